"""Which audit samples are most exposed: a ranking of single records, for those who may take records out.
Numpy and scipy only.

Per sample the answers of the models trained with it stand against those of the models trained without it.
Only answers enter, never scores of a leave-one-out attack, whose value already depends on which half a model
is in. Without a leak a sample's answers do not know its membership, so the test of a sample is sound for any
design that draws membership at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray
from kr_ray.privacy.scores import ScoreError

FAMILY_ERROR = 0.05
"""Of all samples together: the chance that any sample is marked although none leaks."""
SMALLEST_SPREAD = 1e-9
"""Of an answer that does not vary; keeps ratios finite."""


@dataclass(frozen=True)
class Exposure:
    """How much each sample's answers change when it is trained on; all arrays [samples].

    Attributes:
        order: sample indices, the most exposed first, int64.
        shift: mean answer of the models with the sample minus that of those without, in standard deviations
            (one, pooled over all samples and both sides), float64. 0: no difference; its size is an effect,
            not a significance.
        p_value: one-sided, of Student's t-test of the sample's two sides, float64.
        beyond_chance: whether the sample stands out after Holm's correction for all samples, at
            `FAMILY_ERROR`.
        trained, untrained: how many models were trained with and without it, int64.
    """

    order: IndexArray
    shift: FloatArray
    p_value: FloatArray
    beyond_chance: BoolArray
    trained: IndexArray
    untrained: IndexArray


def exposure(answers: FloatArray, member: BoolArray) -> Exposure:
    """Rank samples by how much training on them moves the models' answers.

    Args:
        answers: [models, samples], finite: the logit-scaled confidence in the given label, or any statistic
            that training raises.
        member: [models, samples], every sample in at least two models and out of at least two.

    Raises:
        ScoreError: the shapes differ, or a sample has fewer than two models on a side.
    """
    if answers.ndim != 2 or answers.shape != member.shape:
        raise ScoreError(
            "`answers` and `member` must both be [models, samples], "
            f"but got {answers.shape} and {member.shape}; give one answer per model and sample"
        )
    trained, untrained = member.sum(axis=0), (~member).sum(axis=0)
    if min(trained.min(), untrained.min()) < 2:
        raise ScoreError(
            "`every sample is in >= 2 models and out of >= 2` must hold, "
            f"but got {trained.min()} and {untrained.min()}; add models, or leave those samples out"
        )
    (mean_in, squares_in), (mean_out, squares_out) = _moments(answers, member), _moments(answers, ~member)
    squares, freedom = squares_in + squares_out, trained + untrained - 2
    difference = mean_in - mean_out
    error = np.sqrt(squares / freedom * (1 / trained + 1 / untrained))
    p_value = stats.t.sf(difference / np.maximum(error, SMALLEST_SPREAD), freedom)
    shift = difference / max(float(np.sqrt(squares.sum() / freedom.sum())), SMALLEST_SPREAD)
    return Exposure(
        order=np.lexsort((p_value, -shift)).astype(np.int64),
        shift=shift,
        p_value=p_value,
        beyond_chance=holm_rejections(p_value),
        trained=trained.astype(np.int64),
        untrained=untrained.astype(np.int64),
    )


def _moments(answers: FloatArray, side: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Mean and sum of squared deviations of each sample's answers on one side, [samples]."""
    mean = np.where(side, answers, 0.0).sum(axis=0) / side.sum(axis=0)
    return mean, np.where(side, (answers - mean) ** 2, 0.0).sum(axis=0)


def holm_rejections(p_value: FloatArray, family_error: float = FAMILY_ERROR) -> BoolArray:
    """Hypotheses rejected by Holm's step-down procedure (Holm, Scand. J. Statist. 6, 1979), bool, in the
    order given."""
    order = np.argsort(p_value, kind="stable")
    passed = p_value[order] <= family_error / np.arange(len(order), 0, -1)
    first_failure = len(order) if passed.all() else int(np.argmin(passed))
    rejected = np.zeros(len(order), dtype=np.bool_)
    rejected[order[:first_failure]] = True
    return rejected
