"""Further students in the report: a row each, what bounds what they
give away, and whether they were attacked."""

from __future__ import annotations

from typing import Any

import pytest
from test_report import constructed_arm, fake_report

from kr_ray.privacy.ledger import Guarantee
from kr_ray.report import guarantees, verdict
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.artefacts import artefacts
from kr_ray.report.build import ReportData, render_page, render_summary, result_rows
from kr_ray.report.schema import Report, validate_report


def bound(epsilon: float = 2.0, **keys: Any) -> dict[str, Any]:
    """As a private part's result.json holds it."""
    parts = {"accountant": "PLD", "covers": ("dp_sgd",), "uncovered": (), "records": 11959}
    return Guarantee(epsilon=epsilon, delta=1e-5, **(parts | keys)).record().model_dump()


def further(**keys: Any) -> dict[str, Any]:
    figures = {
        "test_accuracy": 0.71,
        "val_accuracy": 0.7,
        "steps": 900,
        "images_seen": 90_000,
        "seconds": 12.0,
    }
    return {"kind": "dp_sgd", "title": "DP-SGD", "note": "noisy, clipped gradients"} | figures | keys


def report_of(students: dict[str, Any], lira: dict[str, Any] | None = None) -> Report:
    raw = fake_report() | {"students": students}
    if lira:
        raw["audit"]["lira"] = lira
    return validate_report(raw)


@pytest.fixture(scope="module")
def leak() -> dict[str, Any]:
    return constructed_arm(8.0) | {"title": "DP-SGD: private", "kind": "dp_sgd"}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kr_ray.report.build.draw_figures", lambda report: dict.fromkeys(alt_texts(report), "data:,")
    )


def test_every_further_student_has_a_row_with_method_accuracy_and_guarantee() -> None:
    report = report_of(
        {"private": further(guarantee=bound()), "open": further(title="Student", kind="knowledge_recycling")}
    )
    rows = result_rows(report)
    assert list(rows) == ["teacher", "equal_compute", "student", "student_private", "student_open"]
    assert rows["student_private"].name == "DP-SGD: private" and rows["student_private"].accuracy == 0.71
    page = render_page(report, ReportData()).replace("\u00a0", " ").replace("\u2011", "-")
    for said in (
        "DP-SGD: private<small>noisy, clipped gradients</small>", "ε ≤ 2.00 at δ 1e-05 per image",
        "Student: open", "71.00",
        '<th scope="col">Guarantee</th>', "ε ≤ 2.00<small>δ 1e-05 per image</small>",
    ):  # fmt: skip
        assert said in page, said
    assert page.index("Student − teacher") < page.index("DP-SGD: private<small>")
    assert "Guarantee</th>" not in render_page(report_of({"open": further()}), ReportData())


def test_what_is_no_guarantee_is_not_shown_as_one() -> None:
    bounds = [
        bound(80.0),
        bound(insecure_noise=True),
        bound(float("inf"), uncovered=("prior",), accountant="none"),
    ]
    for number, one in enumerate(bounds):
        report = report_of({"private": further(guarantee=one)})
        assert not guarantees.guaranteed(report), number
        assert "each by itself" not in guarantees.caveat(report)
        page = render_page(report, ReportData())
        assert ">none<small>" in page and "is not one</small>" in page
    assert guarantees.bound_words(report.students["private"].guarantee).startswith("ε infinite")  # type: ignore[arg-type]


def test_a_guarantee_of_one_student_is_not_said_of_the_others() -> None:
    report = report_of({"private": further(guarantee=bound(unit="patient", group_size=4))})
    text = guarantees.caveat(report)
    assert text.startswith("The student’s training as a whole is not differentially private")
    assert "DP-SGD: private, ε ≤ 2.00" in text and "per patient with up to 4 images" in text
    for html in (render_page(report, ReportData()), render_summary(report)):
        assert text in html


def test_a_further_student_is_an_artefact_of_its_own_attacked_or_not(leak: dict[str, Any]) -> None:
    untouched = artefacts(report_of({"private": further(guarantee=bound())}))
    assert [row.name for row in untouched] == ["Student", "DP-SGD: private", "Synthetic set", "Generator"]
    assert untouched[1].verdict == "not attacked" and "ε ≤ 2.00" in untouched[1].note.replace("\u00a0", " ")
    student, private, *_ = artefacts(report_of({"private": further(guarantee=bound(1.0))}, {"private": leak}))
    assert student.state == "partly" and "The worst case (canaries)." in student.open
    assert (
        private.state == "found" and "more than the guarantee allows: one of the two is wrong" in private.open
    )
    allowed = artefacts(report_of({"private": further(guarantee=bound(49.0))}, {"private": leak}))[1]
    assert allowed.state == "found" and "one of the two is wrong" not in allowed.open
    alone = artefacts(report_of({}, {"private": leak}))[1]  # audited without having been trained in the run
    assert (alone.name, alone.state) == ("DP-SGD: private", "found")


def test_a_further_students_leak_is_named_as_its_own_and_a_teacher_by_another_name_stays_here(
    leak: dict[str, Any],
) -> None:
    text = verdict.headline(report_of({"private": further()}, {"private": leak}))
    assert "but the model “DP-SGD: private” gives away training images" in text
    longer = report_of(
        {"longer": further(kind="teacher", title="Teacher")}, {"longer": leak | {"kind": "teacher"}}
    )
    assert verdict.worst_found(longer) is None and len(artefacts(longer)) == 3
    assert "gives away" not in verdict.headline(longer)
