"""What Ctrl-C, SIGTERM and SIGHUP do to a command: the same thing, at any moment, however often they come.

The first signal raises KeyboardInterrupt in the main thread, and the work unwinds: states are kept, Ray ends,
the run's status says interrupted. Later signals change nothing, for they would break off just that. But
Python runs a handler only between two of its own instructions, libraries put handlers of their own in its
place (Ray's `init`, Ray Train), and a KeyboardInterrupt raised inside a callback or an import is lost. So a
thread is told of every signal by the interpreter itself, whichever handler stands, and ends the process when
the main thread hasn't within `patience_s`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
"""Exit code, for all of them."""
MESSAGE = "interrupted; run the same command again to go on"
PATIENCE_S = 7.0
LAST_WORDS_S = 1.0
"""With this much for a tidy end, and for last words, nothing of a command is left ten seconds after the first
signal."""


class Interruption:
    """Turns signals into the end of a command, as a context manager around it. Outside of the main thread it
    does nothing.

    Args:
        patience_s: after so many seconds the process is ended if it has not ended by itself. None: it is left
            alone, every SIGINT and SIGTERM raises KeyboardInterrupt, for a command that has an answer of its
            own, and SIGHUP ends it as it would any program.

    Attributes:
        received: the first signal that came, or None.
    """

    def __init__(self, patience_s: float | None = PATIENCE_S) -> None:
        self.received: int | None = None
        self._patience_s = patience_s
        self._raised = self._said = False
        self._ear: socket.socket | None = None
        self._hearing = threading.Lock()
        self._last_words: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if not self._main:
            return self
        # Who ignores a signal (nohup, a job of a shell script in the background) goes on ignoring it.
        taken = SIGNALS if self._patience_s is not None else SIGNALS[:2]
        self._before = {
            number: h for number in taken if (h := signal.getsignal(number)) is not signal.SIG_IGN
        }
        for number in self._before:
            signal.signal(number, self._on_signal)
        if self._patience_s is not None:
            self._ear, self._mouth = socket.socketpair()
            for end in (self._ear, self._mouth):
                end.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(self._ear, self._patience_s), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is undone after a signal: what is left of the process, too, must end in time."""
        if not self._main or self.heard():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._patience_s is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._mouth.close()

    @contextmanager
    def last_words(self, write: Callable[[], None]) -> Iterator[None]:
        """For the length of the block, `write` is what a signal leaves to be said, such as the run's status;
        it may be called twice.

        It runs when the block has unwound, and in the thread that ends a process that doesn't.
        """
        self._last_words = write
        try:
            yield
        finally:
            if self.heard():
                with suppress(OSError, ValueError):
                    write()
            else:
                self._last_words = lambda: None

    def heard(self) -> bool:
        """Whether a signal has come, even if a library's handler took it a moment ago and the listening
        thread has had no turn yet."""
        with self._hearing:
            if self.received is None and self._ear is not None:
                with suppress(BlockingIOError):
                    self._note(self._ear.recv(64, socket.MSG_PEEK))
        return self.received is not None

    def say(self) -> None:
        """The one sentence, once."""
        if not self._said:
            self._said = True
            with suppress(OSError, ValueError):  # the terminal that hung up
                print(f"kr: {MESSAGE}", file=sys.stderr, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number  # the listening thread may have been first
        if not self._raised or self._patience_s is None:
            self._raised = True
            raise KeyboardInterrupt

    def _note(self, numbers: bytes) -> None:
        self.received = self.received or next((number for number in numbers if number in SIGNALS), None)

    def _listen(self, ear: socket.socket, patience_s: float) -> None:
        while self.received is None:
            select.select([ear], [], [])
            with self._hearing:
                if not (numbers := ear.recv(64)):
                    return  # the command is over
                self._note(numbers)
        time.sleep(patience_s)  # if all goes well, the process is gone before this is over
        self._end()

    def _end(self) -> None:
        """Without the main thread, which is busy, stuck, or has not heard. The kernel takes the processes of
        a local Ray along."""
        self.say()
        # In a thread of its own: a store that does not answer must not keep the process.
        speaker = threading.Thread(target=self._last_words, daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_S)
        os._exit(INTERRUPTED)
