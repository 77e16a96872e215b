"""The figure of a comparison of generators: CAS over checkpoints with the teacher's line (figure 3 of
Knowledge Recycling)."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from kr_ray.report.figures import saved_png
from kr_ray.runs.artifacts import atomic_write
from kr_ray.runs.comparisons import GeneratorComparison

MARKERS = "osD^vP*X"


def save_comparison(found: GeneratorComparison, path: Path) -> None:
    """Write it as PNG: a line per generator and labelling, bars of one standard deviation over seeds."""
    with atomic_write(path) as temporary, saved_png(temporary) as ax:
        for curve, marker in zip(found.curves(), cycle(MARKERS), strict=False):
            name = f"{curve.generator}, {curve.labelling}"
            ax.errorbar(
                curve.epochs, curve.means, yerr=curve.sds, label=name, marker=marker, markersize=4, capsize=2
            )
        ax.axhline(found.teacher, color="black", linestyle="--", linewidth=1, label="teacher")
        ax.set_xlabel("generator epoch")
        ax.set_ylabel("validation CAS")
        ax.legend(fontsize="small")
