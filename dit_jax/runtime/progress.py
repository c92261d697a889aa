"""Progress bars with ETA in a terminal; one line now and then where the output is piped. On process 0 only."""

import sys
import time
from types import TracebackType

from dit_jax.runtime.processes import is_main


class Progress:
    """`with Progress("diffs", total) as p: p.advance(n, note="loss 1.2")`."""

    def __init__(self, name: str, total: int, enabled: bool = True):
        self.name, self.total, self.enabled = name, total, enabled and is_main()
        self.done = 0

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self._start = self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self.total, desc=self.name, disable=not (self.enabled and terminal))
        self._lines = self.enabled and not terminal
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._lines and (now - self._printed > 15 or self.done == self.total):
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            note = f", {note}" if note else ""
            print(
                f"{self.name}: {self.done}/{self.total}, about {left:.0f} s left{note}",
                file=sys.stderr,
                flush=True,
            )
            self._printed = now

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
