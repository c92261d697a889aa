"""The Inspect provider `dit_jax/MODEL`: base ⊕ diff ⊕ adapter as a chat model that decodes calls in batches."""

import functools
import logging
import math
import operator
import secrets
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from dit_jax.api import load_diffs, load_model, read_adapter
from dit_jax.asking import Answer, answer_batch, is_temperature
from dit_jax.data.chat import Prompt
from dit_jax.deltas.tree import is_lora, layout
from dit_jax.errors import DitError, did_you_mean, printable
from dit_jax.formats.files import short
from dit_jax.inspection.batching import Batcher
from dit_jax.inspection.one_line import one_line
from dit_jax.models.delta_trees import Delta

MAX_TOKENS = 256
_log = logging.getLogger(__name__)
# Settings of a call that this provider follows, and those that do not change what is decoded. Any other setting is
# refused, so that none is silently dropped.
_FOLLOWED = {"max_tokens", "temperature", "seed", "extra_body"}
_NO_EFFECT = {
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections",
    "adaptive_connections", "max_tool_output", "internal_tools", "parallel_tool_calls", "cache",
    "cache_prompt", "batch", "reasoning_history", "fail_on_refusal",
    "system_message",  # Inspect has put it before the messages
}  # fmt: skip
_ARGUMENTS = ("diff", "index", "adapter", "dtype", "forbid_repeats", "batch_size", "window")
_EXTRA = ("diff", "index", "adapter", "forbid_repeats")


class Call(NamedTuple):
    """One call. Calls that agree from `adapter` on can share a batch."""

    prompt: Prompt
    diff: str
    diff_index: int
    adapter: str
    max_tokens: int
    temperature: float
    seed: int | None
    forbid_repeats: bool


class DitJaxAPI(ModelAPI):
    """A base model with a weight diff and an adapter, both optional.

    Args:
        model_name: anything that `dit_jax.load_model` takes: "tiny_qwen3", a folder, a hub id.
        diff, index: a diff in any format that `dit_jax.load_diff` reads.
        adapter: anything that `dit_jax.load_adapter` takes.
        dtype: "float32" or "bfloat16".
        forbid_repeats: never emit a token twice in an answer (adapters that list evidence).
        batch_size: rows of a decoded batch; every batch is filled up to it, so that one program serves all.
        window: seconds that a call waits for others to share its batch.

    A call may choose its own `diff`, `index`, `adapter` and `forbid_repeats` in `extra_body`; an empty string is none.

    Raises:
        DitError: a model argument is unknown or wrong, or a loader raises it.
    """

    @one_line
    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        diff: str = "",
        index: int = 0,
        adapter: str = "",
        dtype: str = "float32",
        forbid_repeats: bool = False,
        batch_size: int = 32,
        window: float = 0.01,
        **unknown: Any,
    ):
        config = config or GenerateConfig()
        super().__init__(model_name, base_url, api_key, [], config)
        if unknown:
            name = next(iter(unknown))
            hint = did_you_mean(name, _ARGUMENTS, f": choose from {', '.join(_ARGUMENTS)}")
            raise DitError(f"unknown model argument -M {name} of dit_jax{hint}")
        if base_url or api_key:
            raise DitError("dit_jax models run here: drop --model-base-url and -M api_key")
        _settings(config)  # seen before the first sample
        index = _whole("model argument index", index)
        if not 1 <= _whole("model argument batch_size", batch_size) <= 4096:
            raise DitError(f"model argument batch_size is {short(batch_size)}: give 1 to 4096")
        if not isinstance(window, int | float) or not 0 <= window <= 3600:
            raise DitError(f"model argument window is {short(window)}: give 0 to 3600 seconds")
        if not isinstance(forbid_repeats, bool):
            said = short(forbid_repeats)
            raise DitError(f"model argument forbid_repeats is {said}: give true or false")
        self.model = load_model(model_name, dtype)
        for note in self.model.notes():
            _log.warning("note: %s", printable(note))
        self.batch_size = batch_size
        self.defaults: dict[str, Any] = {
            "diff": str(diff or ""),
            "index": index,
            "adapter": str(adapter or ""),
            "forbid_repeats": forbid_repeats,
        }
        self._open = functools.lru_cache(maxsize=16)(lambda path: load_diffs(path, self.model))
        self._kept: dict[tuple[str, int], Delta] = {}
        self._reading = threading.Lock()  # solvers and tools read diffs, too
        self._adapter = functools.lru_cache(maxsize=4)(lambda path: read_adapter(path, self.model))
        self._batcher = Batcher(self._decode, batch_size, window)
        # So that wrong paths and lengths show before the first sample.
        self.check(config)
        if adapter:
            self._adapter(self.defaults["adapter"])
        self.diff(self.defaults["diff"], self.defaults["index"])

    def check(self, config: GenerateConfig) -> None:
        """Raises DitError: no call with these settings can be answered, whatever it asks."""
        _settings(config)
        tokens, context = config.max_tokens or 0, self.model.config.max_position_embeddings
        if 0 < context <= tokens:
            raise DitError(
                f"max_tokens is {tokens}, and the model's context has {context} tokens: give fewer"
            )

    def max_tokens(self) -> int:
        """The longest answer where neither task nor command line sets it."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """As many concurrent calls as a batch has rows."""
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True

    def collapse_system_messages(self) -> bool:
        return True

    async def count_text_tokens(self, text: str) -> int:
        return len(self.model.chat.text_ids(text))

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer. Raises DitError: the call has tools, no text, or a setting that is not followed."""
        call = self._read_call(input, tools, config)
        # The rows of a sampled batch share one key. A call with a seed goes alone, so as not to depend on others.
        alone = call.temperature > 0 and call.seed is not None
        answer: Answer = await self._batcher(object() if alone else call[3:], call)
        used = len(self.model.chat.prompt_ids(call.prompt))
        stopped = answer.generated > len(answer.tokens)  # the end of turn is not among the tokens
        output = ModelOutput.from_content(
            self.model_name, answer.text, "stop" if stopped else "max_tokens"
        )
        output.usage = ModelUsage(
            input_tokens=used,
            output_tokens=answer.generated,
            total_tokens=used + answer.generated,
        )
        told = {"diff": call.diff, "index": call.diff_index, "adapter": call.adapter}
        output.metadata = {**told, "logprob": answer.logprob}
        return output

    # ------------------------------------------------------------------ reading a call

    def _read_call(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolInfo], config: GenerateConfig
    ) -> Call:
        if tools:
            raise DitError("dit_jax models do not call tools: use a task without tools")
        prompt = _read_prompt(messages)
        settings = _settings(config)
        extra = settings.get("extra_body", {})
        for name in extra:
            if name not in _EXTRA:
                hint = did_you_mean(name, _EXTRA, f": choose from {', '.join(_EXTRA)}")
                raise DitError(f"unknown key {name!r} in extra_body{hint}")
        chosen = {**self.defaults, **extra}
        if not isinstance(chosen["forbid_repeats"], bool):
            said = short(chosen["forbid_repeats"])
            raise DitError(f"forbid_repeats is {said}: give true or false")
        adapter = str(chosen["adapter"] or "")
        trained = self._adapter(adapter).metadata.get("system") if adapter else None
        if prompt.system is None and isinstance(trained, str):
            prompt = prompt._replace(system=trained)
        self.model.chat.prompt_ids(prompt)  # refused before it shares a batch
        return Call(
            prompt,
            str(chosen["diff"] or ""),
            _whole("index in extra_body", chosen["index"]),
            adapter,
            settings["max_tokens"],
            settings["temperature"],
            settings["seed"] if settings["temperature"] > 0 else None,
            chosen["forbid_repeats"],
        )

    # ------------------------------------------------------------------ decoding, in a thread

    def _decode(self, calls: Sequence[Call]) -> list[Answer | DitError]:
        """Answers calls that differ in question and diff only: LoRA diffs of one layout together, dense ones alone.

        A call whose diff cannot be read gets the error; the others get their answers.
        """
        of_diff: dict[tuple[str, int], list[int]] = {}
        for i, call in enumerate(calls):
            of_diff.setdefault((call.diff, call.diff_index), []).append(i)
        answers: dict[int, Answer | DitError] = {}
        groups: dict[Any, list[tuple[int, Delta]]] = {}
        for diff, members in of_diff.items():
            try:
                delta = self.diff(*diff)
            except DitError as error:
                answers |= dict.fromkeys(members, error)
                continue
            if is_lora(delta):
                groups.setdefault(layout(delta), []).extend((i, delta) for i in members)
            else:
                answers |= self._answer(calls, members, (delta,), ())
            del delta  # before the next one is read
        for group in groups.values():
            members = [i for i, _ in group]
            stacked = jax.tree.map(lambda *x: np.stack(x), *(delta for _, delta in group))
            answers |= self._answer(calls, members, (), (stacked,) if stacked else ())
        return [answers[i] for i in range(len(calls))]

    def _answer(
        self,
        calls: Sequence[Call],
        members: Sequence[int],
        deltas: Sequence[Delta],
        stacked: Sequence[Delta],
    ) -> dict[int, Answer | DitError]:
        first = calls[members[0]]
        seed = first.seed
        if seed is None:
            seed = secrets.randbits(31) if first.temperature > 0 else 0
        found = answer_batch(
            self.model,
            [calls[i].prompt for i in members],
            deltas=[*deltas, self._adapter(first.adapter).delta] if first.adapter else deltas,
            stacked=stacked,
            max_new_tokens=first.max_tokens,
            batch_size=self.batch_size if first.seed is None else 1,
            temperature=first.temperature,
            seed=seed,
            forbid_repeats=first.forbid_repeats,
        )
        overflows = DitError(
            "the logits of base and diff overflow, so there is no answer: check its scale"
        )
        return {
            i: answer if math.isfinite(answer.logprob) else overflows
            for i, answer in zip(members, found, strict=True)
        }

    def diff(self, path: str, index: int) -> Delta:
        """A diff, read once; of dense diffs, each as large as the model, only the last is kept."""
        if not path:
            return {}
        with self._reading:
            if (path, index) not in self._kept:
                self._kept = {key: delta for key, delta in self._kept.items() if is_lora(delta)}
                if len(self._kept) >= 4 * self.batch_size:
                    del self._kept[next(iter(self._kept))]
                diffs = self._open(path)
                self._kept[path, index] = diffs[diffs.number(index)].delta
            return self._kept[path, index]


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """The settings of a call. Raises DitError: one is not followed, or out of its range."""
    settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "seed": None}
    settings |= config.model_dump(exclude_none=True)
    if settings.get("num_choices") == 1:
        del settings["num_choices"]
    for name in settings:
        if name not in _FOLLOWED and name not in _NO_EFFECT:
            raise DitError(
                f"dit_jax models do not follow the setting {name!r}: drop it; they follow max_tokens, temperature, seed"
            )
    for name, fits, wanted in (
        ("max_tokens", lambda x: 1 <= x <= 2**20, "1 to 1048576"),
        # jax would silently take another seed.
        ("seed", lambda x: x is None or 0 <= x < 2**32, "0 to 4294967295"),
        ("temperature", is_temperature, "0, or 1e-6 to 1e6"),
    ):
        if not fits(settings[name]):
            raise DitError(f"{name} is {short(settings[name])}: give {wanted}")
    return settings


def _read_prompt(messages: Sequence[ChatMessage]) -> Prompt:
    """What is asked. Raises DitError: a message is no text, or the turns are in no order that chat templates know."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if message.role == "tool" or getattr(message, "tool_calls", None):
            raise DitError("dit_jax models do not call tools: this call has earlier tool calls")
        for part in () if isinstance(message.content, str) else message.content:
            if part.type != "text":
                raise DitError(
                    f"dit_jax models read text: this message has a part of type {part.type!r}"
                )
        turns.append((message.role, message.text))
    roles = ", ".join(role for role, _ in turns) or "none"
    system = turns.pop(0)[1] if turns[:1] and turns[0][0] == "system" else None
    prefill = turns.pop()[1] if turns[-1:] and turns[-1][0] == "assistant" else ""
    # The question is the user's last turn.
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [role for role, _ in turns] != expected:
        raise DitError(
            "dit_jax models take a system message first, then turns of user and assistant, and last the start of the "
            f"answer: this call has the messages {roles}"
        )
    return Prompt(turns[-1][1], system, tuple(turns[:-1]), prefill)


def _whole(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise DitError(f"{name} is {short(value)}: give a whole number")
