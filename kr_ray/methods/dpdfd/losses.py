"""The losses of DPDFD and its bound on gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 4.0
"""Of decoupled distillation (Zhao et al. 2022, section 4)."""
STABILITY = 1e-6
"""The paper's e: a gradient of zero stays zero."""
Bound = Literal["normalise", "clip"]


def teacher_loss(student: Tensor, teacher: Tensor, others_weight: float) -> Tensor:
    """L_T: decoupled knowledge distillation with the teacher's own decision as target class (section 4.2;
    Zhao et al. 2022).

    Args:
        student, teacher: logits float32 [N, K].
        others_weight: of what the teacher thinks of all other classes (its beta; alpha is 1).

    Returns:
        Loss of each image, float32 [N].
    """
    target = F.one_hot(teacher.argmax(1), teacher.shape[1]).bool()
    s, t = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (student, teacher))
    s2, t2 = (torch.stack([_log_of(p, target), _log_of(p, ~target)], 1) for p in (s, t))
    # The other classes among themselves: the target's logit is taken out.
    s_rest, t_rest = (
        F.log_softmax(logits.masked_fill(target, -1e9) / TEMPERATURE, 1).masked_fill(target, 0.0)
        for logits in (student, teacher)
    )
    of_target = (t2.exp() * (t2 - s2)).sum(1)
    of_others = (t_rest.exp() * (t_rest - s_rest)).masked_fill(target, 0.0).sum(1)
    return TEMPERATURE**2 * (of_target + others_weight * of_others)


def _log_of(log_probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Log of the summed probability of the chosen classes: [N]."""
    return log_probabilities.masked_fill(~chosen, -torch.inf).logsumexp(1)


def output_gradient(student: Tensor, teacher: Tensor, others_weight: float) -> Tensor:
    """g: the gradient of every image's L_T in the student's outputs, float64 [N, K]."""
    outputs = student.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(teacher_loss(outputs, teacher, others_weight).sum(), outputs)
    return gradient.double()


def bounded(gradient: Tensor, norm_bound: float, bound: Bound) -> Tensor:
    """Rows of norm at most C: C g / (|g| + e), or g clipped to C (equation 4; figure 2)."""
    norms = gradient.norm(dim=1, keepdim=True)
    if bound == "normalise":
        return norm_bound * gradient / (norms + STABILITY)
    return gradient * (norm_bound / norms.clamp(min=norm_bound))


def generator_loss(
    logits: Tensor, features: Tensor, cross_entropy: float, alpha: float, beta: float
) -> Tensor:
    """L_G, equation 5: one-hot decisions, balanced classes, high activations, all by the student.

    Two departures from the print. The information entropy is of the batch's *mean* prediction: the text says
    that it measures class balance, and over single images it would contradict the first term. The activation
    norm is *rewarded*: the text says that real images have higher activations, the printed sign would lower
        them (as in DAFL, Chen et al. 2019, both terms).

    Args:
        logits: of the student, float32 [N, K].
        features: before its last layer, float32 [N, F].
    """
    one_hot = F.cross_entropy(logits, logits.argmax(1))
    mean = logits.softmax(1).mean(0)
    balance = (mean * mean.clamp(min=1e-12).log()).sum()
    return cross_entropy * one_hot + alpha * balance - beta * features.norm(dim=1).mean()
