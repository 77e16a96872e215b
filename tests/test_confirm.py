"""A choice that is more than noise: finalists and defaults trained again; the students' CAS is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, tiny_generator, tiny_recipe, tiny_settings

from kr_ray.classifiers.ticks import Ticks
from kr_ray.cluster import confirm
from kr_ray.cluster.confirm import DEFAULTS, cas_error, decide, difference_error
from kr_ray.cluster.search import TrialOutcome
from kr_ray.cluster.trials import StudentWork
from kr_ray.config import ClusterConfig, ConfigError, SynthesisConfig
from kr_ray.config.file import parse_config
from kr_ray.synthesis.student_set import StudentSpec


def test_errors_by_hand() -> None:
    assert cas_error(0.9, 900) == pytest.approx(0.01)
    assert difference_error(0.9, 0.9, 900) == pytest.approx(0.01 * 2**0.5)
    assert cas_error(1.0, 78) == 0


def test_the_error_is_that_of_counting_on_other_images() -> None:
    random = np.random.default_rng(0)
    assert cas_error(0.8, 500) == pytest.approx(np.std(random.binomial(500, 0.8, 20_000) / 500), rel=0.02)


def test_a_finalist_wins_by_more_than_its_error_only() -> None:
    found = {DEFAULTS: [0.80, 0.82, 0.81], 4: [0.86, 0.87, 0.85], 9: [0.84, 0.80, 0.85]}
    many, few = decide(found, 100_000), decide(found, 20)
    assert (many.trial, many.winner, few.winner) == (4, 4, DEFAULTS)
    assert many.gain == few.gain == pytest.approx(0.05)
    # Differences per seed 0.06, 0.05, 0.04: sd 0.01.
    assert many.standard_error == pytest.approx(
        np.hypot(0.01 / 3**0.5, difference_error(0.86, 0.81, 100_000))
    )


def test_candidates_that_are_alike_seldom_oust_the_defaults() -> None:
    """The null case: all candidates are one and the same; the best of two
    finalists still has an expected gain above 0."""
    random = np.random.default_rng(1)
    won = 0
    for _ in range(2000):
        draws = random.binomial(500, 0.8, (3, 3)) / 500
        won += decide(dict(zip((DEFAULTS, 0, 1), draws.tolist(), strict=True)), 500).winner != DEFAULTS
    assert won / 2000 < 0.12


def outcomes() -> list[TrialOutcome]:
    """Four trials, of which number 1 was pruned; the best two complete ones are 3 and 0."""
    scores = [0.85, 0.99, 0.80, 0.90]
    return [
        TrialOutcome(
            number,
            {"latent_std": 1.0 + number, "regeneration_rate": 2, "cardinality_scale": 1},
            "pruned" if number == 1 else "complete",
            {1: score} if number == 1 else {1: 0.5, 2: score},
        )
        for number, score in enumerate(scores)
    ]


def shared() -> StudentWork:
    spec = StudentSpec(tiny_generator(), 5, SynthesisConfig(view="seen", epoch_unit="real"), 4, 7)
    return StudentWork(Path("run"), Path("stage"), spec, tiny_recipe(), Ticks(2), ClusterConfig())


def trained(cas: Callable[[StudentWork], float]) -> tuple[list[StudentWork], Callable[..., list[float]]]:
    seen: list[StudentWork] = []

    def train(works: Sequence[StudentWork], *_: Any) -> list[float]:
        seen.extend(works)
        return [cas(work) for work in works]

    return seen, train


def test_finalists_and_defaults_are_trained_with_the_same_fresh_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works, train = trained(
        lambda work: 0.9 if work.spec.synthesis.values(["latent_std"]) == {"latent_std": 4.0} else 0.7
    )
    monkeypatch.setattr(confirm, "train_students", train)
    found = confirm.confirm(outcomes(), shared(), finalists=2, seeds=3, images=400)
    assert [row.trial for row in found.rows] == [3, 0, DEFAULTS]
    assert found.winner == found.trial == 3 and found.gain == pytest.approx(0.2)
    seeds = [[work.spec.seed for work in works[k : k + 3]] for k in (0, 3, 6)]
    assert seeds[0] == seeds[1] == seeds[2] and len({7, *seeds[0]}) == 4
    assert {work.spec.synthesis.view for work in works} == {"seen"}
    assert all(work.ticks == Ticks(2, (2,)) and work.spec.epochs == 4 for work in works)
    assert len({work.folder for work in works}) == 9
    assert works[-1].spec.synthesis == shared().spec.synthesis


def test_the_luckiest_trial_does_not_win_on_its_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    _, train = trained(lambda work: 0.8)
    monkeypatch.setattr(confirm, "train_students", train)
    found = confirm.confirm(outcomes(), shared(), finalists=2, seeds=2, images=400)
    assert found.gain == 0 and found.winner == DEFAULTS


def test_one_seed_is_refused() -> None:
    assert tiny_config().tuning.confirmed_students == 0
    assert tiny_config(tuning={"confirm": 3, "finalists": 2}).tuning.confirmed_students == 9
    with pytest.raises(ConfigError, match=r"confirm >= 2.*one seed shows no spread"):
        parse_config(tiny_settings(tuning={"confirm": 1}))
