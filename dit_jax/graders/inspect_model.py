"""Any API model, through Inspect (`openai/…`, `anthropic/…`, `google/…`, `vllm/…`, `mockllm/model`); as judge."""

import asyncio
import hashlib
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dit_jax.errors import DitError, first_line
from dit_jax.graders.grades import Grade, Item
from dit_jax.graders.prompts import PROMPT, judge_prompt, read_reply

MAX_TOKENS = 2048  # room for models that reason before they answer; others stop after the digit
MAX_WAIT = 60.0


class Reply(NamedTuple):
    """What came back: the text, or None and why; tokens as the provider counts them, of prompt and reply."""

    text: str | None
    failure: str = ""
    tokens: int = 0


class InspectClient:
    """A model that Inspect provides, asked with retries; keys come from the provider's environment.

    Args:
        model: a name as Inspect writes it, or a loaded `inspect_ai.model.Model`.
        temperature: None leaves it to the provider.
        attempts: calls per prompt before it is given up.
        wait: seconds before the second attempt; each further one waits twice as long, at most 60 s,
            with up to a quarter more by chance, so that many calls do not return at once.
        connections: calls at the same time.
        what: who asks, for messages.
        **model_args: go to the provider.

    Raises:
        DitError: inspect_ai is not installed, or it does not know the model or finds no key.
    """

    def __init__(
        self,
        model: Any,
        temperature: float | None = None,
        attempts: int = 5,
        wait: float = 1.0,
        connections: int = 10,
        what: str = "the grader 'inspect'",
        **model_args: Any,
    ):
        try:
            from inspect_ai.model import GenerateConfig, get_model
        except ImportError:
            raise DitError(f"{what} needs inspect_ai: pip install 'dit_jax[grading]'") from None
        if attempts < 1:
            raise DitError(f"attempts {attempts} of {what}: give 1 or more")
        # One attempt inside: the waiting is done here, the same for every provider.
        config = GenerateConfig(temperature=temperature, max_tokens=MAX_TOKENS, max_retries=0)
        try:
            self.model = (
                get_model(model, config=config, **model_args) if isinstance(model, str) else model
            )
        except Exception as error:  # each provider raises its own: unknown name, package, key
            # What is missing may stand in a later line, in the markup of a terminal.
            problem = re.sub(r"\[/?bold\]", "", str(error)).removeprefix("ERROR: ")
            raise DitError(f"Inspect cannot give the model {model!r}: {problem}") from None
        self.config = config
        self.name = f"inspect:{self.model}"
        self.attempts, self.wait, self.connections = attempts, wait, connections

    def complete(self, prompts: Sequence[str]) -> list[Reply]:
        """One reply per prompt from synchronous code; inside an event loop await `complete_async` instead."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.complete_async(prompts))
        # A loop is running (a notebook): a thread of its own can wait without blocking it.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self.complete_async(prompts)).result()

    async def complete_async(self, prompts: Sequence[str]) -> list[Reply]:
        """One reply per prompt, in order, `connections` at a time; a scorer inside Inspect can await it."""
        free = asyncio.Semaphore(self.connections)

        async def one(prompt: str) -> Reply:
            async with free:
                return await self._complete(prompt)

        return list(await asyncio.gather(*map(one, prompts)))

    async def _complete(self, prompt: str) -> Reply:
        failure = ""
        for attempt in range(self.attempts):
            if attempt:
                pause = min(MAX_WAIT, self.wait * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(1, 1.25))
            try:
                output = await self.model.generate(prompt, config=self.config, cache=False)
            except (
                Exception
            ) as error:  # of the provider or the network: another attempt may succeed
                failure = f"{type(error).__name__}: {first_line(error)}"
                continue
            if output.error:
                failure = output.error
                continue
            tokens = output.usage.total_tokens if output.usage else 0
            return Reply(output.completion, tokens=tokens)
        return Reply(None, failure)


class InspectJudge(InspectClient):
    """Asks a model that Inspect provides for one digit.

    Args:
        model, temperature, attempts, wait, connections, **model_args: see `InspectClient`.
    """

    version = "1"
    deterministic = False
    cached = True

    def __init__(
        self,
        model: Any,
        temperature: float | None = None,
        attempts: int = 5,
        wait: float = 1.0,
        connections: int = 10,
        **model_args: Any,
    ):
        super().__init__(model, temperature, attempts, wait, connections, **model_args)
        self.batch = 4 * connections
        prompt = hashlib.sha256(PROMPT.encode()).hexdigest()
        self.settings = f"{self.model} {prompt} {temperature} {sorted(model_args.items())}"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        return [self._read(reply) for reply in self.complete([judge_prompt(i) for i in items])]

    async def grade_async(self, items: Sequence[Item]) -> list[Grade]:
        """One grade per item, in order; a scorer inside Inspect can await it."""
        return [
            self._read(reply)
            for reply in await self.complete_async([judge_prompt(i) for i in items])
        ]

    def _read(self, reply: Reply) -> Grade:
        if reply.text is None:
            # The kind alone: the rest differs from call to call.
            error, _, _ = reply.failure.partition(":")
            reason = f"no reply after {self.attempts} attempts ({error})"
            return Grade(None, reply.failure, self.name, reason)
        return read_reply(reply.text, self.name)
