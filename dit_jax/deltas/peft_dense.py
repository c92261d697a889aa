"""What PEFT adapters change besides LoRA factors of projections, as whole new weights.

This covers DoRA, modules_to_save, biases, LoRA on the embedding or the head, trained rows of the embedding, and the
embedding and head that PEFT saves beside an adapter. A delta holds them as dense differences
(`whole_weights.changes`), so they cost the memory of whole weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np

from dit_jax.deltas.peft_config import PeftOptions
from dit_jax.deltas.raw_diff import check_values
from dit_jax.deltas.whole_weights import Weights, base_weight, changes
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import check_rank
from dit_jax.models.misfits import shape_error
from dit_jax.models.modules import EMBEDDING, HEAD, Path, all_modules


class Tensor(NamedTuple):
    """A tensor of the adapter's file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Read = Callable[[], np.ndarray]
Key = tuple[Path, int | None]

_LORA = ("lora_A", "lora_B")
_EMBEDDING_LORA = ("lora_embedding_A", "lora_embedding_B")
# The parts of a module -> how its new weight is made.
_KINDS = {
    frozenset((*_LORA, "lora_magnitude_vector")): "dora",
    frozenset(_LORA): "lora",
    frozenset((*_EMBEDDING_LORA, "lora_magnitude_vector")): "embedding_dora",
    frozenset(_EMBEDDING_LORA): "embedding",
    frozenset(("weight",)): "saved",
    frozenset(("trainable_tokens_delta",)): "tokens",
}


@dataclasses.dataclass
class DenseChanges:
    """Collects the changed modules of an adapter; `delta` reads them.

    notes: what a reader of the answers should know, filled by `delta`.
    """

    options: PeftOptions
    config: DecoderConfig
    base_params: Any
    source: FilePath

    def __post_init__(self) -> None:
        self._modules = all_modules(self.config)
        self._new: dict[Key, Read] = {}
        self._kinds: dict[Key, str] = {}
        self._copies: dict[Key, tuple[str, Read]] = {}
        self.notes: list[str] = []

    def add(self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]) -> None:
        """Takes the tensors of one module. Checks their kinds and shapes."""
        if self.base_params is None:
            raise DitError(
                f"'{self.source}' changes whole weights: the base model is needed to read it"
            )
        parts = {part: tensor for part, tensor in parts.items() if part != "token_copy"}
        if "saved" in parts:
            parts.setdefault("weight", parts["saved"])
            del parts["saved"]
        copy, said = parts.pop("base_layer", None), f"{module}.base_layer.weight"
        if copy is None and "weight" in parts and not self.options.saves(module):
            copy, said = parts.pop("weight"), f"{module}.weight"
        if copy is not None:
            read = self._read(said, copy, self._modules[place].file_shape)
            self._copies[place, layer] = (said, read)
        if not parts:
            self._check_not_targeted(module, place)
            return
        kind = _KINDS.get(frozenset(parts), "")
        fits = {
            "dora": self._modules[place].lora or place == HEAD,
            "lora": place == HEAD or (self._modules[place].lora and copy is not None),
            "embedding": place == EMBEDDING,
            "embedding_dora": place == EMBEDDING,
            "saved": True,
            "tokens": place in (EMBEDDING, HEAD),
        }
        if not fits.get(kind):
            raise DitError(
                f"'{self.source}' holds {', '.join(sorted(parts))} of {short(module)}, which is not supported"
            )
        self._put((place, layer), getattr(self, f"_{kind}")(module, place, layer, parts), module)
        self._kinds[place, layer] = kind

    def add_copy(self, module: str, place: Path, layer: int | None, copy: Tensor) -> None:
        """Takes a copy of the base's weight of a projection, which must be the base's."""
        self.add(module, place, layer, {"base_layer": copy})

    def add_bias(self, module: str, place: Path, layer: int, parts: dict[str, Tensor]) -> None:
        """Takes the bias of a projection, and that of its factor B, which PEFT adds to it."""
        if self.base_params is None:
            raise DitError(f"'{self.source}' changes biases: the base model is needed to read it")
        shape, name = self._modules[place].file_shape, f"{module}.bias"
        # Of a module in modules_to_save, PEFT may also write the bias of the original, which takes no part.
        held = (parts.get(part) for part in ("bias", "saved_bias", "base_bias"))
        whole = next((tensor for tensor in held if tensor is not None), None)
        read = None if whole is None else self._read(name, whole, shape)
        added = parts.get("lora_bias")
        trained = self.options.trains_biases or self.options.saves(module)
        if read is not None and not trained:
            self._copies[place, layer] = (name, read)
            read = None
        if added is not None:
            scale = np.float32(self.options.scale(module))
            of_b, old = self._read(f"{module}.lora_B.bias", added, shape), read
            read = lambda: (old() if old else self._base(place, layer)) + scale * of_b()  # noqa: E731
        if read is not None:
            self._put((place, layer), read, name)

    def delta(self) -> dict[str, Any]:
        """The dense differences of all added modules."""
        self._check_copies()
        self._tie()
        if not self._new:
            return {}
        names = {key: self._modules[key[0]].tensor.format(key[1]) for key in self._new}
        named = {names[key]: read for key, read in self._new.items()}
        shapes = {names[key]: self._modules[key[0]].file_shape for key in self._new}
        weights = Weights(self.source, shapes, lambda name: named[name](), missing="layers")
        return changes(weights, self.config, self.base_params)[0]

    def _put(self, key: Key, read: Read, module: str) -> None:
        if key in self._new:
            raise DitError(
                f"'{self.source}' changes {short(module)} twice, under two names: fix the file"
            )
        self._new[key] = read

    def _check_not_targeted(self, module: str, place: Path) -> None:
        """Where the factors of a module are missing, PEFT would fill them up with random numbers."""
        chosen = self.options.target_modules is not None and not self.options.all_linear
        if place in (EMBEDDING, HEAD) and chosen and self.options.targets(module):
            raise DitError(
                f"'{self.source}' lacks the factors of {short(module)}, which is targeted: get the complete folder"
            )

    def _check_copies(self) -> None:
        """Copies of the base's weights must be the base's, but an embedding or head takes the place of the base's.

        PEFT writes them into the base, of a tied pair the head's last: with `save_embedding_layers` a trained one is
        stored so.
        """
        embedding, head = (EMBEDDING, None), (HEAD, None)
        last = self._copies.get(head) or self._copies.get(embedding)
        if self.config.tie_word_embeddings and last:
            self._copies |= {embedding: last, head: last}
        for (place, layer), (name, read) in list(self._copies.items()):
            old, new = self._of_base(place, layer), read()
            if np.array_equal(new.astype(old.dtype), old):
                del self._copies[place, layer]
            elif place not in (EMBEDDING, HEAD):
                module = name.removesuffix(".weight")
                if name.endswith((".base_layer.weight", ".bias")):
                    raise DitError(
                        f"'{self.source}' was made for a base with another {short(module)}: use that base"
                    )
                raise DitError(
                    f"'{self.source}' holds the whole weight of {short(module)}, which is not in modules_to_save"
                )
            else:
                said = (
                    "the adapter brings an embedding or head of its own, trained or of another base"
                )
                self.notes = [said]

    def _tie(self) -> None:
        """Gives the embedding and the head the weights that PEFT gives them.

        Where the base ties them, a change of one of them leaves the other as it is, except for rows of tokens, and
        with ensure_weight_tying.
        """
        embedding, head = (EMBEDDING, None), (HEAD, None)
        if self.config.tie_word_embeddings:
            follows = self.options.ties_weights or self._kinds.get(embedding) == "tokens"
            if embedding in self._new and head not in self._new and not follows:
                self._new[head] = lambda: self._base(HEAD, None)
            elif head in self._new and embedding not in self._new and follows:
                self._new[embedding] = self._new.pop(head)
        for key in (embedding, head):
            if key in self._copies and key not in self._new:
                self._new[key] = lambda key=key: self._base(*key)  # type: ignore[misc]

    def _of_base(self, place: Path, layer: int | None) -> np.ndarray:
        """The base's own weight in the file's orientation."""
        module = self._modules[place]
        return np.asarray(module.turn(base_weight(self.base_params, module, layer)))

    def _base(self, place: Path, layer: int | None) -> np.ndarray:
        """The weight that factors are added to, in the file's orientation: the base's, or what the file has of it."""
        if (place, layer) in self._copies:
            return self._copies[place, layer][1]()
        return self._of_base(place, layer).astype(np.float32)

    def _read(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Read:
        """Checks the shape now and returns a function that reads the values in float32."""
        if tensor.shape != shape:
            raise shape_error(self.source, name, tensor.shape, shape)
        return lambda: check_values(tensor.read(), name, self.source).astype(np.float32)

    def _product(
        self, module: str, place: Path, parts: dict[str, Tensor], names: tuple[str, str]
    ) -> Read:
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

    def _dora(self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]) -> Read:
        product = self._product(module, place, parts, _LORA)
        return self._with_magnitude(module, place, layer, parts, product, axis=1)

    def _embedding_dora(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Read:
        product = self._product(module, place, parts, _EMBEDDING_LORA)
        return self._with_magnitude(module, place, layer, parts, lambda: product().T, axis=0)

    def _with_magnitude(
        self,
        module: str,
        place: Path,
        layer: int | None,
        parts: dict[str, Tensor],
        product: Read,
        axis: int,
    ) -> Read:
        """The new weight of a DoRA: m · V / ‖V‖, norms over `axis` of V = W + product."""
        size = self._modules[place].file_shape[1 - axis]
        name = f"{module}.lora_magnitude_vector"
        magnitude = self._read(name, parts["lora_magnitude_vector"], (size,))

        def read() -> np.ndarray:
            weight = self._base(place, layer) + product()
            norms = np.linalg.norm(weight, axis=axis)
            with np.errstate(divide="ignore", invalid="ignore"):  # a zero row gives NaN, refused
                return np.expand_dims(magnitude() / norms, axis) * weight

        return read

    def _lora(self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]) -> Read:
        product = self._product(module, place, parts, _LORA)
        return lambda: self._base(place, layer) + product()

    def _embedding(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Read:
        product = self._product(module, place, parts, _EMBEDDING_LORA)
        return lambda: self._base(place, layer) + product().T

    def _saved(self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]) -> Read:
        return self._read(f"{module}.weight", parts["weight"], self._modules[place].file_shape)

    def _tokens(
        self, module: str, place: Path, layer: int | None, parts: dict[str, Tensor]
    ) -> Read:
        rows = self.options.tokens(module, self.config.vocab_size)
        name = f"{module}.token_adapter.trainable_tokens_delta"
        shape = (len(rows), self.config.hidden_size)
        values = self._read(name, parts["trainable_tokens_delta"], shape)

        def read() -> np.ndarray:
            weight = np.array(self._base(place, layer))
            weight[rows] = values()
            return weight

        return read
