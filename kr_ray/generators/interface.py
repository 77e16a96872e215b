"""What every kind of generator offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class GeneratorCheckpoint:
    """The averaged generator after `epoch` epochs.

    Attributes:
        epoch: epochs trained, from 1.
        weights: plain weights (spectral norms folded in) on the CPU, for `Generator.load_folded_weights`.
        images_seen: real images that D has seen.
        loss_d: mean D loss of the last epoch.
        loss_g: mean G loss of the last epoch that had a G step; 0 before the first.
    """

    epoch: int
    weights: dict[str, Tensor]
    images_seen: int
    loss_d: float
    loss_g: float


def checkpoint_file(epoch: int) -> Path:
    """Relative to the run directory."""
    return Path("generator") / "checkpoints" / f"epoch_{epoch:04d}.safetensors"
