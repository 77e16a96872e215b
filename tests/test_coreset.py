"""Coresets: events and rules by constructed answers, one selection training for all of them, and who of the
audit was taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_dpdfd import flat
from torch import Tensor
from torch.nn import functional as F

from kr_ray.audits.design import AuditDesign, design_audit
from kr_ray.audits.runs import AuditPlan, RunScores
from kr_ray.classifiers.networks import load_classifier, new_classifier
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import Config
from kr_ray.config.coreset import CoresetSection
from kr_ray.config.data_free import DataFreeSection
from kr_ray.config.file import parse_config
from kr_ray.config.methods import MethodSection
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.methods.coreset.rules import (
    SelectionScores,
    budget,
    forgetfulness,
    herding,
    highest,
    k_center,
    select,
)
from kr_ray.methods.coreset.selection import (
    ForgettingEvents,
    SelectionTraining,
    scores_of,
    selection_part,
    train_selection,
)
from kr_ray.methods.interface import Site, train_here
from kr_ray.methods.registry import method_of
from kr_ray.methods.taken import load_taken, save_taken
from kr_ray.pipeline import Pipeline
from kr_ray.privacy.arrays import BoolArray
from kr_ray.privacy.attacks import taken_figures
from kr_ray.privacy.scores import SampleScores
from kr_ray.report import worst_case
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.build import ReportData, render_page
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import ArtifactError, load_tensors, read_json
from kr_ray.synthesis.student_set import StudentSpec

RULES = ("random", "forgetting", "herding", "k_center", "el2n", "grand", "entropy")
CPU = torch.device("cpu")


def section(**keys: Any) -> CoresetSection:
    return CoresetSection.model_validate({"epochs": 2, "selection_epochs": 3} | keys)


def scores(count: int, **columns: Tensor) -> SelectionScores:
    """All columns random but those given."""
    random = torch.Generator().manual_seed(0)
    whole: dict[str, Tensor] = {
        name: torch.rand(count, generator=random)
        for name in ("el2n_early", "el2n_end", "grand_early", "grand_end", "entropy")
    }
    whole["forgotten"] = torch.randint(5, (count,), generator=random)
    whole["learned"] = torch.rand(count, generator=random) < 0.8
    whole["features"] = torch.randn(count, 4, generator=random)
    return SelectionScores(**(whole | columns))


# --- what is recorded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "forgotten", "learned"),
    [
        ("00000", 0, False),
        ("11111", 0, True),
        ("01111", 0, True),
        ("01010", 2, True),
        ("10101", 2, True),
        ("11000", 1, True),
        ("00001", 0, True),
    ],
)
def test_events_of_a_constructed_table(history: str, forgotten: int, learned: bool) -> None:
    """Right answers by epoch -> events by hand; another image beside it changes nothing, nor does one that is
    left out of an epoch."""
    events = ForgettingEvents(3, CPU)
    for epoch, right in enumerate(history):
        events.record(torch.tensor([2, 0]), torch.tensor([right == "1", epoch % 2 == 0]))
    assert (int(events.forgotten[2]), bool(events.learned[2])) == (forgotten, learned)
    assert int(events.forgotten[0]) == 2 and not events.learned[1]


def test_never_learned_images_come_first_or_last() -> None:
    forgotten, learned = torch.tensor([0, 3, 0, 1]), torch.tensor([False, True, True, True])
    assert forgetfulness(forgotten, learned, True).tolist() == [4, 3, 0, 1]
    assert forgetfulness(forgotten, learned, False).tolist() == [0, 3, 0, 1]


def test_el2n_of_a_uniform_prediction_and_of_a_sure_one() -> None:
    for classes in (2, 10):
        found = scores_of(torch.zeros(1, classes), torch.zeros(1, 3), torch.tensor([1]))
        assert float(found["el2n"]) == pytest.approx(math.sqrt(1 - 1 / classes))
        assert float(found["entropy"]) == pytest.approx(math.log(classes))
        assert float(found["grand"]) == pytest.approx(float(found["el2n"]))  # no feature: the bias alone
    sure = scores_of(torch.tensor([[0.0, 200.0]]), torch.ones(1, 3), torch.tensor([1]))
    assert all(float(value) == 0 for value in sure.values())
    wrong = scores_of(torch.tensor([[200.0, 0.0]]), torch.ones(1, 3), torch.tensor([1]))
    assert float(wrong["el2n"]) == pytest.approx(math.sqrt(2))


def test_grand_is_the_norm_of_the_last_layers_gradient() -> None:
    config = tiny_config().classifier
    model, images = new_classifier(3, 1, config, 0).eval(), flat(6)
    features = model.features(images.images.float() / 127.5 - 1).detach()
    found = scores_of(model.head(features), features, images.labels)["grand"].detach()
    for row, label, value in zip(features, images.labels, found, strict=True):
        loss = F.cross_entropy(model.head(row[None]), label[None])
        gradients = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert float(value) == pytest.approx(float(norm), rel=1e-5)


# --- rules --------------------------------------------------------------------------------------------------


def test_herding_begins_at_the_mean_and_follows_it() -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double().numpy()
    mean, taken = features.mean(0), herding(features, 40)
    assert taken[0] == np.linalg.norm(features - mean, axis=1).argmin()
    assert sorted(taken) == list(range(40))
    for count in range(1, 6):  # each pick against trying all
        rest = [place for place in range(40) if place not in taken[: count - 1]]
        distances = [np.linalg.norm(mean - features[[*taken[: count - 1], place]].mean(0)) for place in rest]
        assert taken[count - 1] == rest[int(np.argmin(distances))]
    random = np.linalg.norm(features[:8].mean(0) - mean)
    assert np.linalg.norm(features[taken[:8]].mean(0) - mean) < random / 3


def test_k_center_on_points_of_a_line() -> None:
    line = np.arange(0, 11, dtype=np.float64)[:, None]
    assert k_center(line, 5).tolist()[:3] == [5, 0, 10]  # the middle, then the ends (of equals the first)
    assert set(k_center(line, 5).tolist()[3:]) <= {2, 3, 7, 8}
    for size in range(1, 12):
        taken = k_center(line, size)
        assert len(set(taken.tolist())) == size
    uneven = np.array([[0.0], [1.0], [2.0], [100.0]])
    assert k_center(uneven, 2).tolist() == [2, 3]
    assert sorted(k_center(np.zeros((4, 2)), 4).tolist()) == [0, 1, 2, 3]  # all equal: none twice


def test_the_highest_are_taken_and_of_equals_the_first() -> None:
    assert highest(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fraction", "images", "size"), [(0.4, 10, 4), (0.5, 5, 3), (0.001, 10, 1), (1.0, 7, 7), (0.3, 5, 2)]
)
def test_a_budget_is_the_nearest_whole_number_and_at_least_one(
    fraction: float, images: int, size: int
) -> None:
    assert budget(fraction, images) == size


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fraction", [0.01, 0.37, 1.0])
def test_balanced_budgets_are_each_classs_own(rule: Any, fraction: float) -> None:
    labels = torch.tensor([0] * 30 + [1] * 9 + [3])  # nobody is of class 2
    found = None if rule == "random" else scores(40)
    taken = select(section(selection=rule, fraction=fraction), labels, 4, found, 0)
    assert torch.equal(taken, taken.unique()) and taken.dtype == torch.int64
    counts = labels[taken].bincount(minlength=4).tolist()
    assert counts == [budget(fraction, 30), budget(fraction, 9), 0, 1]
    whole = select(section(selection=rule, fraction=fraction, balance=False), labels, 4, found, 0)
    assert len(whole.unique()) == budget(fraction, 40)


def test_ties_are_broken_by_seed_and_not_by_place() -> None:
    labels, ties = torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    found = scores(1000, forgotten=ties, learned=ties == 0)
    picks = [
        select(section(selection="forgetting", fraction=0.1), labels, 1, found, seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])
    assert 350 < picks[0].double().mean() < 650  # neither the first nor the last hundred


def test_both_definitions_of_never_learned_select_opposite_images() -> None:
    learned = torch.arange(20) >= 8
    found = scores(20, forgotten=learned.long(), learned=learned)
    labels = torch.zeros(20, dtype=torch.int64)
    first, last = (
        select(section(selection="forgetting", fraction=0.4, never_learned=rule), labels, 1, found, 0)
        for rule in ("max", "zero")
    )
    assert first.tolist() == list(range(8)) and int((last < 8).sum()) == 0


def test_scores_are_taken_early_or_at_the_end() -> None:
    rising = torch.arange(10.0)
    found = scores(10, el2n_early=rising, el2n_end=-rising, grand_early=-rising, grand_end=rising)
    labels = torch.zeros(10, dtype=torch.int64)
    for rule, scored, expected in (
        ("el2n", "early", [8, 9]),
        ("el2n", "end", [0, 1]),
        ("grand", "early", [0, 1]),
        ("grand", "end", [8, 9]),
    ):
        keys = section(selection=rule, scored=scored, fraction=0.2)
        assert select(keys, labels, 1, found, 0).tolist() == expected


@pytest.mark.parametrize("kind", [CoresetSection, DataFreeSection])
def test_the_search_for_equal_accuracy_stays_within_what_the_key_allows(kind: type[MethodSection]) -> None:
    key = kind.model_validate({}).main_key()
    assert key is not None and key.start is not None and key.rising and 0 < key.low < key.start <= key.high
    for value in (key.low, key.start, key.high):
        kind.model_validate({key.name: round(value) if key.whole else value})


# --- the trainings ------------------------------------------------------------------------------------------


def config(**students: Any) -> Config:
    return tiny_config(
        classifier={"width": 4, "batch_size": 16, "min_steps": 0, "warmup_epochs": 1, "crop_padding": 1},
        students=students,
    )


def site(path: Path, settings: Config, seed: int = 0) -> Site:
    splits = Splits("flat", ("dark", "grey", "bright"), flat(90), flat(30, 1), flat(33, 2))
    save_splits(path / SPLITS_FILE, splits)
    spec = StudentSpec(settings.generator, 1, settings.synthesis, 1, 0)
    return Site(path=path, config=settings, seed=seed, student=spec)


def train(place: Site, name: str, told: list[str]) -> Path:
    parts = method_of(name, place.config).parts(place, f"student_{name}")
    return train_here(place, parts, "stamp", told.append)


def test_one_selection_training_serves_all_coresets_of_a_run(tmp_path: Path) -> None:
    students = {rule: {"kind": "coreset", "selection": rule, "fraction": 0.4, "epochs": 2} for rule in RULES}
    settings = config(**{name: keys | {"selection_epochs": 4} for name, keys in students.items()})
    place, told = site(tmp_path, settings), list[str]()
    taken = {}
    for rule in RULES:
        folder = train(place, rule, told)
        found, index = read_json(folder / "done.json")["result"], load_taken(folder)
        assert index is not None and found["selected"] == len(index) == 36
        assert found["selected_by_class"] == [12, 12, 12] and found["selection"] == rule
        assert found["never_learned"] == ("max" if rule == "forgetting" else None)
        assert load_classifier(folder / "weights.safetensors", CPU).num_classes == 3
        taken[rule] = tuple(index)
    assert len(set(taken.values())) == len(RULES)
    assert sum(text == "selection_4 100%" for text in told) == 1
    assert {path.name for path in tmp_path.glob("selection*")} == {"selection_4"}
    [selection] = {method_of(rule, settings).parts(place, "x")[0].name for rule in RULES[1:]}
    assert selection == "selection_4" and len(method_of("random", settings).parts(place, "x")) == 1
    titles = [method_of(rule, settings).title for rule in RULES]
    assert titles[:4] == ["Coreset, random", "Coreset, forgetting", "Coreset, herding", "Coreset, k-center"]
    assert "never learned counts as most forgotten" in method_of("forgetting", settings).note


def test_the_selection_does_not_depend_on_the_rule_and_mixes_no_images(tmp_path: Path) -> None:
    place = site(tmp_path, config())
    part = selection_part(place, 5)
    assert [getattr(item, "mixup_alpha", item) for item in part.inputs] == [0.0, 5]
    assert part.costs == ("teacher", 5 / place.config.teacher.epochs)


class Killed(Exception):
    """Ends a training in the place of a kill."""


@pytest.mark.parametrize("at", [3, 5, 12])
def test_a_killed_selection_goes_on_to_the_same_scores(tmp_path: Path, at: int) -> None:
    """Events, early and late scores; the kill comes before, with and after the early look."""
    place = site(tmp_path, config())
    recipe, rows = place.config.classifier, list[dict[str, float]]()
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()

    def keep(state: dict[str, Any], row: dict[str, float]) -> None:
        torch.save(state, tmp_path / "state.pt")
        rows.append(row)
        if len(rows) == at:
            raise Killed

    with pytest.raises(Killed):
        train_selection(place.path, tmp_path / "killed", recipe, 9, 0, None, keep)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    train_selection(place.path, tmp_path / "killed", recipe, 9, 0, state, lambda state, row: None)
    train_selection(place.path, tmp_path / "whole", recipe, 9, 0, None, lambda state, row: None)
    found = [load_tensors(tmp_path / name / "scores.safetensors")[0] for name in ("whole", "killed")]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert int(found[0]["forgotten"].sum()) > 0


def test_events_are_those_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's inputs and answers, written down from outside the training, give the same events."""
    images, recipe = flat(50), config().classifier.model_copy(update={"mixup_alpha": 0.0})
    schedule, seed = Schedule.fit(recipe, 50, 6), derive_seed(0, "x")
    answers: list[Tensor] = []
    training = SelectionTraining(new_classifier(3, 1, recipe, 0), images, recipe, schedule, seed, CPU)
    update = ClassifierTraining._update

    def asked(self: Any, inputs: Tensor, targets: Tensor) -> None:
        # The same weights and the batch's own statistics, asked once more before the step.
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        answers.append(self.model(inputs).argmax(1))
        self.model.load_state_dict(before)
        update(self, inputs, targets)

    monkeypatch.setattr(ClassifierTraining, "_update", asked)
    training = SelectionTraining(new_classifier(3, 1, recipe, 0), images, recipe, schedule, seed, CPU)
    training.train_until(schedule.steps)
    right, forgotten, learned = [False] * 50, [0] * 50, [False] * 50
    for step, answered in enumerate(answers):
        epoch, place = divmod(step, schedule.steps_per_epoch)
        order = torch.randperm(50, generator=seeded_generator(seed, "order", epoch))
        batch = order[place * schedule.batch_size :][: schedule.batch_size]
        for image, answer in zip(batch.tolist(), answered.tolist(), strict=True):
            hit = answer == int(images.labels[image])
            forgotten[image] += right[image] and not hit
            right[image], learned[image] = hit, learned[image] or hit
    assert training.events.forgotten.tolist() == forgotten and sum(forgotten) > 0
    assert training.events.learned.tolist() == learned


def first_events() -> dict[str, Tensor]:
    """Of the first five epochs, whose batches of 15 two workers share unevenly."""
    recipe = config().classifier.model_copy(
        update={"mixup_alpha": 0.0, "batch_size": 15, "precision": "full"}
    )
    model, schedule = new_classifier(3, 1, recipe, 0), Schedule.fit(recipe, 45, 5)
    training = SelectionTraining(model, flat(45), recipe, schedule, 0, CPU)
    training.train_until(schedule.steps)
    return training.events.state_dict()


@pytest.mark.slow
def test_two_workers_record_the_events_of_one(tmp_path: Path) -> None:
    from test_parallel import on_workers

    alone, (first, second) = first_events(), on_workers(2, tmp_path, first_events)
    assert all(torch.equal(first[name], second[name]) for name in alone)
    # Rounding may turn an answer on the edge.
    assert int((first["forgotten"] != alone["forgotten"]).sum()) <= 2 and int(alone["forgotten"].sum()) > 5
    assert int((first["right"] != alone["right"]).sum()) <= 2


def test_a_run_has_one_selection_stage_for_all_its_coresets(tmp_path: Path) -> None:
    from test_worst_case_run import Silent

    ruled = {rule: {"kind": "coreset", "selection": rule} for rule in RULES}
    settings = config(**ruled, longer={"kind": "coreset", "selection": "el2n", "selection_epochs": 60})
    run = Pipeline(settings.model_copy(update={"storage": str(tmp_path)}), Silent())
    names = list(run.stages)
    assert [name for name in names if name.startswith("selection")] == ["selection_40", "selection_60"]
    assert run.stages["student_herding"].after == ["data", "selection_40"]
    assert run.stages["student_random"].after == ["data"]
    assert names.index("selection_40") < names.index("student_forgetting")
    assert run.stages["selection_40"].inputs()[0] == settings.seed


# --- the audit ----------------------------------------------------------------------------------------------


def test_what_a_run_took_is_found_among_its_own_images(tmp_path: Path) -> None:
    """Indices count in the run's split, from which non-members are missing."""
    design = AuditDesign(
        canaries=np.array([1, 4]),
        given_labels=np.array([0, 0]),
        population=np.array([6]),
        reference=np.array([0]),
        excluded=0,
        seed=3,
    )
    splits = Splits("flat", ("dark", "grey", "bright"), flat(9), flat(9, 1), flat(9, 2))
    for run in range(4):
        own = design.splits_of_run(splits, run).train
        kept = [place for place in range(9) if place not in design.samples[~design.members_of(run)]]
        assert torch.equal(own.images, splits.train.images[kept])
        everything = design.samples_among(np.arange(len(own)), run, 9)
        assert everything.tolist() == design.members_of(run).tolist()
        for place, image in enumerate(kept):
            alone = design.samples_among(np.array([place]), run, 9)
            assert alone.tolist() == (design.samples == image).tolist()


def test_the_audits_run_records_which_samples_were_taken(tmp_path: Path) -> None:
    keys = {"kind": "coreset", "selection": "herding", "fraction": 0.5, "epochs": 1, "selection_epochs": 2}
    audit = {"worst_case": {"arms": ["teacher", "core"], "models": 4, "queries": 2, "max_canary_share": 0.2}}
    settings = parse_config(
        config(core=keys).model_dump(mode="json") | {"audit": audit, "teacher": {"epochs": 1}}
    )
    place = site(tmp_path / "run", settings)
    splits = Splits("flat", ("dark", "grey", "bright"), flat(90), flat(30, 1), flat(33, 2))
    design = design_audit(splits, settings.audit.worst_case, 0)
    plan = AuditPlan(
        run=tmp_path / "run", folder=tmp_path / "audit", config=settings, student=place.student,
        design=design, digest="x",
    )  # fmt: skip
    plan.train(0, lambda share, text: None)
    core, teacher = plan.scores(0, "core"), plan.scores(0, "teacher")
    assert core is not None and teacher is not None and teacher.taken is None
    member = design.members_of(0)
    assert core.taken is not None and core.taken.dtype == np.bool_ and not (core.taken & ~member).any()
    assert 0 < core.taken.sum() < member.sum()
    assert {path.name for path in (tmp_path / "audit" / "runs" / "0").iterdir()} == {
        "scores_core.npz",
        "scores_teacher.npz",
        "set_core.npz",
    }


def made_up(shift_taken: float, shift_left: float) -> tuple[SampleScores, BoolArray]:
    """16 models, 200 samples; a third of the members is taken."""
    rng = np.random.default_rng(0)
    half = rng.random((8, 200)) < 0.5
    member = np.stack([side for coins in half for side in (coins, ~coins)])
    taken = member & (rng.random(member.shape) < 1 / 3)
    labels = rng.integers(0, 8, 200)
    logits = rng.normal(size=(16, 200, 1, 8)).astype(np.float32)
    by = shift_taken * taken + shift_left * (member & ~taken)
    logits[:, np.arange(200), :, labels] += by.T[..., None]
    return SampleScores(logits, labels, labels, member), taken


def test_taken_and_left_members_are_told_apart() -> None:
    samples, taken = made_up(9.0, 0.0)
    found = taken_figures(samples, taken, 0)
    assert found.share == pytest.approx(taken.sum() / samples.member.sum())
    assert found.taken is not None and found.left is not None
    assert found.taken.n_members + found.left.n_members == samples.member.sum()
    assert found.taken.n_non_members == found.left.n_non_members == (~samples.member).sum()
    assert found.taken.auc > 0.9 and abs(found.left.auc - 0.5) < 0.06
    nothing = taken_figures(samples, np.zeros_like(taken), 0)
    assert nothing.taken is None and nothing.share == 0 and nothing.left is not None
    assert nothing.left.n_members == samples.member.sum()


def test_the_report_shows_taken_and_left_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_report import constructed_arm, fake_report

    drawn = "kr_ray.report.build.draw_figures"
    monkeypatch.setattr(drawn, lambda report: dict.fromkeys(alt_texts(report), "data:,"))
    samples, taken = made_up(9.0, 0.0)
    groups = taken_figures(samples, taken, 0)
    assert groups.left is not None
    figures = groups.model_dump(mode="json", by_alias=True)
    plain, raw = constructed_arm(2.0, 60, 8), fake_report()
    arm = plain | {"canary_taken": figures, "population_taken": figures, "title": "Coreset: c"}
    raw["audit"]["lira"] = {"teacher": plain, "c": arm}
    report = validate_report(raw)
    assert validate_report(report.model_dump(mode="json", by_alias=True)) == report
    page = render_page(report, ReportData())
    assert page.count("Images that the method took, and those that it left") == 1
    said = [text for text in worst_case.findings(report) if "the method took" in text]
    assert len(said) == 1 and f"{100 * groups.share:.1f}" in said[0]
    assert f"{groups.left.n_members:,} pairs" in said[0].replace("\u00a0", " ")


def test_old_scores_without_the_mask_are_still_read(tmp_path: Path) -> None:
    arrays = np.zeros((2, 1, 3), np.float32), np.zeros((1, 3), np.float32)
    RunScores(*arrays, 0.5, 1.0).save(tmp_path / "old.npz", "x")
    RunScores(*arrays, 0.5, 1.0, np.array([True, False])).save(tmp_path / "new.npz", "x")
    old, new = RunScores.load(tmp_path / "old.npz", "x"), RunScores.load(tmp_path / "new.npz", "x")
    assert old is not None and old.taken is None
    assert new is not None and new.taken is not None and new.taken.tolist() == [True, False]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    assert load_taken(tmp_path) is None
    save_taken(tmp_path, torch.tensor([3, 5]))
    assert load_taken(tmp_path).tolist() == [3, 5]  # type: ignore[union-attr]
    np.savez(tmp_path / "taken.npz", index=np.array([0.5]))
    with pytest.raises(ArtifactError, match="must hold indices"):
        load_taken(tmp_path)
