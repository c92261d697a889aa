"""Asks model ⊕ diff ⊕ adapter: one question, every question of every diff, or batches of any of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.api import Diff, Model, check_ids, check_model, deltas_of
from dit_jax.data.chat import Chat, Prompt
from dit_jax.deltas.tree import is_lora, layout, per_example
from dit_jax.errors import DitError
from dit_jax.models import decode, shardings
from dit_jax.models.contrast import WIDTH, contrasted
from dit_jax.models.decoder import forward, unembed
from dit_jax.models.delta_trees import Delta, nbytes, nbytes_each
from dit_jax.runtime import parallel
from dit_jax.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Answer:
    """One decoded answer.

    tokens: the generated ids without the end of turn; logprob: summed log-probability of all generated tokens, the end
    of turn included, NaN where the logits overflow and the text means nothing; generated: the number of those tokens.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    generated: int

    @property
    def mean_logprob(self) -> float:
        """Log-probability per generated token, the end of turn included."""
        return self.logprob / max(self.generated, 1)


def ask(
    model: Model,
    question: str,
    diff: Any = None,
    adapter: Any = None,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    forbid_repeats: bool = False,
    system: str | None = None,
    contrast: float | None = None,
) -> Answer:
    """Asks model ⊕ diff ⊕ adapter one question (WeightDiffQA, paper section 2); greedy by default.

    Args:
        diff, adapter: a Diff or a delta each, or several that are all added: diff=(one, two).
        max_new_tokens, temperature, seed, forbid_repeats, system: see `answer_batch`.
        contrast: see `answer_batch`; the answer is compared with that of the adapter without the diff.

    Raises:
        DitError: see `answer_batch`.
    """
    check_model(model)
    stays = _shared(model, adapter, "adapter")
    (answer,) = _answer(
        model,
        [question],
        (*_shared(model, diff, "diff"), *stays),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        forbid_repeats=forbid_repeats,
        system=system,
        contrast=contrast,
        without=stays,
    )
    return answer


def ask_many(
    model: Model,
    questions: str | Prompt | Iterable[str | Prompt],
    diffs: Any,
    adapter: Any = None,
    *,
    samples: int = 1,
    batch_size: int | None = None,
    progress: bool = False,
    **decoding: Any,
) -> list[list[list[Answer]]]:
    """Asks every diff every question: answers[diff][question][sample].

    LoRA diffs of one shape and dtype share one batched decode, each row with its own diff; dense diffs go one by one.
    Diffs are read when they are needed, so that memory holds those of one batch.

    Args:
        questions: a string is one question, and so is a `Prompt`, which has its own system message, earlier turns or
            prefill.
        diffs: a sequence of what `ask` takes as diff: [one, two] are two diffs, [(one, two)] is the sum of both. A
            single Diff, delta or None (no diff) is one diff. A generator is read before the first question.
        adapter: as in `ask`.
        samples: answers to each question of each diff.
        batch_size: rows (diffs × questions × samples) per decode. Default: all, at most 256. Large LoRAs take fewer,
            see `decode.rows_at_once`.
        **decoding: max_new_tokens, temperature, seed, forbid_repeats, system, contrast; see `ask`.

    Raises:
        DitError: `samples` is below 1, or see `answer_batch`.
    """
    check_model(model)
    if samples < 1:
        raise DitError(f"samples is {samples}: give 1 or more")
    shared = _shared(model, adapter, "adapter")  # on the device once, not with every batch
    questions = [questions] if isinstance(questions, str | Prompt) else list(questions)
    diffs = [diffs] if diffs is None or isinstance(diffs, Diff | Mapping) else diffs
    diffs = diffs if isinstance(diffs, Sequence) else list(diffs)
    prompts = [question for question in questions for _ in range(samples)]
    if not prompts:
        return [[] for _ in diffs]
    groups: dict[Any, list[tuple[int, tuple[Delta, ...]]]] = {}
    # Layouts of which a whole batch was decoded: the rest then runs the same program.
    filled: set[Any] = set()
    answers: dict[int, list[Answer]] = {}
    with Progress("asking", len(diffs) * len(prompts), enabled=progress) as bar:

        def diffs_at_once(own: tuple[Delta, ...]) -> int:
            rows = decode.rows_at_once(batch_size or 256, nbytes(own), model.mesh)
            return max(1, rows // len(prompts))

        def flush(members: list[tuple[int, tuple[Delta, ...]]], whole: bool = False) -> None:
            """Asks the diffs of one batch; `whole`: in as many rows as a whole batch has."""
            deltas: tuple[Delta, ...] = shared
            stacked: tuple[Delta, ...] = ()
            rows = None
            if len(members) == 1 and not whole:
                deltas = (*_placed(model, members[0][1]), *shared)
            else:
                stacked = jax.tree.map(lambda *x: np.stack(x), *(own for _, own in members))
                rows = [row for row in range(len(members)) for _ in prompts]
            found = _answer(
                model,
                prompts * len(members),
                deltas,
                stacked,
                rows,
                batch_size=diffs_at_once(members[0][1]) * len(prompts) if whole else batch_size,
                first=len(answers) * len(prompts),
                on_batch=bar.advance,
                without=shared,
                **decoding,
            )
            for row, (i, _) in enumerate(members):
                answers[i] = found[row * len(prompts) : (row + 1) * len(prompts)]

        for i in getattr(diffs, "order", range(len(diffs))):
            own = deltas_of(diffs[i], model.config, f"diff {i}")
            batched = is_lora(own)
            key = layout(own) if batched else i
            group = groups.setdefault(key, [])
            group.append((i, own))
            block = diffs_at_once(own) if batched else 1
            del own
            if batched and len(group) == block > 1:
                filled.add(key)
            if len(group) == block:
                flush(group, key in filled)
                group.clear()
        for key, group in groups.items():
            if group:
                flush(group, key in filled)
    return [
        [answers[i][q * samples : (q + 1) * samples] for q in range(len(questions))]
        for i in range(len(diffs))
    ]


def answer_batch(
    model: Model,
    questions: str | Sequence[str | Prompt],
    *,
    deltas: Any = (),
    stacked: Sequence[Delta] = (),
    rows: Sequence[int] | None = None,
    without: Any = (),
    **decoding: Any,
) -> list[Answer]:
    """Answers many questions in batches of one compiled program.

    Args:
        questions: a string is one question. A `Prompt` has its own system message, earlier turns or prefill.
        deltas: applied to every question, what `deltas_of` takes, all added.
        stacked: LoRAs [n, L, …] of which question i gets number rows[i]; several such trees are added.
        max_new_tokens: how long an answer may be; default 20.
        batch_size: rows per batch, filled up with repeats: calls of one size share one program.
            Default: all questions at once, at most 256. Rounded up, see `decode.even_rows`; large LoRAs in `stacked`
            take fewer, see `decode.rows_at_once`.
        temperature: 0 (default) is greedy, else samples from softmax(logits / temperature), by `seed` (default 0).
        forbid_repeats: never emit a token twice in an answer (adapters that list evidence before the label).
        system: the system message of all questions; None: the chat template's own, if it has one.
        amplify: enlarge what all deltas change, see `decode.generate`; None: not.
        contrast: of the likeliest answers give the one that `without` makes unlikely, by this weight of its log p, see
            `contrast.contrasted`; greedy. None: not.
        without: what stays when the diff is taken away, as `deltas`.
        first: number of the first question in a longer series; with the seed it gives the sampling keys.
        on_batch: called with the number of new answers after each batch.
        on_part: called after each `every` tokens with the answers of the batch as far as they are; True ends the batch.

    Raises:
        DitError: an argument is out of its range, a question is not a string, the tokenizer belongs to another model,
            or a delta does not fit this model.
    """
    questions = [questions] if isinstance(questions, str) else questions
    stays = _shared(model, () if decoding.get("contrast") is None else without, "without")
    shared = _shared(model, deltas, "deltas")
    return _answer(model, questions, shared, stacked, rows, without=stays, **decoding)


def _shared(model: Model, given: Any, what: str) -> tuple[Delta, ...]:
    """What `deltas_of` makes of `given`, on the device."""
    return _placed(model, deltas_of(given, model.config, what))


def _placed(model: Model, deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    return tuple(shardings.put_delta(model.config, model.mesh, delta) for delta in deltas)


def _answer(
    model: Model,
    questions: Sequence[str | Prompt],
    shared: Sequence[Delta],
    stacked: Sequence[Delta] = (),
    rows: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 20,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    forbid_repeats: bool = False,
    system: str | None = None,
    amplify: float | None = None,
    contrast: float | None = None,
    without: Sequence[Delta] = (),
    first: int = 0,
    on_batch: Callable[[int], None] | None = None,
    on_part: Callable[[list[Answer]], bool] | None = None,
    every: int = 4,
) -> list[Answer]:
    """`answer_batch` with deltas that are checked and on the device."""
    _check_decoding(max_new_tokens, batch_size, temperature, seed)
    if contrast is not None:
        check_contrast(contrast, temperature, amplify)
    if not questions:
        return []
    asked = [q.question if isinstance(q, Prompt) else q for q in questions]
    for text, what in (*((q, "a question") for q in asked), (system or "", "system")):
        if not isinstance(text, str):
            raise DitError(f"{what} is of type {type(text).__name__}: give texts")
    mesh = model.mesh
    beams = 1 if contrast is None else WIDTH  # rows of each question
    batch_size = max(1, batch_size // beams) if batch_size else min(256 // beams, len(questions))
    batch_size = decode.rows_at_once(batch_size, nbytes_each(stacked) * beams, mesh)
    batch_size = decode.even_rows(batch_size, model.config, mesh)
    tokens, mask = model.chat.prompts(questions, system)
    check_ids(tokens.min(), tokens.max(), model)
    context, longest = model.config.max_position_embeddings, int(mask.sum(1).max())
    if context and longest + max_new_tokens > context:
        raise DitError(
            f"a prompt of {longest} tokens and an answer of max_new_tokens {max_new_tokens} exceed the model's context "
            f"of {context}: lower --max-new-tokens, or shorten the question"
        )
    answers: list[Answer] = []
    for start in range(0, len(questions), batch_size):
        # Each process supplies its own rows of the batch.
        picked = [(start + i) % len(questions) for i in parallel.local_rows(mesh, batch_size)]
        index = np.asarray(picked if rows is None else [rows[i] for i in picked])
        local = [per_example(jax.tree.map(lambda x, index=index: x[index], one)) for one in stacked]
        own = [shardings.put_deltas(model.config, mesh, x, batch_size, 1) for x in local]
        prompts = parallel.put_rows((tokens[picked], mask[picked]), mesh, batch_size)
        count = min(batch_size, len(questions) - start)
        options: dict[str, Any] = {
            "deltas": (*own, *shared),
            "max_new_tokens": max_new_tokens,
            "eos_ids": model.chat.eos_ids,
            "pad_id": model.chat.pad_id,
            "forbid_repeats": forbid_repeats,
        }
        if contrast is not None:
            options |= {"without": tuple(without), "contrast": float(contrast)}
        else:
            options |= {
                "temperature": float(temperature),  # an integer would make another program
                "amplify": None if amplify is None else float(amplify),
                "key": jax.random.fold_in(jax.random.key(seed), first + start),
            }
        given = (model.program_params, model.config, *prompts)
        with parallel.use_mesh(mesh):
            if contrast is not None:
                out = contrasted(*given, **options)
                if on_part is not None:  # beams are no part of an answer before one is chosen
                    on_part(_read_out(model.chat, out, count))
            elif on_part is None:
                out = decode.generate(*given, **options)
            else:
                for out in decode.stream(*given, every=every, **options):
                    if on_part(_read_out(model.chat, out, count)):
                        break
        answers += _read_out(model.chat, out, count)
        if on_batch is not None:
            on_batch(count)
    return answers


def first_log_probs(model: Model, tokens: np.ndarray, mask: np.ndarray, deltas: Any) -> jax.Array:
    """Log-probabilities [B, V], fp32, of the first token of the answers to left-padded prompts [B, T].

    Args:
        deltas: shared by all prompts.
    """
    with parallel.use_mesh(model.mesh):
        return _first_log_probs(model.program_params, model.config, tokens, mask, deltas)


@functools.partial(jax.jit, static_argnames=("config",))
def _first_log_probs(
    params: Any, config: Any, tokens: jax.Array, mask: jax.Array, deltas: Any
) -> jax.Array:
    hidden = forward(params, config, tokens, mask=mask, deltas=deltas)
    logits = unembed(params, config, hidden[:, -1], deltas)
    return parallel.replicate(jax.nn.log_softmax(logits, axis=-1))


def is_temperature(value: float) -> bool:
    """Whether it is 0, which is greedy, or logits over it are still numbers in float32."""
    return value == 0 or 1e-6 <= value <= 1e6


def _check_decoding(max_new_tokens: Any, batch_size: Any, temperature: Any, seed: Any) -> None:
    """Raises DitError for an option of `answer_batch` that is out of its range."""
    for name, value, fits, wanted in (
        ("max_new_tokens", max_new_tokens, _is_count(max_new_tokens), "1 or more, a whole number"),
        (
            "batch_size",
            batch_size,
            batch_size is None or _is_count(batch_size),
            "1 or more, a whole number",
        ),
        (
            "temperature",
            temperature,
            hasattr(temperature, "__float__") and is_temperature(temperature),
            "0, or a number from 1e-6 to 1e6",
        ),
        # jax would silently take another seed.
        (
            "seed",
            seed,
            hasattr(seed, "__index__") and 0 <= seed < 2**32,
            "a whole number from 0 to 4294967295",
        ),
    ):
        if not fits:
            raise DitError(f"{name} is {value!r}: give {wanted}")


def check_contrast(contrast: float, temperature: float, amplify: float | None) -> None:
    """Raises DitError for a weight that is no number from 0 to 1, or beside another way to choose tokens."""
    if not (hasattr(contrast, "__float__") and 0 <= contrast <= 1):
        raise DitError(f"contrast is {contrast!r}: give a number from 0 to 1")
    if temperature:
        raise DitError(
            f"contrast is greedy, and temperature is {temperature}: leave one of them out"
        )
    if amplify is not None:
        raise DitError("contrast and amplify are two ways to choose: leave one of them out")


def _is_count(value: Any) -> bool:
    return hasattr(value, "__index__") and value >= 1


def _read_out(chat: Chat, out: decode.Generation, count: int) -> list[Answer]:
    tokens, logprobs, lengths = jax.device_get(out)
    answers = []
    for row, logprob, length in zip(tokens[:count], logprobs[:count], lengths[:count], strict=True):
        ids = tuple(int(i) for i in row[:length] if int(i) not in chat.eos_ids)
        answers.append(Answer(chat.decode(ids), ids, float(logprob.sum()), int(length)))
    return answers
