"""Whom an attacked run is compared with: equal numbers on both sides,
and nothing that depends on its own membership."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from test_null_audits import membership, null_audit

from kr_ray.privacy.attacks import attack_scores
from kr_ray.privacy.leave_one_out import leave_one_out
from kr_ray.privacy.scores import SampleScores


def numbers(member: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of the compared runs are in and out, int64 [samples] each."""
    others = leave_one_out(member).others(run)
    assert not others[run].any()
    return (others & member).sum(axis=0), (others & ~member).sum(axis=0)


@pytest.mark.parametrize("design", ["half", "pairs"])
@pytest.mark.parametrize("models", [4, 6, 8, 32])
def test_member_or_not_a_run_sees_as_many_in_as_out(models: int, design: str) -> None:
    member = membership(np.random.default_rng(models), models, 50, design)
    for run in range(models):
        for number in numbers(member, run):
            assert (number == models // 2 - 1).all()
    assert leave_one_out(member).judged.all()


@pytest.mark.parametrize(("models", "inside"), [(5, 2), (9, 3), (10, 8)])
def test_with_another_number_than_half_members_see_what_non_members_see(models: int, inside: int) -> None:
    member = np.argsort(np.random.default_rng(0).random((models, 200)), axis=0) < inside
    for run in range(models):
        seen_in, seen_out = numbers(member, run)
        assert (seen_in == inside - 1).all() and (seen_out == models - inside - 1).all()


def test_with_coins_the_larger_side_is_cut_to_the_smaller() -> None:
    member = membership(np.random.default_rng(0), 9, 500, "flips")
    judged = leave_one_out(member).judged
    assert not judged.all() and judged.mean() > 0.8
    for run in range(9):
        seen_in, seen_out = numbers(member, run)
        rest = np.delete(member, run, axis=0)
        smaller = np.minimum(rest.sum(axis=0), (~rest).sum(axis=0))
        assert (seen_in == smaller).all() and (seen_out == smaller).all()
        assert (judged[run] == (smaller >= 2)).all()  # the others alone make it a sample that files may hold


@pytest.mark.parametrize("design", ["half", "flips"])
def test_who_is_compared_does_not_depend_on_the_run_s_own_membership(design: str) -> None:
    member = membership(np.random.default_rng(3), 8, 300, design)
    for run in range(8):
        flipped = member.copy()
        flipped[run] = ~flipped[run]
        np.testing.assert_array_equal(leave_one_out(member).others(run), leave_one_out(flipped).others(run))
        if design == "flips":
            np.testing.assert_array_equal(
                leave_one_out(member).judged[run], leave_one_out(flipped).judged[run]
            )


def test_the_compared_sets_have_one_distribution_for_members_and_non_members() -> None:
    """Six runs, three in: all 20 memberships equally often. A run sees two in
    and two out of five: 30 ways, each as likely."""
    patterns = np.array([[bit in chosen for bit in range(6)] for chosen in _triples()]).T
    member = np.tile(patterns, 300)[:, np.random.default_rng(0).permutation(6000)]
    others = leave_one_out(member).others(0)
    code = ((others & member) + 2 * (others & ~member)).T @ 3 ** np.arange(6)
    for side in (True, False):
        _, times = np.unique(code[member[0] == side], return_counts=True)
        assert len(times) == 30 and stats.chisquare(times).pvalue > 0.001


def _triples() -> list[tuple[int, ...]]:
    from itertools import combinations

    return list(combinations(range(6), 3))


@pytest.mark.parametrize("order", [np.arange(8), np.array([0, 2, 4, 6, 1, 3, 5, 7])])
def test_of_complementary_runs_neither_helps_to_attack_the_other(order: np.ndarray) -> None:
    """Exchanging the memberships of a pair, as its coins might have fallen, changes no score of either."""
    samples, reference = null_audit(
        np.random.default_rng(1), membership(np.random.default_rng(0), 8, 60, "pairs")[np.argsort(order)]
    )
    first, second = order[0], order[1]
    coin = np.random.default_rng(2).random(60) < 0.5
    exchanged, moved, asked = samples.member.copy(), samples.logits.copy(), reference.logits.copy()
    exchanged[first], exchanged[second] = (
        np.where(coin, samples.member[b], samples.member[a]) for a, b in ((first, second), (second, first))
    )
    other = SampleScores(samples.logits, samples.labels, samples.true_labels, exchanged)
    moved[second] = 7  # nor do the partner's answers matter
    asked[second] = 7
    third = SampleScores(moved, samples.labels, samples.true_labels, exchanged)
    before, after = attack_scores(samples, reference), attack_scores(other, reference)
    for name, values in attack_scores(third, type(reference)(asked, reference.labels)).items():
        np.testing.assert_array_equal(
            before[name][[first, second]], after[name][[first, second]], err_msg=name
        )
        np.testing.assert_array_equal(values[first], before[name][first], err_msg=name)
