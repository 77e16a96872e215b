"""LiRA, the likelihood-ratio attack (Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022).

For every sample, the models trained with it and those trained without it give two Gaussians of a statistic of the model's
answer; the attack on one model is the likelihood ratio of its own answer. With N models each is attacked by the other N - 1
(leave-one-out): the attacked model never contributes to its own Gaussians. Higher scores mean "more likely a member".

Choices where the paper leaves room or its released code differs:
* Several queries (augmentations) are taken as independent Gaussians and their log-likelihoods are averaged, as in the released
  code; the paper's text (section VI-D) fits one multivariate Gaussian, whose covariance 32 models cannot support.
* Fixed variance (section VI-C, better below about 64 models) pools the spread of every sample about its own mean; the released
  code pools about the grand mean, which mixes in how different the samples are.
* Variances are unbiased (n - 1) and means are means, where the released code takes medians.
* Offline, the score is -log P[N(out) > x] (equation 4's one-sided test). Its logarithm does not saturate, so there are no ties.

When each sample is in exactly half of an even number of models, leaving out the attacked model leaves one Gaussian with one
model fewer than the other. Without any leak, its noisier mean makes members score *lower* by about (1/n_in - 1/n_out): with few
models an AUC slightly below 0.5 is this bias of the estimator, and means "no evidence".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from kr_ray.privacy.scores import BoolArray, FloatArray, IndexArray, LogitArray

VARIANCE_FLOOR = 1e-12
"""Of a statistic that does not vary at all; keeps the likelihood finite."""
ILL_CONDITIONED = 1e-4
"""A downdated sum of squares below this share of the whole has lost digits and is computed again."""


def logit_scaled(logits: LogitArray, labels: IndexArray) -> FloatArray:
    """log(p_y / (1 - p_y)) of the softmax confidence (section VI-A), float64 [models, samples, queries].

    Equal to z_y - logsumexp of the other logits, which needs no probability and so neither overflows nor saturates.

    Args:
        logits: [models, samples, queries, classes].
        labels: y, [samples].
    """
    return _margin(logits, labels, lambda others: special.logsumexp(others, axis=-1))


def hinge(logits: LogitArray, labels: IndexArray) -> FloatArray:
    """z_y - the largest other logit (section VI-A), float64 [models, samples, queries]; arguments as `logit_scaled`."""
    return _margin(logits, labels, lambda others: others.max(axis=-1))


def _margin(logits: LogitArray, labels: IndexArray, rival: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """z_y minus what `rival` makes of the other logits; model by model, since double precision copies of all take much memory."""
    result = np.empty(logits.shape[:3])
    index = np.broadcast_to(labels[:, None, None], (*logits.shape[1:3], 1))
    for model, values in enumerate(logits):
        others = values.astype(np.float64)
        true = np.take_along_axis(others, index, axis=-1)[..., 0]
        np.put_along_axis(others, index, -np.inf, axis=-1)
        result[model] = true - rival(others)
    return result


class Gaussians(NamedTuple):
    """Mean and unbiased variance of one side, seen from each attacked model; float64 [models, samples, queries]."""

    mean: FloatArray
    variance: FloatArray


def lira_scores(statistic: FloatArray, member: BoolArray, *, online: bool, per_sample_variance: bool) -> FloatArray:
    """Membership scores by leave-one-out LiRA, float64 [models, samples]; finite, higher = member.

    Args:
        statistic: [models, samples, queries], finite: `logit_scaled`, `hinge`, or one's own.
        member: [models, samples]; every sample in >= 2 and out of >= 2 models.
        online: compare the models with and without the sample; else only those without it (section VI-E).
        per_sample_variance: one variance per sample and query, else one per query over all samples. Where a side has fewer than
            two other models, its variance is the pooled one in either case.
    """
    out = _leave_one_out(statistic, ~member, per_sample_variance)
    centred = (statistic - out.mean) / np.sqrt(out.variance)
    if not online:
        return -special.log_ndtr(-centred).mean(axis=-1)
    inside = _leave_one_out(statistic, member, per_sample_variance)
    ratio = (np.log(out.variance / inside.variance) + centred**2 - (statistic - inside.mean) ** 2 / inside.variance) / 2
    return ratio.mean(axis=-1)


def _leave_one_out(statistic: FloatArray, side: BoolArray, per_sample_variance: bool) -> Gaussians:
    """The Gaussians of the models on one side of each sample, without the attacked one."""
    weight = side[..., None].astype(np.float64)
    count = weight.sum(axis=0)
    mean = (weight * statistic).sum(axis=0) / count
    deviation = weight * (statistic - mean)  # zero for models of the other side, so that they take nothing away below
    squares = (deviation**2).sum(axis=0)
    left = count - weight
    # Welford's update run backwards: removing x moves the mean by (mean - x) / (n - 1) and takes n / (n - 1) (x - mean)^2.
    loo_mean = mean - deviation / left
    loo_squares = squares - deviation**2 * (count / left)
    for model, sample, query in np.argwhere(loo_squares < ILL_CONDITIONED * squares):
        others = side[:, sample].copy()
        others[model] = False
        values = statistic[others, sample, query]
        loo_squares[model, sample, query] = ((values - values.mean()) ** 2).sum()
    pooled = loo_squares.sum(axis=1, keepdims=True) / np.maximum((left - 1).sum(axis=1, keepdims=True), 1)
    variance = np.broadcast_to(pooled, loo_squares.shape)
    if per_sample_variance:
        variance = np.where(left > 1, loo_squares / np.maximum(left - 1, 1), variance)
    return Gaussians(loo_mean, np.maximum(variance, VARIANCE_FLOOR))
