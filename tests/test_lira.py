"""LiRA, RMIA and the matched shadows against slow, naive versions written
from the papers' definitions, and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kr_ray.privacy.attacks import HEADLINE, attack_scores, audit_arm, figures, matched_shadow_scores
from kr_ray.privacy.leave_one_out import leave_one_out
from kr_ray.privacy.lira import hinge, lira_scores, logit_scaled
from kr_ray.privacy.metrics import auc
from kr_ray.privacy.rmia import rmia_scores
from kr_ray.privacy.scores import ReferenceScores, SampleScores, ScoreError


def memberships(models: int, samples: int, seed: int) -> np.ndarray:
    return np.argsort(np.random.default_rng(seed).random((models, samples)), axis=0) < models // 2


def made_up(
    models: int, samples: int, queries: int, shift: float, seed: int = 0, classes: int = 4
) -> SampleScores:
    """Logits of the given label that membership raises by `shift`; samples differ in difficulty."""
    rng = np.random.default_rng(seed)
    member = memberships(models, samples, seed)
    labels = rng.integers(0, classes, samples)
    logits = rng.normal(size=(models, samples, queries, classes)) + 2 * rng.normal(
        size=(1, samples, 1, classes)
    )
    logits[:, np.arange(samples), :, labels] += shift * member.T[..., None]
    return SampleScores(logits.astype(np.float32), labels, (labels + 1) % classes, member)


def naive_lira(statistic: np.ndarray, member: np.ndarray, online: bool, per_sample: bool) -> np.ndarray:
    models, samples, queries = statistic.shape
    result = np.zeros((models, samples))
    for attacked in range(models):
        others = leave_one_out(member).others(attacked)  # see tests/test_leave_one_out.py
        for query in range(queries):
            groups = {
                side: [
                    [
                        statistic[model, sample, query]
                        for model in range(models)
                        if others[model, sample] and member[model, sample] == side
                    ]
                    for sample in range(samples)
                ]
                for side in (True, False)
            }
            rest = [
                [statistic[m, sample, query] for m in range(models) if m != attacked]
                for sample in range(samples)
            ]
            for sample in range(samples):
                x = statistic[attacked, sample, query]
                normal = {}
                for side in (True, False):
                    values = groups[side][sample]
                    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups[side])
                    free = sum(len(group) - 1 for group in groups[side])
                    variance = (
                        squares / free
                        if free
                        else np.mean([np.var(all_others, ddof=1) for all_others in rest])
                    )
                    if per_sample and len(values) > 1:
                        variance = np.var(values, ddof=1)
                    normal[side] = stats.norm(np.mean(values), np.sqrt(max(variance, 1e-12)))
                gain = normal[True].logpdf(x) - normal[False].logpdf(x) if online else -normal[False].logsf(x)
                result[attacked, sample] += gain / queries
    return result


@pytest.mark.parametrize("models", [4, 8])  # of 4 models one alone is left on either side
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_lira_equals_the_naive_version(models: int, online: bool, per_sample: bool) -> None:
    statistic = logit_scaled(*_logits_and_labels(made_up(models, 12, 3, 1.0)))
    member = memberships(models, 12, 0)
    fast = lira_scores(statistic, member, online=online, per_sample_variance=per_sample)
    np.testing.assert_allclose(fast, naive_lira(statistic, member, online, per_sample), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_sample", [True, False])
def test_an_outlying_model_costs_no_digits(per_sample: bool) -> None:
    """Taking a value of 1e6 out of sums over values of 1e-3 would leave nothing but rounding."""
    rng = np.random.default_rng(0)
    statistic, member = 1e-3 * rng.normal(size=(8, 6, 2)) + 5.0, memberships(8, 6, 0)
    statistic[3, 2] = 1e6
    fast = lira_scores(statistic, member, online=True, per_sample_variance=per_sample)
    np.testing.assert_allclose(fast, naive_lira(statistic, member, True, per_sample), rtol=1e-9, atol=1e-9)


def test_uneven_memberships_are_weighed_by_their_counts() -> None:
    rng = np.random.default_rng(1)
    member = np.array(
        [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=bool
    )
    statistic = rng.normal(size=(7, 3, 2))
    for online in (True, False):
        fast = lira_scores(statistic, member, online=online, per_sample_variance=True)
        np.testing.assert_allclose(fast, naive_lira(statistic, member, online, True), rtol=1e-9, atol=1e-9)


def test_the_statistics_follow_their_definitions_and_do_not_saturate() -> None:
    samples = made_up(4, 10, 2, 1.0)
    logits, labels = _logits_and_labels(samples)
    z = logits.astype(np.float64)
    p = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True))[:, np.arange(10), :, labels].transpose(1, 0, 2)
    np.testing.assert_allclose(logit_scaled(logits, labels), np.log(p / (1 - p)), rtol=1e-9)
    true = z[:, np.arange(10), :, labels].transpose(1, 0, 2)
    masked = z.copy()
    masked[:, np.arange(10), :, labels] = -np.inf
    np.testing.assert_allclose(hinge(logits, labels), true - masked.max(axis=-1), rtol=1e-12)
    extreme = np.array([[[[2000.0, 0.0, -5.0]]]], dtype=np.float32)  # p = 1 in double precision
    assert logit_scaled(extreme, np.array([0]))[0, 0, 0] == pytest.approx(2000 - np.log(1 + np.exp(-5)))


def _logits_and_labels(samples: SampleScores) -> tuple[np.ndarray, np.ndarray]:
    return samples.logits, samples.labels


def test_online_lira_reaches_the_likelihood_ratio_of_the_true_gaussians() -> None:
    """With very many models the fitted Gaussians are the true ones, whose
    ratio's ROC is known: AUC = Phi(shift / sqrt 2)."""
    rng = np.random.default_rng(0)
    member = memberships(400, 50, 0)
    level = 3 * rng.normal(size=(1, 50, 1))
    statistic = rng.normal(size=(400, 50, 1)) + level + 1.5 * member[..., None]
    for per_sample in (True, False):
        found = figures(
            lira_scores(statistic, member, online=True, per_sample_variance=per_sample), member, seed=0
        )
        assert found.auc_low < stats.norm.cdf(1.5 / np.sqrt(2)) < found.auc_high
        assert found.ci_low < stats.norm.sf(stats.norm.isf(0.001) - 1.5) < found.ci_high
    # The same levels defeat the global threshold.
    assert auc(statistic[member][:, 0], statistic[~member][:, 0]) < 0.65


@pytest.mark.parametrize("online", [True, False])
def test_without_a_leak_no_attack_claims_one(online: bool) -> None:
    """Many more such audits are in tests/test_null_audits.py."""
    rng = np.random.default_rng(0)
    statistic, member = rng.normal(size=(32, 500, 2)), memberships(32, 500, 0)
    scores = lira_scores(statistic, member, online=online, per_sample_variance=False)
    assert 0.47 < auc(scores[member], scores[~member]) < 0.51


def test_more_queries_help() -> None:
    member = memberships(16, 200, 0)
    statistic = np.random.default_rng(0).normal(size=(16, 200, 8)) + 0.7 * member[..., None]
    one, all_queries = (
        lira_scores(part, member, online=True, per_sample_variance=False)
        for part in (statistic[..., :1], statistic)
    )
    assert auc(all_queries[member], all_queries[~member]) > auc(one[member], one[~member]) + 0.1


# --- RMIA ---------------------------------------------------------------------------------------------------


def naive_rmia(
    samples: SampleScores, reference: ReferenceScores, online: bool, gamma: float, a: float
) -> np.ndarray:
    def confidence(logits: np.ndarray, label: int) -> float:
        e = np.exp(logits.astype(np.float64) - logits.max())
        return float(e[label] / e.sum())

    models, count, queries, _ = samples.logits.shape
    result = np.zeros((models, count))
    for attacked in range(models):
        others = [model for model in range(models) if model != attacked]
        compared = leave_one_out(samples.member).others(attacked)
        ratio_z = []
        for z, label in enumerate(reference.labels):
            p_out = np.mean([confidence(reference.logits[model, z], label) for model in others])
            p = p_out if online else ((1 + a) * p_out + 1 - a) / 2
            ratio_z.append(confidence(reference.logits[attacked, z], label) / p)
        for x, label in enumerate(samples.labels):
            for query in range(queries):
                p_side = {
                    side: np.mean(
                        [
                            confidence(samples.logits[m, x, query], label)
                            for m in others
                            if compared[m, x] and samples.member[m, x] == side
                        ]
                    )
                    for side in (True, False)
                }
                p = (p_side[True] + p_side[False]) / 2 if online else ((1 + a) * p_side[False] + 1 - a) / 2
                ratio = confidence(samples.logits[attacked, x, query], label) / p
                result[attacked, x] += np.mean([ratio / z >= gamma for z in ratio_z]) / queries
    return result


def references(models: int, count: int) -> ReferenceScores:
    rng = np.random.default_rng(9)
    return ReferenceScores(rng.normal(size=(models, count, 4)).astype(np.float32), rng.integers(0, 4, count))


@pytest.mark.parametrize("online", [True, False])
def test_rmia_equals_the_naive_version(online: bool) -> None:
    samples, reference = made_up(6, 8, 2, 1.0), references(6, 30)
    fast = rmia_scores(samples, reference, online=online, gamma=1.3, offline_a=0.4)
    np.testing.assert_allclose(fast, naive_rmia(samples, reference, online, 1.3, 0.4), atol=1e-9)


def test_rmia_refuses_other_models_and_wrong_settings() -> None:
    samples = made_up(6, 8, 1, 1.0)
    with pytest.raises(ValueError, match="must hold the 6 models"):
        rmia_scores(samples, references(5, 10), online=True)
    with pytest.raises(ValueError, match="gamma > 0"):
        rmia_scores(samples, references(6, 10), online=True, gamma=0.0)


# --- all attacks --------------------------------------------------------------------------------------------


def test_matched_shadows_learn_what_membership_does() -> None:
    leaking, quiet = made_up(8, 300, 1, 4.0, seed=1), made_up(8, 300, 1, 0.0, seed=2)
    scores = matched_shadow_scores({"canary": leaking, "population": quiet}, seed=0)
    assert auc(scores["canary"][leaking.member], scores["canary"][~leaking.member]) > 0.75
    assert 0.45 < auc(scores["population"][quiet.member], scores["population"][~quiet.member]) < 0.55


def test_a_run_does_not_help_to_attack_itself() -> None:
    """Its membership must not influence its own scores: swapping it changes the other runs' scores only."""
    samples = made_up(8, 40, 2, 1.0)
    flipped = samples.member.copy()
    flipped[0] = ~flipped[0]
    other = SampleScores(samples.logits, samples.labels, samples.true_labels, flipped)
    first, second = attack_scores(samples, references(8, 20)), attack_scores(other, references(8, 20))
    for name in first:
        np.testing.assert_allclose(first[name][0], second[name][0], rtol=1e-9, err_msg=name)
    matched = [matched_shadow_scores({"all": group}, seed=0)["all"][0] for group in (samples, other)]
    np.testing.assert_array_equal(*matched)


def test_audit_of_an_arm_shows_canaries_beside_the_population() -> None:
    canary, population = made_up(8, 300, 2, 4.0, seed=1), made_up(8, 300, 2, 0.2, seed=2)
    population = SampleScores(population.logits, population.labels, population.labels, population.member)
    result = audit_arm(canary, population, references(8, 50), seed=3)
    assert result == audit_arm(canary, population, references(8, 50), seed=3)
    assert (result.models, result.queries, result.headline) == (8, 2, HEADLINE)
    assert result.canary == result.attacks[HEADLINE]["canary"]
    assert result.canary.n_members == result.canary.n_non_members == 1200
    assert result.canary.tpr_at_1 > 0.5 > 0.1 > result.population.tpr_at_1
    # Membership raised the given label's logit, so the true label's confidence falls: scored on it, the
    # direction is still seen by a likelihood ratio, but less of it.
    assert result.canary_true_label.auc < result.canary.auc
    assert result.given_label_share["in"] > result.given_label_share["out"]
    assert {name for name in result.attacks if not name.startswith("lira")} == {
        "global_threshold", "rmia_online", "rmia_offline", "shokri_matched"
    }  # fmt: skip
    assert sum(name.startswith("lira") for name in result.attacks) == 8
    with pytest.raises(ScoreError, match="same runs"):
        audit_arm(canary, made_up(6, 300, 2, 0.2), None, seed=3)
    assert audit_arm(population, population, None, seed=3).canary_true_label is None
