"""Which training images a method took for itself, where it does not use all alike.

Such are the images that a coreset selected, or those that a distilled set began with. The audit tells
canaries that were taken from those that were left: they are not exposed alike (Zhao & Zhang 2025).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kr_ray.runs.artifacts import ArtifactError, atomic_write, load_arrays

TAKEN_FILE = "taken.npz"
"""In the folder of a method's last part; a method without it uses all training images alike."""
IndexArray = NDArray[np.int64]


def save_taken(folder: Path, index: Tensor) -> None:
    """Keep which images of the site's training split were taken: int64 [M]."""
    with atomic_write(folder / TAKEN_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, index=index.cpu().numpy().astype(np.int64))


def load_taken(folder: Path) -> IndexArray | None:
    """What `save_taken` wrote; None where the method took none for itself.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / TAKEN_FILE
    if not path.exists():
        return None
    found = load_arrays(path).get("index")
    if found is None or found.dtype != np.int64 or found.ndim != 1:
        raise ArtifactError(f"{path} must hold indices, but holds something else; delete the folder {folder}")
    return found
