"""What the app does, without its page: questions of many people in shared batches, and audits one at a time."""

import asyncio
import dataclasses
import functools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread

from dit_jax.api import Diff, Model, load_model, read_adapter
from dit_jax.asking import Answer, answer_batch
from dit_jax.auditing.run_audit import audit
from dit_jax.auditing.settings import make_settings
from dit_jax.auditing.targets import Target, list_targets, path_and_range
from dit_jax.data.chat import Prompt
from dit_jax.deltas.factors import modules, stack_padded
from dit_jax.deltas.tree import is_lora, scaled
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.inspection.batching import Batcher
from dit_jax.models.delta_trees import Delta, nbytes
from dit_jax.runtime.artifacts import TemporaryFolder
from dit_jax.runtime.exits import explained
from dit_jax.runtime.sizes import next_power
from dit_jax.serving.limits import Memory
from dit_jax.serving.uploads import Limits, unpacked

COLUMNS = ("base", "finetuned", "with adapter")
FILES = ("audit.html", "audit.csv", "audit.jsonl")
OVERFLOWS = "(no answer: the logits overflow)"
READS = 4  # of diffs at the same time
EVERY = 4  # tokens between two looks at an answer that is being written


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the server offers to those who use it, and how much of it.

    others: whether they may name paths and hub ids that are not among `diffs`. seconds: of one batch of answers;
    audit_seconds, audit_diffs: of one audit. rows: answers that are decoded together. memory: bytes of the diffs that
    wait for answers. upload: what one may hold.
    """

    bases: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    diffs: tuple[str, ...] = ()
    others: bool = True
    dtype: str = "float32"
    max_new_tokens: int = 256
    characters: int = 4000
    seconds: float = 120.0
    audit_seconds: float = 1800.0
    audit_diffs: int = 64
    rows: int = 24
    window: float = 0.05
    memory: int = 2**32
    upload: Limits = Limits()


class Choice(NamedTuple):
    """What a user chose. diff: "" is none; upload: the path of a zip file, which takes the place of `diff`."""

    base: str
    adapter: str
    diff: str
    upload: str | None = None


class _Call(NamedTuple):
    """One question. Calls that agree up to `rank` share batches. tell: takes the texts as far as they are."""

    base: str
    adapter: str
    max_new_tokens: int
    evidence: bool
    rank: int
    prompt: Prompt
    delta: Delta
    tell: Callable[[list[str]], None]


class _Row(NamedTuple):
    call: int
    column: int
    loras: tuple[Delta, Delta]  # diff and adapter
    dense: tuple[Delta, ...]


class Desk:
    """Answers questions and audits diffs within the limits of an offer. Models are loaded once, when first chosen."""

    def __init__(self, offer: Offer):
        self.offer = offer
        self._loading, self._auditing = threading.Lock(), threading.Lock()
        self._reads, self._memory = threading.BoundedSemaphore(READS), Memory(offer.memory)
        self._audits: list[TemporaryFolder] = []
        self._model = functools.lru_cache(maxsize=None)(lambda name: load_model(name, offer.dtype))
        self._read_adapter = functools.lru_cache(maxsize=None)(
            lambda base, name: read_adapter(name, self._model(base))
        )
        self._batcher = Batcher(self._answer, max(1, offer.rows // len(COLUMNS)), offer.window)

    def model(self, choice: Choice) -> Model:
        """The base model. Raises DitError: it is not offered."""
        _check(choice.base, self.offer.bases, "base")
        with self._loading:
            return self._model(choice.base)

    def _adapter(self, choice: Choice) -> Diff:
        _check(choice.adapter, ("", *self.offer.adapters), "adapter")
        if not choice.adapter:
            return Diff({})
        self.model(choice)
        with self._loading:
            return self._read_adapter(choice.base, choice.adapter)

    # ------------------------------------------------------------------ diffs

    @contextmanager
    def _targets(self, choice: Choice) -> Iterator[Sequence[Target]]:
        """The diffs that were chosen; those of an upload can be read as long as the context lasts."""
        model = self.model(choice)
        if not choice.upload:
            offered = self.offer.diffs
            if not self.offer.others and choice.diff not in offered:
                _check(path_and_range(choice.diff)[0], offered, "diff")
            with self._room():
                yield list_targets([choice.diff], model)
            return
        with self._room(), unpacked(Path(choice.upload), self.offer.upload) as folder:

            def told(text: str) -> str:  # the user knows the name of the file, nobody the folder
                return text.replace(str(folder), Path(choice.upload or "").stem)

            try:
                yield [
                    dataclasses.replace(
                        x, name=told(x.name), path=told(x.path), problem=told(x.problem)
                    )
                    for x in list_targets([str(folder)], model)
                ]
            except DitError as error:
                raise DitError(told(str(error))) from None

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Room in memory and on the disk to read one: many at once would fill them."""
        if not self._reads.acquire(timeout=max(0.0, self.offer.seconds)):
            raise DitError("other diffs are being read: try again when they have ended")
        try:
            yield
        finally:
            self._reads.release()

    def _diff(self, choice: Choice, number: int, take: Callable[[int], None]) -> Diff:
        if not (choice.diff or choice.upload):
            return Diff({})
        with self._targets(choice) as targets:
            if not 0 <= number < len(targets):
                raise DitError(
                    f"there is no diff {number}: choose a number from 0 to {len(targets) - 1}"
                )
            target = targets[number]
            if target.read is None:
                raise DitError(target.problem)
            diff = target.read()
            take(nbytes(diff.delta))
            return diff

    # ------------------------------------------------------------------ questions

    async def ask(
        self, choice: Choice, number: int, question: str, multiplier: float, max_new_tokens: int
    ) -> AsyncIterator[list[str]]:
        """The texts of `COLUMNS`, again and again as they grow, and last the whole.

        Args:
            number: of the diff, where `choice` names several.

        Raises:
            DitError: something is not offered, cannot be read, or exceeds a limit.
        """
        offer = self.offer
        if not question.strip():
            raise DitError("there is no question: write one")
        if len(question) > offer.characters:
            raise DitError(
                f"the question has {len(question)} characters: {offer.characters} are the most"
            )
        if not math.isfinite(multiplier):
            raise DitError("the diff cannot be taken that many times: give a number")
        if not 1 <= max_new_tokens <= offer.max_new_tokens:
            raise DitError(f"an answer may have 1 to {offer.max_new_tokens} tokens")

        def read(take: Callable[[int], None]) -> tuple[Diff, Prompt, bool]:
            diff, adapter = self._diff(choice, number, take), self._adapter(choice)
            system = adapter.metadata.get("system")
            prompt = Prompt(question, system if isinstance(system, str) else None)
            self.model(choice).chat.prompt_ids(prompt)  # refused before it shares a batch
            trained = adapter.metadata.get("trained_on")
            evidence = isinstance(trained, dict) and trained.get("list_evidence") is True
            return diff, prompt, evidence

        with self._memory.share(offer.seconds) as take:
            diff, prompt, evidence = await anyio.to_thread.run_sync(read, take)
            delta = scaled(diff.delta, float(multiplier)) if multiplier != 1 else diff.delta
            loop, told = asyncio.get_running_loop(), asyncio.Queue[list[str] | None]()

            def tell(texts: list[str] | None) -> None:
                loop.call_soon_threadsafe(told.put_nowait, texts)

            shared = (choice.base, choice.adapter, max_new_tokens, evidence, _padded_rank(delta))
            work = asyncio.ensure_future(self._batcher(shared, _Call(*shared, prompt, delta, tell)))
            work.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (texts := await told.get()) is not None:
                    yield texts
                yield await work
            finally:
                work.cancel()

    def _answer(self, calls: Sequence[_Call]) -> list[list[str]]:
        """Answers calls that share batches: all columns of all LoRAs in one decode, dense diffs one by one."""
        first = calls[0]
        choice = Choice(first.base, first.adapter, "")
        model, adapter = self.model(choice), self._adapter(choice).delta
        texts = [[""] * len(COLUMNS) for _ in calls]
        end = time.monotonic() + self.offer.seconds
        rows = [row for i, call in enumerate(calls) for row in _rows(i, call.delta, adapter)]
        groups: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            groups.setdefault(tuple(map(id, row.dense)), []).append(row)
        for group in groups.values():
            waiting = list(group)  # large LoRAs are asked a few at a time

            def show(answers: list[Answer], waiting: list[_Row] = waiting) -> bool:
                late = time.monotonic() > end
                shown = waiting[: len(answers)]
                for row, answer in zip(shown, answers, strict=True):
                    ended = answer.generated > len(answer.tokens)
                    cut = late and not ended and answer.generated < first.max_new_tokens
                    text = answer.text if math.isfinite(answer.logprob) else OVERFLOWS
                    texts[row.call][row.column] = text + (" … (time is up)" if cut else "")
                for i in {row.call for row in shown}:
                    calls[i].tell(list(texts[i]))
                return late

            def end_batch(count: int, waiting: list[_Row] = waiting) -> None:
                del waiting[:count]

            stacks = [
                stack_padded(part) for part in zip(*(row.loras for row in group), strict=True)
            ]
            answer_batch(
                model,
                [calls[row.call].prompt for row in group],
                deltas=group[0].dense,
                stacked=list(filter(None, stacks)),
                rows=range(len(group)),
                batch_size=next_power(len(group)),  # few sizes are few programs
                max_new_tokens=first.max_new_tokens,
                forbid_repeats=first.evidence,
                on_part=show,
                on_batch=end_batch,
                every=EVERY,
            )
        return texts

    # ------------------------------------------------------------------ audits

    def audit(
        self, choice: Choice, tell: Callable[[int, int], object] = lambda done, total: None
    ) -> tuple[str, list[str]]:
        """The page of an audit, and the paths of its files, which are there until the next but one. One runs at a time.

        Args:
            tell: called with the numbers of finished and of all diffs.

        Raises:
            DitError: another audit is running, there are too many diffs, or see `list_targets`.
        """
        offer = self.offer
        if not (choice.diff or choice.upload):
            raise DitError("there is nothing to audit: name a folder, or upload one")
        if not self._auditing.acquire(blocking=False):
            raise DitError("another audit is running: try again when it has ended")
        try:
            with self._targets(choice) as targets:
                if len(targets) > offer.audit_diffs:
                    raise DitError(
                        f"these are {len(targets)} diffs, and an audit here takes {offer.audit_diffs}: name a range "
                        "such as PATH[0:30]"
                    )
                self._adapter(choice)  # refuses what is not offered
                settings = make_settings(self.model(choice), choice.adapter or None, {})
                end = time.monotonic() + offer.audit_seconds
                while len(self._audits) > 1:  # the last one's files may just be on their way
                    self._audits.pop(0).cleanup()
                self._audits.append(TemporaryFolder("dit_jax-audit-"))
                out = Path(self._audits[-1].name)
                timed, total = [_until(target, end) for target in targets], len(targets)
                tell(0, total)
                audit(settings, timed, out, tell=lambda done: tell(done, total))
                return (out / FILES[0]).read_text("utf-8"), [str(out / name) for name in FILES]
        finally:
            self._auditing.release()


def _check(name: str, offered: Sequence[str], what: str) -> None:
    if name not in offered:
        known = ", ".join(filter(None, offered)) or "none"
        raise DitError(f"the {what} {short(name)} is not offered here: choose from {known}")


def _padded_rank(diff: Delta) -> int:
    """16, or the next power of two: LoRAs of a batch are padded to one rank, and a stranger's would cost all others."""
    ranks = [module["a"].shape[-1] for _, module in modules(diff) if "a" in module]
    return next_power(max([16, *ranks]))


def _rows(call: int, diff: Delta, adapter: Delta) -> Iterator[_Row]:
    """A row for each column: nothing, the diff, and the diff with the adapter."""
    for column, parts in enumerate((({}, {}), (diff, {}), (diff, adapter))):
        diff_part, adapter_part = (part if is_lora(part) else {} for part in parts)
        dense = tuple(part for part in parts if not is_lora(part))
        yield _Row(call, column, (diff_part, adapter_part), dense)


def _until(target: Target, end: float) -> Target:
    """The target; after the end, one that cannot be read."""
    read = target.read
    if read is None:
        return target

    def in_time() -> Diff:
        if time.monotonic() > end:
            raise DitError(
                "not audited, because the time of this audit was up: audit fewer at once"
            )
        return read()

    return dataclasses.replace(target, read=in_time)


def problem_of(error: Exception) -> str:
    """What a user sees of an error. Raises the error itself if it is a bug."""
    known = explained(error)
    if known is None:
        raise error
    return str(known)
