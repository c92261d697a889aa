"""Any API model, through Inspect (`openai/…`, `anthropic/…`, `google/…`, `vllm/…`, `mockllm/model`); as judge."""

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dit_jax.errors import DitError, first_line
from dit_jax.graders.grades import Grade, Grader, Item
from dit_jax.graders.judge import PROMPT_DIGEST, judge_prompt, read_reply

MAX_TOKENS = 2048  # room for models that reason before they answer; others stop after the digit
MAX_WAIT = 60.0


class Reply(NamedTuple):
    """What came back: the text, or None and why; tokens as the provider counts them, of prompt and reply.

    attempts: how many calls failed before Inspect gave up; 0: it had a reply, or another call could not help.
    """

    text: str | None
    failure: str = ""
    tokens: int = 0
    attempts: int = 0


class InspectClient:
    """A model that Inspect provides; keys come from the provider's environment.

    Inspect repeats a failed call where its provider says that another attempt may succeed (rate limits, timeouts,
    servers that are down), and not where it cannot (a wrong key, a bad request).

    Args:
        model: a name as Inspect writes it, or a loaded `inspect_ai.model.Model`, which keeps its own waits.
        temperature: None leaves it to the provider.
        attempts: calls per prompt, at most.
        wait: seconds before the second attempt; each further one waits twice as long, at most 60 s,
            and a random part of `wait` / 4 longer, so that many calls do not return at once.
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
            from tenacity import wait_exponential, wait_random
        except ImportError:
            raise DitError(f"{what} needs inspect_ai: pip install 'dit_jax[grading]'") from None
        if attempts < 1:
            raise DitError(f"attempts {attempts} of {what}: give 1 or more")
        self.config = GenerateConfig(
            temperature=temperature, max_tokens=MAX_TOKENS, max_retries=attempts - 1
        )
        own = isinstance(model, str)
        try:
            # Its own instance: others that ask the same model keep their waits.
            options = {"memoize": False, **model_args}
            self.model = get_model(model, config=self.config, **options) if own else model
        except Exception as error:  # each provider raises its own: unknown name, package, key
            # What is missing may stand in a later line, in the markup of a terminal.
            problem = re.sub(r"\[/?bold\]", "", str(error)).removeprefix("ERROR: ")
            raise DitError(f"Inspect cannot give the model {model!r}: {problem}") from None
        if own:
            waits = wait_exponential(wait, max=MAX_WAIT) + wait_random(0, wait / 4)
            self.model.api.retry_wait = lambda: waits  # type: ignore[method-assign]
        self.name = f"inspect:{self.model}"
        self.connections = connections

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
        from tenacity import RetryError

        last: BaseException
        try:
            output = await self.model.generate(prompt, config=self.config, cache=False)
        except Exception as error:  # of the provider or the network, after Inspect's retries
            attempts, last = 0, error
            if isinstance(error, RetryError):
                attempts = error.last_attempt.attempt_number
                last = error.last_attempt.exception() or error
            return Reply(None, f"{type(last).__name__}: {first_line(last)}", attempts=attempts)
        if output.error:
            return Reply(None, output.error)
        return Reply(output.completion, tokens=output.usage.total_tokens if output.usage else 0)


class InspectJudge(InspectClient, Grader):
    """Asks a model that Inspect provides for one digit.

    Args:
        model, temperature, attempts, wait, connections, **model_args: see `InspectClient`.
    """

    name = "inspect"
    about = "an API model as judge"
    needs = "inspect_ai and the name of a model, often with a provider's key"
    version = "2"
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
        given = sorted(model_args.items())
        self.settings = f"{self.model} {PROMPT_DIGEST} {temperature} {given}"

    @classmethod
    def check(cls, **options: Any) -> None:
        cls(**options)

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        return [self._read(reply) for reply in self.complete([judge_prompt(i) for i in items])]

    async def grade_async(self, items: Sequence[Item]) -> list[Grade]:
        """One grade per item, in order; a scorer inside Inspect can await it."""
        replies = await self.complete_async([judge_prompt(item) for item in items])
        return [self._read(reply) for reply in replies]

    def _read(self, reply: Reply) -> Grade:
        if reply.text is not None:
            return read_reply(reply.text, self.name)
        error, _, _ = reply.failure.partition(":")  # the kind alone: the rest differs by call
        tried = f" after {reply.attempts} attempts" if reply.attempts else ""
        return Grade(None, reply.failure, self.name, f"no reply{tried} ({error})")
