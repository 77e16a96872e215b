"""The run directory: fingerprints, atomic writes, done-markers, progress, and who is working in it.

<storage>/<run>/config.yaml            the resolved configuration
<storage>/<run>/status.json            state, stage, heartbeat (read by `kr runs`)
<storage>/<run>/<stage>/started.json   fingerprint of what the folder's partial work belongs to
<storage>/<run>/<stage>/done.json      fingerprint and result; written last, so its presence means the stage is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from safetensors import safe_open

from kr_ray.locks import is_locked, lock_file
from kr_ray.storage import RemotePath, local_copy, make_folder, remove_tree, upload

if TYPE_CHECKING:  # commands that only read or write JSON and numpy arrays must not wait for torch
    from torch import Tensor

READ_ERRORS = (
    OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, SyntaxError, OverflowError, MemoryError,
    struct.error, zlib.error, zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip
"""What numpy and Pillow raise on damaged files (found by truncating and altering thousands of them)."""


class ArtifactError(RuntimeError):
    """An artefact is missing, broken, or in use by another process."""


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a local, temporary path; put it into place, by a rename or an upload, if the block succeeds, else leave nothing behind."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="kr_ray-") as folder:
            yield (temporary := Path(folder) / path.name)
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False)
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write a safetensors file atomically; `metadata` is kept as one JSON string."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"json": json.dumps(metadata or {})},
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        ArtifactError: the file is missing or not a safetensors file.
    """
    try:
        with local_copy(path) as local, safe_open(local, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no __iter__)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first") from error
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read as safetensors ({error}); delete it and run the stage again") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, strings, nested) atomically."""
    import torch

    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict[str, Any] | None:
    """The training state at `path`, or None. Never unpickles code."""
    import torch

    if not path.exists():
        return None
    with local_copy(path) as local:
        return torch.load(local, map_location="cpu", weights_only=True)


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, independent of key order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the run ---------------------------------------------------------------------------------------------------------


class RunDirectory:
    """One run's folder, locked while a driver works in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> RunDirectory:
        make_folder(self.path)
        self._lock = lock_file(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ArtifactError(
                f"{self.path} is in use by another process; wait for it, or give this run another `name`"
            ) from error
        except OSError as error:
            if not isinstance(self.path, RemotePath):
                raise
            raise ArtifactError(
                f"`storage` must be a bucket that can be read and written, but got {self.path}: {error}; create the bucket, correct the "
                "location, or give credentials by the environment"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        last_line = (str(error).strip().splitlines() or [""])[-1]
        self.set_status(state=state, error="" if state == "finished" else last_line[:300], note="")
        self._lock.release()

    def set_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json and stamp it."""
        path = self / "status.json"
        old = read_json(path) if path.exists() else {}
        stamp = {"host": socket.gethostname(), "pid": os.getpid(), "updated": time.time()}
        write_json(path, old | stamp | fields)

    def result(self, stage: str, print_of_inputs: str) -> dict[str, Any] | None:
        """The stage's result if it finished on exactly these inputs, else None."""
        path = self / stage / "done.json"
        if path.exists() and (done := read_json(path))["fingerprint"] == print_of_inputs:
            return dict(done["result"])
        return None

    def begin(self, stage: str, print_of_inputs: str) -> Path:
        """The stage's folder: with its partial work if that belongs to the same inputs, else emptied."""
        folder, marker = self / stage, self / stage / "started.json"
        if not marker.exists() or read_json(marker)["fingerprint"] != print_of_inputs:
            remove_tree(folder)
            write_json(marker, {"fingerprint": print_of_inputs, "spent_s": 0.0})
        return folder

    def spent_s(self, stage: str) -> float:
        """Seconds of wall time that earlier, interrupted attempts have spent on the stage."""
        return float(read_json(self / stage / "started.json")["spent_s"])

    def heartbeat(self, stage: str, spent_s: float, progress: Mapping[str, Any]) -> None:
        """Record how long the stage has taken so far and how far it is (the fields of a `StageProgress`)."""
        marker = self / stage / "started.json"
        write_json(marker, read_json(marker) | {"spent_s": spent_s})
        self.set_status(state="running", stage=stage, error="", **progress)

    def finish(self, stage: str, print_of_inputs: str, result: dict[str, Any]) -> None:
        """Keep the result and say that the stage is whole."""
        self.set_status(stage=stage, share=1.0)
        write_json(self / stage / "done.json", {"fingerprint": print_of_inputs, "result": result})


def list_runs(storage: Path) -> list[dict[str, Any]]:
    """Status of every run below `storage`."""
    return [run_status(path.parent) | {"name": path.parent.name} for path in sorted(storage.glob("*/status.json"))]


def run_status(run: Path, stale_s: float = 0.0) -> dict[str, Any]:
    """status.json; a run marked running, last stamped `stale_s` ago, that nobody holds the lock of was killed."""
    status: dict[str, Any] = read_json(run / "status.json")
    stale = time.time() - status["updated"] >= stale_s
    if status.get("state") == "running" and stale and not is_locked(run / ".lock"):
        status["state"] = "killed"
    return status
