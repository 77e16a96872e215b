"""The ways of making a classifier: teacher, synthesis, checkpoint sweep, tuning, student (sections 3.1 to 3.5)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Location, Section


class TeacherConfig(Section):
    epochs: int = Field(500, ge=1)


class SynthesisConfig(Section):
    """How a synthetic set is drawn and labelled (sections 3.4 and 3.5); tuning varies three of these."""

    labelling: Literal["gkd", "gap_filler", "filter", "hard"] = "gkd"
    class_prior: Literal["real", "uniform"] = "real"
    latent_std: float = Field(1.0, gt=0)
    regeneration_rate: int = Field(10, ge=1)
    """Epochs between two regenerations; an epoch here is one pass over the synthetic set, whatever its size."""
    cardinality_scale: int = Field(1, ge=1)
    """Synthetic over real training images."""
    epoch_unit: Literal["synthetic", "real"] = "synthetic"
    """What a student's budget counts. `synthetic` (the paper): passes over the scaled set, so the scale multiplies the work.
    `real`: passes of real size. Tuning always counts in passes of real size, so that all scales are compared at equal work."""
    confidence_threshold: float = Field(0.9, ge=0, lt=1)
    """`gap_filler`: the least teacher probability of the kept label."""
    batch_size: int = Field(128, ge=2)
    standing_batches: int = Field(16, ge=1)
    """Batches that re-estimate G's batch-norm statistics at each (checkpoint, latent std)."""
    max_draws: int = Field(20, ge=1)
    """Filtering strategies give up after drawing this many times the wanted number of images."""


class CheckpointsConfig(Section):
    search: Literal["exhaustive", "halving"] = "exhaustive"
    epochs: int = Field(100, ge=1)
    shortening: int = Field(9, ge=2)
    """`halving`: all checkpoints are first tried on complete schedules that are this many times shorter."""
    budget: float = Field(0.35, gt=0, lt=1)
    """`halving`: its share of the exhaustive sweep's epochs; as many of the best go on to the whole schedule as it allows."""


class TuningConfig(Section):
    """TPE with Hyperband over three generation parameters (section 3.5)."""

    trials: int = Field(50, ge=1)
    epochs: int = Field(100, ge=1)
    searcher: Literal["optuna", "hyperopt", "random"] = "optuna"
    latent_std: tuple[float, float] = (1.0, 2.5)
    regeneration_rate: tuple[int, int] = (1, 10)
    cardinality_scale: tuple[int, int] = (1, 10)
    reduction_factor: int = Field(3, ge=2)
    rungs: int = Field(9, ge=1)
    """Hyperband's resource R. The resource is images seen, in units of 1/R of a trial's budget, which is `epochs` passes of real
    size for every trial, whatever its cardinality scale; the first rung must lie past the learning-rate warm-up."""
    startup_trials: int = Field(10, ge=1)
    """Random trials before TPE models anything."""
    brackets_in_flight: int = Field(1, ge=1)
    """Hyperband brackets that run side by side; 1 is the strict sequence. More keeps more workers busy (50 trials on 8 slots: 84
    rounds at 1, 47 at 2), but TPE learns later. Part of the search, not of the machine: it must not follow the number of
    workers, or results would."""

    @model_validator(mode="after")
    def _ranges_fit(self) -> TuningConfig:
        bad = [
            f"`0 < low <= high` must hold, but got {key}={list(pair)}; swap or widen the two bounds"
            for key in ("latent_std", "regeneration_rate", "cardinality_scale")
            if not 0 < (pair := getattr(self, key))[0] <= pair[1]
        ]
        if self.trials > 1 and 1 < self.rungs < self.reduction_factor:
            bad.append(
                f"`rungs >= reduction_factor` must hold, but got rungs={self.rungs}, reduction_factor={self.reduction_factor}; "
                "else no trial could be stopped early (rungs: 1 switches Hyperband off)"
            )
        smallest = self.rungs // self.reduction_factor ** int(math.log(self.rungs, self.reduction_factor) + 1e-9)
        if smallest / self.rungs <= 0.1:
            bad.append(
                f"the first rung must lie past the warm-up, a tenth of a trial, but with rungs={self.rungs}, "
                f"reduction_factor={self.reduction_factor} it is at {smallest / self.rungs:.3f}; use rungs: 9 with reduction_factor: 3"
            )
        if bad:
            raise ValueError("; ".join(bad))
        return self


class StudentConfig(Section):
    epochs: int = Field(500, ge=1)
    from_parquet: Location = ""
    """A labelled synthetic set that `kr export` wrote, a file or folder: train on it alone. Then a run has neither teacher nor generator,
    nor what is made with them; of the real images only validation and test images are shown to the student."""
    equal_compute_teacher: bool = True
    """Also train a teacher for as many gradient steps as the student."""
