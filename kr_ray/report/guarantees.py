"""What private methods of the run prove, in words: bounds of what any attack can find, of all that leaves a
private run, or of one student alone."""

from __future__ import annotations

import math

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


def whole_run(report: Report) -> Bound | None:
    """Of what leaves a private run: to the people of the training images."""
    return report.released.guarantee.get("training") if report.released else None


def meaning(bound: Bound) -> str:
    """What the figure means for one person."""
    if bound.epsilon is None or not bound.guarantee:
        return f"It promises nothing to anybody{_reason(bound)}."
    times = math.exp(bound.epsilon)
    factor = f"{times:.3g}" if times < 1e4 else f"{times:.1e}"
    return (
        "Whatever somebody may see in, or conclude from, all that leaves this run, by any method and with "
        f"any other knowledge, is at most e^{bound.epsilon:.2f} = {factor} times as likely with one "
        f"{bound.unit}’s data among the training images as without, but for a probability of "
        f"{bound.delta:.2g}. {_verdict(bound.epsilon)}"
    )


def _reason(bound: Bound) -> str:
    if bound.uncovered:
        parts = " and ".join(bound.uncovered)
        return f", for {parts} told of the real images without noise that anybody accounted for"
    if bound.insecure_noise:
        return ", for the key of the noise is known, so that it can be subtracted"
    return ", for so large an epsilon bounds no person’s risk"


def _verdict(epsilon: float) -> str:
    if epsilon <= 1:
        return "That is a strong promise."
    return "That is a moderate promise." if epsilon < 5 else "That is a weak promise."


def scope(report: Report) -> list[str]:
    """What the guarantee of a private run covers, and what it does not, in sentences."""
    released = report.released
    if released is None:
        return []
    said = [
        f"It covers what `kr export` writes: the student, the synthetic set and the released part of this "
        f"report, made of {released.training_images:,} training images (a number that counts as public)."
    ]
    if "validation" in released.guarantee:
        bound = released.guarantee["validation"]
        said.append(
            f"Validation images chose checkpoint and parameters by noisy scores: {bound_words(bound)}."
        )
    else:
        said.append("Validation images decided nothing.")
    return [
        *said,
        "It does not cover this page, whose scores, curves and audits are of real images: it stays inside. "
        "Nor does it cover test images, further students, or earlier versions of this run.",
    ]


def guaranteed(report: Report) -> dict[str, Bound]:
    """The students whose bound may be called a guarantee, by title."""
    return {
        student_title(name, student): student.guarantee
        for name, student in report.students.items()
        if student.guarantee and student.guarantee.guarantee
    }


def caveat(report: Report) -> str:
    """What no mathematics protects, and what it does."""
    bounds = "; ".join(f"{title}, {bound_words(bound)}" for title, bound in guaranteed(report).items())
    further = (
        f" Differential privacy bounds only what these further students give away, each by itself: {bounds}."
        if bounds
        else ""
    )
    whole = whole_run(report)
    if whole is None or not whole.guarantee:
        return (
            "The student’s training as a whole is not differentially private, so no mathematical bound "
            f"limits what a stronger or future attack can learn.{further}"
        )
    return (
        f"Differential privacy bounds what anybody can learn of a training image from student, generator and "
        f"synthetic set: {bound_words(whole)}. It covers neither this page nor validation and test images."
        f"{further}"
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


def broken(report: Report) -> str:
    """Said where the worst-case audit of the run's own student contradicts the guarantee; else empty."""
    arms = report.audit.lira if report.audit else {}
    return contradiction(whole_run(report), arms.get("kr"))
