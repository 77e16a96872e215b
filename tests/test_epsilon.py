"""Lower bounds of epsilon against exact arithmetic and against mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from kr_ray.privacy.epsilon import (
    clopper_pearson_epsilon,
    epsilon_bounds,
    one_run_epsilon,
    one_run_p_value,
    simultaneous_epsilon,
)


@pytest.mark.parametrize(
    ("guesses", "correct", "epsilon", "delta"),
    [(50, 40, 1.0, 1e-3), (100, 100, 3.0, 1e-5), (30, 10, 0.0, 0.01)],
)
def test_one_run_p_value_equals_a_plain_loop(
    guesses: int, correct: int, epsilon: float, delta: float
) -> None:
    """Theorem 5.2: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, W
    binomial; in exact coefficients, term by term."""
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(guesses, k) * rate**k * (1 - rate) ** (guesses - k) for k in range(guesses + 1)]
    slope = max(sum(mass[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = min(1.0, sum(mass[correct:]) + 2 * 120 * delta * slope)
    assert one_run_p_value(120, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 100), (200, 150), (40, 21)])
def test_one_run_epsilon_without_delta_is_the_logit_of_clopper_pearson(guesses: int, correct: int) -> None:
    low = stats.beta.ppf(0.05, correct, guesses - correct + 1)
    assert one_run_epsilon(200, guesses, correct, 0.0) == pytest.approx(
        max(0.0, special.logit(low)), abs=1e-6
    )


def test_delta_and_wrong_guesses_only_lower_the_bound() -> None:
    bounds = [one_run_epsilon(1000, 300, 290, delta) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1]
    assert one_run_epsilon(1000, 300, 140, 0.0) == 0.0


def test_pooled_bound_from_counts() -> None:
    tpr_low = stats.beta.ppf(0.025, 500, 501)
    fpr_high = stats.beta.ppf(0.975, 1, 1000)
    assert clopper_pearson_epsilon(500, 1000, 0, 1000, 1e-5) == pytest.approx(
        math.log((tpr_low - 1e-5) / fpr_high)
    )
    assert clopper_pearson_epsilon(5, 1000, 5, 1000, 1e-5) == 0.0


def randomised_response(
    rng: np.random.Generator, models: int, samples: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Every membership bit is told truly with probability e^eps / (1 + e^eps): exactly (epsilon, 0)-DP."""
    member = rng.random((models, samples)) < 0.5
    truly = rng.random((models, samples)) < special.expit(epsilon)
    return np.where(truly, member, ~member).astype(np.float64), member


@pytest.mark.parametrize(("models", "epsilon"), [(1, 0.0), (1, 1.0), (1, 3.0), (8, 1.0)])
def test_bounds_exceed_the_epsilon_of_randomised_response_in_at_most_5_percent(
    models: int, epsilon: float
) -> None:
    rng = np.random.default_rng(0)
    exceeded = {"clopper_pearson": 0, "one_run": 0}
    best = dict.fromkeys(exceeded, 0.0)
    audits = 1000
    for audit in range(audits):
        found = epsilon_bounds(
            *randomised_response(rng, models, 400 // models, epsilon), seed=audit, delta=0.0
        )
        for name in exceeded:
            if getattr(found, name) is None:  # too far from half members, by chance
                continue
            exceeded[name] += getattr(found, name) > epsilon
            best[name] = max(best[name], getattr(found, name))
    # 5 % of 1,000 and three standard deviations of the count.
    assert max(exceeded.values()) <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    assert epsilon == 0 or min(best.values()) > 0.5 * epsilon, (
        "a bound that is always near zero proves nothing"
    )


def test_gaussian_mechanism_is_bounded_by_its_privacy_curve() -> None:
    """A shift of mu at unit noise is (epsilon, delta)-DP with delta = Phi(mu/2 -
    eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang)."""
    shift, delta, rng = 2.0, 1e-5, np.random.default_rng(0)
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        curve = stats.norm.cdf(shift / 2 - middle / shift) - math.exp(middle) * stats.norm.cdf(
            -shift / 2 - middle / shift
        )
        low, high = (middle, high) if curve > delta else (low, middle)
    member = rng.random((8, 2000)) < 0.5
    found = epsilon_bounds(rng.normal(size=(8, 2000)) + shift * member, member, seed=0, delta=delta)
    assert 2.0 < found.clopper_pearson < low and 1.5 < found.one_run < low


def test_bounds_that_cannot_be_computed_are_null() -> None:
    few = epsilon_bounds(np.arange(4.0)[None], np.array([[True, False, False, False]]), seed=0)
    assert few.one_run is None and few.clopper_pearson is None
    uneven = epsilon_bounds(np.random.default_rng(0).random((1, 1000)), (np.arange(1000) < 100)[None], seed=0)
    assert uneven.one_run is None and uneven.clopper_pearson == 0.0


def test_the_largest_bound_of_many_attacks_is_corrected_for_their_number() -> None:
    rng = np.random.default_rng(0)
    scores, member = randomised_response(rng, 1, 4000, 3.0)
    noise = [(rng.random((1, 4000)), member, np.ones_like(member)) for _ in range(9)]
    found = simultaneous_epsilon([*noise, (scores, member, np.ones_like(member))], seed=0)
    assert found.attack == 9
    each = epsilon_bounds(scores, member, seed=0, confidence=1 - 0.05 / 20)
    assert found.epsilon == max(each.clopper_pearson, each.one_run)
    assert 2.0 < found.epsilon < 3.0


def test_of_many_attacks_that_know_nothing_one_has_a_bound_too_often_and_the_corrected_one_not() -> None:
    rng = np.random.default_rng(0)
    single = corrected = 0
    for audit in range(60):
        member = rng.random((1, 200)) < 0.5
        attacks = [(rng.normal(size=(1, 200)), member, np.ones_like(member)) for _ in range(20)]
        found = [epsilon_bounds(scores, member, audit) for scores, _, _ in attacks]
        single += any((bounds.clopper_pearson or 0) > 0 or (bounds.one_run or 0) > 0 for bounds in found)
        corrected += (simultaneous_epsilon(attacks, audit).epsilon or 0) > 0
    assert single >= 6 and corrected <= 3 + 3 * math.sqrt(60 * 0.05 * 0.95)


def test_pairs_that_are_not_judged_do_not_count() -> None:
    rng = np.random.default_rng(0)
    scores, member = randomised_response(rng, 4, 800, 2.0)
    judged = np.arange(800) % 2 == np.zeros((4, 1), dtype=int)
    misled = np.where(judged, scores, 1 - member)
    bounds = epsilon_bounds(misled, member, seed=0, judged=judged)
    assert bounds.clopper_pearson > 1.0 and bounds.one_run > 1.0
    unjudged = epsilon_bounds(misled, member, seed=0)
    assert unjudged.clopper_pearson < bounds.clopper_pearson and unjudged.one_run == 0.0
