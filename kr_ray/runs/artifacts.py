"""The run directory: fingerprints, atomic writes, done-markers, progress, and who is working in it.

<storage>/<run>/config.yaml            the resolved configuration <storage>/<run>/status.json
state, stage, heartbeat (read by `kr runs`) <storage>/<run>/<stage>/started.json   fingerprint of what the
folder's partial work belongs to <storage>/<run>/<stage>/done.json      fingerprint, result and hashes of the
outputs; written last: the stage is whole <storage>/<run>/<stage>.next/          an attempt on other inputs
than a finished stage's, whose place it takes at its end
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from safetensors import safe_open

from kr_ray.foreign.files import MAKE_ANEW
from kr_ray.foreign.files import READ_ERRORS as READ_ERRORS
from kr_ray.foreign.npz import read_arrays, whole_arrays
from kr_ray.masking import masked
from kr_ray.runs.attempts import DONE_FILE, STARTED_FILE, beside, real_folder, settle
from kr_ray.runs.locks import is_locked, lock_file
from kr_ray.runs.outputs import Recorded, changed_outputs, look_at_outputs, record_outputs
from kr_ray.runs.storage import RemotePath, local_copy, make_folder, remove_tree, upload

if TYPE_CHECKING:  # commands that only read or write JSON and numpy arrays must not wait for torch
    from numpy.typing import NDArray
    from torch import Tensor

Json = dict[str, Any]
"""An object of a JSON file, or of a file's JSON metadata, as it is read or about to be written."""
State = dict[str, Any]
"""A training from which it can go on, as torch writes and reads it: tensors, numbers, strings, nested."""

VERSION_0_1 = {"fingerprint", "result"}
"""Of a done-marker: the first version sealed nothing and recorded no outputs."""
UNREADABLE = "unreadable"
"""State of a run whose status file cannot be read."""


class ArtifactError(RuntimeError):
    """An artefact is missing, broken, or in use by another process."""


# --- files --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a local, temporary path; if the block succeeds put it into
    place, by a rename or an upload, else remove it.

    Args:
        durable: whether the bytes are on the disk before the name is; what
            only shows progress can do without.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="kr_ray-") as folder:
            yield (temporary := Path(folder) / path.name)
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:  # else a loss of power can leave the new name with nothing behind it
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write atomically; what only shows progress need not be `durable`."""
    text = json.dumps(value, indent=1, allow_nan=False)
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_own_json(path: Path) -> Json:
    """What the program itself wrote at `path`; empty if nothing is there, or a damaged or foreign file."""
    try:
        value = read_json(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_damage(error: BaseException, path: Path) -> bool:
    """Whether reading `path` failed by what it holds, and not because its store cannot be reached."""
    return isinstance(error, READ_ERRORS) and not (
        isinstance(path, RemotePath) and isinstance(error, OSError)
    )


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Json | None = None) -> None:
    """Write a safetensors file atomically; `metadata` is kept as one JSON string."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"json": json.dumps(metadata or {})},
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Json]:
    """Read what `save_tensors` wrote.

    Raises:
        ArtifactError: the file is missing or not a safetensors file.
    """
    try:
        with local_copy(path) as local, safe_open(local, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no __iter__)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; run the stage that writes it") from error
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read as safetensors ({error}); delete it and run the same command again"
        ) from error


def load_arrays(path: Path, keys: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Plain arrays of an .npz file that a run wrote: those of `keys` that are there, or all.

    Raises:
        ArtifactError: it is damaged.
        OSError: its store cannot be reached, which says nothing about the file.
    """
    try:
        return whole_arrays(path, keys)[1]
    except READ_ERRORS as error:
        if not is_damage(error, path):
            raise
    return read_arrays(path, ArtifactError, keys, MAKE_ANEW)[1]  # which says what it is instead


@contextmanager
def holding(path: Path, what: str) -> Iterator[None]:
    """Make `what` of what was read at `path`; if it is something else, however whole, say so.

    Raises:
        ArtifactError: the block could not do with what it got.
    """
    try:
        yield
    except ArtifactError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} must hold {what}, but holds something else; {MAKE_ANEW}") from error


def save_state(path: Path, state: State) -> None:
    """Write a training state atomically."""
    import torch

    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> State | None:
    """The training state at `path`; None if there is none, or a damaged one: the work is then begun anew.

    Never unpickles code.
    """
    import torch

    if not path.exists():
        return None
    with local_copy(path) as local:
        try:
            state = torch.load(local, map_location="cpu", weights_only=True)
        except (*READ_ERRORS, pickle.UnpicklingError) as error:
            logging.getLogger(__name__).warning("%s is damaged and not used (%s)", path, error)
            return None
    return state if isinstance(state, dict) else None


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, independent of key order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What a done-marker says of a finished stage.

    Attributes:
        result: as its typed result was dumped.
        outputs: none of a stage that the first version finished.
    """

    fingerprint: str
    result: Json
    outputs: Recorded = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Done | None:
        """The marker in `folder`; None if there is none, or one that is not just as it was written."""
        found = read_own_json(folder / DONE_FILE)
        if found.get("seal") == _seal(found) or found.keys() == VERSION_0_1:
            return cls(found["fingerprint"], found["result"], found.get("outputs", {}))
        return None

    def write(self, folder: Path) -> None:
        content = vars(self)
        write_json(folder / DONE_FILE, content | {"seal": _seal(content)})


def _seal(content: Mapping[str, Any]) -> str:
    """Of a done-marker's content, as JSON brings it back."""
    sealed = {key: content.get(key) for key in ("fingerprint", "result", "outputs")}
    return fingerprint(json.loads(json.dumps(sealed)))


@dataclass(frozen=True)
class RunStatus:
    """What everybody reads of status.json.

    Attributes:
        state: running, finished, failed, interrupted, killed or unreadable.
        updated: seconds since 1970; None where it cannot be read.
        stage: the one that is or was being worked on.
        note: of that stage, for a person.
        error: why it failed, or cannot be read and what to do.
        share: of the stage, 0 to 1.
        fields: all of the file's, those of a `StageProgress` among them.
    """

    state: str
    updated: float | None
    stage: str = ""
    note: str = ""
    error: str = ""
    share: float = 0.0
    fields: Json = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, status: Json) -> RunStatus | None:
        """What the file says; None unless the fields that everybody reads have their types."""
        wanted = {"state": str, "updated": int | float, "stage": str, "error": str, "note": str,
                  "share": int | float}  # fmt: skip
        if not {"state", "updated"} <= status.keys() or not all(
            isinstance(status[key], kind) for key, kind in wanted.items() if key in status
        ):
            return None
        return cls(**{key: status[key] for key in wanted if key in status}, fields=status)


class RunDirectory:
    """One run's folder, locked while a driver works in it.

    Args:
        notice: is told why something that was finished is made again.
    """

    def __init__(self, path: Path, notice: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self._notice = notice
        self._told: set[str] = set()
        self._attempts: dict[str, Path] = {}
        self._unread: dict[Path, Recorded] = {}
        self._compared: set[Path] = set()

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
                raise ArtifactError(
                    f"`{self.path / '.lock'}` must be a file that can be locked, but got {error}; remove it"
                ) from error
            raise ArtifactError(
                f"`storage` must be a bucket that can be read and written, but got {self.path}: {error}; "
                "create the bucket, correct the location, or give credentials by the environment"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        last_line = (str(error).strip().splitlines() or [""])[-1]
        self.set_status(state=state, error="" if state == "finished" else masked(last_line)[:300], note="")
        self._lock.release()

    def set_status(self, **fields: Any) -> None:
        """Merge `fields` into status.json and stamp it."""
        path = self / "status.json"
        stamp = {"host": socket.gethostname(), "pid": os.getpid(), "updated": time.time()}
        old = read_own_json(path)
        _write_progress(path, (old if RunStatus.of(old) else {}) | stamp | fields)

    # --- finished stages ---

    def result(self, stage: str, print_of_inputs: str) -> Json | None:
        """The stage's result if it finished on exactly these inputs and
        its outputs are what it wrote, else None."""
        folder = real_folder(self / stage)
        settle(folder)
        done = self._done(folder)
        if done is None or done.fingerprint != print_of_inputs:
            return None
        wrong, outputs = look_at_outputs(folder, done.outputs)
        if wrong:
            self._tell(f"{wrong}: {stage} is made again")
            return None
        if outputs != done.outputs:
            replace(done, outputs=outputs).write(folder)
        if folder not in self._compared:
            self._unread[folder] = outputs
        return dict(done.result)

    def stands_since_version_0_1(self, stage: str, print_of_inputs: str) -> bool:
        """Whether the first version of the program finished the stage on these inputs."""
        done = read_own_json(real_folder(self / stage) / DONE_FILE)
        return done.keys() == VERSION_0_1 and done["fingerprint"] == print_of_inputs

    def latest(self, stage: str) -> Json | None:
        """The result of the stage whatever its inputs were; None if it has not finished."""
        done = self._done(real_folder(self / stage))
        return dict(done.result) if done else None

    def _done(self, folder: Path) -> Done | None:
        """The done-marker in `folder`; a damaged one is told of, and is none."""
        done = Done.read(folder)
        if done is None and (folder / DONE_FILE).exists():
            self._tell(f"{folder / DONE_FILE} is damaged: the stage is done again")
        return done

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._notice(text)

    # --- stages that are worked on ---

    def begin(self, stage: str, print_of_inputs: str) -> Path:
        """The folder for an attempt: with its partial work if that belongs to the same inputs, else empty.

        It is the stage's own, or lies beside it where that holds another
        finished result, which stays until `finish`.

        Raises:
            ArtifactError: an artefact of a finished stage, on which the work
                would build, is not what was written.
            LocationError: the partial work of other inputs cannot be removed.
        """
        self.check_artefacts()
        home = real_folder(self / stage)
        settle(home)
        folder = home if self._is_free(home, print_of_inputs) else beside(home)
        if read_own_json(folder / STARTED_FILE).get("fingerprint") != print_of_inputs:
            remove_tree(folder)
            write_json(folder / STARTED_FILE, {"fingerprint": print_of_inputs, "spent_s": 0.0})
        if folder == home:
            remove_tree(beside(home))
            if not self._done(home):
                done = home / DONE_FILE
                remove_tree(done) if done.is_dir() else done.unlink(missing_ok=True)
        self._attempts[stage] = folder
        return folder

    def _is_free(self, home: Path, print_of_inputs: str) -> bool:
        """Whether an attempt on these inputs may be made in the stage's own folder.

        So it is if nothing else was finished there, or the folder is shared by all inputs (that of the worst
        case, whose scores name their own). Where the done-marker is damaged, the partial work of the same
        inputs goes on.
        """
        begun = read_own_json(home / STARTED_FILE).get("fingerprint") == print_of_inputs
        if done := self._done(home):
            return begun and done.fingerprint != print_of_inputs
        return begun or not (home / DONE_FILE).exists()

    def check_artefacts(self) -> None:
        """Before they are used: compare the bytes of all artefacts that
        were taken over by their size and time alone.

        Raises:
            ArtifactError: one is not what its stage wrote.
        """
        while self._unread:
            folder, outputs = self._unread.popitem()
            self._compared.add(folder)
            for path in changed_outputs(folder, outputs):
                raise ArtifactError(
                    f"`{path}` must hold what its stage wrote, but its SHA-256 is another than then; delete "
                    "it and run the same command again, which makes it anew"
                )

    def spent_s(self, stage: str) -> float:
        """Seconds of wall time that earlier, interrupted attempts have spent on the stage."""
        spent = read_own_json(self._attempt(stage) / STARTED_FILE).get("spent_s")
        return float(spent) if isinstance(spent, int | float) else 0.0

    def heartbeat(self, stage: str, spent_s: float, progress: Mapping[str, Any]) -> None:
        """Record how long the stage has taken so far and how far it is (the fields of a `StageProgress`)."""
        marker = self._attempt(stage) / STARTED_FILE
        if started := read_own_json(marker):
            write_json(marker, started | {"spent_s": spent_s}, durable=False)
        self.set_status(state="running", stage=stage, error="", **progress)

    def finish(self, stage: str, print_of_inputs: str, result: Json) -> None:
        """Keep the result and the hashes of the outputs, say that the
        stage is whole, and put it into its place."""
        self.set_status(stage=stage, share=1.0)
        folder, home = self._attempt(stage), real_folder(self / stage)
        Done(print_of_inputs, result, record_outputs(folder)).write(folder)
        self._attempts.pop(stage, None)
        settle(home)

    def _attempt(self, stage: str) -> Path:
        return self._attempts.get(stage, self / stage)


def _write_progress(path: Path, value: Json) -> None:
    if not isinstance(path, RemotePath) and path.is_dir():
        remove_tree(path)
    write_json(path, value, durable=False)


def list_runs(storage: Path) -> dict[str, RunStatus]:
    """Status of every run below `storage`, by name; that of one whose status cannot be read says so."""
    return {path.parent.name: run_status(path.parent) for path in sorted(storage.glob("*/status.json"))}


def run_status(run: Path, stale_s: float = 0.0) -> RunStatus:
    """What status.json says; a run marked running, last stamped `stale_s`
    ago, that nobody holds the lock of was killed.

    One that is damaged or foreign has the state `unreadable`, and says in `error` what to do.
    """
    path = run / "status.json"
    try:
        status = RunStatus.of(read_own_json(path))
    except OSError as error:
        return RunStatus(UNREADABLE, None, error=f"{path}: {error}")
    if status is None:
        wrong = f"{path} is damaged or not kr's; the run's own command writes it anew"
        return RunStatus(UNREADABLE, None, error=wrong)
    stale = time.time() - (status.updated or 0.0) >= stale_s
    if status.state == "running" and stale and not _is_held(run):
        return replace(status, state="killed")
    return status


def _is_held(run: Path) -> bool:
    """Whether somebody works in the run, or nobody can tell: its lock may be another user's, or no file."""
    try:
        return is_locked(run / ".lock")
    except OSError:
        return True
