"""Secret noise: everything a private mechanism draws comes from a key that only the run's folder holds.

A seed stands in reports and fingerprints, so noise drawn from it could be drawn again and subtracted, and
batches drawn from it would be known, which takes away the amplification by sampling. So the key comes from
the operating system, lies in the part's folder (mode 0600), is in no report, log, fingerprint or export, and
is deleted when the part is done. A resumed run reads it and replays the *same* noise, so that nothing is
released twice.

Numbers are a keyed stream of SHAKE-256: torch's CPU generator keeps 32 bits of its seed, few enough to try
all. Noise is drawn and added in float64. That is not proven safe against attacks on floating-point arithmetic
(Mironov 2012).
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.storage import RemotePath

KEY_FILE = "noise.key"
KEY_BYTES = 32
BITS = 53
"""Of a float64's significand: a uniform draw has so many."""


@dataclass(frozen=True)
class NoiseKey:
    """A secret from which noise and batches are drawn.

    Attributes:
        secret: never shown, not even by `repr`.
        insecure: somebody knows the key (tests): what was made with it is not private, and every report must
            say so.
    """

    secret: bytes = field(repr=False)
    insecure: bool = False

    def gaussian(self, shape: tuple[int, ...] | torch.Size, *context: str | int) -> Tensor:
        """Standard normal noise, float64 `shape` on the CPU; the same for the same context, independent for
        another one."""
        return torch.from_numpy(ndtri(self._uniform(math.prod(shape), "gaussian", *context))).view(shape)

    def poisson_sample(self, records: int, probability: float, *context: str | int) -> Tensor:
        """Indices int64 [M], ascending: each of `records` is in the sample with `probability`, independently
        of all others."""
        chosen = self._uniform(records, "poisson", *context) < probability
        return torch.from_numpy(np.flatnonzero(chosen))

    def shard(self, record: bytes, shards: int) -> int:
        """The shard in [0, shards) of a record's bytes. It depends on no other record, so one person changes
        one shard."""
        digest = hashlib.sha256(self.secret + b"\x1fshard\x1f" + record).digest()
        return int.from_bytes(digest[:16], "big") % shards

    def _uniform(self, count: int, *context: str | int) -> NDArray[np.float64]:
        """Float64 [count] in (0, 1), from the stream of this key and context."""
        named = "\x1f".join(str(part) for part in context).encode()
        stream = hashlib.shake_256(self.secret + b"\x1f" + named).digest(8 * count)
        bits = np.frombuffer(stream, dtype="<u8") >> (64 - BITS)
        return (bits.astype(np.float64) + 0.5) * 2.0**-BITS


def insecure_key(text: str) -> NoiseKey:
    """A key that is written down somewhere, for tests and comparisons."""
    return NoiseKey(hashlib.sha256(text.encode()).digest(), insecure=True)


def noise_key(folder: Path, insecure_text: str = "", *, started: bool = False) -> NoiseKey:
    """The key of the part in `folder`: the one that lies there, else a new one.

    Args:
        folder: of the part, on a local or shared file system.
        insecure_text: not empty = the key is made of this text and no file is written.
        started: the part goes on from a state. Then there must be a key: fresh noise would be a second
            release.

    Raises:
        ArtifactError: the key is lost or damaged, or `folder` is in an object store, where nothing can be
            mode 0600.
    """
    if insecure_text:
        return insecure_key(insecure_text)
    if isinstance(folder, RemotePath):
        raise ArtifactError(
            f"the noise key of a private training must lie on a file system, but got {folder}; set "
            "`storage` to a local or shared folder"
        )
    path = folder / KEY_FILE
    if not path.exists():
        if started:
            raise ArtifactError(
                f"{path} must exist to go on with a private training, but it is gone; new noise would be a "
                "second release, so delete "
                f"{folder} and count what was made of it as released"
            )
        _write_key(path)
    secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise ArtifactError(
            f"{path} must hold {KEY_BYTES} bytes, but has {len(secret)}; "
            f"delete {folder} and start the part again"
        )
    return NoiseKey(secret)


def forget_key(folder: Path) -> None:
    """Delete the key once the part's result stands: nobody can subtract the noise any more, nor may anybody
    go on."""
    if not isinstance(folder, RemotePath):
        (folder / KEY_FILE).unlink(missing_ok=True)


def _write_key(path: Path) -> None:
    """Whole or not at all; readable by the owner alone from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, os.urandom(KEY_BYTES))
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
