"""What a person sees of a run in a terminal or a log: progress per stage while it lasts, its figures at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kr_ray.config import Config
from kr_ray.runs.results import AUDIT, STUDENT, TEACHER, WORST_CASE, ReportResult, Result, Results
from kr_ray.runs.storage import storage_path

if TYPE_CHECKING:
    from rich.console import Console

    from kr_ray.runs.progress import StageProgress


def plain_console() -> Console:
    """A console that shows text as it is: in a path or an error, brackets are no markup and `:key:` is no emoji."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


class Display:
    """Progress per stage: bars in a terminal, a line now and then in a log."""

    LOG_EVERY_S, LOG_AT_MOST_EVERY_S = 15.0, 300.0
    """A log's lines come the rarer, the longer the stage: a tenth of the time it has taken, within these bounds."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self.console = plain_console()
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<21}", markup=False), BarColumn(16),
            TextColumn("{task.percentage:>3.0f}%", markup=False), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1)),  # wraps in what room is left
            console=self.console, disable=not self.live, expand=True,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}
        self.started = self.logged = 0.0

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def stage_started(self, stage: str) -> None:
        self.tasks[stage] = self.progress.add_task(stage, total=1.0, note="")
        if not self.live:
            self.console.print(f"{stage}: started")
            self.started = self.logged = time.monotonic()

    def stage_progress(self, stage: str, progress: StageProgress) -> None:
        note = progress.describe()
        self.progress.update(self.tasks[stage], completed=progress.share, note=note)
        now = time.monotonic()
        pause = min(max(self.LOG_EVERY_S, (now - self.started) / 10), self.LOG_AT_MOST_EVERY_S)
        if not self.live and progress.share and now - self.logged > pause:
            self.logged = now
            self.console.print(f"{stage}: {progress.share:.0%} {note}", soft_wrap=True)

    def notice(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def stage_finished(self, stage: str, result: Result, skipped: bool) -> None:
        note = result.headline()
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=1.0, note=note)
        self.progress.update(self.tasks[stage], completed=1.0, note=note)
        self.progress.stop_task(self.tasks[stage])
        if not self.live:
            took = "finished before" if skipped else f"{result.wall_s:.1f} s"
            self.console.print(f"{stage}: done ({took}) {note}", soft_wrap=True)


def print_summary(config: Config, stage: str, results: Results, result: Result) -> None:
    """Table 2's row, the worst case, and where the result is."""
    from rich.table import Table
    from rich.text import Text

    console = plain_console()
    if audit := results.get(AUDIT):
        table = Table("model", "test accuracy / CAS", "AUC_MIA", "AOP", title=f"{config.name}: Table 2's row for this run")
        accuracies = {"teacher": results[TEACHER].test_accuracy, "student": results[STUDENT].test_accuracy}
        for name, accuracy in accuracies.items():
            if attacked := getattr(audit.kr, name):
                table.add_row(name, f"{accuracy:.4f}", f"{attacked.auc:.4f}", f"{attacked.aop:.4f}")
        console.print(table)
    if worst := results.get(WORST_CASE):
        table = Table("arm", "test accuracy", "canary TPR", "population TPR", "epsilon >=", title="worst case, at 0.1 % FPR")
        for arm, found in worst.lira.items():
            bound = found.canary.epsilon.clopper_pearson
            rates = [found.canary.tpr(), found.population.tpr()]
            table.add_row(arm, f"{found.test_accuracy:.4f}", *rates, "–" if bound is None else f"{bound:.2f}")
        console.print(table)
    if isinstance(result, ReportResult):
        console.print(Text.assemble("report: ", (str(storage_path(result.page).resolve()), "bold")), soft_wrap=True)
    else:
        console.print(f"result: {(storage_path(config.storage) / config.name / stage).resolve()}", soft_wrap=True)
