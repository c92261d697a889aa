"""Rewritings of a model that leave its function as it is: views of a layer's weights, and disguises made of them.

| kind | what is rewritten |
| --- | --- |
| neurons | the order of the MLP's neurons, and a factor between up and down of each |
| heads | the order of KV groups, and of the query heads in each |
| values | an invertible matrix between v and o of each KV group |
| queries | for each rotary pair a factor between q and k; where no norm stands between, with an angle |
| norms | scales of norms go through the products after them |
| stream | a rotation of the residual stream; a permutation with signs where the head is tied or norms follow products |

`alignment` undoes them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.stats import ortho_group

from dit_jax.errors import DitError, did_you_mean
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import bias_of, stream_readers

Array = NDArray[Any]
KINDS = ("neurons", "heads", "values", "queries", "norms", "stream")
_GROUP = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


@dataclasses.dataclass(frozen=True)
class LayerView:
    """Views of one layer's weights, numpy arrays; what is assigned to them changes the tree.

    weights: its part of the tree. norms: by name the scales. offset: what norms add to their scales.
    """

    config: DecoderConfig
    weights: dict[str, Any]
    norms: dict[str, Array]
    offset: float

    @property
    def groups(self) -> int:
        """How many heads of keys and values there are."""
        return self.config.num_key_value_heads

    @property
    def heads_per_group(self) -> int:
        """How many heads of queries share one of them."""
        return self.config.num_attention_heads // self.groups

    def kernel(self, name: str) -> Array:
        """[in, out] of a projection."""
        return self.weights[_GROUP.get(name, "self_attn")][name]["kernel"]  # type: ignore[no-any-return]

    def bias(self, name: str) -> Array | None:
        """[out] of a projection, None without one."""
        group = self.weights[_GROUP.get(name, "self_attn")]
        return group[bias_of(name)]["bias"] if bias_of(name) in group else None

    def heads(self, name: str) -> Array:
        """[D, heads, H] of q, k or v."""
        return self.kernel(name).reshape(self.config.hidden_size, -1, self.config.head_dim)

    def output_heads(self) -> Array:
        """[N, H, D] of o."""
        return self.kernel("o_proj").reshape(-1, self.config.head_dim, self.config.hidden_size)

    def set_output_heads(self, heads: Any, values: Array) -> None:
        """Writes [n, H, D] in the place of these heads of o."""
        self.output_heads()[heads] = values

    def with_bias(self, name: str, head: int) -> Array:
        """A copy [D, H] of a head of q, k or v; with a bias it is one row more."""
        kernel, bias = self.heads(name)[:, head], self.bias(name)
        if bias is None:
            return kernel.copy()
        return np.concatenate([kernel, bias.reshape(-1, self.config.head_dim)[None, head]])

    def set_with_bias(self, name: str, head: int, values: Array) -> None:
        """Writes what `with_bias` gave."""
        self.heads(name)[:, head] = values[: self.config.hidden_size]
        if (bias := self.bias(name)) is not None:
            bias.reshape(-1, self.config.head_dim)[head] = values[-1]

    def take_heads(self, groups: Sequence[int] | Array, heads: Sequence[int] | Array) -> None:
        """Reorders KV groups and query heads: number i becomes what was number groups[i] and heads[i]."""
        for name, order in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
            self.heads(name)[...] = self.heads(name)[:, order]
            if (bias := self.bias(name)) is not None:
                parts = bias.reshape(-1, self.config.head_dim)
                parts[...] = parts[order]
        self.output_heads()[...] = self.output_heads()[heads]

    def neurons(self, name: str) -> Array:
        """[F, D]: a row of gate, up or down for each neuron."""
        return self.kernel(name) if name == "down_proj" else self.kernel(name).T

    def take_neurons(self, order: Sequence[int] | Array) -> None:
        """Reorders the neurons of the MLP: number i becomes what was number order[i]."""
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.neurons(name)[...] = self.neurons(name)[order]
        for name in ("gate_proj", "up_proj"):
            if (bias := self.bias(name)) is not None:
                bias[...] = bias[order]

    def consumers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each norm before products, and these products."""
        readers = stream_readers(self.config)
        for norm in dict.fromkeys(readers.values()):
            yield norm[-1], tuple(path[-1] for path, before in readers.items() if before == norm)

    def output_norms(self) -> tuple[str, ...]:
        """The norms after products, whose results go to the residual stream."""
        return (
            ("post_attention_layernorm", "post_feedforward_layernorm")
            if self.config.sandwich_norm
            else ()
        )


def layer_views(params: Any, config: DecoderConfig) -> list[LayerView]:
    """One `LayerView` of each layer of a parameter tree of numpy arrays."""
    views = []
    for number in range(config.num_hidden_layers):
        weights = jax.tree.map(
            lambda leaf, number=number: np.asarray(leaf)[number], params["layers"]
        )
        norms = {
            name: module["scale"]
            for part in (weights, weights["self_attn"])
            for name, module in part.items()
            if "scale" in module
        }
        views.append(LayerView(config, weights, norms, float(config.unit_offset_norm)))
    return views


def paired(values: Array) -> Array:
    """[…, H] as [2, …, H / 2]: the two entries of each rotary pair."""
    return np.stack(np.split(values, 2, -1))


def complex_pairs(values: Array) -> Array:
    """[…, H] as complex [..., H / 2]: rope turns each rotary pair by an angle."""
    first, second = paired(values.astype(np.float64))
    return first + 1j * second


def real_pairs(values: Array) -> Array:
    """The inverse of `complex_pairs`."""
    return np.concatenate([values.real, values.imag], -1)


# ------------------------------------------------------------------ disguises


def disguise(
    params: Any, config: DecoderConfig, kinds: Sequence[str] = KINDS, seed: int = 0
) -> Any:
    """A copy of parameters in float32 numpy arrays that computes the same and looks like another model.

    Args:
        kinds: of `KINDS`, see the module's docstring.

    Raises:
        DitError: an unknown kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            known = f": choose from {', '.join(KINDS)}"
            raise DitError(f"unknown symmetry {kind!r}{did_you_mean(kind, KINDS, known)}")
    made = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    rng = np.random.default_rng(seed)
    if "stream" in kinds:
        _turn_stream(made, config, rng)
    for layer in layer_views(made, config):
        for kind in kinds:
            if kind in _DISGUISES:
                _DISGUISES[kind](layer, rng)
    return made


def _neurons(layer: LayerView, rng: np.random.Generator) -> None:
    order = rng.permutation(layer.config.intermediate_size)
    factor = np.exp(0.5 * rng.normal(size=len(order))) * rng.choice([-1, 1], len(order))
    layer.take_neurons(order)
    layer.kernel("up_proj")[...] *= factor
    if (bias := layer.bias("up_proj")) is not None:
        bias *= factor
    layer.kernel("down_proj")[...] /= factor[:, None]


def _heads(layer: LayerView, rng: np.random.Generator) -> None:
    per, groups = layer.heads_per_group, rng.permutation(layer.groups)
    layer.take_heads(
        groups, np.concatenate([group * per + rng.permutation(per) for group in groups])
    )


def _values(layer: LayerView, rng: np.random.Generator) -> None:
    size, per = layer.config.head_dim, layer.heads_per_group
    for group in range(layer.groups):
        # Well conditioned: rounding to bfloat16 must not eat a finetune.
        left, right = (ortho_group.rvs(size, random_state=rng) for _ in range(2))
        matrix = left * np.exp(0.3 * rng.normal(size=size)) @ right
        layer.set_with_bias("v_proj", group, layer.with_bias("v_proj", group) @ matrix)
        heads = slice(group * per, (group + 1) * per)
        layer.set_output_heads(heads, np.linalg.solve(matrix, layer.output_heads()[heads]))


def _queries(layer: LayerView, rng: np.random.Generator) -> None:
    half, per = layer.config.head_dim // 2, layer.heads_per_group
    if layer.config.qk_norm:
        factor = np.tile(np.exp(0.3 * rng.normal(size=half)) * rng.choice([-1, 1], half), 2)
        for name, by in (("q_norm", factor), ("k_norm", 1 / factor)):
            layer.norms[name][...] = (layer.norms[name] + layer.offset) * by - layer.offset
        return
    for group in range(layer.groups):
        factor = np.exp(0.3 * rng.normal(size=half) + 2j * np.pi * rng.random(half))
        for name, numbers, by in (
            ("q_proj", range(group * per, (group + 1) * per), factor),
            ("k_proj", (group,), 1 / factor.conj()),
        ):
            for head in numbers:
                pairs = complex_pairs(layer.with_bias(name, head))
                layer.set_with_bias(name, head, real_pairs(pairs * by))


def _norms(layer: LayerView, rng: np.random.Generator) -> None:
    for norm, consumers in layer.consumers():
        factor = np.exp(0.5 * rng.normal(size=layer.config.hidden_size))
        scale = layer.norms[norm]
        scale[...] = (scale + layer.offset) / factor - layer.offset
        for name in consumers:
            layer.kernel(name)[...] *= factor[:, None]


_DISGUISES = {
    "neurons": _neurons,
    "heads": _heads,
    "values": _values,
    "queries": _queries,
    "norms": _norms,
}


def _turn_stream(params: Any, config: DecoderConfig, rng: np.random.Generator) -> None:
    size, offset = config.hidden_size, float(config.unit_offset_norm)
    permuted = config.sandwich_norm or "lm_head" not in params
    if permuted:
        turn = np.eye(size)[:, rng.permutation(size)] * rng.choice([-1, 1], size)
    else:
        turn = ortho_group.rvs(size, random_state=rng)

    def read(scale: Array, kernels: list[Array]) -> None:
        if permuted:
            scale[...] = scale @ np.abs(turn)
        for kernel in kernels:
            kernel[...] = turn.T @ (kernel if permuted else (scale + offset)[:, None] * kernel)
        if not permuted:
            scale[...] = 1 - offset

    params["embed_tokens"]["embedding"] = (params["embed_tokens"]["embedding"] @ turn).astype(
        np.float32
    )
    for layer in layer_views(params, config):
        for norm, consumers in layer.consumers():
            read(layer.norms[norm], [layer.kernel(name) for name in consumers])
        for name in ("o_proj", "down_proj"):
            layer.kernel(name)[...] = layer.kernel(name) @ turn
            if (bias := layer.bias(name)) is not None:
                bias[...] = bias @ turn
        for norm in layer.output_norms():
            layer.norms[norm][...] = layer.norms[norm] @ np.abs(turn)
    read(params["norm"]["scale"], [params["lm_head"]["kernel"]] if "lm_head" in params else [])
