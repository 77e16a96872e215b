"""RMIA, the robust membership inference attack (Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership
Inference Attacks", ICML 2024): a sample is a member if it dominates images that are certainly none.

The likelihood ratio of sample x to reference z is (p(x|model) / p(x)) / (p(z|model) / p(z)), where p(.|model)
is the softmax confidence in the label and p(.) its mean over other models; the score is the share of
references z with a ratio >= gamma. Higher scores mean "more likely a member". Scores are multiples of 1 /
references, so ties are common: many references are needed for a low FPR.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from kr_ray.privacy.arrays import FloatArray
from kr_ray.privacy.leave_one_out import LeaveOneOut, leave_one_out
from kr_ray.privacy.lira import logit_scaled
from kr_ray.privacy.scores import ReferenceScores, SampleScores

GAMMA = 2.0
"""The paper's setting for image models (its ablation finds the attack insensitive to it)."""
OFFLINE_A = 0.3
"""The offline correction `a` that the paper finds for CIFAR-10 models; 0 to 1, 1 = no correction."""
TINY = 1e-300


def rmia_scores(
    samples: SampleScores,
    reference: ReferenceScores,
    *,
    online: bool,
    gamma: float = GAMMA,
    offline_a: float = OFFLINE_A,
) -> FloatArray:
    """Membership scores in [0, 1] by leave-one-out over the models, float64 [models, samples].

    Online, p(x) is the mean of the averages over the models with and over those without x. Offline only the
    latter are known, and p(x) = ((1 + a) p_out(x) + 1 - a) / 2 stands for the missing half (the paper's
    offline approximation). No model saw a reference image z: its mean over all other models is p_out(z),
    corrected likewise offline, taken as it is online. The score of several queries is the mean of their
    scores.

    The averages of x are over the models that `leave_one_out` compares, as many for members as for
    non-members. Over all others the offline average would be of one model fewer, and its inverse larger in
    the mean, where the attacked model is a non-member.

    Args:
        samples: the audit samples, scored on `labels`.
        reference: images that no model saw; the same models in the same order, the same classes.
        gamma: > 0.
        offline_a: in [0, 1].

    Raises:
        ScoreError: another number of models or classes.
        ValueError: gamma or offline_a out of range.
    """
    reference.check_fits(samples)
    if not (gamma > 0 and 0 <= offline_a <= 1):
        raise ValueError(
            f"`gamma > 0, 0 <= offline_a <= 1` must hold, but got {gamma}, "
            f"{offline_a}; use {GAMMA}, {OFFLINE_A}"
        )
    p_x = special.expit(logit_scaled(samples.logits, samples.labels))
    p_z = special.expit(logit_scaled(reference.logits[:, :, None], reference.labels))[..., 0]
    design = leave_one_out(samples.member)
    mean_in, mean_out = _side_means(p_x, design)
    mean_z = np.stack([p_z[design.strangers(model)].mean(axis=0) for model in range(len(p_z))])
    if online:
        mean_x = (mean_in + mean_out) / 2
    else:
        mean_x, mean_z = (((1 + offline_a) * mean + 1 - offline_a) / 2 for mean in (mean_out, mean_z))
    ratio_x, ratio_z = p_x / np.maximum(mean_x, TINY), np.sort(p_z / np.maximum(mean_z, TINY), axis=1)
    ranks = [np.searchsorted(z, x / gamma, side="right") for x, z in zip(ratio_x, ratio_z, strict=True)]
    return np.stack(ranks).mean(axis=-1) / p_z.shape[1]


def _side_means(values: FloatArray, design: LeaveOneOut) -> FloatArray:
    """Mean over the compared models with and over those without each
    sample: float64 [2, models, samples, queries]."""
    means = np.empty((2, *values.shape))
    for model in range(len(values)):
        for side, weight in enumerate(design.sides(model)):
            means[side, model] = np.einsum("ms,msq->sq", weight, values) / weight.sum(axis=0)[:, None]
    return means
