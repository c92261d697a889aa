"""Progress bars with the time left in a terminal, occasional lines where the output is piped; on process 0 only."""

import sys
import time

from dit_jax.runtime.outgoing import show
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
            show(
                f"{self.name}: {self.done}/{self.total}, about {left:.0f} s left{note}", error=True
            )
            self._printed = now

    def __exit__(self, *error: object) -> None:
        self._bar.close()
