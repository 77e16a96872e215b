"""Lower bounds of epsilon that an attack's success proves at a stated
confidence: what was trained is *not* more private.

A bound says nothing about the opposite direction: zero is no guarantee. Thresholds are chosen on samples that
the bound is not computed from. What the confidence rests on:
* the pairs are taken as independent, as in all audits that pool canaries (Jagielski et al. 2020, Nasr et al.
  2023), though pairs of one model share its training and pairs of one sample are attacked with each other's
  help. On scores that know nothing the latter doubles the variance of a likelihood ratio's difference; the
  bound stays above it, for it takes both rates at their far end (`tests/test_null_audits.py` counts false
  bounds);
* the attack on one model may know the other models' membership (LiRA, matched shadows). Where every sample is
  in exactly half of the models that knowledge would settle the attacked model's own: the attacks here see the
  others only through `leave_one_out`, which takes away just that, or (matched shadows) never on the sample
  that they attack;
* the attack was chosen before its figures were seen. The largest of many bounds is not a
  bound at the same confidence: `simultaneous_epsilon` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray
from kr_ray.privacy.rates import CONFIDENCE, Pairs, clopper_pearson, pair_scores, split_samples
from kr_ray.runs.figures import Epsilon

DELTA = 1e-5
THRESHOLDS = 60
MAX_EPSILON = 100.0
FAIR = (0.4, 0.6)
"""Share of members within which membership may pass for the toss of a fair coin."""


def epsilon_bounds(
    scores: FloatArray,
    member: BoolArray,
    seed: int,
    delta: float = DELTA,
    *,
    judged: BoolArray | None = None,
    confidence: float = CONFIDENCE,
) -> Epsilon:
    """Both lower bounds, each at the confidence; every rate in them
    takes its end of error (1 - confidence) / 2.

    `clopper_pearson`: from the pairs of all models; one half of the samples chooses the threshold and its
    side, the other half gives the bound. `one_run`: from the first model's samples alone; its guesses on
    either half of them follow thresholds that were chosen on the other models' scores of the other half (with
    a single model: half of its samples choose, the others are guessed). Null where a side is missing, or
    (`one_run`) where far more or fewer than half are members.

    Args:
        scores, member: [models, samples]; higher = member.
        delta: of (epsilon, delta)-DP, in [0, 1).
        judged: the pairs that count, bool [models, samples]; all by default.
    """
    counted = np.ones_like(member) if judged is None else judged
    halves = split_samples(scores.shape[1], seed)
    selection, tested = (_pairs(scores[:, half], member[:, half], counted[:, half]) for half in halves)
    return Epsilon(
        clopper_pearson=_pooled_bound(selection, tested, delta, confidence),
        one_run=_one_run_bound(scores, member, counted, halves, delta, confidence),
        delta=delta,
        confidence=confidence,
    )


@dataclass(frozen=True)
class Largest:
    """The largest bound of several attacks.

    Attributes:
        epsilon: None where no bound can be computed.
        attack: index of the one that gives it.
    """

    epsilon: float | None
    attack: int | None


def simultaneous_epsilon(
    attacks: Sequence[tuple[FloatArray, BoolArray, BoolArray]], seed: int, delta: float = DELTA
) -> Largest:
    """The largest bound of several attacks, holding at 95 % although it is
    the largest (Bonferroni over both bounds of each).

    Args:
        attacks: scores, member, judged of each, as `epsilon_bounds` takes them; one or more.
    """
    each = 1 - (1 - CONFIDENCE) / (2 * len(attacks))
    best, where = None, None
    for index, (scores, member, judged) in enumerate(attacks):
        found = epsilon_bounds(scores, member, seed, delta, judged=judged, confidence=each)
        for value in (found.clopper_pearson, found.one_run):
            if value is not None and (best is None or value > best):
                best, where = value, index
    return Largest(best, where)


def _pairs(scores: FloatArray, member: BoolArray, counted: BoolArray) -> Pairs | None:
    inside = member[counted]
    return pair_scores(scores, member, counted) if inside.any() and not inside.all() else None


def clopper_pearson_epsilon(
    hits: ArrayLike,
    members: ArrayLike,
    false_hits: ArrayLike,
    non_members: ArrayLike,
    delta: float,
    confidence: float = CONFIDENCE,
) -> FloatArray:
    """log((TPR - delta) / FPR), at least 0 (Kairouz, Oh and Viswanath 2015), from counts at fixed thresholds.

    Each rate takes its Clopper-Pearson end of error (1 - confidence) / 2 (Jagielski, Ullman and Oprea 2020).
    """
    tpr_low, _ = clopper_pearson(hits, members, confidence)
    _, fpr_high = clopper_pearson(false_hits, non_members, confidence)
    return np.log(np.maximum((tpr_low - delta) / fpr_high, 1.0))


def _thresholds(pairs: Pairs) -> FloatArray:
    """Candidates: dense in both tails of the scores."""
    values = np.sort(np.concatenate([pairs.members, pairs.non_members]))
    steps = np.unique(np.round(np.geomspace(1, len(values) / 2, THRESHOLDS)).astype(int))
    return np.unique(np.concatenate([values[-steps], values[steps - 1]]))


def _pooled_bound(
    selection: Pairs | None, tested: Pairs | None, delta: float, confidence: float
) -> float | None:
    if selection is None or tested is None:
        return None

    def bounds(pairs: Pairs, thresholds: FloatArray) -> FloatArray:
        n_in, n_out = len(pairs.members), len(pairs.non_members)
        hits, wrong = pairs.members_above(thresholds), pairs.non_members_above(thresholds)
        above = clopper_pearson_epsilon(hits, n_in, wrong, n_out, delta, confidence)
        # Below the threshold the roles change: the attack then says "non-member".
        below = clopper_pearson_epsilon(n_out - wrong, n_out, n_in - hits, n_in, delta, confidence)
        return np.stack([above, below])

    thresholds = _thresholds(selection)
    side, chosen = divmod(int(np.argmax(bounds(selection, thresholds))), len(thresholds))
    return float(bounds(tested, thresholds[[chosen]])[side, 0])


# --- one training run ---------------------------------------------------------------------------------------


def one_run_p_value(samples: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Probability of so many correct guesses under (epsilon, delta)-DP, at most 1 (Steinke, Nasr and
    Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, main theorem and its listing).

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


def one_run_epsilon(
    samples: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that the guesses reject at the confidence, in [0, 100]; 0 if they reject none."""
    low, high = 0.0, MAX_EPSILON
    if one_run_p_value(samples, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        rejected = one_run_p_value(samples, guesses, correct, middle, delta) <= 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return low


def _one_run_bound(
    scores: FloatArray,
    member: BoolArray,
    counted: BoolArray,
    halves: tuple[IndexArray, IndexArray],
    delta: float,
    confidence: float,
) -> float | None:
    """Thresholds never see the samples that they judge: other models' scores of the same samples would know
    the first model's membership twice over, by the design and by having been attacked with its help."""
    choosers = slice(1, None) if len(scores) > 1 else slice(None)
    rounds = (halves, halves[::-1]) if len(scores) > 1 else (halves,)
    samples = sum(int(counted[0, judged].sum()) for _, judged in rounds)
    inside = sum(int(member[0, judged][counted[0, judged]].sum()) for _, judged in rounds)
    if not samples or not FAIR[0] <= inside / samples <= FAIR[1]:
        return None
    guesses = correct = 0
    for chosen_on, judged in rounds:
        selection = _pairs(
            scores[choosers, chosen_on], member[choosers, chosen_on], counted[choosers, chosen_on]
        )
        if selection is None:
            return None
        upper, lower = _guess_thresholds(selection, samples, confidence)
        rows = judged[counted[0, judged]]
        values, truth = scores[0, rows], member[0, rows]
        guesses += int((values > upper).sum() + (values <= lower).sum())
        correct += int((truth & (values > upper)).sum() + (~truth & (values <= lower)).sum())
    return one_run_epsilon(samples, guesses, correct, delta, (1 + confidence) / 2)


def _guess_thresholds(pairs: Pairs, samples: int, confidence: float) -> tuple[float, float]:
    """Guess "member" above the first, "non-member" at or below the second:
    the pair with the best bound for `samples`."""
    thresholds = np.concatenate([[-np.inf], _thresholds(pairs), [np.inf]])
    scale = samples / (len(pairs.members) + len(pairs.non_members))
    hits, wrong = scale * pairs.members_above(thresholds), scale * pairs.non_members_above(thresholds)
    misses, rejected = scale * len(pairs.members) - hits, scale * len(pairs.non_members) - wrong
    correct = hits[:, None] + rejected[None, :]
    guesses = correct + wrong[:, None] + misses[None, :]
    possible = (thresholds[:, None] >= thresholds[None, :]) & (correct > 0)
    # At delta 0 the bound is the logit of Clopper-Pearson's lower end, so this end may be maximised.
    low = np.zeros(possible.shape)
    low[possible] = special.betaincinv(
        correct[possible], (guesses - correct)[possible] + 1, (1 - confidence) / 2
    )
    upper, lower = np.unravel_index(int(np.argmax(low)), low.shape)
    return float(thresholds[upper]), float(thresholds[lower])
