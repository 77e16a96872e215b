"""Whole runs with one epsilon: the plan against composition by hand, what is refused beforehand, what a
forgotten release does, and two runs from real images to the export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_settings
from test_further_students import bound
from test_pipeline import kill_in, kr, write_config
from test_report import constructed_arm, fake_report

from kr_ray.classifiers.networks import load_classifier
from kr_ray.cluster.hyperband import hyperband_brackets
from kr_ray.cluster.sweep import selection_scores
from kr_ray.config import Config, ConfigError
from kr_ray.config.dp import DpdfdSection
from kr_ray.config.file import load_config, parse_config
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.display import Display
from kr_ray.dp.noise import KEY_FILE
from kr_ray.dp.scores import NoisyScores
from kr_ray.generators.interface import checkpoint_file, released_prior
from kr_ray.generators.registry import generator_of
from kr_ray.methods.interface import Site, train_here
from kr_ray.methods.knowledge_recycling import KnowledgeRecycling
from kr_ray.methods.private_run import check_part, fitted, plan_private_run
from kr_ray.methods.registry import method_of
from kr_ray.pipeline import Pipeline
from kr_ray.privacy.accountants import epsilon_of, event_record, gaussian, poisson_gaussian
from kr_ray.privacy.whole_run import Reader, whole_run
from kr_ray.report import guarantees
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.build import ReportData, render_page, render_summary
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import load_state, read_json
from kr_ray.runs.results import ClassifierResult, DataResult
from kr_ray.stages import Stage
from kr_ray.synthesis.student_set import StudentSpec, synthetic_set

pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:grad and param")
MERF = {"kind": "dp_merf", "random_features": 100, "steps": 20, "batch_size": 20}
NOISELESS = MERF | {"noise_multiplier": 0.5}
SGD = {"kind": "dp_sgd", "epochs": 1, "expected_batch_size": 64}


def private_settings(**sections: Any) -> dict[str, Any]:
    """A tiny run of a private generator and hard labels; sections given replace those that are there."""
    raw = tiny_settings()
    raw["generator"] = MERF | {"noise_multiplier": 2.0}
    raw["synthesis"] = {
        "epoch_unit": "real", "regeneration_rate": 2, "labelling": "hard", "class_prior": "uniform",
    }  # fmt: skip
    raw["tuning"]["space"] = {"regeneration_rate": [1, 10]}
    return raw | {"privacy": {}} | sections


def private_config(**sections: Any) -> Config:
    return parse_config(private_settings(**sections))


def soft(raw: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The same with a teacher's soft labels."""
    return raw | {"synthesis": raw["synthesis"] | {"labelling": "gkd"} | keys}


# --- the plan -----------------------------------------------------------------------------------------------


def test_generator_and_teacher_compose_to_one_epsilon_as_by_hand() -> None:
    teacher = SGD | {"noise_multiplier": 1.5, "epochs": 2, "expected_batch_size": 256}
    config = parse_config(soft(private_settings(teacher=teacher, privacy={"delta": 1e-5})))
    plan = plan_private_run(config, 4000, 500, 0)
    hand = epsilon_of([gaussian(2.0), poisson_gaussian(256 / 4000, 1.5, round(2 * 4000 / 256))], 1e-5)
    assert (plan.training.epsilon, plan.training.accountant) == hand
    assert set(plan.training.covers) == {"generator", "teacher"} and plan.validation is None
    alone = plan_private_run(private_config(privacy={"delta": 1e-5}), 4000, 500, 0).training
    assert alone.epsilon == epsilon_of([gaussian(2.0)], 1e-5)[0] < hand[0] and alone.covers == ("generator",)


@pytest.mark.parametrize(("generator", "sigma"), [(0.3, 1.844), (0.7, 2.389)])
def test_a_teacher_that_leaves_its_noise_open_takes_what_the_generator_leaves(
    generator: float, sigma: float
) -> None:
    """Known answers for 60,000 images, 10 epochs of 1,024: found by bisection of PLD epsilons elsewhere."""
    raw = private_settings(
        generator=MERF | {"target_epsilon": generator, "delta": 1e-5},
        teacher=SGD | {"expected_batch_size": 1024, "epochs": 10},
        privacy={"target_epsilon": 1.0, "delta": 1e-5},
    )
    config = parse_config(soft(raw))
    teacher = fitted(config, "teacher", config.teacher, 60_000)
    assert teacher.noise_multiplier == pytest.approx(sigma, rel=5e-3)  # type: ignore[attr-defined]
    assert 0.99 < plan_private_run(config, 60_000, 10_000, 0).training.epsilon <= 1.0


def test_a_generator_that_leaves_its_noise_open_takes_all() -> None:
    raw = private_settings(generator=MERF, privacy={"target_epsilon": 1.0, "delta": 1e-5})
    found = plan_private_run(parse_config(raw), 60_000, 10_000, 0).training
    assert found.epsilon == pytest.approx(1.0, rel=2e-3) and found.epsilon <= 1.0


def test_a_person_with_several_images_costs_more() -> None:
    single, several = (
        plan_private_run(private_config(privacy={"images_per_unit": k, "unit": "patient"}), 4000, 500, 0)
        for k in (1, 3)
    )
    assert several.training.epsilon == pytest.approx(epsilon_of([gaussian(2.0 / 3)], several.delta)[0])
    assert several.training.epsilon > single.training.epsilon and several.training.unit == "patient"
    raw = private_settings(generator=MERF, privacy={"target_epsilon": 1.0, "images_per_unit": 3})
    assert 0.99 < plan_private_run(parse_config(raw), 4000, 500, 0).training.epsilon <= 1.0


def test_validation_people_pay_for_scores_and_training_people_do_not() -> None:
    privacy = {"selection": "noisy", "score_noise_multiplier": 40.0, "delta": 1e-5}
    plan = plan_private_run(private_config(privacy=privacy), 4000, 500, 30)
    assert plan.validation is not None
    assert plan.validation.epsilon == epsilon_of([gaussian(40 / math.sqrt(30))], 1e-5)[0]
    assert plan.training.epsilon == epsilon_of([gaussian(2.0)], 1e-5)[0]
    fitted = {"selection": "noisy", "target_epsilon": 5.0, "delta": 1e-5}
    plan = plan_private_run(private_config(privacy=fitted), 4000, 500, 30)
    assert plan.validation is not None and 4.98 < plan.validation.epsilon <= 5.0


def test_scores_are_counted_as_hyperband_makes_them() -> None:
    """Of 4 trials, 2 rungs and eta 2, and 1 checkpoint: every trial at every rung that it reaches."""
    config = private_config(privacy={"selection": "noisy", "score_noise_multiplier": 40.0})
    (first, second) = hyperband_brackets(4, 2, 2)
    assert first.rungs == ((2, 1), (1, 2)) and second.rungs == ((2, 2),)
    assert selection_scores(config) == {"checkpoints": 1, "tuning": 2 + 1 + 2 + 1}  # the defaults, too


# --- what is refused before anything starts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"synthesis": {"labelling": "hard"}},
            "`synthesis.class_prior` must be uniform or released with",
        ),
        (
            {"generator": MERF | {"noise_multiplier": 1.0, "collapse": {"action": "record"}}},
            "`generator.collapse.action: off` must hold with `privacy`, but got record",
        ),
        ({"generator": MERF}, "`generator.noise_multiplier` or `generator.target_epsilon` must be given"),
        (
            {"generator": MERF, "teacher": SGD, "privacy": {"target_epsilon": 1.0}},
            "at most one part may leave its noise open to privacy.target_epsilon, but got gene",
        ),
        ({"cluster": {"workers": 2}}, "`cluster.workers: 1` must hold for a private generator"),
        (
            {"storage": "s3://bucket/runs"},
            "`storage` must be a local or shared folder for a private generator",
        ),
        ({"tracking": {"mlflow": "sqlite:////a.db"}}, "`tracking.mlflow` must be empty with `privacy`"),
        ({"privacy": {"target_epsilon": 51.0}}, "less than or equal to 50"),
        ({"privacy": {"target_epsilon": 0.0}}, "greater than 0"),
        ({"privacy": {"delta": 1.0}}, "less than 1"),
        ({"privacy": {"selection": "noisy"}}, "`score_noise_multiplier` or `target_epsilon` must be given"),
        ({"data": {"name": "digits", "image_size": 18}}, "`data.image_size` must be a multiple of 4 for gen"),
        (
            {"teacher": {"kind": "dpdfd", "accounting": "paper", "noise_multiplier": 1.0}},
            "`accounting: sound`",
        ),
        ({"teacher": {"kind": "dp_sdg"}}, "did you mean 'dp_sgd'?"),
    ],
)
def test_what_would_leak_or_cannot_be_is_refused_with_the_configuration(
    sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        private_config(**sections)
    assert said in str(refused.value)


def test_the_released_prior_needs_a_generator_that_releases_one() -> None:
    with pytest.raises(ConfigError, match=r"class_prior: released` needs a generator .*biggan_deep"):
        parse_config(tiny_settings(synthesis={"class_prior": "released"}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"teacher": SGD | {"noise_multiplier": 1.0}, "privacy": {"target_epsilon": 1.0}},
            "`privacy.target_epsilon` must be kept by the whole run, but got 1, and generator and teacher g",
        ),
        (
            {"teacher": {"epochs": 1}, "privacy": {"target_epsilon": 5.0}},
            "but teacher (classifier) releases private facts without any; use teacher.kind: dp_sgd",
        ),
        (
            {"teacher": SGD | {"noise_multiplier": 1.0, "expected_batch_size": 1000}},
            "`expected_batch_size <= images` must hold, but got 1000 for 400",
        ),
        (
            {
                "teacher": SGD,
                "generator": MERF | {"noise_multiplier": 0.5},
                "privacy": {"target_epsilon": 1.0},
            },
            "teacher: `target_epsilon` must be reachable, but got 1.0, and even noise_multiplier=1000 gives",
        ),
        ({"privacy": {"delta": 0.01}, "teacher": SGD | {"noise_multiplier": 1.0}}, "privacy: `delta < 1/N`"),
        (
            {"teacher": {"kind": "dpdfd", "answer": "votes", "noise_multiplier": 9.0, "teachers": 100}},
            "`images / teachers >= 16` must hold",
        ),
    ],
)
def test_what_the_images_cannot_bear_is_refused_before_ray(sections: dict[str, Any], said: str) -> None:
    config = parse_config(soft(private_settings(**sections)))
    with pytest.raises(ConfigError) as refused:
        plan_private_run(config, 400, 100, 0)
    assert said in str(refused.value)


def test_shards_that_would_miss_a_class_are_refused_before_ray() -> None:
    config, counts = private_config(), [40] * 9 + [10]
    copies = {"within_train": 0, "validation_in_train": 0, "test_in_train": 0}
    found = {
        "name": "few", "digest": "", "num_classes": 10, "class_names": [str(k) for k in range(10)],
        "channels": 1, "image_size": 16, "train": sum(counts), "validation": 50, "test": 50,
        "class_counts": counts, "duplicates": copies,
    }  # fmt: skip
    data, section = DataResult.model_validate(found), DpdfdSection(target_epsilon=1, teachers=20)
    with pytest.raises(ConfigError, match=r"every teacher must see every class, but got teachers=20"):
        check_part(config, section, data)
    check_part(config, section.model_copy(update={"teachers": 2}), data)
    check_part(config, config.generator, data)


def test_a_command_refuses_with_exit_code_2_before_ray_starts(tmp_path: Path) -> None:
    raw = private_settings(generator=MERF | {"noise_multiplier": 0.5}, privacy={"target_epsilon": 1.0})
    refused = kr("student", write_config(tmp_path, raw), check=False)
    assert refused.returncode == 2 and "`privacy.target_epsilon` must be kept" in refused.stderr
    assert not (tmp_path / "runs" / "tiny" / "generator" / "progress").exists()


# --- the ledger of the stages -------------------------------------------------------------------------------


def test_a_stage_that_says_nothing_makes_the_epsilon_infinite_and_is_named() -> None:
    told = event_record(gaussian(2.0))
    records = {"training": 4000, "validation": 500}
    good = [Reader("generator", ("training",), told), Reader("student", (), None)]
    found = whole_run(good, records, 1e-5)
    assert found["training"].holds and found["training"].covers == ("generator",)
    assert found["validation"].epsilon == 0 and not found["validation"].covers
    for forgotten in (Reader("peek", ("training",), None), Reader("peek", ("training", "validation"), told)):
        lost = whole_run([*good, forgotten], records, 1e-5)["training"]
        assert math.isinf(lost.epsilon) and lost.uncovered == ("peek",)
    unsaid = Stage(key=None, after=(), inputs=lambda: [], work=lambda folder: folder)  # type: ignore[arg-type,type-var]
    assert set(unsaid.reads) == {"training", "validation"}


def made(config: Config, tmp_path: Path) -> Pipeline:
    return Pipeline(config.model_copy(update={"storage": str(tmp_path)}), Display())


def test_the_student_of_a_private_run_stands_on_nothing_that_it_need_not(tmp_path: Path) -> None:
    hard = made(private_config(), tmp_path)
    assert hard.ancestors("student") == {"data", "generator", "student"}
    assert "checkpoints" not in hard.stages and "guarantee" in hard.stages
    teacher = SGD | {"noise_multiplier": 1.0}
    labelled = made(parse_config(soft(private_settings(teacher=teacher))), tmp_path)
    assert labelled.ancestors("student") == {"data", "generator", "teacher", "student"}
    noisy = {"selection": "noisy", "score_noise_multiplier": 9.0}
    selected = made(private_config(privacy=noisy), tmp_path)
    assert selected.ancestors("student") == {"data", "generator", "checkpoints", "tuning", "student"}
    votes = {"kind": "dpdfd", "answer": "votes", "noise_multiplier": 9.0}
    asked = made(parse_config(soft(private_settings(teacher=votes))), tmp_path)
    assert asked.stages["teacher"].after == ("data", "generator")
    assert list(asked.stages).index("generator") < list(asked.stages).index("teacher")
    papers = made(parse_config(tiny_settings()), tmp_path)
    assert papers.stages["generator"].after == ("data", "teacher") and papers.stages["student"].after == (
        "tuning",
    )
    with pytest.raises(ConfigError, match=r"`privacy.selection: noisy` must hold for the stage tuning"):
        hard.run_until("tuning")


# --- noisy scores -------------------------------------------------------------------------------------------


def test_noisy_scores_have_the_stated_spread_and_are_the_same_when_asked_again(tmp_path: Path) -> None:
    scores = NoisyScores(tmp_path, 20.0, 1000, 5)
    scores.begin()
    key = (tmp_path / KEY_FILE).read_bytes()
    told = torch.tensor([scores.of(0.5, f"student {k}", 0) for k in range(2000)], dtype=torch.float64)
    assert told.mean() == pytest.approx(0.5, abs=5 * 0.02 / 2000**0.5)
    assert told.std() == pytest.approx(0.02, rel=0.1)
    assert scores.of(0.5, "student 7", 0) == told[7] != scores.of(0.5, "student 7", 1)
    assert scores.of(0.001, "a", 0) >= 0.0 and scores.of(0.999, "b", 3) <= 1.0
    scores.begin()
    assert (tmp_path / KEY_FILE).read_bytes() == key, "a resumed stage replays its noise"
    scores.end()
    assert not (tmp_path / KEY_FILE).exists()


# --- parts --------------------------------------------------------------------------------------------------


def digits(config: Config, run: Path) -> Splits:
    splits = load_splits(config.data)
    save_splits(run / SPLITS_FILE, splits)
    return splits


def site_of(config: Config, run: Path) -> Site:
    generator = config.generator
    student = StudentSpec(generator, generator.epochs, config.synthesis, config.student.epochs, 0)
    return Site(path=run, config=config, seed=0, student=student)


def test_a_student_of_hard_labels_never_asks_for_a_teacher(tmp_path: Path) -> None:
    """There is none in the run's folder, and the prior is the one that was released."""
    raw = private_settings()
    raw["synthesis"]["class_prior"] = "released"
    config = parse_config(raw)
    splits, site = digits(config, tmp_path), site_of(config, tmp_path)
    parts = KnowledgeRecycling().parts(site)
    assert [part.name for part in parts] == ["generator", "student"]
    train_here(site, parts, "digits", lambda text: None)
    made = synthetic_set(tmp_path, site.student, config.classifier, splits, torch.device("cpu"))
    images, targets = made.regeneration(0)
    assert len(images) == len(splits.train) and not (tmp_path / "teacher").exists()
    prior = released_prior(tmp_path / checkpoint_file(5))
    assert torch.equal(made._prior, prior)
    counts = torch.bincount(targets.argmax(1), minlength=10) / len(targets)
    assert (counts - prior).abs().max() < 0.15


@pytest.mark.parametrize(
    "teacher",
    [
        SGD,
        {"kind": "dpdfd", "answer": "votes", "teachers": 3, "queries": 60, "rounds": 1, "steps": 20,
         "teacher_epochs": 1},
    ],
    ids=["dp_sgd", "votes"],
)  # fmt: skip
def test_a_private_teacher_takes_its_noise_from_the_target_and_labels(
    tmp_path: Path, teacher: dict[str, Any]
) -> None:
    """In a miniature directory, as in an audit: its guarantee and the generator's compose to the target."""
    raw = private_settings(
        data={"name": "digits", "image_size": 8, "max_train_images": 400, "max_test_images": 50},
        teacher=teacher,
        generator=MERF | {"noise_multiplier": 4.0},
        privacy={"target_epsilon": 6.0, "delta": 1e-5},
    )
    config = parse_config(soft(raw))
    digits(config, tmp_path)
    site = site_of(config, tmp_path)
    parts = KnowledgeRecycling().parts(site)
    asked = teacher["kind"] == "dpdfd"
    assert [part.name for part in parts[:2]] == (
        ["generator", "teacher"] if asked else ["teacher", "generator"]
    )
    train_here(site, parts, "digits", lambda text: None)
    found = ClassifierResult.model_validate(read_json(tmp_path / "teacher" / "done.json")["result"])
    assert found.privacy is not None and found.privacy.guarantee.guarantee
    stages = [
        Reader("teacher", ("training",), found.privacy.release),
        Reader("generator", ("training",), event_record(gaussian(4.0))),
    ]
    assert 5.9 < whole_run(stages, {"training": 400}, 1e-5)["training"].epsilon <= 6.0
    assert (
        load_classifier(tmp_path / "teacher" / "weights.safetensors", torch.device("cpu")).num_classes == 10
    )
    assert not list(tmp_path.rglob(KEY_FILE)), "keys are forgotten with their parts"
    own = method_of("teacher", config)
    assert own.title.startswith("Teacher, ") and own.parts(site)[-1].inputs == parts[1 if asked else 0].inputs


def test_an_open_generator_keeps_its_pace_when_it_ends_early() -> None:
    config = private_config(generator=MERF, privacy={"target_epsilon": 1.0})
    generator = generator_of(config.generator).up_to(2)
    own = generator.with_section(generator.section.model_copy(update={"noise_multiplier": 3.0}))  # type: ignore[attr-defined]
    assert (own.section.epochs, own.whole.epochs, own.whole.noise_multiplier) == (2, 5, 3.0)


# --- the report ---------------------------------------------------------------------------------------------


def promised(**keys: Any) -> dict[str, Any]:
    return {
        "run": "private", "guarantee": {"training": bound(1.0, covers=("generator",)) | keys}, "words": {},
        "artefacts": ["student.onnx"], "class_names": ["a"], "channels": 1, "image_size": 28,
        "training_images": 4000, "generator": "dp_merf", "checkpoint_epoch": 5, "synthesis": None,
        "student_parameters": 7, "versions": {},
    }  # fmt: skip


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kr_ray.report.build.draw_figures", lambda report: dict.fromkeys(alt_texts(report), "data:,")
    )


def page_of(raw: dict[str, Any]) -> str:
    report = validate_report(raw)
    both = render_page(report, ReportData()) + render_summary(report)
    return both.replace("\u00a0", " ").replace("\u2011", "-")


def test_the_page_says_what_the_figure_means_and_what_it_does_not_cover(no_drawing: None) -> None:
    page = page_of(fake_report() | {"released": promised(), "internal": ["teacher"]})
    for said in (
        "ε ≤ 1.00 at δ 1e-05 per image", "at most e^1.00 = 2.72 times as likely", "That is a strong promise.",
        "Validation images decided nothing.", "It does not cover this page", "A bounded guarantee.",
        "ε ≤ 1.00<small>δ 1e-05 per image</small>",
    ):  # fmt: skip
        assert said in page, said
    lost = {"epsilon": None, "guarantee": False, "covers": [], "uncovered": ["teacher"]}
    page = page_of(fake_report() | {"released": promised(**lost)})
    assert "It promises nothing to anybody, for teacher told of the real images" in page
    assert "A bounded guarantee." not in page and "strong promise" not in page
    assert "What leaves this run" not in page_of(fake_report())


def test_an_audit_that_finds_more_than_the_guarantee_allows_is_told_loudly(no_drawing: None) -> None:
    raw = fake_report() | {"released": promised()}
    raw["audit"]["lira"] = {"kr": constructed_arm(8.0)}
    report = validate_report(raw)
    found = report.audit.lira["kr"].canary.epsilon.clopper_pearson  # type: ignore[union-attr]
    assert found is not None and found > 1.0
    assert "more than the guarantee allows: one of the two is wrong." in guarantees.broken(report)
    assert guarantees.broken(report) in page_of(raw)
    raw["released"] = promised(epsilon=found + 1)
    assert guarantees.broken(validate_report(raw)) == ""


# --- whole runs ---------------------------------------------------------------------------------------------


def hand_composed(run: Path, names: tuple[str, ...]) -> float:
    """Epsilon of what the stages' results say that they released, at the default delta of so many images."""
    done = [read_json(run / name / "done.json")["result"]["privacy"]["release"] for name in names]
    return whole_run(
        [Reader(str(k), ("training",), one) for k, one in enumerate(done)], {"training": 160}, 1e-5
    )["training"].epsilon


def judged_in(stage: Path) -> list[list[float]]:
    """The validation scores of every student of a stage that has finished."""
    histories = [load_state(folder / "state.pt") for folder in (stage / "trials").iterdir()]
    return [
        [row["val_accuracy"] for row in one["history"] if "val_accuracy" in row] for one in histories if one
    ]


@pytest.mark.timeout(600)
def test_a_private_run_ends_with_the_epsilon_of_the_hand_and_exports_what_may_leave(tmp_path: Path) -> None:
    raw = private_settings(generator=MERF, privacy={"target_epsilon": 8.0})
    raw["audit"] = {"shadow": {"models": 2, "epochs": 1}, "copies": {"images": 100}}
    raw["student"]["equal_compute_teacher"] = False
    config, run = write_config(tmp_path, raw), tmp_path / "runs" / "tiny"
    printed = kr("run", config).stdout
    report = read_json(run / "report" / "report.json")
    epsilon = report["released"]["guarantee"]["training"]["epsilon"]
    assert epsilon == hand_composed(run, ("generator",)) and 7.9 < epsilon <= 8.0
    assert f"guarantee, training images: epsilon <= {epsilon:.4g} at delta = 1e-05 per image" in printed
    assert report["released"]["guarantee"]["training"]["covers"] == ["generator"]
    assert set(report) == {"schema_version", "released", "internal"} | set(report["internal"])
    assert "guarantee" in report["stages"] and "checkpoints" not in report["stages"]
    assert not list(run.rglob(KEY_FILE))
    assert (run / "generator" / "release.safetensors").exists()

    kr("export", config, "--images", "40")
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "released.json", "student.onnx", "synthetic",
    ]  # fmt: skip
    assert read_json(run / "export" / "released.json") == report["released"]
    told = json.dumps(report["released"])
    for secret in ("accuracy", "curve", "confusion", "class_counts", "digest", "loss", "auc"):
        assert secret not in told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_a_private_teacher_and_noisy_selection_killed_in_its_stages_is_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    """-9 in every stage that has a key: the same noise, one release, the same numbers (known keys, for
    comparison: the run says that it is no guarantee)."""
    known = {"insecure_noise_key": "test"}
    raw = private_settings(
        generator=MERF | known | {"noise_multiplier": 4.0, "epochs": 4, "checkpoint_every": 2},
        teacher=SGD | known,
        privacy=known | {"target_epsilon": 9.0, "selection": "noisy"},
    )
    raw = soft(raw)
    raw["audit"] = {"shadow": {"models": 2, "epochs": 1}, "copies": {"images": 100}}
    raw["student"]["equal_compute_teacher"] = False
    ends = []
    for name, stages in (("whole", ()), ("killed", ("teacher", "generator", "checkpoints", "tuning"))):
        config, run = write_config(tmp_path / name, raw), tmp_path / name / "runs" / "tiny"
        for stage in stages:
            kill_in(stage, config, run)
        kr("run", config)
        ends.append((run, read_json(run / "report" / "report.json")))
    (run, whole), (_, killed) = ends
    assert whole["released"] == killed["released"] and whole["checkpoints"] == killed["checkpoints"]
    assert whole["tuning"]["history"] == killed["tuning"]["history"]
    assert whole["student"]["test_cas"] == killed["student"]["test_cas"]
    promise = whole["released"]["guarantee"]
    assert promise["training"]["epsilon"] == hand_composed(run, ("generator", "teacher")) <= 9.0
    scored = [read_json(run / name / "done.json")["result"]["privacy"] for name in ("checkpoints", "tuning")]
    assert promise["validation"]["covers"] == ["checkpoints", "tuning"]
    assert promise["validation"]["epsilon"] == pytest.approx(
        epsilon_of([gaussian(scored[0]["noise_multiplier"], sum(one["scores"] for one in scored))], 1e-5)[0]
    )
    made = sum(len(trial) for trial in judged_in(run / "tuning"))
    assert made == scored[1]["scores"] == selection_scores(load_config(config))["tuning"]
    assert not promise["training"]["guarantee"] and promise["training"]["insecure_noise"]
    refused = kr("export", config, check=False)
    assert refused.returncode == 2 and "needs a guarantee" in refused.stderr
