"""A local model as judge: any chat model that this program loads, through batched decoding."""

import hashlib
from collections.abc import Sequence
from typing import Any

from dit_jax.errors import DitError
from dit_jax.graders.grades import Grade, Item
from dit_jax.graders.prompts import PROMPT, judge_prompt, read_reply

MAX_NEW_TOKENS = 8  # a digit with some decoration


class Judge:
    """Asks a chat model for one digit.

    Args:
        model: a loaded `dit_jax.api.Model`, or what `load_model` takes (a folder, a hub id).
        dtype: to load it in.
        temperature: 0 is greedy, and then every repeat is the same; above 0 repeats differ by seed.
        seed: of the first repeat.
        batch: items per compiled program; the last batch is filled up with repeats.

    Raises:
        DitError: no such model, it has no tokenizer, or a temperature below 0.
    """

    version = "1"
    cached = True

    def __init__(
        self,
        model: Any,
        dtype: str = "bfloat16",
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 32,
    ):
        from dit_jax.api import load_model

        if temperature < 0:
            raise DitError(f"temperature {temperature} of the judge: give 0 (greedy) or more")
        self.model = model if hasattr(model, "logits") else load_model(model, dtype)
        _ = self.model.chat  # says now that a tokenizer is missing
        self.name = f"judge:{self.model.name.rstrip('/').rsplit('/', 1)[-1]}"
        self.temperature, self.seed, self.batch = temperature, seed, batch
        self.deterministic = temperature == 0
        prompt = hashlib.sha256(PROMPT.encode()).hexdigest()
        self.settings = f"{self.model.digest()} {prompt} {temperature} {seed}"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        from dit_jax.asking import answer_batch

        answers = answer_batch(
            self.model,
            [judge_prompt(item) for item in items],
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=self.batch,
            temperature=self.temperature,
            seed=self.seed + repeat,
        )
        return [read_reply(answer.text, self.name) for answer in answers]
