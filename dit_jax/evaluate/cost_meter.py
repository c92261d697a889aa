"""What methods cost: seconds, answers and tokens of each."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from dit_jax.asking import Answer
from dit_jax.data.chat import Chat


class CostMeter:
    """`with meter.measure("dit"): … meter.count(…)`; `costs` then has {"seconds", "answers", "tokens", …} of it."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}
        self._current: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """What happens inside is the cost of `name`; compilation is in the seconds."""
        self._current = {"seconds": 0.0, "answers": 0, "prompt_tokens": 0, "tokens": 0}
        start = time.monotonic()
        yield
        self._current["seconds"] = round(time.monotonic() - start, 3)
        self.costs[name] = self._current

    def count(self, chat: Chat, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        """Adds answers, the tokens of their prompts and those that were generated."""
        if self._current:
            self._current["answers"] += len(answers)
            self._current["prompt_tokens"] += sum(len(chat.prompt_ids(p)) for p in prompts)
            self._current["tokens"] += sum(a.generated for a in answers)

    def tokens(self, number: int) -> None:
        """Adds tokens that another model generated."""
        if self._current:
            self._current["tokens"] += number
