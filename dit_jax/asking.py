"""Asking a model ⊕ diff ⊕ adapter: one question, every question of every diff, or batches of any of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import parallel, shardings
from dit_jax.api import Diff, Model
from dit_jax.data.chat import Chat
from dit_jax.deltas.store import flatten
from dit_jax.deltas.tree import per_example
from dit_jax.errors import DitError
from dit_jax.models import generate as generate_lib
from dit_jax.models.layers import Delta, Deltas
from dit_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Answer:
    """One decoded answer.

    text; tokens: the generated ids without the end of turn; logprob: summed log-probability of everything
    generated, the end of turn included; generated: how many tokens that were.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    generated: int

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(self.generated, 1)


def ask(
    model: Model,
    question: str,
    diff: Diff | None = None,
    adapter: Delta | None = None,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    forbid_repeats: bool = False,
) -> Answer:
    """Asks model ⊕ diff ⊕ adapter one question (WeightDiffQA, paper section 2); greedy by default."""
    deltas = ([diff.delta] if diff else []) + ([adapter] if adapter else [])
    (answer,) = answer_batch(
        model,
        [question],
        deltas=deltas,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        forbid_repeats=forbid_repeats,
    )
    return answer


def ask_many(
    model: Model,
    questions: Sequence[str],
    diffs: Sequence[Diff],
    adapter: Delta | None = None,
    *,
    samples: int = 1,
    batch_size: int | None = None,
    progress: bool = False,
    **decoding: Any,
) -> list[list[list[Answer]]]:
    """Asks every diff every question: answers[diff][question][sample].

    LoRA diffs of one shape share one batched decode, each row with its own diff; dense diffs go one by one. Diffs
    are read as they are needed, so that memory holds those of one batch.

    Args:
        batch_size: rows (diffs x questions x samples) per decode. Default: all, at most 256.
        **decoding: max_new_tokens, temperature, seed, forbid_repeats; see `answer_batch`.
    """
    shared = () if adapter is None else (adapter,)
    prompts = [question for question in questions for _ in range(samples)]
    if not prompts:
        return [[] for _ in diffs]
    block = max(1, (batch_size or 256) // len(prompts))  # diffs of one batch
    groups: dict[Any, list[tuple[int, Delta]]] = {}
    answers: dict[int, list[Answer]] = {}
    with Progress("asking", len(diffs) * len(prompts), enabled=progress) as bar:

        def flush(members: list[tuple[int, Delta]]) -> None:
            deltas: tuple[Delta, ...] = shared
            stacked, rows, size = None, None, batch_size
            if len(members) == 1:
                deltas = (members[0][1], *shared)
            else:
                stacked = jax.tree.map(lambda *x: np.stack(x), *(delta for _, delta in members))
                rows = [row for row in range(len(members)) for _ in prompts]
                if len(diffs) > block:  # one program for full batches and the last one
                    size = block * len(prompts)
            found = answer_batch(
                model,
                prompts * len(members),
                deltas=deltas,
                stacked=stacked,
                rows=rows,
                batch_size=size,
                first=len(answers) * len(prompts),
                on_batch=bar.advance,
                **decoding,
            )
            for row, (i, _) in enumerate(members):
                answers[i] = found[row * len(prompts) : (row + 1) * len(prompts)]

        for i in getattr(diffs, "order", range(len(diffs))):
            delta = diffs[i].delta
            shapes = tuple((name, leaf.shape) for name, leaf in flatten(delta).items())
            is_lora = all(not name.endswith(".w") for name, _ in shapes)
            group = groups.setdefault(shapes if is_lora else i, [])
            group.append((i, delta))
            del delta
            if not is_lora or len(group) == block:
                flush(group)
                group.clear()
        for group in groups.values():
            if group:
                flush(group)
    return [
        [answers[i][q * samples : (q + 1) * samples] for q in range(len(questions))]
        for i in range(len(diffs))
    ]


def answer_batch(
    model: Model,
    questions: Sequence[str],
    *,
    deltas: Deltas = (),
    stacked: Delta | None = None,
    rows: Sequence[int] | None = None,
    max_new_tokens: int = 20,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    forbid_repeats: bool = False,
    first: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers many questions in batches of one compiled program.

    Args:
        deltas: applied to every question.
        stacked: deltas [n, L, …] of which question i gets number rows[i] (per-example LoRA).
        batch_size: rows per batch, filled up with repeats: calls of one size share one program.
            Default: all questions at once, at most 256. Rounded up to a multiple of the mesh's batch shards.
        forbid_repeats: never emit a token twice in an answer (adapters that list evidence before the label).
        first: number of the first question in a longer series; with the seed it gives the sampling keys.
        on_batch: called with the number of new answers after each batch.
    """
    if not questions:
        return []
    mesh = model.mesh
    batch_size = parallel.round_up(batch_size or min(256, len(questions)), mesh)
    shared = [shardings.put_delta(model.config, mesh, delta) for delta in deltas]
    tokens, mask = model.chat.prompts(questions)
    if tokens.max() >= model.config.vocab_size:  # the embedding would give another token's row
        raise DitError(
            f"{model.name}: its tokenizer makes the token {tokens.max()}, but the model knows "
            f"{model.config.vocab_size}: use the tokenizer that belongs to the model"
        )
    answers: list[Answer] = []
    for start in range(0, len(questions), batch_size):
        # Each process supplies its own rows of the batch.
        picked = [(start + i) % len(questions) for i in parallel.local_rows(mesh, batch_size)]
        own: tuple[Delta, ...] = ()
        if stacked is not None:
            index = np.asarray(picked if rows is None else [rows[i] for i in picked])
            local = per_example(jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), stacked))
            own = (shardings.put_deltas(model.config, mesh, local, batch_size, 1),)
        prompts = parallel.put_rows((tokens[picked], mask[picked]), mesh, batch_size)
        with parallel.use_mesh(mesh):
            out = generate_lib.generate(
                model.program_params,
                model.config,
                *prompts,
                deltas=(*own, *shared),
                max_new_tokens=max_new_tokens,
                eos_ids=model.chat.eos_ids,
                pad_id=model.chat.pad_id,
                temperature=temperature,
                forbid_repeats=forbid_repeats,
                key=jax.random.fold_in(jax.random.key(seed), first + start),
            )
        count = min(batch_size, len(questions) - start)
        answers += _read_out(model.chat, out, count)
        if on_batch is not None:
            on_batch(count)
    return answers


def _read_out(chat: Chat, out: generate_lib.Generation, count: int) -> list[Answer]:
    tokens, logprobs, lengths = jax.device_get(out)
    answers = []
    for row, logprob, length in zip(tokens[:count], logprobs[:count], lengths[:count], strict=True):
        ids = tuple(int(i) for i in row[:length] if int(i) not in chat.eos_ids)
        answers.append(Answer(chat.decode(ids), ids, float(logprob.sum()), int(length)))
    return answers
