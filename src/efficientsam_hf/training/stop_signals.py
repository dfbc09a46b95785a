# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: noted, so that it can save first; and output that outlives the terminal."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside the block the signals that end a process go to a handler; only the main thread has signals.

    SIGHUP does not where it is ignored: `nohup` is for runs that outlive their terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in STOPPING if not _is_without_terminal(number)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: of a library in C


def _is_without_terminal(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class StopSignal:
    """The signal that a run is to end by, once it has come; a second Ctrl-C does not wait for the run to be saved."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # and a third one not for anything
            raise KeyboardInterrupt
        if self.number is None:  # launchers pass signals on, and batch systems signal every process as well
            self.number = number


class LastingStream:
    """A stream whose reader may go, as a closed terminal does: what it cannot take is lost, and nothing else."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
