"""Audits of scores that know nothing: no attack may find anything,
whatever the number of models and the design.

`pytest -s -m slow tests/test_null_audits.py` prints, for 300 audits of each
kind, the mean AUC and how often a bound is above zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kr_ray.privacy.attacks import attack_scores, judged_pairs, matched_shadow_scores
from kr_ray.privacy.epsilon import epsilon_bounds, simultaneous_epsilon
from kr_ray.privacy.rates import auc_interval, pair_scores
from kr_ray.privacy.scores import ReferenceScores, SampleScores

MODELS = (4, 6, 8, 16, 32)
DESIGNS = ("half", "pairs", "flips")
"""Every sample in exactly half of the models, at random or in
complementary pairs; a coin per model and sample."""
SAMPLES, CLASSES, REFERENCES = 100, 3, 50


def membership(
    rng: np.random.Generator, models: int, samples: int, design: str, share: float = 0.5
) -> np.ndarray:
    if design == "half":
        return np.argsort(rng.random((models, samples)), axis=0) < models // 2
    if design == "pairs":
        coin = rng.random((models // 2, samples)) < 0.5
        return np.stack([coin, ~coin], axis=1).reshape(models, samples)
    member = rng.random((models, samples)) < share
    while (
        bad := np.minimum(member.sum(axis=0), (~member).sum(axis=0)) < 2
    ).any():  # as files are asked to be
        member[:, bad] = rng.random((models, int(bad.sum()))) < share
    return member


def null_audit(rng: np.random.Generator, member: np.ndarray) -> tuple[SampleScores, ReferenceScores]:
    """Samples differ in difficulty, models in quality; membership changes nothing."""
    models, samples = member.shape
    level, quality = 2 * rng.normal(size=(1, samples, 1, CLASSES)), 1 + 0.2 * rng.random((models, 1, 1, 1))
    logits = quality * (rng.normal(size=(models, samples, 1, CLASSES)) + level)
    labels = rng.integers(0, CLASSES, samples)
    reference = rng.normal(size=(models, REFERENCES, CLASSES)) + 2 * rng.normal(size=(1, REFERENCES, CLASSES))
    return (
        SampleScores(logits.astype(np.float32), labels, labels, member),
        ReferenceScores(reference.astype(np.float32), rng.integers(0, CLASSES, REFERENCES)),
    )


def audits(
    models: int, design: str, number: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Seed, membership, judged pairs and the scores of all attacks
    but the matched shadows, `number` times."""
    for seed in range(number):
        rng = np.random.default_rng([seed, models, DESIGNS.index(design)])
        samples, reference = null_audit(rng, membership(rng, models, SAMPLES, design))
        scores = attack_scores(samples, reference)
        kept = {
            name: values for name, values in scores.items() if "hinge" not in name
        }  # the same formulae as of the logit score
        yield seed, samples.member, judged_pairs(samples.member), kept


def allowed(audits: int) -> float:
    """5 % of the audits, and where they are few, what chance adds to it."""
    return 0.05 * audits if audits >= 300 else 0.05 * audits + 3 * np.sqrt(0.05 * 0.95 * audits)


def check_nothing_found(models: int, design: str, number: int) -> None:
    found: dict[str, list[tuple[float, bool, float, float]]] = {}
    of_all = []
    for seed, member, judged, scores in audits(models, design, number):
        for name, values in scores.items():
            area, low, high = auc_interval(pair_scores(values, member, judged))
            bounds = epsilon_bounds(values, member, seed, judged=judged)
            found.setdefault(name, []).append(
                (area, low <= 0.5 <= high, bounds.clopper_pearson or 0.0, bounds.one_run or 0.0)
            )
        if seed < 100:  # takes as long as everything else together
            of_all.append(
                simultaneous_epsilon([(values, member, judged) for values in scores.values()], seed).epsilon
                > 0
            )
    for name, rows in found.items():
        area, covered, pooled, one_run = (np.array(column) for column in zip(*rows, strict=True))
        error = area.std(ddof=1) / np.sqrt(number)
        print(
            f"{design:6}{models:3} models  {name:32} AUC {area.mean():.4f} +- {error:.4f}, "
            f"interval covers 0.5 in {covered.mean():.3f}, above 0: pooled "
            f"{(pooled > 0).mean():.3f}, one run {(one_run > 0).mean():.3f}"
        )
        assert abs(area.mean() - 0.5) < 4 * error, name
        assert max((pooled > 0).sum(), (one_run > 0).sum()) <= allowed(number), name
    print(f"{design:6}{models:3} models  largest of all, corrected: above 0 in {np.mean(of_all):.3f}")
    assert sum(of_all) <= allowed(len(of_all))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("models", [4, 8])
def test_scores_that_know_nothing_prove_nothing(models: int, design: str) -> None:
    check_nothing_found(models, design, 16)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("models", MODELS)
def test_300_audits_of_scores_that_know_nothing_prove_nothing(models: int, design: str) -> None:
    check_nothing_found(models, design, 300)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("models", MODELS)
def test_auc_of_scores_that_know_nothing_is_a_half(models: int, design: str) -> None:
    """Before the others were made as many on either side: 0.36 to 0.77 with 4
    models, where every sample was in half of them."""
    areas: dict[str, list[float]] = {}
    for _, member, judged, scores in audits(models, design, 40):
        for name, values in scores.items():
            areas.setdefault(name, []).append(auc_interval(pair_scores(values, member, judged))[0])
    for name, values in areas.items():
        assert abs(np.mean(values) - 0.5) < 4 * np.std(values, ddof=1) / np.sqrt(len(values)), name


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_coins_that_are_not_fair_tell_nothing_either(share: float) -> None:
    areas: dict[str, list[float]] = {}
    for seed in range(40):
        rng = np.random.default_rng([seed, 99])
        samples, reference = null_audit(rng, membership(rng, 10, SAMPLES, "flips", share))
        judged = judged_pairs(samples.member)
        assert not judged.all()
        for name, values in attack_scores(samples, reference).items():
            areas.setdefault(name, []).append(auc_interval(pair_scores(values, samples.member, judged))[0])
    for name, values in areas.items():
        assert abs(np.mean(values) - 0.5) < 4 * np.std(values, ddof=1) / np.sqrt(len(values)), name


# --- the matched shadows ------------------------------------------------------------------------------------


def recognisable(models: int, design: str, seed: int) -> SampleScores:
    """No model knows its members, but every sample is known by its
    logits: the attack could look up who had it."""
    rng = np.random.default_rng([seed, models])
    member = membership(rng, models, 160, design)
    logits = 5 * rng.normal(size=(1, 160, 1, 2)) + 0.01 * rng.normal(size=(models, 160, 1, 2))
    labels = np.zeros(160, dtype=np.int64)
    return SampleScores(logits.astype(np.float32), labels, labels, member)


@pytest.mark.parametrize("design", ["half", "pairs"])
def test_matched_shadows_do_not_recognise_a_sample(design: str) -> None:
    """Fitted and used on the same samples of 4 models they had AUCs of
    0.07 to 0.47, the surer the other way round."""
    samples = [recognisable(4, design, seed) for seed in range(3)]
    scores = [matched_shadow_scores({"all": part}, 0)["all"] for part in samples]
    areas = [
        auc_interval(pair_scores(values, part.member)) for values, part in zip(scores, samples, strict=True)
    ]
    assert all(abs(area - 0.5) < 0.12 for area, _, _ in areas)
    assert abs(np.mean([area for area, _, _ in areas]) - 0.5) < 0.07


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("models", [4, 8])
def test_matched_shadows_prove_nothing_from_scores_that_know_nothing(models: int) -> None:
    areas, pooled, one_run = [], 0, 0
    for seed in range(60):
        rng = np.random.default_rng([seed, models])
        samples, _ = null_audit(rng, membership(rng, models, SAMPLES, "half"))
        scores = matched_shadow_scores({"all": samples}, seed)["all"]
        areas.append(auc_interval(pair_scores(scores, samples.member))[0])
        bounds = epsilon_bounds(scores, samples.member, seed)
        pooled, one_run = pooled + (bounds.clopper_pearson > 0), one_run + ((bounds.one_run or 0) > 0)
    error = np.std(areas, ddof=1) / np.sqrt(len(areas))
    print(
        f"half {models} models  shokri_matched AUC {np.mean(areas):.4f} +- "
        f"{error:.4f}, above 0: {pooled}, {one_run} of 60"
    )
    assert abs(np.mean(areas) - 0.5) < 4 * error
    assert max(pooled, one_run) <= allowed(len(areas))
