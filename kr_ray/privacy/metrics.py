"""What an attack's scores say: AUC, accuracy over privacy, the ROC curve. Pure functions of numpy arrays.

Scores are any real numbers in which a higher value means "more likely a member" (a training image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk_metrics

CHANCE_AUC = 0.5


def auc(member_scores: ArrayLike, non_member_scores: ArrayLike) -> float:
    """Area under the ROC curve, in [0, 1]: how often a random member
    outscores a random non-member, ties counting half.

    Args:
        member_scores: float [M], M >= 1, finite.
        non_member_scores: float [N], N >= 1, finite.

    Raises:
        ValueError: an array is empty, not one-dimensional or not finite.
    """
    truth, scores = _stack(member_scores, non_member_scores)
    return float(sk_metrics.roc_auc_score(truth, scores))


def clamped_auc(member_scores: ArrayLike, non_member_scores: ArrayLike) -> float:
    """`max(auc, 0.5)`, in [0.5, 1]: the form in which Table 2 of Knowledge
    Recycling prints AUC_MIA (its least value is 50.00)."""
    return max(auc(member_scores, non_member_scores), CHANCE_AUC)


def auc_standard_error(auc: float, members: int, non_members: int) -> float:
    """Standard error of an AUC over a finite number of images (Hanley and McNeil, Radiology 143, 1982).

    Covers which images were drawn, not how the attacked model would differ if it were trained again.

    Args:
        auc: as measured (unclamped), in [0, 1].
        members, non_members: number of scores on either side, each >= 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (0.0 <= auc <= 1.0 and members >= 1 and non_members >= 1):
        raise ValueError(
            f"`0 <= auc <= 1, members >= 1, non_members >= 1` must hold, but got auc={auc}, "
            f"members={members}, non_members={non_members}; attack at least one image of either kind"
        )
    both_above = auc / (2.0 - auc)  # P(two members outscore one non-member), exponential scores
    both_below = 2.0 * auc**2 / (1.0 + auc)  # P(one member outscores two non-members)
    variance = (
        auc * (1.0 - auc) + (members - 1) * (both_above - auc**2) + (non_members - 1) * (both_below - auc**2)
    )
    return math.sqrt(max(variance, 0.0) / (members * non_members))


def accuracy_over_privacy(accuracy: float, auc: float) -> float:
    """AOP = accuracy / (2 max(auc, 0.5))^2, in [0, 1] (Lomurno et al.,
    "Discriminative Adversarial Privacy", 2023).

    At chance level it equals the accuracy; against a perfect attack it is a quarter of it. It reproduces all
    18 AOP cells of Knowledge Recycling's Table 2 within 0.02 percentage points, which is what their inputs'
    rounding allows. The mean gain of those cells is 8.73 points, where the table prints 7.72.

    Args:
        accuracy: share of correct answers (or CAS), in [0, 1].
        auc: AUC of the attack, in [0, 1], clamped or not.

    Raises:
        ValueError: an argument is outside [0, 1].
    """
    for name, value in (("accuracy", accuracy), ("auc", auc)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"`0 <= {name} <= 1` must hold, but got {name}={value}; give a fraction, not per cent"
            )
    return accuracy / (2.0 * max(auc, CHANCE_AUC)) ** 2


@dataclass(frozen=True)
class RocCurve:
    """Vertices of a ROC curve from (0, 0) to (1, 1).

    Attributes:
        fpr: share of non-members called members, float64 [P], ascending in [0, 1].
        tpr: share of members called members, float64 [P], ascending in [0, 1].
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]


def roc_curve(member_scores: ArrayLike, non_member_scores: ArrayLike, max_points: int = 200) -> RocCurve:
    """The ROC curve, thinned for drawing to at most `max_points` of its own vertices, evenly along the curve.

    Raises:
        ValueError: as `auc`, or `max_points < 2`.
    """
    if max_points < 2:
        raise ValueError(
            f"`max_points >= 2` must hold, but got max_points={max_points}; a curve has two ends"
        )
    truth, scores = _stack(member_scores, non_member_scores)
    fpr, tpr, _ = sk_metrics.roc_curve(truth, scores)
    if len(fpr) > max_points:
        # fpr + tpr grows monotonically from 0 to 2: equal steps of it spread
        # the points over flat and steep parts alike.
        along = fpr + tpr
        keep = np.unique(
            np.searchsorted(along, np.linspace(0.0, along[-1], max_points)).clip(max=len(fpr) - 1)
        )
        keep[0], keep[-1] = 0, len(fpr) - 1
        fpr, tpr = fpr[keep], tpr[keep]
    return RocCurve(fpr.astype(np.float64), tpr.astype(np.float64))


def _stack(
    member_scores: ArrayLike, non_member_scores: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    parts = []
    for name, values in (("member_scores", member_scores), ("non_member_scores", non_member_scores)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(
                f"`{name}` must be a non-empty 1-D array, but got shape "
                f"{array.shape}; give one score per image"
            )
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise ValueError(
                f"`{name}` must be finite, but got {bad} of {array.size} "
                "nan or inf; check the model's outputs"
            )
        parts.append(array)
    truth = np.repeat(np.array([1, 0], dtype=np.int64), [parts[0].size, parts[1].size])
    return truth, np.concatenate(parts)
