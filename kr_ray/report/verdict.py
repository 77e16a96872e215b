"""The worst finding that was measured about what is handed on, and the sentences that put it first.

The attack that is quoted was chosen before any figure was known. Another one is quoted only where it finds
clearly more, after a correction for having picked it among all of them: the best of twelve attacks on noise
always looks like a find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from kr_ray.config.run import OWN_ARMS
from kr_ray.report.repetition import repetition
from kr_ray.report.schema import Report
from kr_ray.report.words import bind, count, percent
from kr_ray.report.worst_case import attack_name
from kr_ray.runs.figures import AttackFigures, LiraArm

STAYS_HERE = "teacher"
"""The arm, and the kind of further students, whose model is not handed on:
its figures are a comparison, never the verdict."""
MODELS_FOR_OWN_VARIANCES = 64
"""Below so many models a variance per sample is too rough to be quoted (Carlini et al. 2022, section
VI-C)."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Found:
    """What one attack found among one arm's canaries.

    Attributes:
        arm, attack: keys of the report; title: of the arm, in tables.
        chosen_before: whether the attack was; else it is the strongest of `attacks` and stands out among
            them.
        false_positive_rate: at which `share` was counted; None where only the AUC could be measured, which
            `share` then is.
        share, low, high: with a 95 % interval.
        hits, pairs: counts behind `share`, pairs of a run and a canary; None for an AUC.
        epsilon: lower bound shown by the attack chosen before, at 95 % confidence; None where not computable.
        ordinary: the same rate among ordinary images, None where not measured.
    """

    arm: str
    title: str
    attack: str
    chosen_before: bool
    attacks: int
    false_positive_rate: float | None
    share: float
    low: float
    high: float
    hits: int | None
    pairs: int | None
    epsilon: float | None
    delta: float
    ordinary: float | None

    @property
    def guessing(self) -> float:
        """What an attack that knows nothing reaches."""
        return 0.5 if self.false_positive_rate is None else self.false_positive_rate

    @property
    def leaks(self) -> bool:
        """Whether anything was found beyond guessing."""
        return self.low > self.guessing or bool(self.epsilon)


def handed_on(report: Report) -> dict[str, LiraArm]:
    """The audited arms that stand for something handed on."""
    arms = report.audit.lira if report.audit else {}
    return {name: arm for name, arm in arms.items() if (arm.kind or name) != STAYS_HERE}


def worst_found(report: Report) -> Found | None:
    """The worst of what the audited arms that are handed on showed; None where none of them was audited."""
    found = [found_in(name, arm) for name, arm in handed_on(report).items()]
    return (
        max(found, key=lambda one: (one.leaks, one.epsilon or 0.0, one.share - one.guessing))
        if found
        else None
    )


def found_in(name: str, arm: LiraArm, coarsest: float = 0.0) -> Found:
    """What the attack chosen beforehand, or one that finds clearly more, found among the arm's canaries.

    Args:
        coarsest: a false-positive rate that it is not counted below, so that several arms share one.
    """
    rate = finest_rate(arm.canary)
    rate = None if rate is None else max(rate, coarsest)
    stronger = _stronger_attack(arm, rate)
    attack, figures = stronger or (arm.headline, arm.canary)
    share, low, high, hits = at_rate(figures, rate)
    return Found(
        arm=name,
        title=arm.title or name,
        attack=attack,
        chosen_before=stronger is None,
        attacks=len(_quotable(arm)),
        false_positive_rate=rate,
        share=share,
        low=low,
        high=high,
        hits=hits,
        pairs=None if rate is None else figures.n_members,
        epsilon=arm.canary.epsilon.clopper_pearson,
        delta=arm.canary.epsilon.delta,
        ordinary=_ordinary(arm, attack, rate),
    )


def _quotable(arm: LiraArm) -> dict[str, AttackFigures]:
    """Attacks whose figures for the canaries may be quoted."""
    return {
        name: groups["canary"]
        for name, groups in arm.attacks.items()
        if "canary" in groups and ("per_sample" not in name or arm.models >= MODELS_FOR_OWN_VARIANCES)
    }


def _stronger_attack(arm: LiraArm, rate: float | None) -> tuple[str, AttackFigures] | None:
    """The attack of largest share, if even its corrected lower bound lies above the upper bound of the one
    chosen beforehand."""
    others = {name: figures for name, figures in _quotable(arm).items() if name != arm.headline}
    if not others:
        return None
    name = max(others, key=lambda key: at_rate(others[key], rate)[0])
    share, low, _, _ = at_rate(others[name], rate)
    n = others[name].n_members
    return (
        (name, others[name])
        if corrected_low(share, low, n, len(others)) > at_rate(arm.canary, rate)[2]
        else None
    )


def corrected_low(share: float, low: float, n: int, choices: int) -> float:
    """The 95 % lower bound after a Bonferroni correction for `choices` comparisons, by widening it on the
    logit scale.

    Args:
        share, low: in [0, 1], `low <= share`.
        n: pairs behind `share`, so that a share of 0 or 1 has a logit.
    """
    if low <= 0:
        return 0.0
    tail = (1 - CONFIDENCE) / 2
    wider = float(stats.norm.isf(tail / choices) / stats.norm.isf(tail))
    centre, bound = (_logit(min(max(value, 0.5 / n), 1 - 0.5 / n)) for value in (share, low))
    return 1 / (1 + math.exp(-(centre - wider * (centre - bound))))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def finest_rate(figures: AttackFigures) -> float | None:
    """The finest false-positive rate that the counts can bear."""
    if figures.tpr_at_01 is not None:
        return 0.001
    return None if figures.tpr_at_1 is None else 0.01


def at_rate(figures: AttackFigures, rate: float | None) -> tuple[float, float, float, int | None]:
    """Share, its 95 % interval and the hits at a false-positive rate, or the AUC and its interval."""
    fine = (figures.tpr_at_01, figures.ci_low, figures.ci_high, figures.true_positives)
    coarse = (figures.tpr_at_1, figures.ci_low_at_1, figures.ci_high_at_1, figures.true_positives_at_1)
    share, low, high, hits = fine if rate == 0.001 else coarse
    if rate is None or share is None or low is None or high is None:
        return figures.auc, figures.auc_low, figures.auc_high, None
    return share, low, high, hits


def _ordinary(arm: LiraArm, attack: str, rate: float | None) -> float | None:
    figures = arm.attacks.get(attack, {}).get(
        "population", arm.population if attack == arm.headline else None
    )
    return None if figures is None else at_rate(figures, rate)[0]


# --- sentences ----------------------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """The result in two or three sentences, the worst finding first; what was not measured is named."""
    return bind(" ".join(part for part in (_result(report), *_copied(report), *missing(report)) if part))


def shown(report: Report) -> list[str]:
    """The worst case for the list of what the report shows, then what the generated images show; empty where
    neither was looked at."""
    worst = worst_found(report)
    sentences = [_worst_in_full(report, worst)] if worst else []
    if report.audit and report.audit.copies:
        sentences.append(repetition(report.audit.copies).sentence)
    return [bind(sentence) for sentence in sentences]


def missing(report: Report) -> list[str]:
    """Which of the attacks were not made, a sentence each; empty before anything was attacked."""
    audit = report.audit
    if audit is None or (audit.kr is None and not audit.lira):
        return []
    sentences = []
    if not handed_on(report):
        only = " (only the teacher's was, which is not handed on)" if audit.lira else ""
        sentences.append(
            f"The worst case, the few images that a model may know by heart, was not audited{only}."
        )
    if audit.kr is None or audit.kr.student is None:
        sentences.append("The average attack was not made.")
    return sentences


def _copied(report: Report) -> list[str]:
    """A sentence where generated images repeat training images."""
    found = repetition(report.audit.copies) if report.audit and report.audit.copies else None
    return [found.short] if found and found.repeats else []


def _result(report: Report) -> str:
    worst, audit = worst_found(report), report.audit.kr if report.audit else None
    sentence = _accuracy(report)
    if worst is not None and worst.leaks:
        # An average beside it would only water the finding down: it stands in the list and the table below.
        subject = "it" if report.student and worst.arm == "kr" else _subject(worst)
        return (
            f"{sentence[:-1]}, but {_leak(subject, worst)}."
            if sentence
            else _capital(f"{_leak(subject, worst)}.")
        )
    if worst is not None:
        return f"{sentence[:-1]}; {_nothing(worst)}." if sentence else _capital(f"{_nothing(worst)}.")
    if report.student is None:
        return sentence or _without_models(report)
    if audit is None or audit.student is None:
        return (
            f"{sentence[:-1]}; whether its answers give away real training images has not been measured yet."
        )
    against = f"against the teacher: {percent(audit.teacher.auc_raw, 1)}; " if audit.teacher else ""
    return (
        f"{sentence[:-1]}, and an attacker shown one real training image and one other picks the training "
        "image "
        f"{percent(audit.student.auc_raw, 1)} times in 100 ({against}by guessing: 50)."
    )


def _accuracy(report: Report) -> str:
    teacher, student = report.teacher, report.student
    if student is None:
        return (
            f"The teacher, trained on the real images, classifies {percent(teacher.test_accuracy, 1)} % of "
            "the test images "
            "correctly; no student has been trained on synthetic images yet."
            if teacher
            else ""
        )
    beside = (
        f" (the teacher, trained on the real ones: {percent(teacher.test_accuracy, 1)} %)" if teacher else ""
    )
    return (
        f"Trained on synthetic images alone, the student classifies {percent(student.test_cas, 1)} % "
        f"of the real test images correctly{beside}."
    )


def _without_models(report: Report) -> str:
    if report.audit and report.audit.lira:
        return (
            "Only the worst-case audit of a model that is not handed on has "
            "been made of this run; see below what it found."
        )
    return "No stage of this run has produced a result yet."


def _leak(subject: str, found: Found) -> str:
    epsilon = f", and its epsilon is at least {found.epsilon:.2f}" if found.epsilon else ""
    return f"{subject} gives away training images: in the worst-case audit {_rate(found)}{epsilon}"


def _nothing(found: Found) -> str:
    return (
        f"the worst-case audit of {_subject(found)} found no more than guessing would: "
        f"{_rate(found)}, its 95 % interval "
        f"({percent(found.low, 1)} to {percent(found.high, 1)}) includes guessing, and no epsilon above 0 "
        "was shown; "
        "this is “not found”, not “protected”"
    )


def _rate(found: Found) -> str:
    """What is quoted, with the attack's name."""
    name = attack_name(found.attack)
    which = name if found.chosen_before else f"{name}, the strongest of {found.attacks} attacks"
    if found.false_positive_rate is None:
        return (
            f"{which} tells canaries that were trained on from others "
            f"{percent(found.share, 1)} times in 100 (by guessing: 50)"
        )
    accused = f"{round(1 / found.false_positive_rate):,}"
    return (
        f"an attacker who accepts one false accusation in {accused} recognises {percent(found.share, 1)} % "
        "of the canaries "
        f"(by guessing: {100 * found.guessing:g} %; attack: {which})"
    )


def _worst_in_full(report: Report, found: Found) -> str:
    """With counts and interval, for the list."""
    arms, text = len(handed_on(report)), f"Worst case ({found.title}"
    text += f", the worse of {arms} audited)" if arms > 1 else ")"
    text += f": {_rate(found)}"
    if found.hits is not None:
        text += f"; {count(found.hits)} of {count(found.pairs)} pairs of a repetition and a canary"
    text += f", 95 % interval {percent(found.low, 1)} to {percent(found.high, 1)} %."
    if found.ordinary is not None:
        text += f" Of ordinary images: {percent(found.ordinary, 1)} %."
    if not found.leaks:
        return f"{text} That cannot be told from guessing; it is “not found”, not “protected”."
    if found.epsilon:
        text += f" Whatever is claimed for this training, its epsilon is at least {found.epsilon:.2f}."
    return text


def _subject(found: Found) -> str:
    """`the student`; of a further student its whole title."""
    return f"the {found.title.lower()}" if found.arm in OWN_ARMS else f"the model “{found.title}”"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
