"""Reads what PEFT adapters change by other means than LoRA factors of projections, as whole new weights.

These are DoRA, modules_to_save, LoRA on the embedding or the head, and trained rows of the embedding. A delta holds
them as dense differences (`whole_weights.changes`), so they take the memory of whole weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np

from dit_jax.deltas.peft_config import PeftOptions
from dit_jax.deltas.raw_diff import check_values, shape_error
from dit_jax.deltas.whole_weights import Weights, base_weight, changes
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import check_rank
from dit_jax.models.modules import EMBEDDING, HEAD, Path, all_modules


class Tensor(NamedTuple):
    """A tensor of the adapter's file: its shape, and what reads its values."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


_LORA = ("lora_A", "lora_B")
# The parts of a module -> the kind of its change; `base_layer` is a copy of the base that PEFT adds.
_KINDS = {
    frozenset((*_LORA, "lora_magnitude_vector")): "dora",
    frozenset(_LORA): "lora",
    frozenset((*_LORA, "base_layer")): "lora",
    frozenset(("lora_embedding_A", "lora_embedding_B")): "embedding",
    frozenset(("lora_embedding_A", "lora_embedding_B", "base_layer")): "embedding",
    frozenset(("weight",)): "saved",
    frozenset(("trainable_tokens_delta",)): "tokens",
}


@dataclasses.dataclass
class DenseChanges:
    """Collects the changed modules of a folder, which `delta` reads."""

    options: PeftOptions
    config: DecoderConfig
    base_params: Any
    source: FilePath

    def __post_init__(self) -> None:
        self._modules = all_modules(self.config)
        self._new: dict[tuple[Path, int | None], Callable[[], np.ndarray]] = {}
        self._copies: list[Callable[[], None]] = []

    def add(self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]) -> None:
        """Adds the tensors of one module, after a check of their kinds and shapes."""
        kind = _KINDS.get(frozenset(parts))
        wanted = {
            "dora": self._modules[place].lora,
            "lora": place == HEAD,
            "embedding": place == EMBEDDING,
            "saved": True,
            "tokens": place in (EMBEDDING, HEAD),
        }
        if kind is None or not wanted[kind]:
            raise DitError(
                f"'{self.source}' holds {', '.join(sorted(parts))} of {short(module)}, which is not "
                "supported"
            )
        if self.base_params is None:
            raise DitError(
                f"'{self.source}' changes whole weights: the base model is needed to read it"
            )
        if kind == "saved" and place in (EMBEDDING, HEAD) and not self.options.saves(module):
            # With save_embedding_layers, PEFT also saves what was not trained.
            chosen = self.options.target_modules is not None and not self.options.all_linear
            if chosen and self.options.targets(module):
                raise DitError(
                    f"'{self.source}' lacks the factors of {short(module)}, which is targeted: get the complete folder"
                )
            self._copies.append(self._copy(module, place, parts["weight"], f"{module}.weight"))
            return
        if self.config.tie_word_embeddings and place in (EMBEDDING, HEAD) and kind != "tokens":
            option = "modules_to_save" if kind == "saved" else "target_modules"
            raise DitError(
                f"'{self.source}': {option} changes {short(module)} alone, but the base ties embedding "
                "and head: this is supported for untied models only"
            )
        make = getattr(self, f"_{kind}")(module, place, layer, parts)
        if (place, layer) in self._new:
            raise DitError(
                f"'{self.source}' changes {short(module)} twice, under two names: fix the file"
            )
        self._new[place, layer] = make

    def delta(self) -> dict[str, Any]:
        """Reads the dense differences of all modules that were added."""
        for check in self._copies:
            check()
        if not self._new:
            return {}
        new = dict(self._new)
        for place in {place for place, layer in self._new if layer is not None}:
            for layer in self._modules[place].indices:  # layers without a change
                new.setdefault((place, layer), lambda at=(place, layer): self._base(*at))  # type: ignore[misc]
        names = {key: f"{self._modules[key[0]].name.format(key[1])}.weight" for key in new}
        named = {names[key]: read for key, read in new.items()}
        shapes = {names[key]: self._modules[key[0]].file_shape for key in new}
        weights = Weights(self.source, shapes, lambda name: named[name](), complete=False)
        return changes(weights, self.config, self.base_params)[0]

    def _base(self, place: Path, layer: int | None) -> np.ndarray:
        """The base's weight in the file's orientation."""
        module = self._modules[place]
        return module.turn(base_weight(self.base_params, module, layer)).astype(np.float32)

    def _read(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        """Checks the shape now; returns a function that reads the values in float32."""
        if tensor.shape != shape:
            raise shape_error(self.source, name, tensor.shape, shape)
        return lambda: check_values(tensor.read(), name, self.source).astype(np.float32)

    def _product(
        self, module: str, place: Path, parts: dict[str, Tensor], names: tuple[str, str]
    ) -> Callable[[], np.ndarray]:
        """scale * (B A), [out, in], of LoRA factors A [r, in] and B [out, r]."""
        inputs, outputs = self._modules[place].shape
        if not self.options.targets(module):
            raise DitError(
                f"'{self.source}' holds factors of {short(module)}, which is not targeted"
            )
        rank, scale = self.options.rank(module), self.options.scale(module)
        check_rank(rank, inputs, outputs, module, self.source)
        a = self._read(f"{module}.{names[0]}", parts[names[0]], (rank, inputs))
        b = self._read(f"{module}.{names[1]}", parts[names[1]], (outputs, rank))
        return lambda: np.float32(scale) * (b() @ a())

    def _unchanged(
        self, module: str, place: Path, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        """The base's weight; if the file has a copy of it, reading compares them."""
        if "base_layer" not in parts:
            return lambda: self._base(place, None)
        check = self._copy(module, place, parts["base_layer"], f"{module}.base_layer.weight")

        def read() -> np.ndarray:
            check()
            return self._base(place, None)

        return read

    def _copy(self, module: str, place: Path, tensor: Tensor, name: str) -> Callable[[], None]:
        """Returns a check that the file's copy of the base's embedding or head equals it."""
        copy = self._read(name, tensor, self._modules[place].file_shape)

        def check() -> None:
            tied = self.config.tie_word_embeddings and place == HEAD
            kept = self._modules[EMBEDDING if tied else place]
            base, found = base_weight(self.base_params, kept, None), kept.turn(copy())
            if not np.array_equal(found.astype(base.dtype), base):
                raise DitError(
                    f"'{self.source}' was made for a base with a different {short(module)}: use that base"
                )

        return check

    def _dora(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        product = self._product(module, place, parts, _LORA)
        outputs = self._modules[place].file_shape[:1]
        name = f"{module}.lora_magnitude_vector"
        magnitude = self._read(name, parts["lora_magnitude_vector"], outputs)

        def read() -> np.ndarray:
            weight = self._base(place, layer) + product()
            norms = np.linalg.norm(weight, axis=1)
            with np.errstate(
                divide="ignore", invalid="ignore"
            ):  # a row of zeros gives NaN, which is refused
                return (magnitude() / norms)[:, None] * weight

        return read

    def _lora(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        product, base = (
            self._product(module, place, parts, _LORA),
            self._unchanged(module, place, parts),
        )
        return lambda: base() + product()

    def _embedding(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        names = ("lora_embedding_A", "lora_embedding_B")
        product = self._product(module, place, parts, names)
        base = self._unchanged(module, place, parts)
        return lambda: base() + product().T

    def _saved(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        if not self.options.saves(module):
            raise DitError(
                f"'{self.source}' holds the whole weight of {short(module)}, which is not in "
                "modules_to_save"
            )
        return self._read(f"{module}.weight", parts["weight"], self._modules[place].file_shape)

    def _tokens(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Callable[[], np.ndarray]:
        rows = self.options.tokens(module, self.config.vocab_size)
        name = f"{module}.token_adapter.trainable_tokens_delta"
        shape = (len(rows), self.config.hidden_size)
        values = self._read(name, parts["trainable_tokens_delta"], shape)

        def read() -> np.ndarray:
            weight = np.array(self._base(place, layer))
            weight[rows] = values()
            return weight

        return read
