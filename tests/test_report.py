"""The report: schema, words, and the page as a browser shows it.
All numbers here are made up or Table 2's."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kr_ray.privacy.attacks import audit_arm
from kr_ray.privacy.metrics import accuracy_over_privacy
from kr_ray.privacy.scores import SampleScores
from kr_ray.report import figures, verdict, words, worst_case
from kr_ray.report.build import ReportData, render_page, render_summary, result_rows, write_report
from kr_ray.report.schema import Report, ReportError, validate_report
from kr_ray.runs.figures import Generation, LiraArm

CLASS_NAMES = [
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocytes",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
]
FIGURES = 12
OPTIONAL = ("teacher", "generator", "checkpoints", "tuning", "student", "audit", "stages")


# --- a made-up run with the figures of BloodMNIST's line in Table 2 -----------------------------------------


def fake_copies(rng: np.random.Generator) -> dict[str, Any]:
    space = {
        "threshold": 0.05, "near_copies": 12, "near_copy_share": 0.006, "ci_low": 0.0031, "ci_high": 0.0105,
        "data_copying": -1.2,
        "memorised_share": 0.31, "memorised_share_test": 0.33, "median_generated": 0.11, "median_test": 0.12,
        "histogram": {"edges": np.linspace(0, 0.3, 31).tolist(),
                      **{k: rng.dirichlet(np.ones(30)).tolist() for k in ("generated", "test")}},
    }  # fmt: skip
    found = {
        "n_real": 2000, "n_generated": 2000, "fid": 0.5, "kid": 0.01, "kid_sd": 0.002, "precision": 0.6,
        "recall": 0.7,
        "density": 0.8, "coverage": 0.75,
    }  # fmt: skip
    return {
        "images": 2000, "train": 11959, "test": 2000, "quantile": 0.01, "encoder": "teacher",
        "exact_copies": 0,
        "spaces": {"pixels": space, "features": space}, "fidelity": {"generated": found, "test": found},
    }  # fmt: skip


def fake_report(num_classes: int = 8, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    names = CLASS_NAMES if num_classes == 8 else [f"class {index}" for index in range(num_classes)]
    return {
        "schema_version": 1,
        "run": "TEST DATA, not a measurement",
        "seed": 0,
        "created": "2031-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "torchvision": "0.28.0", "ray": "2.60.0",
                     "optuna": "5.0.0"},
        "config": {"name": "fake", "seed": 0, "data": {"name": "bloodmnist", "image_size": 32},
                   "teacher": {"epochs": 500}},
        "data": {
            "name": "bloodmnist", "num_classes": num_classes, "channels": 3, "image_size": 32,
            "train": 11959, "validation": 1712, "test": 3421, "class_names": names,
            "duplicates": {"train_test": 3},
        },
        "device": "1 x imaginary GPU",
        "teacher": {
            "test_accuracy": 0.9749, "val_accuracy": 0.9772, "steps": 23500, "test_loss": 0.31,
            "equal_compute": {"test_accuracy": 0.9758, "steps": 235000},
            "curve": _classifier_curve(rng, 500, 0.977), "confusion": _confusion(rng, num_classes, 0.975),
        },
        "generator": {
            "architecture": "studiogan32", "parameters": {"generator": 9_340_000, "discriminator": 3_180_000},
            "epochs": 500,
            "curve": [{"epoch": e, "loss_d": 1.1 + rng.normal(0, 0.03),
                       "loss_g": 0.8 + e / 900 + rng.normal(0, 0.05)}
                      for e in range(1, 501, 5)],
            "collapse": [{"epoch": e, "agreement": 0.95 * (1 - np.exp(-e / 60)) if e < 440 else 0.5,
                          "diversity": 0.9 - e / 1500 if e < 440 else 0.08,
                          "alarm": e >= 440} for e in range(5, 501, 5)],
        },
        "checkpoints": [{"epoch": e,
                         "val_cas": float(0.93 - 0.5 * np.exp(-e / 40) - 0.25 * (e > 430) + rng.normal(0,
                                                                                                       0.006))}
                        for e in range(5, 501, 5)],
        "tuning": _tuning(rng),
        "student": {
            "test_cas": 0.9626, "val_cas": 0.9690, "steps": 235000, "images_seen": 59_795_000,
            "parameters": 2_777_674,
            "curve": _classifier_curve(rng, 500, 0.969), "confusion": _confusion(rng, num_classes, 0.963),
            "checkpoint_epoch": 385,
        },
        "audit": {"kr": {
            "teacher": _attacked(rng, 0.5120, 0.9749, num_classes),
            "student": _attacked(rng, 0.5038, 0.9626, num_classes),
            "attack_models": [{"class": k, "kind": ["logistic_regression", "svc_rbf", "random_forest"][k % 3],
                               "val_auc": 0.52 + 0.01 * (k % 4)} for k in range(num_classes)],
            "shadow_models": 10, "members": 11959, "non_members": 3421,
        }, "copies": fake_copies(rng)},
        "stages": {
            "teacher": {"wall_s": 412.3, "skipped": False, "images_per_s": 48211.0},
            "generator": {"wall_s": 7384.0, "skipped": True, "images_per_s": 3200.0},
            "checkpoints": {"wall_s": 5120.0, "skipped": False, "images_per_s": 24000.0},
            "tuning": {"wall_s": 9130.0, "skipped": False, "images_per_s": 31000.0},
            "student": {"wall_s": 2210.0, "skipped": False, "images_per_s": 27000.0},
            "audit": {"wall_s": 75.0, "skipped": False},
            "report": {"wall_s": 2.4, "skipped": False},
        },
    }  # fmt: skip


def _classifier_curve(rng: np.random.Generator, epochs: int, top: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": e,
            "train_loss": float(0.6 + 1.4 * np.exp(-e / 80) + rng.normal(0, 0.01)),
            "val_accuracy": float(min(top, top - 0.4 * np.exp(-e / 60) + rng.normal(0, 0.004)))
            if e % 10 == 0
            else None,
        }
        for e in range(1, epochs + 1, 3)
    ]


def _confusion(rng: np.random.Generator, k: int, accuracy: float) -> list[list[int]]:
    rows = rng.integers(200, 600, k)
    off = (1 - accuracy) / max(k - 1, 1)
    return [
        rng.multinomial(n, [accuracy if i == j else off for j in range(k)]).tolist()
        for i, n in enumerate(rows)
    ]


def _tuning(rng: np.random.Generator) -> dict[str, Any]:
    history = []
    for trial in range(50):
        std, rate, scale = float(rng.uniform(1, 2.5)), int(rng.integers(1, 11)), int(rng.integers(1, 11))
        pruned = trial > 5 and rng.random() < 0.5
        cas = 0.93 + 0.03 * scale / 10 - 0.02 * abs(std - 2.0) + rng.normal(0, 0.003) - 0.03 * pruned
        history.append(
            {
                "trial": trial, "latent_std": std, "regeneration_rate": rate, "cardinality_scale": scale,
                "val_cas": float(cas), "state": "PRUNED" if pruned else "COMPLETE",
                "resource": 3.0 if pruned else 9.0,
            }
        )  # fmt: skip
    best = max((t for t in history if t["state"] == "COMPLETE"), key=lambda t: t["val_cas"])
    return {
        "searcher": "optuna", "trials": 50, "default_cas": 0.930, "delta_cas": best["val_cas"] - 0.930,
        "best": {key: best[key] for key in ("latent_std", "regeneration_rate", "cardinality_scale", "val_cas",
                                            "trial")},
        "images_seen": 31_000_000, "images_unpruned": 60_000_000, "saved_share": 1 - 31 / 60,
        "history": history,
        "importance": {"latent_std": 0.31, "regeneration_rate": 0.08, "cardinality_scale": 0.61},
    }  # fmt: skip


def _attacked(rng: np.random.Generator, auc: float, accuracy: float, k: int) -> dict[str, Any]:
    fpr = np.linspace(0, 1, 150)
    return {
        "auc": max(auc, 0.5), "auc_raw": auc, "aop": accuracy_over_privacy(accuracy, auc),
        "roc": {"fpr": fpr, "tpr": fpr ** ((1 - auc) / auc)},
        "per_class": (auc + rng.normal(0, 0.01, k)).clip(0, 1).tolist(),
    }  # fmt: skip


def fake_samples(k: int = 8, n: int = 10, channels: int = 3) -> np.ndarray:
    """Coloured discs: clearly no one's cells."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    rng = np.random.default_rng(0)
    samples = np.empty((k, n, channels, 32, 32), np.uint8)
    for index in range(k):
        for sample in range(n):
            disc = (x - rng.normal(0, 0.1)) ** 2 + (y - rng.normal(0, 0.1)) ** 2 < rng.uniform(0.15, 0.5)
            tint = 120 + 100 * np.sin(index + np.arange(channels))
            samples[index, sample] = np.where(
                disc[None], tint[:, None, None], 235 + rng.integers(-6, 7, (channels, 32, 32))
            )
    return samples


# --- schema -------------------------------------------------------------------------------------------------


def test_json_is_what_was_given_and_fits_the_json_schema(written: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    given = fake_report()
    names = ["report.html", "report.json", "report_summary.html"]
    assert sorted(p.name for p in written.parent.iterdir()) == names and written.name == "report.html"
    read = json.loads(written.with_suffix(".json").read_text())
    jsonschema.validate(read, Report.model_json_schema())
    given["audit"]["kr"]["teacher"]["roc"] = read["audit"]["kr"]["teacher"][
        "roc"
    ]  # numpy arrays became lists
    given["audit"]["kr"]["student"]["roc"] = read["audit"]["kr"]["student"]["roc"]
    _assert_subset(given, read)
    assert validate_report(read) == validate_report(given)


def _assert_subset(given: Any, read: Any) -> None:
    """Everything given is in the file, unchanged (defaults may be added)."""
    if isinstance(given, dict):
        for key in given:
            _assert_subset(given[key], read[key])
    elif isinstance(given, list):
        assert len(given) == len(read)
        for left, right in zip(given, read, strict=True):
            _assert_subset(left, right)
    else:
        assert given == read


def test_all_mistakes_are_named_at_once() -> None:
    wrong = fake_report()
    wrong["teacher"]["test_accuracy"] = 97.49
    wrong["studnet"] = {}
    del wrong["seed"]
    wrong["audit"]["kr"]["student"]["auc"] = 0.4
    with pytest.raises(ReportError) as caught:
        validate_report(wrong)
    message = str(caught.value)
    assert message.startswith("4 mistake(s)")
    for part in ("teacher.test_accuracy", "97.49", "studnet", "seed", "audit.kr.student.auc"):
        assert part in message


def test_another_schema_version_and_misfit_matrices_are_refused() -> None:
    with pytest.raises(ReportError, match="schema_version"):
        validate_report(fake_report() | {"schema_version": 2})
    wrong = fake_report()
    wrong["student"]["confusion"] = [[1, 2], [3, 4]]
    with pytest.raises(ReportError, match=r"student\.confusion` must be 8 x 8"):
        validate_report(wrong)


def test_diverged_losses_become_null_and_are_drawn_as_gaps() -> None:
    report = fake_report()
    for point in report["generator"]["curve"][50:]:
        point["loss_g"], point["loss_d"] = float("nan"), float("inf")
    checked = validate_report(report)
    assert checked.generator is not None and checked.generator.curve[60].loss_g is None
    assert figures.generator_figure(checked.generator.curve).startswith("data:image/svg+xml")


# --- words --------------------------------------------------------------------------------------------------


def test_headline_says_what_was_measured_and_no_more() -> None:
    report = fake_report()
    full = verdict.headline(validate_report(report))
    assert all(
        part in full
        for part in (
            "96.3\u00a0%",
            "97.5\u00a0%",
            "50.4 times in 100 (against the teacher: 51.2; by guessing: 50)",
        )
    )
    del report["audit"]
    assert verdict.headline(validate_report(report)).endswith("has not been measured yet.")
    del report["student"]
    assert "no student has been trained" in verdict.headline(validate_report(report))
    del report["teacher"]
    assert verdict.headline(validate_report(report)) == "No stage of this run has produced a result yet."


@pytest.mark.parametrize(
    ("auc", "expected"), [(0.56, "finds something"), (0.503, "cannot be told"), (0.45, "not as “protected”")]
)
def test_findings_follow_the_interval(auc: float, expected: str) -> None:
    report = fake_report()
    report["audit"]["kr"]["student"] |= {"auc": max(auc, 0.5), "auc_raw": auc}
    assert expected in words.privacy_findings(validate_report(report))[0]


def test_numbers_in_words() -> None:
    assert [words.duration(s) for s in (0.04, 9.96, 41, 75, 3600, 7384, 59.9)] == [
        "0.0 s", "10 s", "41 s", "1 min 15 s", "1 h", "2 h 3 min", "1 min",
    ]  # fmt: skip
    assert (words.points(-0.0123), words.points(0.151), words.points(-0.00001)) == ("−1.23", "+15.10", "0.00")
    assert (words.percent(0.95831), words.percent(None), words.count(59795000)) == (
        "95.83",
        "–",
        "59,795,000",
    )


def test_wilson_interval_matches_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 20), (7, 20), (3293, 3421), (50, 50)):
        reference = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert words.wilson_interval(successes / n, n) == pytest.approx(
            (reference.low, reference.high), abs=1e-6
        )
    assert words.wilson_interval(0.5, 0) is None


def test_the_better_of_teacher_and_student_is_marked() -> None:
    rows = result_rows(validate_report(fake_report()))
    assert (rows["teacher"].best, rows["student"].best) == ({"accuracy"}, {"auc", "aop"})
    assert rows["equal_compute"].auc is None and not rows["equal_compute"].best


# --- the page -----------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a browser would fetch, the text, and unclosed tags."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's words: every figure is the same pixel (drawing them all takes seconds)."""
    for name in [name for name in dir(figures) if name.endswith("_figure")]:
        monkeypatch.setattr(
            figures, name, lambda *_: "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(fake_report(), ReportData(fake_samples()), tmp_path_factory.mktemp("report"))


def _page(report: dict[str, Any], data: ReportData | None = None) -> _Page:
    return _Page(
        render_page(validate_report(report), data or ReportData(fake_samples(report["data"]["num_classes"])))
    )


def test_page_is_self_contained_well_formed_and_complete(written: Path) -> None:
    html = written.read_text()
    page = _Page(html)
    assert not page.open and page.links and all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html and "not available" not in page.text
    for number in ("97.49", "96.26", "51.20", "50.38", "92.97", "94.81", "97.58", "235,000"):
        assert number in page.text
    assert page.tags.count("img") == FIGURES + 8
    # All figures are figures: decodable, and free of links to elsewhere (namespaces are names, not links).
    for link in page.links:
        body = base64.b64decode(link.partition(",")[2])
        assert body.startswith(b"\x89PNG") or (b"<svg" in body and b'href="http' not in body)


def test_same_report_same_bytes(written: Path) -> None:
    assert render_page(validate_report(fake_report()), ReportData(fake_samples())) == written.read_text()


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_a_partial_run_still_renders_and_says_what_is_missing(count: int) -> None:
    report = fake_report()
    for name in OPTIONAL[count:]:
        report.pop(name)
    page = _page(report)
    assert not page.open
    for stage in set(OPTIONAL[count:]) - {"stages"}:
        assert f"the stage {stage} has not run yet" in page.text
    for stage in OPTIONAL[:count]:
        assert f"the stage {stage} has not run yet" not in page.text


def test_sparse_sections_render() -> None:
    report = fake_report()
    report["student"] = {
        key: value
        for key, value in report["student"].items()
        if key not in ("curve", "confusion", "checkpoint_epoch")
    }
    report["teacher"]["equal_compute"] = None
    report["teacher"]["curve"] = report["teacher"]["curve"][:1]
    report["tuning"] |= {
        "history": [],
        "importance": None,
        "default_cas": None,
        "delta_cas": None,
        "images_seen": None,
    }
    report["audit"]["kr"] |= {"teacher": None, "attack_models": []}
    report["audit"]["kr"]["student"] |= {"roc": None, "per_class": []}
    report["checkpoints"] = [{"epoch": 5, "val_cas": 0.0}]
    page = _page(report, ReportData())
    assert not page.open and "not attacked" in page.text


@pytest.mark.usefixtures("no_drawing")
def test_a_search_that_found_nothing_better_is_said_so() -> None:
    report = fake_report()
    report["tuning"] |= {"delta_cas": -0.004, "saved_share": -1e-16}
    page = _page(report)
    assert "No trial beat the default parameters" in page.text and "−0.40" in page.text


@pytest.mark.usefixtures("no_drawing")
def test_every_row_names_its_work_and_the_students_labels_are_described() -> None:
    report = fake_report()
    teacher = {"cpu_seconds": 75.4, "gpu_seconds": 0.0, "images_trained": 6_000_000}
    report["teacher"] |= {"work": teacher}
    report["teacher"]["equal_compute"] |= {"work": teacher | {"cpu_seconds": 7384.0}}
    report["student"] |= {
        "work": teacher | {"gpu_seconds": 90.0, "images_generated": 597_950, "teacher_queries": 59_795_000},
        "labels": words.labels(Generation(labelling="gkd", view="seen", temperature=2.0)),
    }
    page = _page(report)
    for said in (
        "1 min 15 s CPU6,000,000 images trained on",
        "2 h 3 min CPU6,000,000",
        "1 min 15 s CPU, 1 min 30 s GPU6,000,000 images trained on, "
        "597,950 generated, 59,795,000 asked of the teacher",
        "answers to exactly what the student saw at each step, at temperature 2",
    ):
        assert said in page.text, said


def test_labels_in_words() -> None:
    assert (
        words.labels(Generation(labelling="gkd"))
        == "labelled by the teacher's answers to the clean generated images"
    )
    assert words.labels(Generation(labelling="hard", view="clean")) == "labelled by the strategy hard"
    several = words.labels(Generation(labelling="gkd", labellers=3))
    assert several == "labelled by the mean answer of 3 teachers to the clean generated images"
    long = words.labels(Generation(labelling="gkd", view="seen", labeller="equal_compute"))
    assert long.startswith("labelled by the answers of a teacher of as many steps as the student to exactly")


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("winner", "outcome"), [(7, "so it was chosen"), (-1, "so the default parameters stay")]
)
def test_a_confirmed_choice_says_what_decided(winner: int, outcome: str) -> None:
    report = fake_report()
    params = {"latent_std": 1.0, "regeneration_rate": 2, "cardinality_scale": 1}
    row = params | {"val_cas": [0.9, 0.92, 0.91], "mean": 0.91, "sd": 0.01}
    confirmed = {"trial": 7, "gain": 0.012, "standard_error": 0.008, "winner": winner}
    report["tuning"] |= {
        "delta_error": 0.009,
        "confirmed": confirmed | {"rows": [row | {"trial": trial} for trial in (7, 3, -1)]},
    }
    text = _page(report).text
    assert (
        "with 3 fresh seeds each, the best of 2 finalists (trial 7) gains "
        f"+1.20 ± 0.80 points over the defaults, {outcome}" in text
    )
    assert "± 0.9" in text and "1,712 validation images, at most" in text


def test_checkpoints_within_an_error_of_the_best_are_counted() -> None:
    report = fake_report()
    report["data"]["validation"] = 900
    report["checkpoints"] = [
        {"epoch": k, "val_cas": cas} for k, cas in enumerate((0.9, 0.895, 0.889, 0.5, 0.0))
    ]
    said = words.checkpoints_apart(validate_report(report))
    assert said == (
        "One standard error of the best CAS, on 900 validation images and with one seed, is 1.00 points; "
        "1 of the other 4 checkpoints lie within it."
    )


@pytest.mark.usefixtures("no_drawing")
def test_hostile_names_stay_text() -> None:
    report = fake_report()
    report["run"] = "<script>alert(1)</script>"
    report["data"]["class_names"][0] = '"><img src=x onerror=alert(1)>'
    report["config"]["name"] = "</code></pre><script>"
    page = _page(report)
    assert "script" not in page.tags and all(link.startswith("data:") for link in page.links)
    assert "<script>alert(1)</script>" in page.text


def test_dollar_signs_and_angle_brackets_in_figures_stay_text() -> None:
    uri = figures.confusion_figure([[3, 1], [0, 4]], ["$\\frac{<b>$", "&"])
    svg = base64.b64decode(uri.partition(",")[2]).decode()
    assert "$\\frac{&lt;b&gt;$" in svg


@pytest.mark.usefixtures("no_drawing")
def test_hostile_run_names_cannot_leave_the_printed_margin() -> None:
    report = fake_report() | {"run": 'x"; } </style><script>alert(1)</script> \\ \n'}
    for html in (render_page(validate_report(report), ReportData()), render_summary(validate_report(report))):
        page = _Page(html)
        assert "script" not in page.tags and not page.open
        style = html[html.index("<style>") : html.index("</style>")]
        assert r'content: "x\22 \3b  \7d  \3c \2f style' in style and "page " in style


FOREIGN_NAMES = [
    "嗜碱性粒细胞",
    "好酸球",
    "적혈구",
    "صفيحة دموية",
    "לימפוציט",
    "моноцит",
    "with\nbreak",
    "😀 cells",
]


@pytest.mark.filterwarnings("error")
def test_class_names_of_any_script_give_no_warning_and_are_shown() -> None:
    report = fake_report()
    report["data"]["class_names"] = FOREIGN_NAMES
    page = _page(report, ReportData())
    legend = page.text[page.text.index("Classes by number") :]
    for index, name in enumerate(FOREIGN_NAMES):
        assert f"{index} {name}" in legend
    uri = figures.confusion_figure(report["student"]["confusion"], FOREIGN_NAMES)
    svg = base64.b64decode(uri.partition(",")[2]).decode()
    assert "моноцит  5" in svg and "好酸球" not in svg  # what the font has is drawn, the rest is a number


def test_names_that_the_figure_shows_whole_need_no_legend() -> None:
    assert not figures.needs_legend(["cat", "dog"]) and not figures.needs_legend(["9", "Müller"])
    assert figures.needs_legend(["cat", "a name of more letters than fit"]) and figures.needs_legend(
        ["猫", "dog"]
    )
    assert not figures.needs_legend(["猫"] * 25)  # so many are not labelled at all


@pytest.mark.usefixtures("no_drawing")
def test_every_table_has_a_caption_and_every_image_a_text() -> None:
    raw = fake_report()
    raw["audit"]["lira"] = {"kr": constructed_arm(0.0, samples=40, models=4)}
    html = render_page(validate_report(raw), ReportData(fake_samples()))
    assert html.count("<table") == html.count("<caption>") > 8
    assert all(text for text in re.findall(r'<img [^>]*alt="([^"]*)"', html)) and 'alt=""' not in html
    assert html.count('class="optional"') == 2 * 5  # gradient steps and work alone


@pytest.mark.usefixtures("no_drawing")
def test_many_classes_and_grey_images() -> None:
    page = _page(fake_report(100), ReportData(fake_samples(100, 4, 1)))
    assert "the first 20 of 100" in _page(fake_report(100), ReportData(fake_samples(20, 4, 1))).text
    assert "88 more classes" in page.text and "Class by class (100 classes)" in page.text


@pytest.mark.usefixtures("no_drawing")
def test_samples_are_checked_and_a_png_grid_is_taken() -> None:
    for bad in (fake_samples(9), fake_samples().astype(np.float32), fake_samples()[:, 0], b"GIF89a"):
        with pytest.raises(ValueError, match="`samples`"):
            _page(fake_report(), ReportData(bad))
    png = base64.b64decode(_page(fake_report()).links[0].partition(",")[2])
    assert png.startswith(b"\x89PNG")
    assert (
        _page(fake_report(), ReportData(png)).links[0]
        == "data:image/png;base64," + base64.b64encode(png).decode()
    )


@pytest.mark.usefixtures("no_drawing")
def test_strip_holds_the_very_pixels() -> None:
    from io import BytesIO

    from PIL import Image

    samples = fake_samples()
    strip = np.asarray(Image.open(BytesIO(base64.b64decode(_page(fake_report()).links[0].partition(",")[2]))))
    assert strip.shape == (32, 10 * 34 - 2, 3)
    assert np.array_equal(strip[:, 34:66], samples[0, 1].transpose(1, 2, 0))


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )
    if found is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    return found


def _chromium(browser: str, profile: Path, *arguments: str) -> str:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command = [browser, *flags, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1280, 400])
def test_page_opens_in_a_browser(browser: str, written: Path, tmp_path: Path, width: int) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    _chromium(
        browser, tmp_path / "p1", f"--screenshot={shot}", f"--window-size={width},4000", written.as_uri()
    )
    image = np.asarray(Image.open(shot).convert("L"))
    # The last row of a page that had not rendered would be as empty as the first.
    assert image.shape == (4000, width) and shot.stat().st_size > 100_000
    assert (image < 128).any(axis=1).mean() > 0.4


def _pdf_pages(browser: str, page: Path, folder: Path) -> list[str]:
    """The text of each printed page."""
    pdf = folder / "page.pdf"
    _chromium(browser, folder / "printer", "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    reader = shutil.which("pdftotext")
    if reader is None:
        pytest.skip("no pdftotext on this machine: the printed pages were not read")
    text = subprocess.run(
        [reader, "-layout", str(pdf), "-"], capture_output=True, text=True, check=True
    ).stdout
    return text.rstrip("\f").split("\f")


def test_printed_pages_are_numbered_and_named_and_the_caveats_are_on_the_first(
    browser: str, written: Path, tmp_path: Path
) -> None:
    pages = _pdf_pages(browser, written, tmp_path)
    assert len(pages) <= 8
    assert "What this does not promise" in pages[0] and "No guarantee" in pages[0]
    for number, page in enumerate(pages, start=1):
        assert f"page {number} of {len(pages)}" in page and "TEST DATA, not a measurement" in page


def test_the_summary_is_one_sheet(browser: str, written: Path, tmp_path: Path) -> None:
    (sheet,) = _pdf_pages(browser, written.with_name("report_summary.html"), tmp_path)
    assert "Assessed by" in sheet and "not made" in sheet and "page 1 of 1" in sheet


def test_browser_shows_every_image_and_nothing_overflows(browser: str, written: Path, tmp_path: Path) -> None:
    """At 400 px: every image decodes, and the page itself does not scroll sideways."""
    probe = """<script>
      const frame = document.querySelector('iframe');
      frame.onload = () => {
        const doc = frame.contentDocument, images = [...doc.images];
        document.body.dataset.result = JSON.stringify([images.length,
                                                       images.filter(i => i.naturalWidth > 0).length,
                                                       doc.documentElement.scrollWidth]);
      };
    </script>"""
    html = written.read_text().replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "probe.html").write_text(
        f'<body><iframe width="400" height="800" style="border:0" srcdoc="{html}"></iframe>{probe}</body>'
    )
    dom = _chromium(
        browser,
        tmp_path / "p2",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (tmp_path / "probe.html").as_uri(),
    )
    found = re.search(r'data-result="\[(\d+),(\d+),(\d+)\]"', dom)
    assert found, dom[-500:]
    images, decoded, scroll_width = (int(value) for value in found.groups())
    assert images == decoded == 8 + FIGURES
    assert scroll_width <= 400


# --- the worst case -----------------------------------------------------------------------------------------


def constructed_arm(shift: float, samples: int = 200, models: int = 16) -> dict[str, Any]:
    """An audited arm whose logits of the given label rise by `shift` for
    members among the canaries, and by nothing otherwise."""
    rng = np.random.default_rng(0)

    def group(by: float, wrong: bool) -> SampleScores:
        half = rng.random((models // 2, samples)) < 0.5
        member = np.stack([side for coins in half for side in (coins, ~coins)])
        true = rng.integers(0, 8, samples)
        given = (true + 1) % 8 if wrong else true
        logits = rng.normal(size=(models, samples, 2, 8)).astype(np.float32)
        logits[:, np.arange(samples), :, given] += by * member.T[..., None]
        return SampleScores(logits, given, true, member)

    found = audit_arm(group(shift, True), group(0, False), None, 0)
    facts = {
        "canary_kind": "mislabeled",
        "canaries": samples,
        "population_samples": samples,
        "reference_images": 0,
    }
    facts |= {"test_accuracy": 0.9, "test_accuracy_sd": 0.01, "seconds": 60.0}
    return LiraArm.model_validate(vars(found) | facts).model_dump(mode="json", by_alias=True)


def test_the_worst_case_is_shown_with_counts_and_words() -> None:
    raw = fake_report()
    raw["audit"]["lira"] = {"teacher": constructed_arm(8.0), "kr": constructed_arm(0.0)}
    report = validate_report(raw)
    again = validate_report(report.model_dump(mode="json", by_alias=True))
    assert again == report
    teacher, student = worst_case.rows(report)
    found = raw["audit"]["lira"]["teacher"]["canary"]
    assert teacher.canary.counts == f"{found['true_positives']:,} of 1,600" and found["true_positives"] > 1000
    assert teacher.canary.value == f"{100 * found['true_positives'] / 1600:.1f}"
    assert float(student.canary.value) < 3 and float(teacher.population.value) < 3
    page = render_page(report, ReportData())
    for text in (
        teacher.canary.counts,
        "LiRA online, fixed variance, logit score",
        "No guarantee without differential privacy",
        "log-log",
    ):
        assert text in page
    headline = [row for row in worst_case.attack_rows(report) if row["headline"]]
    assert len(headline) == 4 and len(worst_case.attack_rows(report)) == 4 * len(
        raw["audit"]["lira"]["kr"]["attacks"]
    )
    assert any("memory" in sentence for sentence in worst_case.findings(report))


def test_a_rate_that_the_counts_cannot_bear_is_not_printed() -> None:
    raw = fake_report()
    raw["audit"] = {"lira": {"teacher": constructed_arm(8.0, samples=100, models=8)}}
    (row,) = worst_case.rows(validate_report(raw))
    assert (row.canary.value, row.canary.interval) == (
        "–",
        "needs 1,000 pairs, has 400",
    ) and "1 % FPR" in row.canary.counts
    assert "not been audited" not in render_page(validate_report(raw), ReportData())
    assert "The worst case has not been audited" in render_page(validate_report(fake_report()), ReportData())
