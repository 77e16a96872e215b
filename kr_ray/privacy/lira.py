"""LiRA, the likelihood-ratio attack (Carlini et al., "Membership
Inference Attacks From First Principles", S&P 2022).

For every sample, the models trained with it and those trained without it give two Gaussians of a statistic of
the model's answer; the attack on one model is the likelihood ratio of its own answer. Each model is attacked
with the help of the others (leave-one-out): it never contributes to its own Gaussians. Which others is
decided by `leave_one_out`, so that neither the number of models behind a Gaussian nor the noise of its mean
and variance tells the attacked model's membership: where every sample is in half of N models, N/2 - 1 are
left on either side. Higher scores mean "more likely a member".

Choices where the paper leaves room or its released code differs:
* Several queries (augmentations) are taken as independent Gaussians and their log-likelihoods are averaged,
  as in the released code; the paper's text (section VI-D) fits one multivariate Gaussian, whose covariance 32
  models cannot support.
* Fixed variance (section VI-C, better below about 64 models) pools the spread of every sample about its own
  mean; the released code pools about the grand mean, which mixes in how different the samples are.
* Variances are unbiased (n - 1) and means are means, where the released code takes medians.
* Offline, the score is -log P[N(out) > x] (equation 4's one-sided test). Its
  logarithm does not saturate, so there are no ties.

Plain leave-one-out over all N - 1 others, as in the code of earlier audits, leaks the design: without any
leak of the models the fixed variance gave an AUC of 0.37 with 4 models (the noisier mean on the attacked
model's side) and a variance per sample one of 0.77.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray, LogitArray
from kr_ray.privacy.leave_one_out import leave_one_out

VARIANCE_FLOOR = 1e-12
"""Of a statistic that does not vary at all; keeps the likelihood finite."""


def logit_scaled(logits: LogitArray, labels: IndexArray) -> FloatArray:
    """log(p_y / (1 - p_y)) of the softmax confidence (section VI-A), float64 [models, samples, queries].

    Equal to z_y - logsumexp of the other logits, which needs no
    probability and so neither overflows nor saturates.

    Args:
        logits: [models, samples, queries, classes].
        labels: y, [samples].
    """
    return _margin(logits, labels, lambda others: special.logsumexp(others, axis=-1))


def hinge(logits: LogitArray, labels: IndexArray) -> FloatArray:
    """z_y - the largest other logit (section VI-A), float64 [models,
    samples, queries]; arguments as `logit_scaled`."""
    return _margin(logits, labels, lambda others: others.max(axis=-1))


def _margin(logits: LogitArray, labels: IndexArray, rival: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """z_y minus what `rival` makes of the other logits; model by model, since
    double precision copies of all take much memory."""
    result = np.empty(logits.shape[:3])
    index = np.broadcast_to(labels[:, None, None], (*logits.shape[1:3], 1))
    for model, values in enumerate(logits):
        others = values.astype(np.float64)
        true = np.take_along_axis(others, index, axis=-1)[..., 0]
        np.put_along_axis(others, index, -np.inf, axis=-1)
        result[model] = true - rival(others)
    return result


@dataclass(frozen=True)
class Side:
    """What the compared models of one side answer, seen from each attacked model.

    Attributes:
        mean: float64 [models, samples, queries].
        squares: sum of squares about that mean, float64 [models, samples, queries].
        count: number of compared models, float64 [models, samples, 1].
        spread: mean variance of all other models' answers, whatever their side; float64 [models, 1, queries].
    """

    mean: FloatArray
    squares: FloatArray
    count: FloatArray
    spread: FloatArray

    def variance(self, per_sample: bool) -> FloatArray:
        """Unbiased, float64, broadcasts to [models, samples, queries]; see `lira_scores`."""
        free = (self.count - 1).sum(axis=1, keepdims=True)
        pooled = np.where(
            free > 0, self.squares.sum(axis=1, keepdims=True) / np.maximum(free, 1), self.spread
        )
        if per_sample:
            pooled = np.where(self.count > 1, self.squares / np.maximum(self.count - 1, 1), pooled)
        return np.maximum(pooled, VARIANCE_FLOOR)


@dataclass(frozen=True)
class Sides:
    """The statistic beside what it is compared with."""

    statistic: FloatArray
    inside: Side
    outside: Side

    def scores(self, *, online: bool, per_sample_variance: bool) -> FloatArray:
        """Membership scores, float64 [models, samples]; arguments as `lira_scores`."""
        variance = self.outside.variance(per_sample_variance)
        centred = (self.statistic - self.outside.mean) / np.sqrt(variance)
        if not online:
            return -special.log_ndtr(-centred).mean(axis=-1)
        inside = self.inside.variance(per_sample_variance)
        ratio = (
            np.log(variance / inside) + centred**2 - (self.statistic - self.inside.mean) ** 2 / inside
        ) / 2
        return ratio.mean(axis=-1)


def lira_scores(
    statistic: FloatArray, member: BoolArray, *, online: bool, per_sample_variance: bool
) -> FloatArray:
    """Membership scores by leave-one-out LiRA, float64 [models, samples]; finite, higher = member.

    Args:
        statistic: [models, samples, queries], finite: `logit_scaled`, `hinge`, or one's own.
        member: [models, samples]; every sample in >= 2 and out of >= 2 models. Pool
            only pairs that `leave_one_out` calls judged.
        online: compare the models with and without the sample; else only those without it (section VI-E).
        per_sample_variance: one variance per sample and query, else one per query over all samples. Where a
            side has fewer than two compared models, its variance is the pooled one in either case; where it
            has so for every sample (4 models), the mean variance of all other models' answers, both sides in
            one.
    """
    return compared_sides(statistic, member).scores(online=online, per_sample_variance=per_sample_variance)


def compared_sides(statistic: FloatArray, member: BoolArray) -> Sides:
    """Mean and squares of both sides for every attacked model; all variants of the attack start from them."""
    design = leave_one_out(member)
    models, samples, queries = statistic.shape
    mean, squares = np.empty((2, models, samples, queries)), np.empty((2, models, samples, queries))
    count, spread = np.empty((2, models, samples, 1)), np.empty((models, 1, queries))
    for model in range(models):
        for side, weight in enumerate(design.sides(model)):
            count[side, model, :, 0] = weight.sum(axis=0)
            mean[side, model] = np.einsum("ms,msq->sq", weight, statistic) / count[side, model]
            squares[side, model] = np.einsum("ms,msq->sq", weight, (statistic - mean[side, model]) ** 2)
        spread[model] = np.delete(statistic, model, axis=0).var(axis=0, ddof=1).mean(axis=0)
    inside, outside = (Side(mean[side], squares[side], count[side], spread) for side in (0, 1))
    return Sides(statistic, inside, outside)
