"""Turns concurrent calls into batches: the first waits a moment, then works for all that arrived meanwhile."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Waiting(Generic[Item]):
    def __init__(self, key: Hashable, item: Item):
        self.key, self.item = key, item
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class Batcher(Generic[Item, Result]):
    """Runs `work(items)` in a thread on up to `size` waiting items of one key at a time.

    Args:
        work: gives one result or exception per item; where it raises one, it is called again for each
            item alone, so that an error reaches only the item that causes it.
        size: the most items of a batch.
        window: seconds that the first item waits for others.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        size: int,
        window: float,
    ):
        self._work, self._size, self._window = work, size, window
        self._waiting: list[_Waiting[Item]] = []
        self._lock = anyio.Lock()
        self._calls = 0

    async def __call__(self, key: Hashable, item: Item) -> Result:
        """The result of one item; items of other keys run in other batches."""
        if not self._calls:
            self._lock = anyio.Lock()  # an earlier event loop may have ended while holding it
            self._waiting.clear()
        mine = _Waiting(key, item)
        self._waiting.append(mine)
        self._calls += 1
        try:
            async with self._lock:  # one batch at a time uses the device
                if not mine.done:
                    await self._run_batch(mine)
        finally:
            self._calls -= 1
            if mine in self._waiting:  # cancelled before its turn
                self._waiting.remove(mine)
        if mine.error is not None:
            raise mine.error
        return mine.result

    async def _run_batch(self, first: _Waiting[Item]) -> None:
        await anyio.sleep(self._window)
        same = [other for other in self._waiting if other.key == first.key and other is not first]
        batch = [first, *same[: self._size - 1]]
        self._waiting = [other for other in self._waiting if other not in batch]
        ended, loop = anyio.Event(), anyio.lowlevel.current_token()

        def run() -> None:
            self._work_for(batch)
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                anyio.from_thread.run_sync(ended.set, token=loop)

        # The other calls of the batch need their results even if the one that works for them is cancelled, and no
        # batch runs beside one that goes on. A shield does not keep off what asyncio itself cancels.
        threading.Thread(target=run, daemon=True).start()
        with anyio.CancelScope(shield=True):
            try:
                await ended.wait()
            finally:
                await ended.wait()

    def _work_for(self, batch: Sequence[_Waiting[Item]]) -> None:
        """Gives each call its result; runs in a thread."""
        try:
            self._give(batch)
        except BaseException:
            # One of them is wrong: each alone, so that only this one gets the error.
            for call in batch:
                try:
                    self._give([call])
                except BaseException as error:  # a panic of a native library is no Exception
                    call.error = error
        for call in batch:
            call.done = True

    def _give(self, batch: Sequence[_Waiting[Item]]) -> None:
        results = self._work([call.item for call in batch])
        for call, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                call.error = result
            else:
                call.result = result
