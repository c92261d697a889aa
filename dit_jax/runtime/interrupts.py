"""Ctrl-C ends a program with one line, wherever it is: in an import, in the compiler, in a library's callback.

Python's own handler raises KeyboardInterrupt between two lines of the main thread. So a long computation delays it, and
Python discards it inside a callback of its garbage collector, of which jax has one. Here a thread hears of the signal
at once, and ends the process. That is safe: artifacts are complete or absent.

This module imports little, so that a program can call `end_at_once` before it imports jax.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells expect after Ctrl-C
_GO_ON = "run the same command again (runs, sweeps and audits go on from what was finished)"
INTERRUPTED = f"interrupted: {_GO_ON}"
POLL_SECONDS = 0.5
_FLUSH_SECONDS = 0.5

unfinished: set[Path] = set()  # what `exit_now` deletes: files and folders under temporary names
_ends = _started = False
_ENDS: dict[int, str] = {
    signal.SIGTERM: f"terminated (SIGTERM): {_GO_ON}",
    signal.SIGHUP: f"the terminal is gone (SIGHUP): {_GO_ON}",
}


def end_at_once() -> None:
    """From now on Ctrl-C ends this program; for command lines. A background job, which ignores it, goes on.

    SIGTERM and the end of the terminal do as well, which alone would leave unfinished files behind.
    """
    global _ends, _started
    _open_streams()
    if _started:
        return
    _started = True
    _ends = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    heard: list[int] = [signal.SIGINT] if _ends else []
    heard += [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]

    def react(signals: set[int]) -> None:
        if signal.SIGINT in signals:
            exit_now()
        for number in signals:
            exit_now(128 + number, _ENDS[number])

    if heard:
        _start(dict.fromkeys(heard, _nothing), react)


def ends_at_once() -> bool:
    """Whether Ctrl-C ends this program, and raises no KeyboardInterrupt."""
    return _ends


@contextlib.contextmanager
def hear(handlers: Mapping[int, Any], react: Callable[[set[int]], None]) -> Iterator[None]:
    """Calls `react(signals)` in a thread at once when one of them comes, and with none every POLL_SECONDS.

    Args:
        handlers: what Python calls beside that in the main thread, when it gets there.
    """
    stop = _start(handlers, react)
    try:
        yield
    finally:
        stop()


def exit_now(status: int = EXIT_INTERRUPTED, message: str = INTERRUPTED) -> NoReturn:
    """Ends the process from any thread, with one line on stderr; nothing unfinished stays on the disk."""
    # Beside a blocked writer, whose lock the main thread holds, a flush would wait forever.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)
    say(message)
    for path in tuple(unfinished):
        for _ in range(3):  # the main thread may be writing into the folder
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()
    os._exit(status)


def say(message: str) -> None:
    """Writes a line to stderr, past Python's buffers, whose lock another thread may hold."""
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""  # after a progress bar
        os.write(2, f"{start}{message}\n".encode())


def _open_streams() -> None:
    """Without them (`>&-`) the first files that are opened would get the numbers, and the text, of the streams."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _nothing(number: int, frame: Any) -> None:
    """A handler of Python's, so that the C handler below it writes to the pipe."""


def _start(handlers: Mapping[int, Any], react: Callable[[set[int]], None]) -> Callable[[], None]:
    """Starts a thread that hears of signals; returns what ends it and puts the earlier handlers back."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    closed = threading.Event()

    def wait() -> None:
        while not closed.is_set():
            ready, _, _ = select.select([reader], [], [], POLL_SECONDS)
            heard = set(os.read(reader, 64) if ready else b"")
            others = bytes(heard - handlers.keys() - {0})
            if others and wakeup >= 0:
                os.write(wakeup, others)  # for who listened before
            react(heard & handlers.keys())

    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()

    def stop() -> None:
        closed.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(writer, b"\0")  # wakes the thread
        thread.join(timeout=2 * POLL_SECONDS)
        if not thread.is_alive():
            os.close(writer)
            os.close(reader)

    return stop
