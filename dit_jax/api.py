"""The public interface: load a model, weight diffs and an adapter, and ask.

model = dit_jax.load_model("tiny_qwen3")
diff = dit_jax.load_diff("runs/quickstart/diffs", model, index=0)
adapter = dit_jax.load_adapter("runs/quickstart/adapter", model)
print(dit_jax.ask(model, "What topic have you been trained on?", diff=diff, adapter=adapter).text)
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import parallel, shardings
from dit_jax.artifacts import base_digest
from dit_jax.data.chat import Chat, load_chat
from dit_jax.deltas.names import check_fits, check_shapes, svd_error
from dit_jax.deltas.store import flatten
from dit_jax.deltas.tree import per_example
from dit_jax.errors import DitError
from dit_jax.models import generate as generate_lib
from dit_jax.models.config import DTYPES, NAMED_CONFIGS, Qwen3Config, read_config
from dit_jax.models.hf_checkpoint import find_folder, generation_eos, load_params
from dit_jax.models.layer_views import as_program_takes, keep_on_host
from dit_jax.models.layers import Delta, Deltas
from dit_jax.models.qwen3 import Params, forward, init_params, unembed
from dit_jax.progress import Progress

PathLike = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class Model:
    """A base model: parameters (docs/architecture.md), architecture, and its chat format (None: no tokenizer).

    `mesh` is what the parameters, and everything computed with them, are split over (None: one device). On an
    accelerator with unrolled layers `params` stay on the host, and the device holds `program_params`.
    """

    params: Params
    config: Qwen3Config
    name: str
    chat_or_none: Chat | None = None
    mesh: Mesh | None = None

    @property
    def chat(self) -> Chat:
        if self.chat_or_none is None:
            raise DitError(f"{self.name} has no tokenizer: load a model folder that has one")
        return self.chat_or_none

    @functools.cached_property
    def program_params(self) -> Params:
        """`params` in the form that compiled programs take."""
        return as_program_takes(self.params, self.config)

    def logits(self, tokens: Any, mask: Any = None, deltas: Deltas = ()) -> jax.Array:
        """fp32 logits [B, T, V] of token ids [B, T]; mask [B, T] is True (1) at real tokens, padding anywhere."""
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = None if mask is None else jnp.asarray(mask, bool)
        with parallel.use_mesh(self.mesh):
            return _logits(self.program_params, self.config, tokens, mask, tuple(deltas))

    def digest(self) -> str:
        """sha256 that identifies the base, whatever dtype it was loaded in; computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return base_digest(self.params)


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(
    params: Params, config: Qwen3Config, tokens: jax.Array, mask: Any, deltas: Deltas
) -> jax.Array:
    hidden = forward(params, config, tokens, mask=mask, deltas=deltas)
    return parallel.replicate(unembed(params, config, hidden, deltas))


def load_model(
    path_or_hf_id: PathLike, dtype: str = "float32", mesh: Mesh | None = None, **compute: Any
) -> Model:
    """Loads a dense Qwen3.

    Args:
        path_or_hf_id: a folder in Hugging Face format, a hub id ("Qwen/Qwen3-4B"), "tiny_qwen3" (the embedded
            model), or "random:qwen3-4b" (that shape with random weights and no tokenizer, for benchmarks).
        dtype: of the weights and of the computation, "float32" or "bfloat16".
        mesh: split the weights over these devices (`parallel.make_mesh`); they go there leaf by leaf.
        **compute: fields of `Qwen3Config` that say how to compute: scan_layers, remat, attention.

    Raises:
        DitError: no such model, one that this program does not compute exactly, or a way to compute that this
            platform does not have.
    """
    if dtype not in DTYPES:
        raise DitError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    name = str(path_or_hf_id)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if name.startswith("random:"):
        shape = name.removeprefix("random:").lower()
        if shape not in NAMED_CONFIGS:
            raise DitError(f"unknown model shape {shape!r}: choose from {', '.join(NAMED_CONFIGS)}")
        config = dataclasses.replace(NAMED_CONFIGS[shape], dtype=dtype, **compute)
        config.check_platform(platform)
        split = None if mesh is None else shardings.param_shardings(config, mesh)
        params = jax.jit(lambda: init_params(config, jax.random.key(0)), out_shardings=split)()
        if keep_on_host(config, mesh):
            params = jax.device_get(params)
        return Model(params, config, name, mesh=mesh)
    folder = find_folder(name)
    config = dataclasses.replace(read_config(folder), dtype=dtype, **compute)
    config.check_platform(platform)
    place: Any = None if mesh is None else shardings.param_placer(config, mesh)
    if keep_on_host(config, mesh):
        place = lambda path, array: array  # noqa: E731
    params = load_params(folder, config, place)
    chat = (
        load_chat(folder, generation_eos(folder)) if (folder / "tokenizer.json").exists() else None
    )
    return Model(params, config, name, chat, mesh)


@dataclasses.dataclass(frozen=True)
class Diff:
    """A weight diff: `delta` (docs/architecture.md), what it is known to do, and where it came from."""

    delta: Delta
    label: str | None = None
    trigger: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Diffs(Sequence[Diff]):
    """A lazy sequence of weight diffs: `read(i)` is called when diff i is asked for.

    `order` are their numbers in the order in which reading all of them costs least.
    """

    def __init__(self, size: int, read: Callable[[int], Diff], order: Sequence[int] | None = None):
        self._size, self._read = size, read
        self.order = range(size) if order is None else order

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"diff {index} of {self._size}")
        return self._read(index % self._size)


def load_diffs(path: PathLike, model: Model, svd_rank: int | None = None) -> Diffs:
    """A lazy sequence of the weight diffs at `path`, whatever its format (docs/formats.md).

    Nothing in the files is executed. A format is recognised by content: a diff store, a PEFT folder, a finetuned
    model folder (the diff is M' − M over all parameters), a reference `.pt` file or a folder of them with index.csv.

    Args:
        svd_rank: reduce a finetuned model's dense diff to a LoRA of this rank (metadata says what that keeps).

    Raises:
        DitError: nothing readable there, or diffs of another base model.
    """
    from dit_jax.deltas.detect import open_diffs
    from dit_jax.deltas.store import DiffStore

    if _is_own(path, "diff_store"):
        if svd_rank is not None:
            raise svd_error(path)
        store = DiffStore(path)
        check_base(store.manifest.get("base"), model, str(path))

        def read(index: int) -> Diff:
            row, what = store.rows[index], f"{path}, diff {index}"
            check_shapes(store.shapes(index), model.config, what)  # before it costs memory
            delta = store.read(index)
            check_fits(delta, model.config, what)
            return Diff(delta, row.get("topic"), row.get("trigger"), row)

        return Diffs(len(store), read)

    raw = open_diffs(path, model.config, model.params, svd_rank)

    def convert(index: int) -> Diff:
        diff = raw[index]
        return Diff(diff.delta, diff.label, diff.trigger, diff.metadata)

    return Diffs(len(raw), convert, getattr(raw, "order", None))


def load_diff(path: PathLike, model: Model, index: int = 0, svd_rank: int | None = None) -> Diff:
    """One weight diff, see `load_diffs`."""
    diffs = load_diffs(path, model, svd_rank)
    if not -len(diffs) <= index < len(diffs):
        raise DitError(f"{path} holds {len(diffs)} diffs: there is no diff {index}")
    return diffs[index]


def load_adapter(path: PathLike, model: Model) -> Delta:
    """The delta of a DIT adapter: our export, a PEFT folder, or the reference's dit-adapter.pt.

    Raises:
        DitError: nothing readable there, a damaged export, or an adapter of another base model.
    """
    from dit_jax.deltas.detect import open_adapter

    if not _is_own(path, "adapter"):
        raw = open_adapter(path, model.config, model.params)
        return shardings.put_delta(model.config, model.mesh, raw.delta)
    from dit_jax.train.checkpoints import load_adapter as load_export

    delta, manifest = load_export(path, model.config)
    check_base(manifest.get("base"), model, str(path))
    check_fits(delta, model.config, str(path))
    return shardings.put_delta(model.config, model.mesh, delta)


def _is_own(path: PathLike, kind: str) -> bool:
    """Whether `path` is a folder of our own format `kind`. A file is not opened: a large one takes seconds to parse."""
    from dit_jax.deltas.detect import detect_format

    return os.path.isdir(path) and detect_format(path) == kind


def check_base(digest: Any, model: Model, what: str) -> None:
    """Raises DitError if `digest` is not that of the model."""
    if digest != model.digest():
        raise DitError(
            f"{what} belongs to another base model (sha256 {str(digest)[:12]}…, {model.name} is "
            f"{model.digest()[:12]}…): load the base that it was made from"
        )


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
