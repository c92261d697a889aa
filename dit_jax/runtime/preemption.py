"""SIGTERM, by which a cluster announces that it takes the machine back, and Ctrl-C: save what can be saved, then exit.

Where no unfinished work can be saved (a batch of diffs, an evaluation) the process ends at once, even while it waits
for a long computation. A loop that can save its state holds the notice back until its next step:

    with preemption.hold() as notice:
        for step in range(steps):
            ...
            if notice.reached(step):
                save()
                raise preemption.Preempted

A second Ctrl-C does not wait for the step. With several processes a notice to one of them stops all, in such a loop
after the same step, so that none waits for another in a collective. They talk through the coordination service of
`jax.distributed`, which costs nothing while there is no notice.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from dit_jax.runtime import interrupts
from dit_jax.runtime.outgoing import show

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
MESSAGE = "preempted (SIGTERM): what was finished is kept, run the same command again to go on"
SAVES = "interrupted: this step is finished and saved first; Ctrl-C again ends at once"
AGREE_SECONDS = 20  # until another process counts as gone
_KEY = "dit_jax/preempted"


class Preempted(SystemExit):
    """Ends the program after the state was saved, with the status of what stopped it."""

    def __init__(self) -> None:
        super().__init__(ending(_current.number)[0])


def ending(number: int) -> tuple[int, str]:
    """Exit status and last line of a program that a signal has stopped."""
    if number == signal.SIGINT:
        return interrupts.EXIT_INTERRUPTED, interrupts.INTERRUPTED
    return EXIT_PREEMPTED, MESSAGE


class Notice:
    """Whether to stop, and after which step. `listen` makes it; one thread of the process waits for the signal.

    number: the signal that stops the program.
    """

    def __init__(self, client: Any = None) -> None:
        self.number: int = signal.SIGTERM
        self._client = client  # of the coordination service; None: one process
        self._lock = threading.Lock()
        self._step: int | None = None  # the last step of a holding loop; None: nothing to save
        self._stop_at: int | None = None
        self._holding = False
        self._interrupts = 0
        self._asked = False  # by Ctrl-C
        self._told = False  # to stop, by this process or another
        self._stopped = False  # all processes know it

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

    def interrupt(self, number: int, frame: Any) -> None:
        """Python's handler of Ctrl-C, which in a program comes after the waiting thread."""
        self._interrupts += 1
        if interrupts.ends_at_once():
            if self._interrupts > 1:  # the thread may be waiting for other processes
                self._end()
        elif self._step is None or self._asked:
            raise KeyboardInterrupt
        else:
            self._asked = True  # the thread tells all: the lock that it takes may be held here

    # ------------------------------------------------------------ called by the waiting thread

    def react(self, signals: set[int]) -> None:
        """Acts on signals that this process got, and on what another process says."""
        if signal.SIGINT in signals and interrupts.ends_at_once():
            self._asked, asked_before = True, self._told
            if asked_before or (self._step is None and self._client is None):
                self.number = signal.SIGINT
                self._end()
            if self._step is not None:
                interrupts.say(SAVES)
        if not self._told and (self._asked or signal.SIGTERM in signals):
            self.number = signal.SIGINT if self._asked else signal.SIGTERM
            self._told = True
            self._tell_all()
        if not self._stopped:
            self._poll()

    def _tell_all(self) -> None:
        if self._client is None:
            self._stop()
            return
        try:
            self._client.key_value_set(_KEY, str(int(self.number)))
        except Exception:
            if self._others_tell() is None:  # otherwise another process was faster
                self._end()

    def _poll(self) -> None:
        """If any process was told to stop, this one learns after which step."""
        if self._client is not None and (said := self._others_tell()) is not None:
            self._told, self.number = True, int(said)
            self._stop()

    def _others_tell(self) -> str | None:
        try:
            return str(self._client.key_value_try_get(_KEY))
        except Exception:  # no such key; or no service, and then its client ends the process
            return None

    def _stop(self) -> None:
        self._stopped = True
        with self._lock:
            steps = self._gather(self._step)
            if None in steps:  # a process without state to save would not reach the common step
                meet(self._client)
                self._end()
            self._stop_at = max(step for step in steps if step is not None) + 1

    def _end(self) -> NoReturn:
        interrupts.exit_now(*ending(self.number))

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
    """Listens for SIGTERM and Ctrl-C while the body runs; does nothing outside the main thread."""
    global _current
    client = _client() if jax.process_count() > 1 else None
    _current = notice = Notice(client)
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield notice
        return
    handlers: dict[int, Any] = {signal.SIGTERM: lambda number, frame: None}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a background job does
        handlers[signal.SIGINT] = notice.interrupt
    try:
        with interrupts.hear(handlers, notice.react):
            yield notice
    except Preempted:
        show(ending(notice.number)[1], error=True)
        raise
    finally:
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


def _client() -> Any:
    # jax has no public name for the client of its coordination service.
    from jax._src import distributed

    return distributed.global_state.client
