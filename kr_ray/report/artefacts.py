"""What is handed on, by what it was attacked, what was found, and what nobody tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kr_ray.config.run import OWN_ARMS
from kr_ray.report.guarantees import bound_words, contradiction, student_title, whole_run
from kr_ray.report.repetition import repetition
from kr_ray.report.schema import FurtherStudent, Report
from kr_ray.report.verdict import (
    STAYS_HERE,
    at_rate,
    corrected_low,
    finest_rate,
    found_in,
    handed_on,
)
from kr_ray.report.words import auc_interval, bind, count, percent
from kr_ray.report.worst_case import attack_name
from kr_ray.runs.figures import LiraArm

State = Literal["found", "nothing", "partly", "open"]
UNTRIED = "Attackers who hold its weights; reconstruction of images from it; stronger or later attacks."
"""Of every classifier."""


@dataclass(frozen=True)
class Test:
    """One test of one artefact: what was done, and what it found;
    `finds` whether that is more than guessing."""

    attack: str
    found: str
    finds: bool
    worst_case: bool = False


@dataclass(frozen=True)
class Artefact:
    """A row of the table.

    Attributes:
        open: what no test covers.
        if_nothing: what may be said where no test found anything and none of them was a worst case.
    """

    name: str
    note: str
    tests: tuple[Test, ...]
    open: str
    if_nothing: str

    @property
    def state(self) -> State:
        """Of the worst that was found; a search that is no worst case never counts as more than a part."""
        if not self.tests:
            return "open"
        if any(test.finds for test in self.tests):
            return "found"
        return "nothing" if any(test.worst_case for test in self.tests) else "partly"

    @property
    def verdict(self) -> str:
        """The same in words."""
        words = {
            "found": "leak found",
            "nothing": "tried, none found",
            "partly": self.if_nothing,
            "open": "not attacked",
        }
        return words[self.state]


def artefacts(report: Report) -> list[Artefact]:
    """Student, further students, synthetic set and generator, in this order."""
    looked_at, arms = _copies(report), handed_on(report)
    of_set, of_generator = (_membership(arms.get("kr"), which) for which in ("set", "generator"))
    own = {name: arm for name, arm in arms.items() if name in OWN_ARMS}
    unworst = "" if own else "The worst case (canaries). "
    return [
        Artefact(
            "Student",
            f"its answers to images{_promised(report)}",
            tuple([_worst_case(name, arm) for name, arm in own.items()] + _average(report)),
            f"{unworst}{UNTRIED}",
            "none on average; worst case not tried",
        ),
        *_further_students(report),
        Artefact(
            "Synthetic set",
            f"the generated images and their labels{_promised(report)}",
            looked_at + of_set,
            f"{'' if of_set else 'Attacks that infer membership from the set; '}linking its images to "
            "persons by other data; the teacher's soft labels beside the images.",
            "no copies found; not attacked",
        ),
        *_further_sets(report),
        Artefact(
            "Generator",
            f"its weights, or free sampling from it{_promised(report)}",
            looked_at + of_generator,
            f"Attacks that infer membership from its weights{'' if of_generator else ' or many samples'}; "
            "reconstruction from its weights. Only images drawn from it were looked at.",
            "no copies found; not attacked",
        ),
    ]


def _promised(report: Report) -> str:
    """The bound of all that leaves a private run together."""
    bound = whole_run(report)
    return f"; {bound_words(bound)}, together with all that leaves" if bound and bound.guarantee else ""


def _further_students(report: Report) -> list[Artefact]:
    """Those that were trained, then those that were audited without that."""
    arms = {name: arm for name, arm in handed_on(report).items() if name not in OWN_ARMS}
    rows = [
        _further(name, one, arms.get(name)) for name, one in report.students.items() if one.kind != STAYS_HERE
    ]
    alone = {name: arm for name, arm in arms.items() if name not in report.students}
    return rows + [
        _classifier(arm.title or name, arm.note, "", (_worst_case(name, arm),)) for name, arm in alone.items()
    ]


def _further(name: str, student: FurtherStudent, arm: LiraArm | None) -> Artefact:
    bound = student.guarantee
    note, wrong = student.note, contradiction(bound, arm)
    if bound:
        note += f"; {bound_words(bound)}" if bound.guarantee else f"; {bound_words(bound)} is no guarantee"
    tests = () if arm is None else (_worst_case(name, arm),)
    return _classifier(
        student_title(name, student), note.removeprefix("; "), f"{wrong} " if wrong else "", tests
    )


def _classifier(title: str, note: str, remark: str, tests: tuple[Test, ...]) -> Artefact:
    untried = "The average attack. " if tests else "The worst case (canaries); the average attack. "
    return Artefact(title, note, tests, f"{remark}{untried}{UNTRIED}", "not attacked")


def _worst_case(name: str, arm: LiraArm) -> Test:
    found = found_in(name, arm)
    attack = f"Worst case, {attack_name(found.attack)}, {count(arm.models)} repetitions"
    if name == "fixed_generator":
        attack += f" ({found.title})"
    epsilon = "not computable" if found.epsilon is None else f"at least {found.epsilon:.2f}"
    if found.false_positive_rate is None:
        text = f"AUC on canaries {percent(found.share, 1)} % (guessing: 50)"
    else:
        at = f"{100 * found.false_positive_rate:g}"
        text = f"{percent(found.share, 1)} % of canaries at {at} % false accusations (guessing: {at})"
    text += f", 95 % interval {percent(found.low, 1)} to {percent(found.high, 1)}; epsilon {epsilon}"
    return Test(attack, bind(text), found.leaks, worst_case=True)


def _further_sets(report: Report) -> list[Artefact]:
    """Sets of images of further students, as far as they were attacked."""
    return [
        Artefact(
            f"Set of {arm.title or name}",
            "the images that it hands on, and their labels",
            tests,
            "A search for copies, unless the method made one; linking its images to persons by other data.",
            "not attacked",
        )
        for name, arm in handed_on(report).items()
        if name not in OWN_ARMS and (tests := _membership(arm, "set"))
    ]


SET_ATTACKS = {"nearest": "nearest image", "density": "density of images", "denoising": "denoising loss"}


def _membership(arm: LiraArm | None, artefact: str) -> tuple[Test, ...]:
    """Attacks that infer membership from handed-on images; the first was chosen beforehand, the others must
    stand a correction for their number."""
    attacks = [one for one in arm.sets if one.artefact == artefact] if arm else []
    tests = []
    for place, one in enumerate(attacks):
        figures, rate = one.canary, finest_rate(one.canary)
        share, low, high, _ = at_rate(figures, rate)
        guessing = 0.5 if rate is None else rate
        surely = low if place == 0 else corrected_low(share, low, figures.n_members, len(attacks))
        at = "AUC on canaries" if rate is None else f"of canaries at {100 * rate:g} % false accusations"
        text = (
            f"{percent(share, 1)} % {at} (guessing: {100 * guessing:g}), 95 % interval {percent(low, 1)} to "
            f"{percent(high, 1)}"
        )
        of = "samples" if artefact == "generator" else "images"
        asked = f"{count(one.images)} {of}" if one.images else "of its weights"
        name = f"Membership by {SET_ATTACKS[one.attack]}, {asked}"
        runs = f", {count(arm.models)} repetitions" if arm else ""
        tests.append(Test(name + runs, bind(text), surely > guessing, worst_case=True))
    return tuple(tests)


def markdown(report: Report) -> str:
    """The table for a reader of text: what is handed on, attacked by, found, not covered."""
    lines = ["| handed on | verdict | attacked by, and found | not covered |", "|---|---|---|---|"]
    for row in artefacts(report):
        tests = " ".join(f"{test.attack}: {test.found}." for test in row.tests) or "Nothing was tried."
        cells = (row.name, row.verdict, tests, row.open)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _average(report: Report) -> list[Test]:
    audit = report.audit.kr if report.audit else None
    if audit is None or audit.student is None:
        return []
    interval = auc_interval(audit.student, audit)
    text = f"AUC {percent(audit.student.auc_raw, 1)} % (guessing: 50)"
    if interval is not None:
        text += f", 95 % interval {percent(interval[0], 1)} to {percent(interval[1], 1)}"
    finds = interval is not None and interval[0] > 0.5
    return [
        Test(f"Average, the paper's attack, {count(audit.shadow_models)} shadow models", bind(text), finds)
    ]


def _copies(report: Report) -> tuple[Test, ...]:
    copies = report.audit.copies if report.audit else None
    if copies is None:
        return ()
    found = repetition(copies)
    text = f"{count(copies.exact_copies)} exact copies; near-copies "
    text += ", ".join(
        f"{percent(space.near_copy_share, 1)} % by {name}" for name, space in copies.spaces.items()
    )
    text += f" ({percent(copies.quantile, 1)} expected)"
    return (
        Test(
            f"Search for copies in {count(copies.images)} fresh images of the generator",
            bind(text),
            found.repeats,
        ),
    )
