"""What a made image should be: like the teacher's training images by its batch norms, sure of its class, and
new to the student.

Sources: batch-norm statistics and the adversarial term, Yin et al. 2020 (DeepInversion) as Fang et al. 2022
(Fast-Datafree) use them; one-hot, information entropy and activation, Chen et al. 2019 (DAFL).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.config.data_free import DataFreeSection

Moments = tuple[Tensor, Tensor]
"""Mean and biased variance of each channel, float32 [C]."""


class BatchStatistics:
    """Watches what enters the batch norms of a network, within `with`.

    Args:
        network: in evaluation mode, so that its own statistics stay as they are.
        momentum: share of the earlier batches in what is compared.

    Attributes:
        earlier: the mixed statistics of the batches that were kept so far, by layer; empty before the first.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        # By isinstance: the project's own batch norm is a subclass.
        self._norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self._momentum = momentum
        self._now: list[Moments] = []
        self.earlier: list[Moments] = []

    def __enter__(self) -> BatchStatistics:
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in self._norms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (values,) = inputs
        self._now.append((values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=False)))

    @property
    def layers(self) -> int:
        """Batch norms that are watched."""
        return len(self._norms)

    def begin(self) -> None:
        """Forget the last pass."""
        self._now = []

    def loss(self) -> Tensor:
        """Over the layers, the distances of means and of variances from the stored ones; of the pass since
        `begin`, mixed with the earlier batches."""
        distances = [
            (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
            for (mean, var), norm in zip(self._mixed(), self._norms, strict=True)
            if norm.running_mean is not None and norm.running_var is not None
        ]
        return torch.stack(distances).sum()

    def _mixed(self) -> list[Moments]:
        if not self.earlier:
            return self._now
        share = self._momentum
        return [
            (share * old_mean + (1 - share) * mean, share * old_var + (1 - share) * var)
            for (old_mean, old_var), (mean, var) in zip(self.earlier, self._now, strict=True)
        ]

    def keep(self) -> None:
        """Count the last pass among the earlier batches."""
        self.earlier = [(mean.detach(), var.detach()) for mean, var in self._mixed()]


def image_loss(
    section: DataFreeSection,
    *,
    teacher: Tensor,
    features: Tensor,
    labels: Tensor,
    statistics: Tensor | None,
    student: Tensor | None,
) -> Tensor:
    """What the generator and its latents are fitted to, a scalar; a term of weight 0 is not computed.

    Args:
        teacher: logits float32 [N, K], with gradients down to the images.
        features: of the teacher, float32 [N, D].
        labels: int64 [N], as drawn.
        statistics: `BatchStatistics.loss` of the batch; None where it has no weight.
        student: logits float32 [N, K]; None where they have no weight.
    """
    terms: Sequence[Tensor] = [
        *([] if statistics is None else [section.bn_weight * statistics]),
        *([] if student is None else [section.adversarial_weight * adversarial(student, teacher)]),
    ]
    total = torch.stack([teacher.new_zeros(()), *terms]).sum()
    if section.onehot_weight:
        wanted = labels if section.onehot_labels == "drawn" else teacher.argmax(1)
        total = total + section.onehot_weight * F.cross_entropy(teacher, wanted)
    if section.balance_weight:
        total = total + section.balance_weight * negative_entropy(teacher)
    if section.activation_weight:
        total = total - section.activation_weight * features.abs().mean()
    return total


def adversarial(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mean divergence KL(teacher | student) of the images whose class both name alike; on the
    others they disagree enough already. The mean is over the whole batch."""
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    alike = student.argmax(1) == teacher.argmax(1)
    return -(divergence.sum(1) * alike).mean()


def negative_entropy(logits: Tensor) -> Tensor:
    """Of the mean probabilities of a batch, in nats: least, -ln K, where all classes are as frequent."""
    mean = logits.softmax(1).mean(0)
    return torch.special.xlogy(mean, mean).sum()


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher | student) of softened probabilities, times the squared temperature (Hinton et al. 2015,
    section 2)."""
    s, t = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)
