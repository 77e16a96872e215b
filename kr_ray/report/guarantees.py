"""What private methods of the run prove, in words: bounds of what any
attack can find, each of one student alone."""

from __future__ import annotations

from kr_ray.report.schema import FurtherStudent, Report
from kr_ray.report.words import bind
from kr_ray.runs.figures import Bound, LiraArm


def student_title(name: str, student: FurtherStudent) -> str:
    """As the arm of the worst-case audit is called, too: `DP-SGD: private`."""
    return f"{student.title or student.kind}: {name}"


def bound_words(bound: Bound) -> str:
    """`ε ≤ 2.00 at δ 1e-05 per image`."""
    return f"{epsilon_words(bound)} at {terms(bound)}"


def epsilon_words(bound: Bound) -> str:
    """`ε ≤ 2.00`."""
    return "ε infinite" if bound.epsilon is None else f"ε ≤ {bound.epsilon:.2f}"


def terms(bound: Bound) -> str:
    """`δ 1e-05 per image`."""
    unit = bound.unit if bound.group_size == 1 else f"{bound.unit} with up to {bound.group_size} images"
    return bind(f"δ {bound.delta:.2g} per {unit}")


def guaranteed(report: Report) -> dict[str, Bound]:
    """The students whose bound may be called a guarantee, by title."""
    return {
        student_title(name, student): student.guarantee
        for name, student in report.students.items()
        if student.guarantee and student.guarantee.guarantee
    }


def caveat(report: Report) -> str:
    """What no mathematics protects, and what it does."""
    text = (
        "The student’s training as a whole is not differentially private, so no mathematical bound limits "
        "what a stronger or future attack can learn."
    )
    bounds = "; ".join(f"{title}, {bound_words(bound)}" for title, bound in guaranteed(report).items())
    return (
        f"{text} Differential privacy bounds only what these further "
        f"students give away, each by itself: {bounds}."
        if bounds
        else text
    )


def contradiction(bound: Bound | None, arm: LiraArm | None) -> str:
    """Said where the audit has proved more leakage than the guarantee allows; else empty."""
    found = arm.canary.epsilon.clopper_pearson if arm else None
    if not (
        bound
        and bound.guarantee
        and bound.epsilon is not None
        and found is not None
        and found > bound.epsilon
    ):
        return ""
    return (
        f"The audit shows an epsilon of at least {found:.2f}, more than the "
        "guarantee allows: one of the two is wrong."
    )
