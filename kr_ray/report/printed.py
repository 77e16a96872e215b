"""A finished command's last lines in the terminal: its figures, the
report's first sentences, and where everything is."""

from __future__ import annotations

from collections.abc import Iterator

from kr_ray.config import Config
from kr_ray.display import Grid, plain_console
from kr_ray.report.frontier import advice, state_sentences, verdict_of
from kr_ray.report.guarantees import epsilon_words
from kr_ray.report.schema import validate_report
from kr_ray.report.verdict import headline
from kr_ray.runs.artifacts import read_json
from kr_ray.runs.figures import Frontier
from kr_ray.runs.results import (
    AUDIT,
    FRONTIER,
    GUARANTEE,
    STUDENT,
    TEACHER,
    WORST_CASE,
    AuditResult,
    ReportResult,
    Result,
    Results,
    WorstCaseResult,
)
from kr_ray.runs.storage import storage_path


def print_summary(config: Config, stage: str, results: Results, result: Result) -> None:
    """Table 2's row, the worst case, the report's first sentences, and where the result is."""
    from rich.text import Text

    console = plain_console()
    for grid in _tables(config, results):
        grid.print(console)
    if not isinstance(result, ReportResult):
        console.print(
            f"result: {(storage_path(config.storage) / config.name / stage).resolve()}", soft_wrap=True
        )
        return
    page = storage_path(result.page)
    console.print(_first_sentences(result))
    if promised := results.get(GUARANTEE):
        for split, said in promised.words.items():
            console.print(f"guarantee, {split} images: {said}", soft_wrap=True)
        console.print("the report stays inside; `kr export` writes what may leave", soft_wrap=True)
    console.print(Text.assemble("report: ", (str(page.resolve()), "bold")), soft_wrap=True)
    console.print("one sheet for the data-protection officer: report_summary.html, beside it")


def _tables(config: Config, results: Results) -> Iterator[Grid]:
    if audit := results.get(AUDIT):
        yield _average(config, results, audit)
    if worst := results.get(WORST_CASE):
        yield _worst(worst)
    if found := results.get(FRONTIER):
        yield _frontier(found.frontier)


def _average(config: Config, results: Results, audit: AuditResult) -> Grid:
    grid = Grid(
        f"{config.name}: Table 2's row for this run", ("model", "test accuracy / CAS", "AUC_MIA", "AOP")
    )
    accuracies = {"teacher": results[TEACHER].test_accuracy, "student": results[STUDENT].test_accuracy}
    for name, accuracy in accuracies.items():
        if attacked := getattr(audit.kr, name):
            grid.add(name, f"{accuracy:.4f}", f"{attacked.auc:.4f}", f"{attacked.aop:.4f}")
    return grid


def _worst(worst: WorstCaseResult) -> Grid:
    grid = Grid(
        "worst case, at 0.1 % FPR", ("arm", "test accuracy", "canary TPR", "population TPR", "epsilon >=")
    )
    for arm, found in worst.lira.items():
        bound = found.canary.epsilon.clopper_pearson
        rates = [found.canary.tpr(), found.population.tpr()]
        grid.add(arm, f"{found.test_accuracy:.4f}", *rates, "–" if bound is None else f"{bound:.2f}")
    return grid


def _frontier(frontier: Frontier) -> Grid:
    at = f" at {100 * frontier.false_positive_rate:g} % FPR" if frontier.false_positive_rate else " (AUC)"
    said = " ".join([advice(frontier).answer, *state_sentences(frontier)])
    grid = Grid(
        "frontier: accuracy against leak",
        ("method", "test accuracy", f"canaries recognised{at}", "guarantee", "epsilon >=", "CPU s", ""),
        note=_plain(said),
    )
    for row in frontier.rows:
        leak, bound = row.leak, row.bound
        grid.add(
            row.title,
            "–" if row.accuracy is None else f"{row.accuracy:.4f}",
            f"{leak.share:.1%} [{leak.low:.1%}, {leak.high:.1%}]" if leak else "–",
            (epsilon_words(bound) if bound.guarantee else "none") if bound else "none",
            "–" if leak is None or leak.epsilon is None else f"{leak.epsilon:.2f}",
            "–" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}",
            verdict_of(row, frontier)[0],
        )
    return grid


def _first_sentences(result: ReportResult) -> str:
    """The report's headline, plain."""
    report = validate_report(read_json(storage_path(result.page).with_suffix(".json")))
    return _plain(headline(report))


def _plain(text: str) -> str:
    """As a terminal shows it."""
    return text.replace("\u00a0", " ").replace("\u2011", "-")
