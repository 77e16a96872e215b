"""Accuracy against leak: one row per way of making a classifier, who is beaten by whom, and what may be
recommended to whoever must decide.

Every method was audited with the same canaries in the same runs, so the rows can be compared; the
false-positive rate of the leak is the finest that all rows' counts bear. Which method dominates which is read
off measured values; a recommendation asks more: that the whole interval of the leak lies below the limit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kr_ray.report.guarantees import bound_words, contradiction
from kr_ray.report.verdict import STAYS_HERE, Found, finest_rate, found_in
from kr_ray.report.words import bind, count, percent, wilson_interval
from kr_ray.runs.figures import Bound, Frontier, FrontierRow, Leak, LiraArm, Matched
from kr_ray.runs.results import ClassifierResult, Result

MOST_RUNS_ADVISED = 10_000
"""More runs than this are not advised, whatever would separate an interval from a limit."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A method on the whole training split.

    Attributes:
        kind, title, note: of the method.
        result: of the classifier that would be handed on; None: not trained yet.
        stages: results of all stages that it is made of, its own included.
        folders: of the run that hold what it leaves.
        on_gpu: whether stages that count no processor time held a GPU.
        promised: what the whole run proves of it, where its own result says nothing.
    """

    name: str
    kind: str
    title: str
    note: str
    result: ClassifierResult | None
    stages: Sequence[Result]
    folders: Sequence[str]
    on_gpu: bool
    promised: Bound | None = None


def frontier_of(
    *,
    trained: Sequence[Trained],
    lira: Mapping[str, LiraArm],
    missing: Mapping[str, Sequence[int]],
    matched: Mapping[str, Matched],
    unmatched: Mapping[str, str],
    test_images: int,
    models: int,
    asked_models: int,
    leak_limit: float | None,
    match: str,
    settings: Sequence[str],
) -> Frontier:
    """All methods in one table, in the order in which they were asked for.

    Args:
        lira: what the audit found, by method; those without enough runs are not in it.
        missing: numbers of the audit's runs that a method lacks.
        matched, unmatched: methods that were tuned to equal accuracy; those that were not, and why.
        models, asked_models: runs of the whole audit, after and before a budget cut them.
    """
    rates = [finest_rate(arm.canary) for arm in lira.values()]
    rate = None if not rates or None in rates else max(rate for rate in rates if rate is not None)
    rows = [
        _row(one, lira.get(one.name), list(missing.get(one.name, [])), rate, test_images) for one in trained
    ]
    rows = [
        row.model_copy(
            update={"matched": matched.get(row.name), "unmatched": unmatched.get(row.name, "")}
            | {"dominated_by": dominators(row, rows)}
        )
        for row in rows
    ]
    found = Frontier(
        rows=rows, models=models, asked_models=asked_models, leak_limit=leak_limit, false_positive_rate=rate,
        match=match, recommended="", settings=list(settings),
    )  # fmt: skip
    best = recommended(found)
    return found.model_copy(update={"recommended": best.name if best else ""})


def _row(
    one: Trained, arm: LiraArm | None, missing: list[int], rate: float | None, test_images: int
) -> FrontierRow:
    result = one.result
    bound = result.privacy.guarantee if result and result.privacy else one.promised
    interval = wilson_interval(result.test_accuracy, test_images) if result else None
    cpu_s, gpu_s = _seconds(one) if result else (None, None)
    return FrontierRow(
        name=one.name,
        kind=one.kind,
        title=one.title,
        note=one.note,
        handed_on=one.kind != STAYS_HERE,
        accuracy=result.test_accuracy if result else None,
        accuracy_low=interval[0] if interval else None,
        accuracy_high=interval[1] if interval else None,
        audited_accuracy=arm.test_accuracy if arm else None,
        audited_sd=arm.test_accuracy_sd if arm else None,
        leak=_leak(one.name, arm, rate) if arm else None,
        runs=arm.models if arm else 0,
        missing=missing,
        bound=bound,
        alarm=contradiction(bound, arm),
        cpu_seconds=cpu_s,
        gpu_seconds=gpu_s,
        folders=list(one.folders),
        matched=None,
        unmatched="",
    )


def _leak(name: str, arm: LiraArm, rate: float | None) -> Leak:
    found: Found = found_in(name, arm, coarsest=rate or 0.0)
    return Leak(
        attack=found.attack,
        chosen_before=found.chosen_before,
        false_positive_rate=found.false_positive_rate,
        share=found.share,
        low=found.low,
        high=found.high,
        hits=found.hits,
        pairs=found.pairs,
        ordinary=found.ordinary,
        epsilon=found.epsilon,
    )


def _seconds(one: Trained) -> tuple[float, float]:
    """Processor and GPU seconds of all stages together; a stage that counts none, with its wall time."""
    cpu_s = gpu_s = 0.0
    for stage in one.stages:
        if isinstance(stage, ClassifierResult) and stage.work:
            cpu_s, gpu_s = cpu_s + stage.work.cpu_seconds, gpu_s + stage.work.gpu_seconds
        else:
            cpu_s, gpu_s = cpu_s + stage.wall_s, gpu_s + stage.wall_s * one.on_gpu
    return cpu_s, gpu_s


# --- who is beaten by whom ----------------------------------------------------------------------------------


def dominators(row: FrontierRow, rows: Sequence[FrontierRow]) -> list[str]:
    """Methods that are at least as accurate, leak no more, prove no less, and are better in one of these."""
    if (here := _point(row)) is None:
        return []
    found = []
    for other in rows:
        there = _point(other)
        if other.name != row.name and there and there != here and all(map(operator.le, there, here)):
            found.append(other.name)
    return found


def _point(row: FrontierRow) -> tuple[float, float, float] | None:
    """What is to be small: mistakes, leak, and the epsilon of a guarantee (infinite without one); None where
    accuracy or leak was not measured."""
    if row.accuracy is None or row.leak is None:
        return None
    bound = row.bound
    epsilon = bound.epsilon if bound and bound.guarantee and not row.alarm else None
    return 1 - row.accuracy, row.leak.share, math.inf if epsilon is None else epsilon


def surely_beaten(row: FrontierRow, rows: Sequence[FrontierRow]) -> bool:
    """Whether one of those that dominate it does so with both intervals apart."""
    by_name = {other.name: other for other in rows}

    def apart(other: FrontierRow) -> bool:
        return bool(
            row.leak
            and other.leak
            and other.leak.high < row.leak.low
            and (other.accuracy_low or 0.0) > (row.accuracy_high or 1.0)
        )

    return any(apart(by_name[name]) for name in row.dominated_by if name in by_name)


# --- the recommendation -------------------------------------------------------------------------------------


def below(row: FrontierRow, limit: float) -> bool:
    """Whether the whole interval of a leak lies below the limit, and nothing contradicts it."""
    return bool(
        row.handed_on
        and row.accuracy is not None
        and row.leak
        and row.leak.false_positive_rate is not None
        and row.leak.high <= limit
        and not row.alarm
    )


def recommended(frontier: Frontier) -> FrontierRow | None:
    """The most accurate method that is handed on and whose leak lies below the limit; of equals the one that
    leaks less. None where there is no limit, or no such method."""
    if (limit := frontier.leak_limit) is None:
        return None
    fit = [row for row in frontier.rows if below(row, limit)]
    return max(
        fit, key=lambda row: (row.accuracy or 0.0, -(row.leak.high if row.leak else 1.0)), default=None
    )


def proved_rate(bound: Bound, false_positive_rate: float) -> float | None:
    """What share any attack can recognise at a false-positive rate, by an (epsilon, delta) guarantee; None
    where that is no guarantee or bounds nothing."""
    if not bound.guarantee or bound.epsilon is None:
        return None
    # The second form bounds attacks that err on the other side (Kairouz, Oh and Viswanath 2015).
    shares = (
        math.exp(bound.epsilon) * false_positive_rate + bound.delta,
        1 - math.exp(-bound.epsilon) * (1 - bound.delta - false_positive_rate),
    )
    share = min(shares)
    return share if share < 1 else None


@dataclass(frozen=True)
class Advice:
    """The recommendation in words.

    Attributes:
        answer: one or two sentences.
        promises, promises_not: what the recommended method's figures say, and what they do not; both empty
            without a recommendation.
    """

    answer: str
    promises: tuple[str, ...] = ()
    promises_not: tuple[str, ...] = ()


def advice(frontier: Frontier) -> Advice:
    """For the data-protection officer: which method, what it promises and what not."""
    if frontier.leak_limit is None:
        return Advice(bind(_without_limit(frontier)))
    best = recommended(frontier)
    if best is None:
        return Advice(bind(_none_fits(frontier, frontier.leak_limit)))
    return Advice(
        bind(_recommends(frontier, best, frontier.leak_limit)),
        tuple(bind(text) for text in _promises(frontier, best)),
        tuple(bind(text) for text in _promises_not(frontier, best)),
    )


def accused(rate: float | None) -> str:
    """`one false accusation in 1,000`."""
    return f"one false accusation in {round(1 / rate):,}" if rate else "any number of false accusations"


def _limit_words(frontier: Frontier, limit: float) -> str:
    at = accused(frontier.false_positive_rate)
    return f"{100 * limit:g} % of the canaries at {at}"


def _without_limit(frontier: Frontier) -> str:
    rows = [row for row in frontier.rows if row.handed_on and not row.dominated_by and _point(row)]
    if not rows:
        return "No method that is handed on has been trained and audited yet, so nothing can be recommended."
    named = "; ".join(_in_short(row) for row in sorted(rows, key=lambda row: -(row.accuracy or 0.0)))
    return (
        f"No limit for the leak was named (--leak-limit), so none is recommended. Not beaten by measured "
        f"values: "
        f"{named}."
    )


def _in_short(row: FrontierRow) -> str:
    leak = row.leak
    if leak is None:
        return row.title
    return (
        f"{row.title} with {percent(row.accuracy, 1)} % accuracy and {percent(leak.share, 1)} % of canaries "
        f"recognised ({percent(leak.low, 1)} to {percent(leak.high, 1)})"
    )


def _none_fits(frontier: Frontier, limit: float) -> str:
    """Why nothing is recommended: above the limit, or not to be told from it, or not measured."""
    said = [f"None: no method is shown to leak less than {_limit_words(frontier, limit)}."]
    rows = [row for row in frontier.rows if row.handed_on]
    if frontier.false_positive_rate is None:
        said.append("There are too few runs to count so few false accusations; raise the number of runs.")
        return " ".join(said)
    unsure = [row for row in rows if row.leak and row.leak.share <= limit < row.leak.high and not row.alarm]
    above = [row for row in rows if row.leak and row.leak.share > limit and not row.alarm]
    if unsure:
        names = "; ".join(f"{row.title}, up to {percent(_high(row), 1)} %" for row in unsure)
        said.append(
            f"Measured below it, but with intervals that reach beyond: {names}.{_more_runs(unsure, limit)}"
        )
    if above:
        names = "; ".join(
            f"{row.title}, {percent(row.leak.share if row.leak else None, 1)} %" for row in above
        )
        said.append(f"Measured above it: {names}.")
    if wrong := [row.title for row in rows if row.alarm]:
        said.append(f"Left out, for its guarantee is contradicted: {', '.join(wrong)}.")
    if unmade := [row.title for row in rows if not _point(row)]:
        said.append(f"Not measured yet: {', '.join(unmade)}.")
    return " ".join(said)


def _high(row: FrontierRow) -> float:
    return row.leak.high if row.leak else 1.0


def _more_runs(rows: Sequence[FrontierRow], limit: float) -> str:
    """Roughly how many runs would do, if the measured share is right: intervals shrink with the square root
    of their number."""
    needed = []
    for row in rows:
        if row.leak and row.leak.share < limit and row.runs:
            factor = ((row.leak.high - row.leak.share) / (limit - row.leak.share)) ** 2
            needed.append(2 * math.ceil(row.runs * factor / 2))
    if not needed or min(needed) > MOST_RUNS_ADVISED:
        return ""
    return f" About {min(needed):,} runs would tell, if what was measured is right."


def _recommends(frontier: Frontier, best: FrontierRow, limit: float) -> str:
    said = (
        f"{best.title}: the most accurate method ({percent(best.accuracy, 1)} %) whose leak, with its "
        f"whole 95 % "
        f"interval, lies below {_limit_words(frontier, limit)}."
    )
    if near := [row for row in frontier.rows if row.name != best.name and _as_good(row, best, limit)]:
        names = "; ".join(
            f"{row.title}, {percent(row.accuracy, 1)} %, leak up to {percent(_high(row), 1)} %"
            for row in near
        )
        said += (
            " Its accuracy cannot be told from that of others below the limit, which may be chosen as well: "
            f"{names}."
        )
    if frontier.partial:
        said += " The frontier is partial; a method that is missing may be better."
    return said


def _as_good(row: FrontierRow, best: FrontierRow, limit: float) -> bool:
    """Whether it is below the limit, too, and the two accuracies' intervals overlap."""
    return below(row, limit) and (row.accuracy_high or 0.0) >= (best.accuracy_low or 0.0)


def _promises(frontier: Frontier, best: FrontierRow) -> list[str]:
    leak, rate = best.leak, frontier.false_positive_rate
    if leak is None or rate is None:
        return []
    said = [
        f"Measured: of {count(leak.pairs)} pairs of a repetition and a canary the attack recognised "
        f"{percent(leak.share, 1)} % at {accused(rate)} (95 % interval {percent(leak.low, 1)} to "
        f"{percent(leak.high, 1)} %; by guessing: {100 * rate:g} %), in {count(best.runs)} repetitions of "
        f"the "
        "whole training."
    ]
    if best.bound and best.bound.guarantee and best.bound.epsilon is not None:
        proved = proved_rate(best.bound, rate)
        most = f", so at {accused(rate)} at most {percent(proved, 1)} %" if proved else ""
        said.append(
            f"Proved: {bound_words(best.bound)} bounds every attack on this model, the strongest and any "
            f"later "
            f"one{most}."
        )
    return said


def _promises_not(frontier: Frontier, best: FrontierRow) -> list[str]:
    said = []
    if best.bound and best.bound.guarantee:
        said.append(
            "The proof covers the training images of this one model: not validation and test images, not "
            "other "
            "models or sets of the same run, and not that this method was chosen by looking at all of them."
        )
    else:
        said.append(
            "No proof: only differential privacy bounds attacks that nobody has tried. This figure says "
            "what these "
            "attacks found."
        )
    said.append(
        "Canaries stand for the worst case; a real record may be more exposed than they are. One image was "
        "hidden "
        "at a time, not all images of a person."
    )
    said.append(
        "What was attacked are the model's answers. Its weights, and the sets and generators that were "
        "made on the "
        "way, are other artefacts: see “May it be handed on?”."
    )
    if best.matched:
        said.append("Its key was tuned on validation images, which no guarantee of this run covers.")
    return said


# --- the table ----------------------------------------------------------------------------------------------


def verdict_of(row: FrontierRow, frontier: Frontier) -> tuple[str, str]:
    """A row's state in words, and its class on the page."""
    titles = {one.name: one.title for one in frontier.rows}
    if row.alarm:
        return "guarantee contradicted", "found"
    if row.missing or row.accuracy is None:
        return "not complete", "open"
    if frontier.recommended == row.name:
        return "recommended", "nothing"
    if row.dominated_by:
        names = ", ".join(titles.get(name, name) for name in row.dominated_by)
        sure = "" if surely_beaten(row, frontier.rows) else ", intervals overlap"
        return f"beaten by {names}{sure}", "open"
    return "on the frontier" if row.leak else "not audited", "partly"


def state_sentences(frontier: Frontier) -> list[str]:
    """What of the frontier is missing or smaller than was asked for; empty where it is whole."""
    said = []
    for row in frontier.rows:
        if row.accuracy is None:
            said.append(f"{row.title} has not been trained on the whole set.")
        if row.missing:
            used = f"the first {row.runs} were attacked" if row.runs else "too few to attack"
            said.append(
                f"{row.title} lacks {len(row.missing)} of {frontier.models} runs "
                f"({_numbers(row.missing)}); {used}."
            )
    if frontier.asked_models > frontier.models:
        said.append(f"A budget cut the runs from {frontier.asked_models} to {frontier.models}.")
    return [bind(text) for text in said]


def _numbers(numbers: Sequence[int]) -> str:
    """`3, 5 to 9`."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def matched_words(row: FrontierRow) -> str:
    """How a method was tuned to equal accuracy; empty where that was not asked for."""
    found = row.matched
    if found is None:
        return row.unmatched
    text = (
        f"{found.key.replace('_', ' ')} {found.value:.3g}, found in {len(found.tried)} trainings: validation "
        f"accuracy {percent(found.accuracy, 1)} for {percent(found.target, 1)} %"
    )
    if not found.reached:
        text += ", not within its error: the nearest that was tried"
    if row.bound and not row.bound.guarantee:
        text += "; its epsilon bounds nothing"
    return bind(text)


def alt_text(frontier: Frontier) -> str:
    """The figure in words."""
    points = [_in_short(row) for row in frontier.rows if _point(row)]
    return bind(
        "Accuracy against the share of canaries recognised, a point per method: "
        + ("; ".join(points) or "none yet")
        + "."
    )
