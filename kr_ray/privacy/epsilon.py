"""Lower bounds of epsilon that an attack's success proves at a stated confidence: what was trained is *not* more private.

A bound says nothing about the opposite direction: zero is no guarantee. Thresholds are chosen on scores that the bound is not
computed from. What the confidence rests on:
* the pairs are taken as independent, as in all audits that pool canaries (Jagielski et al. 2020, Nasr et al. 2023), though pairs of
  one model share its training;
* the attack on one model may know the other models' membership (LiRA, matched shadows). Where every sample is in exactly half of the
  models that knowledge would settle the attacked model's own; the attacks here do not use it, beyond how many models each
  Gaussian is fitted on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from kr_ray.privacy.rates import CONFIDENCE, Pairs, clopper_pearson, pair_scores, split_samples
from kr_ray.privacy.scores import BoolArray, FloatArray

DELTA = 1e-5
THRESHOLDS = 60
MAX_EPSILON = 100.0
FAIR = (0.4, 0.6)
"""Share of members within which membership may pass for the toss of a fair coin."""


def epsilon_bounds(scores: FloatArray, member: BoolArray, seed: int, delta: float = DELTA) -> dict[str, Any]:
    """Both lower bounds at 95 % confidence.

    `clopper_pearson`: from the pairs of all models; one half of the samples chooses the threshold and its side, the other half
    gives the bound. `one_run`: from the first model's samples alone, thresholds chosen on the other models (with a single
    model: on one half of its samples). Null where a side is missing, or (`one_run`) where far more or fewer than half are members.

    Args:
        scores, member: [models, samples]; higher = member.
        delta: of (epsilon, delta)-DP, in [0, 1).
    """
    models, samples = scores.shape
    halves = split_samples(samples, seed)
    selection, judged = ((scores[:, half], member[:, half]) for half in halves)
    one_selection, one_judged = ((scores[1:], member[1:]), (scores[:1], member[:1])) if models > 1 else (selection, judged)
    return {
        "clopper_pearson": _pooled_bound(_pairs(*selection), _pairs(*judged), delta),
        "one_run": _one_run_bound(_pairs(*one_selection), _pairs(*one_judged), delta),
        "delta": delta,
        "confidence": CONFIDENCE,
    }


def _pairs(scores: FloatArray, member: BoolArray) -> Pairs | None:
    return pair_scores(scores, member) if member.any() and not member.all() else None


def clopper_pearson_epsilon(
    hits: ArrayLike, members: ArrayLike, false_hits: ArrayLike, non_members: ArrayLike, delta: float
) -> FloatArray:
    """log((TPR - delta) / FPR), at least 0 (Kairouz, Oh and Viswanath 2015), from counts at fixed thresholds.

    Each rate takes its Clopper-Pearson end of error (1 - confidence) / 2 (Jagielski, Ullman and Oprea 2020).
    """
    tpr_low, fpr_high = clopper_pearson(hits, members)[0], clopper_pearson(false_hits, non_members)[1]
    return np.log(np.maximum((tpr_low - delta) / fpr_high, 1.0))


def _thresholds(pairs: Pairs) -> FloatArray:
    """Candidates: dense in both tails of the scores."""
    values = np.sort(np.concatenate([pairs.members, pairs.non_members]))
    steps = np.unique(np.round(np.geomspace(1, len(values) / 2, THRESHOLDS)).astype(int))
    return np.unique(np.concatenate([values[-steps], values[steps - 1]]))


def _pooled_bound(selection: Pairs | None, judged: Pairs | None, delta: float) -> float | None:
    if selection is None or judged is None:
        return None

    def bounds(pairs: Pairs, thresholds: FloatArray) -> FloatArray:
        n_in, n_out = len(pairs.members), len(pairs.non_members)
        hits, wrong = pairs.members_above(thresholds), pairs.non_members_above(thresholds)
        above = clopper_pearson_epsilon(hits, n_in, wrong, n_out, delta)
        # Below the threshold the roles change: the attack then says "non-member".
        below = clopper_pearson_epsilon(n_out - wrong, n_out, n_in - hits, n_in, delta)
        return np.stack([above, below])

    thresholds = _thresholds(selection)
    side, chosen = divmod(int(np.argmax(bounds(selection, thresholds))), len(thresholds))
    return float(bounds(judged, thresholds[[chosen]])[side, 0])


# --- one training run ------------------------------------------------------------------------------------------------


def one_run_p_value(samples: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Probability of so many correct guesses under (epsilon, delta)-DP, at most 1 (Steinke, Nasr and Jagielski, "Privacy
    Auditing with One (1) Training Run", NeurIPS 2023, main theorem and its listing).

    Args:
        samples: audit samples of the run, each a member with probability 1/2, independently.
        guesses: for how many of them the attack guessed (it may abstain).
        correct: how many of the guesses were right.
    """
    rate = float(special.expit(epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, rate))
    if delta == 0 or correct == 0:
        return min(tail, 1.0)
    just_below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
    slope = float((just_below / np.arange(1, correct + 1)).max())
    return min(tail + 2 * samples * delta * slope, 1.0)


def one_run_epsilon(samples: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that the guesses reject at the confidence, in [0, 100]; 0 if they reject none."""
    low, high = 0.0, MAX_EPSILON
    if one_run_p_value(samples, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        rejected = one_run_p_value(samples, guesses, correct, middle, delta) <= 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return low


def _one_run_bound(selection: Pairs | None, judged: Pairs | None, delta: float) -> float | None:
    if selection is None or judged is None:
        return None
    samples = len(judged.members) + len(judged.non_members)
    if not FAIR[0] <= len(judged.members) / samples <= FAIR[1]:
        return None
    upper, lower = _guess_thresholds(selection, samples)
    n_in, n_out = len(judged.members), len(judged.non_members)
    hits, wrong = int(judged.members_above(upper)), int(judged.non_members_above(upper))
    misses, rejected = n_in - int(judged.members_above(lower)), n_out - int(judged.non_members_above(lower))
    return one_run_epsilon(samples, hits + wrong + misses + rejected, hits + rejected, delta)


def _guess_thresholds(pairs: Pairs, samples: int) -> tuple[float, float]:
    """Guess "member" above the first, "non-member" at or below the second: the pair with the best bound for `samples`."""
    thresholds = np.concatenate([[-np.inf], _thresholds(pairs), [np.inf]])
    scale = samples / (len(pairs.members) + len(pairs.non_members))
    hits, wrong = scale * pairs.members_above(thresholds), scale * pairs.non_members_above(thresholds)
    misses, rejected = scale * len(pairs.members) - hits, scale * len(pairs.non_members) - wrong
    correct = hits[:, None] + rejected[None, :]
    guesses = correct + wrong[:, None] + misses[None, :]
    upper_is_above = thresholds[:, None] >= thresholds[None, :]
    # At delta 0 the bound is the logit of Clopper-Pearson's lower end, so this end may be maximised.
    low = np.where(
        upper_is_above & (correct > 0), special.betaincinv(np.maximum(correct, 1e-9), guesses - correct + 1, 1 - CONFIDENCE), 0
    )
    upper, lower = np.unravel_index(int(np.argmax(low)), low.shape)
    return float(thresholds[upper]), float(thresholds[lower])
