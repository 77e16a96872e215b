"""The benchmark's document as a table, for a terminal and for README.md in this folder."""

from __future__ import annotations

from kr_ray.bench.document import Document, FigureRow

VERDICTS = {True: "pass", False: "fall short", None: ""}


def markdown_table(document: Document) -> str:
    """One row per figure: median, spread, target, verdict; above it where
    and when it was measured, below it the notes."""
    lines = [headline(document), "", "| measured | median | min to max | target | |", "|---|---|---|---|---|"]
    notes = []
    for name, suite in document.suites.items():
        if suite.skipped:
            lines.append(f"| {name} | {suite.skipped} | | | |")
        for figure in suite.figures:
            lines.append(f"| {' | '.join(figure_cells(figure))} |")
        notes += suite.notes
    return "\n".join([*lines, *([""] if notes else []), *(f"* {note}" for note in notes)]) + "\n"


def headline(document: Document) -> str:
    """Date, machine, threads, versions and yardsticks in one paragraph."""
    where, rates = document.environment, document.rates
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    device = "" if where.device == "cpu" else f"{where.device}; "
    return (
        f"{document.date[:10]}; {device}{where.processor}, {where.cores} cores, AMX "
        f"{'yes' if where.amx else 'no'}; {where.threads} thread(s) a process; {versions}. Medians of "
        f"{document.rounds} interleaved rounds; {document.seconds:.0f} s in all. Yardsticks: "
        f"{rates.matrix_flops_per_s / 1e12:.3g} TFLOP/s ({rates.dtype} matrix product), "
        f"{rates.copy_bytes_per_s / 1e9:.3g} GB/s (copy)."
    )


def figure_cells(figure: FigureRow) -> list[str]:
    """Name, median, spread, target, verdict."""
    target = "" if figure.target is None else f"{figure.rule} {_number(figure.target, figure.unit)}"
    spread = f"{_number(figure.low, '')} to {_number(figure.high, '')}"
    return [
        figure.name,
        _number(figure.value, figure.unit),
        spread,
        target,
        VERDICTS[figure.passed],
    ]


def _number(value: float, unit: str) -> str:
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return digits + {"": "", "x": "x"}.get(unit, f" {unit}")


def print_table(document: Document) -> None:
    """The same for a terminal."""
    from kr_ray.display import Grid, plain_console

    console = plain_console()
    grid = Grid("kr bench", ("measured", "median", "min to max", "target", "verdict"))
    for name, suite in document.suites.items():
        if suite.skipped:
            grid.add(name, suite.skipped, "", "", "")
        for figure in suite.figures:
            grid.add(*figure_cells(figure))
    console.print(headline(document))
    grid.print(console)
    for suite in document.suites.values():
        for note in suite.notes:
            console.print(f"* {note}")
