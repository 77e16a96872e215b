"""Who works in a folder: one process at a time.

On a file system a lock belongs to its process and goes with it. An object store has none: there the holder
writes a beat into an object every few seconds, and whoever finds one waits to see whether it still beats. No
two clocks are compared. A killed holder's lock is free after `LEASE_S`. Two processes that start within the
same moment are told apart by who wrote last, which `SETTLE_S` gives them time to see; who finds at a later
beat that the lock is another's is interrupted.
"""

from __future__ import annotations

import _thread
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kr_ray.runs.storage import RemotePath, list_files

BEAT_S = 5.0
LEASE_S = 20.0
"""Longer than a beat takes while the store is slow; a store that fails for
longer stops the work before it frees the lock."""
SETTLE_S = 1.0


class RemoteLock:
    """Like filelock.FileLock, for an object in a store."""

    def __init__(self, path: RemotePath, timeout: float = 0.0) -> None:
        self.path, self.timeout = path, timeout
        self._owner, self._beats, self._over = uuid.uuid4().hex, 0, threading.Event()

    def acquire(self, timeout: float | None = None) -> None:
        """Take the lock, or wait for `timeout` s (and at least as long
        as it takes to see whether its holder lives).

        Raises:
            filelock.Timeout: another process holds it.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not self._take():
            if time.monotonic() > deadline:
                raise Timeout(str(self.path))
        self._over.clear()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        if self._holder() == self._owner:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RemoteLock:
        self.acquire()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def _take(self) -> bool:
        """One attempt: wait until the lock is free, its holder was seen to live, or it stopped beating."""
        found, since = self._read(), time.monotonic()
        while found is not None:
            time.sleep(min(1.0, BEAT_S / 4))
            if (now := self._read()) is not None and now != found:
                return False
            if now is None or time.monotonic() - since > LEASE_S:
                break
        self._beat()
        time.sleep(SETTLE_S)
        return self._holder() == self._owner

    def _keep(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if (
                    self._holder() != self._owner
                ):  # taken over while this process was suspended: two must not go on
                    _thread.interrupt_main()
                    return
                self._beat()
            except OSError:  # asked for a minute; the work will find out by itself
                continue

    def _beat(self) -> None:
        self._beats += 1
        beat = {"owner": self._owner, "beats": self._beats, "host": socket.gethostname(), "pid": os.getpid()}
        self.path.write_bytes(json.dumps(beat).encode())

    def _read(self) -> bytes | None:
        """The last beat, as it was written. A damaged one is taken for a holder's
        until it has not changed for a lease's time."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _holder(self) -> str:
        try:
            beat = json.loads(self._read() or b"{}")
        except ValueError:
            return ""
        return str(beat.get("owner", "")) if isinstance(beat, dict) else ""


def lock_file(path: Path, timeout: float = 0.0) -> FileLock | RemoteLock:
    """A lock, not taken yet, that waits for `timeout` s; use as a
    context manager or by `acquire` and `release`."""
    return RemoteLock(path, timeout) if isinstance(path, RemotePath) else FileLock(path, timeout=timeout)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock. Of a remote one: whether it has beaten
    lately, by the store's clock and this machine's."""
    if isinstance(path, RemotePath):
        whole_second = 1.0  # in which stores tell the time
        return any(time.time() - file.mtime_ns / 1e9 < LEASE_S + whole_second for file in list_files(path))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
