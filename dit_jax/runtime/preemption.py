"""SIGTERM, by which a cluster announces that it takes the machine back: save what can be saved, exit with status 75.

Where no unfinished work can be saved (a batch of diffs, an evaluation) the process ends at once, even while it waits
for a long computation. A loop that can save its state holds the notice back until its next step:

    with preemption.hold() as notice:
        for step in range(steps):
            ...
            if notice.reached(step):
                save()
                raise preemption.Preempted

With several processes a notice to one of them stops all, in such a loop after the same step, so that none waits for
another in a collective. They talk through the coordination service of `jax.distributed`, which costs nothing while
there is no notice.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
MESSAGE = "preempted (SIGTERM): what was finished is kept, run the same command again to go on"
POLL_SECONDS = 0.5  # between two questions whether another process was told to stop
AGREE_SECONDS = 20  # until another process counts as gone
_KEY = "dit_jax/preempted"


class Preempted(SystemExit):
    """Ends the program with status 75, after the state was saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Notice:
    """Whether to stop, and after which step. `listen` makes it; one thread of the process waits for the signal."""

    def __init__(self, client: Any = None) -> None:
        self._client = client  # of the coordination service; None: one process
        self._lock = threading.Lock()
        self._step: int | None = None  # the last step of a holding loop; None: nothing to save
        self._stop_at: int | None = None
        self._holding = False

    # ------------------------------------------------------------ called by the program

    def reached(self, step: int) -> bool:
        """Whether to save after this step and stop, the same on all processes. A holding loop calls it every step."""
        with self._lock:  # held while the processes agree, so that none runs past the chosen step
            self._step = step if self._holding else None
            return self._stop_at is not None and step >= self._stop_at

    @contextlib.contextmanager
    def hold(self) -> Iterator["Notice"]:
        """After the loop's first `reached`, a notice no longer ends the process at once."""
        self._holding = True
        try:
            yield self
        finally:
            with self._lock:
                self._holding, self._step, told = False, None, self._stop_at is not None
            if told and sys.exc_info()[0] is None:  # the loop had no further step
                raise Preempted

    # ------------------------------------------------------------ called by the waiting thread

    def tell_all(self) -> None:
        """Tells all processes to stop, because this one was told to."""
        if self._client is None:
            self._stop()
            return
        try:
            self._client.key_value_set(_KEY, "")
        except Exception:
            if not self._others_told():  # otherwise another process was faster
                _exit_now()

    def poll(self) -> bool:
        """Whether any process was told to stop; if so, this one learns after which step."""
        if self._client is None or not self._others_told():
            return False
        self._stop()
        return True

    def _others_told(self) -> bool:
        try:
            self._client.key_value_try_get(_KEY)
        except Exception:  # no such key; or no service, and then its client ends the process
            return False
        return True

    def _stop(self) -> None:
        with self._lock:
            steps = self._gather(self._step)
            if None in steps:  # a process without state to save would not reach the common step
                meet(self._client)
                _exit_now()
            self._stop_at = max(step for step in steps if step is not None) + 1

    def _gather(self, step: int | None) -> list[int | None]:
        if self._client is None:
            return [step]
        try:
            mine = "" if step is None else str(step)
            self._client.key_value_set(f"{_KEY}/{jax.process_index()}", mine)
            texts = [
                self._client.blocking_key_value_get(f"{_KEY}/{i}", AGREE_SECONDS * 1000)
                for i in range(jax.process_count())
            ]
        except Exception:  # another process is gone, and a step that needs it would never end
            return [None]
        return [int(text) if text else None for text in texts]


_current = Notice()


def hold() -> contextlib.AbstractContextManager[Notice]:
    """`Notice.hold` of the run that listens; without one (a stage called as a function) no notice ever comes."""
    return _current.hold()


@contextlib.contextmanager
def listen() -> Iterator[Notice]:
    """Listens for SIGTERM while the body runs; does nothing outside the main thread."""
    global _current
    client = _client() if jax.process_count() > 1 else None
    _current = notice = Notice(client)
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield notice
        return
    # Python's own handlers run between two lines of the program, so a long computation would delay the notice. The
    # C handler below them writes a byte at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    closed = threading.Event()
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_wait, args=(notice, reader, closed), daemon=True)
    thread.start()
    try:
        yield notice
    except Preempted:
        print(MESSAGE, file=sys.stderr, flush=True)
        raise
    finally:
        closed.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, earlier if earlier is not None else signal.SIG_DFL)
        os.write(writer, b"\0")  # wakes the thread
        thread.join(timeout=2 * POLL_SECONDS)
        os.close(writer)
        os.close(reader)
        _current = Notice()


def meet(client: Any = None) -> None:
    """Waits for the other processes before this one exits, because its end would end them with another status."""
    client = client or (_client() if jax.process_count() > 1 else None)
    if client is None:
        return
    with contextlib.suppress(Exception):
        client.wait_at_barrier(f"{_KEY}/exit", AGREE_SECONDS * 1000)
    if jax.process_index() == 0:
        time.sleep(1)  # process 0 serves the barrier, and its answers must reach the others first


def _wait(notice: Notice, reader: int, closed: threading.Event) -> None:
    told = False
    while not closed.is_set():
        ready, _, _ = select.select([reader], [], [], POLL_SECONDS)
        signals = os.read(reader, 64) if ready else b""
        if not told and signal.SIGTERM in signals:
            notice.tell_all()
            told = notice._client is None
        told = told or notice.poll()


def _exit_now() -> None:
    os.write(
        2, f"{MESSAGE}\n".encode()
    )  # not through Python's buffers, whose lock the main thread may hold
    os._exit(EXIT_PREEMPTED)


def _client() -> Any:
    # jax has no public name for the client of its coordination service.
    from jax._src import distributed

    return distributed.global_state.client
