"""What an assessment of anonymity asks of such a report: unit, attacker, tests made and not made, who, when,
with what.

The European Data Protection Board's Opinion 28/2024 (17 December 2024) calls a model anonymous where both the
extraction of personal data from it and obtaining them by queries are insignificantly likely for every person,
judged case by case on documented tests. Opinion 05/2014 of the Article 29 Working Party (WP 216) names the
three risks: singling out, linkability, inference. This page documents tests; it judges neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kr_ray.report.repetition import repetition
from kr_ray.report.schema import Report
from kr_ray.report.verdict import handed_on
from kr_ray.report.words import bind, count, date, percent
from kr_ray.report.worst_case import CANARY_WORDS
from kr_ray.runs.figures import LiraArm

UNIT = (
    "One image. Every figure says how surely a single image is recognised. A person with several images is "
    "exposed more than "
    "any figure here says, and images of one person on both sides of a split blur all of them."
)
Made = Literal["made", "in part", "not made"]


@dataclass(frozen=True)
class Fact:
    """A term of the assessment and what there is to say."""

    term: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class RiskTest:
    """A risk, the test that bears on it, whether it was made, and on what."""

    risk: str
    test: str
    made: Made
    detail: str


def facts(report: Report) -> list[Fact]:
    """Unit, attacker's knowledge, who, when, with what."""
    versions, data = report.versions, report.data
    parts = [f"{name} {version}" for name, version in versions.items() if name not in ("commit", "kr_ray")]
    version, commit = (versions.get(name, "(not recorded)") for name in ("kr_ray", "commit"))
    program = f"kr_ray {version}, commit {commit}"
    sizes = (
        f"{count(data.train)} training, {count(data.validation)} validation, {count(data.test)} test images"
    )
    made_by = f"{program}; {', '.join(parts)}; on {report.device}. The program does not know who started it."
    return [
        Fact("Data", (f"{data.name}: {sizes}.",)),
        Fact("Unit", (UNIT,)),
        Fact("Attacker’s knowledge", tuple(_attackers(report))),
        Fact("Made by", (made_by,)),
        Fact("When", (f"{date(report.created)}; seed {report.seed}.",)),
    ]


def _attackers(report: Report) -> list[str]:
    audit = report.audit
    texts = []
    if audit and audit.kr:
        texts.append(
            f"Average attack: has {count(report.data.validation)} images like the training images, trains "
            f"{count(audit.kr.shadow_models)} imitations of the teacher on them, and sees the attacked "
            "model’s full answer (logits) to "
            "an image; does not see its weights."
        )
    if arms := _audited(report):
        arm = next(iter(arms.values()))
        texts.append(
            f"Worst case: knows the recipe, {count(arm.models - 1)} other models made by it, which of them "
            "were trained on the image "
            f"in question, and the label it was given; sees full answers (logits) to {count(arm.queries)} "
            "views of it. Stronger than "
            "most real attackers; does not see weights."
        )
    if audit and audit.copies:
        texts.append(
            "Search for copies: made by the holder of the training images; "
            "nobody else could compare with all of them."
        )
    return texts or ["No attack was made."]


def _audited(report: Report) -> dict[str, LiraArm]:
    return report.audit.lira if report.audit else {}


def tests(report: Report) -> list[RiskTest]:
    """All risks that such an assessment names, tested or not."""
    return [_average(report), _worst(report), _copies(report), *NOT_MADE]


def _average(report: Report) -> RiskTest:
    test, audit = "membership inference, average over images", report.audit.kr if report.audit else None
    if audit is None or audit.student is None:
        return RiskTest("Singling out", test, "not made", "No attack on the student was run.")
    found = f"Student: AUC {percent(audit.student.auc_raw, 1)} % (guessing: 50)"
    tried = f" on {count(audit.members)} training and {count(audit.non_members)} other images."
    return RiskTest("Singling out", test, "made", bind(found + tried))


def _worst(report: Report) -> RiskTest:
    test, arms = "membership inference, most vulnerable images", handed_on(report)
    if not arms:
        only = "Only the teacher was audited, which is not handed on." if _audited(report) else "Not audited."
        return RiskTest("Singling out", test, "not made", only)
    first = next(iter(arms.values()))
    detail = (
        f"{', '.join(arm.title or name for name, arm in arms.items())}: {count(first.models)} repetitions, "
        f"{count(first.canaries)} canaries ({CANARY_WORDS.get(first.canary_kind, first.canary_kind)})."
    )
    return RiskTest("Singling out", test, "made", bind(detail))


def _copies(report: Report) -> RiskTest:
    risk, test = "Extraction", "generated images that repeat training images"
    if report.audit is None or report.audit.copies is None:
        return RiskTest(risk, test, "not made", "The search for copies has not run.")
    return RiskTest(risk, test, "in part", bind(repetition(report.audit.copies).sentence))


NOT_MADE = (
    RiskTest(
        "Extraction",
        "reconstruction or inversion of training images from weights or answers",
        "not made",
        "Neither student nor generator was attacked so.",
    ),
    RiskTest(
        "Linkability",
        "linking an image of the set, or an answer, to a record or a person elsewhere",
        "not made",
        "Needs the other data; a matter for whoever knows them.",
    ),
    RiskTest(
        "Inference",
        "concluding a person’s attribute from model, set or generator",
        "not made",
        "Membership alone can be one: that an image was in a set of patients says that its person is one.",
    ),
    RiskTest(
        "Membership from the set or the generator",
        "attacks on the synthetic set and on the generator’s weights",
        "not made",
        "Only copies were searched for.",
    ),
)
"""What this program has no test for."""
