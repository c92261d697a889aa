"""The public interface to load a model, weight diffs and an adapter (`asking` asks them; example: `dit_jax`)."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.data.chat import Chat, check_id, load_chat
from dit_jax.deltas.raw_diff import said
from dit_jax.errors import DitError, did_you_mean
from dit_jax.models import shardings
from dit_jax.models.decoder import Params, forward, init_params, unembed
from dit_jax.models.decoder_config import COMPUTE, DTYPES, DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas, check_fits, check_modules
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import (
    find_folder,
    generation_eos,
    load_params,
    open_checkpoint,
    stored_config,
)
from dit_jax.models.layer_views import as_program_takes, keep_on_host
from dit_jax.models.shapes import NAMED_CONFIGS
from dit_jax.runtime import parallel
from dit_jax.runtime.digests import base_digest

if TYPE_CHECKING:
    from dit_jax.deltas.detect import Found

PathLike = str | pathlib.Path


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A base model: parameters (docs/architecture.md), architecture, and its chat format (None: no tokenizer).

    The parameters, and everything computed with them, are split over `mesh` (None: one device). On an accelerator with
    unrolled layers `params` stay on the host, and the device holds `program_params`.
    """

    params: Params = dataclasses.field(repr=False)
    config: DecoderConfig
    name: str
    chat_or_none: Chat | None = dataclasses.field(default=None, repr=False)
    mesh: Mesh | None = None

    @property
    def chat(self) -> Chat:
        """Tokenizer and chat template. Raises DitError: the model has no tokenizer."""
        if self.chat_or_none is None:
            raise DitError(f"{self.name} has no tokenizer: load a model folder that has one")
        return self.chat_or_none

    def notes(self, system: str | None = None) -> list[str]:
        """What a user may not expect of the model, and of prompts with this system message, a line each."""
        notes = []
        if self.chat_or_none is not None:
            said = self.chat.system if system is None else system
            notes = list(self.chat.tokenizer.notes(said))
        if self.config.text_part:
            notes.append(
                f"{self.name} is a model of images and text: its text part is used, and all of its vision tower and "
                "projector, in the base and in diffs, is ignored"
            )
        return notes

    @functools.cached_property
    def program_params(self) -> Params:
        """`params` in the form that compiled programs take."""
        return as_program_takes(self.params, self.config)

    def logits(self, tokens: Any, mask: Any = None, deltas: Any = ()) -> jax.Array:
        """fp32 logits [B, T, V] of token ids [B, T].

        Args:
            mask: [B, T], True (1) at real tokens; padding may be anywhere. Default: no padding.
            deltas: anything that `deltas_of` takes; all of it is added.

        Raises:
            DitError: there are no tokens, rows differ in length, ids are outside the vocabulary, the mask has another
                shape, or a delta does not fit this model.
        """
        if not isinstance(tokens, jax.Array):
            try:
                tokens = np.asarray(tokens)
            except ValueError:
                raise DitError(
                    "rows of token ids differ in length: pad them, and give a mask"
                ) from None
        if np.ndim(tokens) != 2 or not np.size(tokens):
            raise DitError(
                f"token ids have the shape {np.shape(tokens)}: give one or more rows [B, T]"
            )
        if tokens.dtype.kind not in "iu":
            raise DitError(f"token ids are of type {tokens.dtype.name}: give whole numbers")
        if mask is not None and np.shape(mask) != np.shape(tokens):
            raise DitError(
                f"the mask has the shape {np.shape(mask)}, the token ids {np.shape(tokens)}"
            )
        if not isinstance(tokens, jax.core.Tracer):  # an embedding clamps unknown ids
            check_ids(np.min(tokens), np.max(tokens), self)
        deltas = deltas_of(deltas, self.config, "deltas", len(tokens))
        inputs = (jnp.asarray(tokens, jnp.int32), None if mask is None else jnp.asarray(mask, bool))
        with parallel.use_mesh(self.mesh):
            return _logits(self.program_params, self.config, *inputs, deltas)

    def digest(self) -> str:
        """sha256 that identifies the base, whatever dtype it is loaded in; computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return base_digest(self.params)


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(
    params: Params, config: DecoderConfig, tokens: jax.Array, mask: Any, deltas: Deltas
) -> jax.Array:
    # Tokens arrive whole on every device; without the constraint every device would compute all of them.
    tokens = parallel.constrain(tokens, "batch", None)
    mask = None if mask is None else parallel.constrain(mask, "batch", None)
    hidden = forward(params, config, tokens, mask=mask, deltas=deltas)
    return parallel.replicate(unembed(params, config, hidden, deltas))


def load_model(
    path_or_hf_id: PathLike,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    system: str | None = None,
    **compute: Any,
) -> Model:
    """Loads a model of a known family (`models.family_table`).

    Args:
        path_or_hf_id: a folder in Hugging Face format, a GGUF file or a folder that holds one, a hub id
            ("Qwen/Qwen3-4B"), "tiny_qwen3" (the embedded model), "package:NAME" (the GGUF file that an installed Python
            package ships), or "random:qwen3-4b" (that shape with random weights and no tokenizer, for benchmarks).
        dtype: of the weights and of the computation, "float32" or "bfloat16".
        mesh: devices to split the weights over (`parallel.make_mesh`); each leaf goes straight there.
        system: the system message of all prompts; "": none; None: the chat template's own, if it has one.
        **compute: fields of `DecoderConfig` that say how to compute (`COMPUTE`): scan_layers, remat, attention.

    Raises:
        DitError: there is no such model, this program cannot compute it exactly, a keyword is unknown, or this
            platform lacks a way to compute.
    """
    for option in compute:
        if option not in COMPUTE:  # any other field would change the model
            known = f": how to compute is said by {', '.join(COMPUTE)}"
            raise DitError(
                f"load_model has no option {option!r}{did_you_mean(option, COMPUTE, known)}"
            )
    if dtype not in DTYPES:
        raise DitError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    name = str(path_or_hf_id)
    devices = parallel.find_devices() if mesh is None else mesh.devices.flat
    platform = devices[0].platform
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
    config, files = read_config(folder), open_checkpoint(folder)
    config = stored_config(files, config, folder)
    config = dataclasses.replace(config, dtype=dtype, **compute)
    config.check_platform(platform)
    place: Any = None if mesh is None else shardings.param_placer(config, mesh)
    if keep_on_host(config, mesh):
        place = lambda path, array: array  # noqa: E731
    has_chat = folder.is_file() or (folder / "tokenizer.json").exists()
    chat = None
    if has_chat:
        chat = load_chat(folder, generation_eos(folder), config.vocab_size, system)
    params = load_params(folder, config, place, files)
    return Model(params, config, name, chat, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class Diff:
    """A weight diff: its `delta` (docs/architecture.md), what it is known to do, and where it came from."""

    delta: Delta = dataclasses.field(repr=False)
    label: str | None = None
    trigger: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def deltas_of(
    given: Any, config: DecoderConfig, what: str, batch: int | None = None
) -> tuple[Delta, ...]:
    """The deltas of `given`: None (no delta), a Diff, a delta, or a list or tuple of these, which are all added.

    Args:
        what: how messages call it.
        batch: a LoRA may also hold one delta for each of this many examples.

    Raises:
        DitError: anything else, or a delta that does not fit this model.
    """
    if given is None:
        return ()
    if isinstance(given, list | tuple):
        return tuple(delta for one in given for delta in deltas_of(one, config, what, batch))
    delta = given.delta if isinstance(given, Diff) else given
    if isinstance(delta, Mapping):
        check_modules(delta, config, what, batch)
        return (delta,)
    raise DitError(
        f"{what} is of type {type(given).__name__}: give a Diff, a delta, or a list of them (load_diff, load_adapter)"
    )


class Diffs(Sequence[Diff]):
    """A lazy sequence of weight diffs: `read(i)` is called when diff i is asked for.

    Args:
        order: the numbers of the diffs in the order in which reading all of them costs least.
        name: how messages call the sequence.
        splits: the split of each diff, as far as the files say it.
        sources: the file or folder of each diff, and its number there.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[int], Diff],
        order: Sequence[int] | None = None,
        name: str = "the sequence",
        splits: Sequence[str | None] | None = None,
        sources: Sequence[tuple[str, int]] | None = None,
    ):
        self._size, self._read, self._name = size, read, name
        self.order = range(size) if order is None else order
        self.splits = [None] * size if splits is None else splits
        self.sources = [(name, i) for i in range(size)] if sources is None else sources

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"diff {index} of {self._size}")
        return self._read(index % self._size)

    def number(self, index: int) -> int:
        """The number of a diff, from 0 up; a negative index counts from the end. Raises DitError: no such diff."""
        if not -self._size <= index < self._size:
            diffs = "1 diff" if self._size == 1 else f"{self._size} diffs"
            raise DitError(f"{self._name} holds {diffs}: there is no diff {index}")
        return index % self._size


def load_diffs(
    path: "PathLike | Found", model: Model, svd_rank: int | None = None, align: bool = False
) -> Diffs:
    """A lazy sequence of the weight diffs at `path`, in any known format (docs/formats.md).

    Nothing in the files is executed. The content tells the format: one of `deltas.detect.KINDS`. The diff of a
    finetuned model is M' − M over all parameters.

    Args:
        path: a path or a hub id (`formats.hub`), or what `detect.look_for_diffs` found there.
        svd_rank: reduce each diff to a LoRA of this rank (metadata says what that keeps).
        align: undo rewritings of a finetuned model that leave its function as it is (metadata says which).

    Raises:
        DitError: there is nothing readable, or the diffs belong to another base model.
    """
    from dit_jax.deltas.detect import list_diffs, look, open_diffs
    from dit_jax.deltas.store import DiffStore, label_of
    from dit_jax.deltas.truncation import check_svd_rank, truncate_delta

    check_model(model)
    if svd_rank is not None:
        check_svd_rank(svd_rank, model.config)
    found = look(path)
    path = str(found.path)

    def reduced(diff: Diff) -> Diff:
        if svd_rank is None or "svd" in diff.metadata:
            return diff
        delta, facts = truncate_delta(diff.delta, svd_rank, model.config, path)
        return dataclasses.replace(diff, delta=delta, metadata={**diff.metadata, **facts})

    if found.kind == "folder":
        return _joined(
            path, [(n, load_diffs(p, model, svd_rank, align)) for n, p in list_diffs(found.path)]
        )
    if found.kind == "diff_store":
        store = DiffStore(path)
        check_base(store.manifest.get("base"), model, path)

        def read(index: int) -> Diff:
            row = store.rows[index]
            store.check_fits([index], model.config)  # before it costs memory
            return reduced(Diff(store.read(index), label_of(row), row.get("trigger"), said(row)))

        return Diffs(len(store), read, name=path, splits=[row["split"] for row in store.rows])

    raw = open_diffs(found, model.config, model.params, svd_rank, align)

    def convert(index: int) -> Diff:
        diff = raw[index]
        return reduced(Diff(diff.delta, diff.label, diff.trigger, diff.metadata))

    rows = getattr(raw, "rows", None)  # of a release's index.csv
    splits = None if rows is None else [row["split"] for row in rows]
    return Diffs(len(raw), convert, getattr(raw, "order", None), path, splits)


def _joined(path: str, parts: Sequence[tuple[str, Diffs]]) -> Diffs:
    """The diffs of a folder one after the other; metadata["found_in"] is each one's file or folder."""
    places = [(name, diffs, i) for name, diffs in parts for i in range(len(diffs))]
    starts = itertools.accumulate((len(diffs) for _, diffs in parts), initial=0)

    def read(index: int) -> Diff:
        name, diffs, i = places[index]
        diff = diffs[i]
        return dataclasses.replace(diff, metadata={**diff.metadata, "found_in": name})

    order = [
        start + i for start, (_, diffs) in zip(starts, parts, strict=False) for i in diffs.order
    ]
    splits = [split for _, diffs in parts for split in diffs.splits]
    sources = [source for _, diffs in parts for source in diffs.sources]
    return Diffs(len(places), read, order, path, splits, sources)


def load_diff(
    path: "PathLike | Found",
    model: Model,
    index: int = 0,
    svd_rank: int | None = None,
    align: bool = False,
) -> Diff:
    """Weight diff number `index` of `load_diffs`; a negative one counts from the end.

    Raises:
        DitError: there is no such diff, or see `load_diffs`.
    """
    diffs = load_diffs(path, model, svd_rank, align)
    return diffs[diffs.number(index)]


def load_adapter(path: "PathLike | Found", model: Model) -> Delta:
    """The delta of a DIT adapter: our export, an adapter of PEFT or mlx-lm, a GGUF LoRA, or the reference's
    dit-adapter.pt.

    Raises:
        DitError: there is nothing readable, the export is damaged, or the adapter belongs to another base model.
    """
    return read_adapter(path, model).delta


def read_adapter(path: "PathLike | Found", model: Model) -> Diff:
    """Like `load_adapter`, with further facts from the files in `metadata`."""
    from dit_jax.deltas.detect import look, open_adapter

    check_model(model)
    found = look(path)
    path = str(found.path)
    if found.kind != "adapter":
        raw = open_adapter(found, model.config, model.params)
        delta = shardings.put_delta(model.config, model.mesh, raw.delta)
        return Diff(delta, metadata=raw.metadata)
    from dit_jax.deltas.adapter_file import load_adapter as load_export

    delta, manifest = load_export(path, model.config)
    check_base(manifest.get("base"), model, path)
    check_fits(delta, model.config, path)
    facts: dict[str, Any] = {
        key: manifest.get(key) for key in ("system", "questions", "trained_on")
    }
    return Diff(shardings.put_delta(model.config, model.mesh, delta), metadata=facts)


def check_model(model: Any) -> None:
    """Raises DitError unless `model` is a loaded model (it may be a name)."""
    if not isinstance(model, Model):
        raise DitError(f"the model is of type {type(model).__name__}: give what load_model returns")


def check_ids(least: Any, most: Any, model: Model) -> None:
    """Raises DitError for ids outside the vocabulary, for which an embedding returns another token's row."""
    for token in (int(least), int(most)):
        check_id(token, model.config.vocab_size, model.name)


def check_base(digest: Any, model: Model, what: str) -> None:
    """Raises DitError if `digest`, which `what` names as that of its base, is not the model's."""
    if digest != model.digest():
        raise DitError(
            f"{what} belongs to another base model (sha256 {str(digest)[:12]}…, {model.name} is "
            f"{model.digest()[:12]}…): load the base that it was made from"
        )
