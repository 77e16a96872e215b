"""Comparisons on one and the same generator: labelling strategies (appendix D), and ways of searching for the best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kr_ray.cluster.sweep import SWEEP_TICKS, best_checkpoint, sweep_checkpoints, sweep_cost
from kr_ray.cluster.trials import StudentWork, train_students
from kr_ray.config import Config
from kr_ray.synthesis.student_set import StudentSpec

LABELLINGS = ("gkd", "gap_filler", "filter", "hard")
"""Appendix D, from the paper's own strategy to its baseline."""


def compare_labelling(
    run: Path, folder: Path, checkpoint_epochs: Sequence[int], strategies: Sequence[str], seeds: Sequence[int], config: Config
) -> list[dict[str, Any]]:
    """Appendix D: validation CAS of each labelling strategy, from one and the same generator, per checkpoint and seed."""
    rows, works = [], []
    for strategy in strategies:
        synthesis = config.synthesis.with_values({"labelling": strategy})
        for checkpoint in checkpoint_epochs:
            for seed in seeds:
                spec = StudentSpec(config.generator, checkpoint, synthesis, config.checkpoints.epochs, seed)
                name = f"{strategy}_{checkpoint:04d}_seed{seed}"
                works.append(StudentWork(run, folder / "trials" / name, spec, config.classifier, SWEEP_TICKS, config.cluster))
                rows.append({"labelling": strategy, "epoch": checkpoint, "seed": seed})
    cas = train_students(works, folder, config.cluster)
    return [row | {"val_cas": value} for row, value in zip(rows, cas, strict=True)]


def compare_search(
    run: Path, folder: Path, checkpoint_epochs: Sequence[int], seeds: Sequence[int], config: Config
) -> list[dict[str, Any]]:
    """What `halving` costs and loses against the `exhaustive` sweep, a row per seed of the students.

    A student of a whole schedule that both searches train is one and the same, so it is trained once and counts in both costs.

    Returns:
        Rows: seed; exhaustive and halving, each with epoch, val_cas, students, images_seen and seconds; lost_cas, the exhaustive
        winner's CAS minus that of halving's winner; images_share and seconds_share of halving's cost in the exhaustive one's.
    """
    rows = []
    for seed in seeds:
        found = {}
        for search in ("exhaustive", "halving"):
            keys = config.checkpoints.model_copy(update={"search": search})
            own = config.model_copy(update={"seed": seed, "checkpoints": keys})
            swept = sweep_checkpoints(run, folder / f"seed{seed}", checkpoint_epochs, own)
            best = best_checkpoint(swept)
            cost = sweep_cost(run, folder / f"seed{seed}", swept, own)
            found[search] = {"epoch": best.epoch, "val_cas": best.val_cas} | cost
        whole, short = found["exhaustive"], found["halving"]
        rows.append(
            {"seed": seed}
            | found
            | {
                "lost_cas": whole["val_cas"] - short["val_cas"],
                "images_share": short["images_seen"] / whole["images_seen"],
                "seconds_share": short["seconds"] / whole["seconds"],
            }
        )
    return rows
