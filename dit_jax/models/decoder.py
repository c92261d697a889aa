"""The decoder as a pure function of (params, tokens, deltas).

The parameter tree and the delta tree are described in docs/architecture.md. Layers are stacked on axis 0
and either scanned or unrolled (`config.scan_layers`); both compute the same function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models import head
from dit_jax.models.attention import Segments, causal_mask
from dit_jax.models.block import Block, Context, Queries
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas, check_modules
from dit_jax.models.kv_cache import Cache, cached_masks, view
from dit_jax.models.layer_kinds import Layer, layer_kinds, scanned, window_over
from dit_jax.models.layer_views import cut_layers
from dit_jax.models.layers import PROJECTION, make_norm, pick, ready
from dit_jax.models.modules import EMBEDDING, HEAD, Module, module_table
from dit_jax.models.products import precision
from dit_jax.runtime.parallel import FREE, constrain

Params = dict[str, Any]


class Decoder(nn.Module):
    """Token ids [B, T] and `ready_deltas` -> final hidden states [B, T, D], or [B, P, D] at `queries`.

    The head is separate, see `unembed`.
    """

    config: DecoderConfig
    segments: Segments | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        deltas: Deltas,
        kv: Any,
        context: Context,
        queries: Queries | None = None,
    ) -> Any:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        table = module_table(c)
        embedding = _Table(table[EMBEDDING], dtype, name="embed_tokens")()
        if HEAD in table:  # declared here, used by `unembed`
            _Table(table[HEAD], dtype, name="lm_head")()
        x = constrain(embedding, "vocab", None)[tokens].astype(dtype)
        for delta in pick(deltas, "embed_tokens"):
            x = x + delta["w"][tokens].astype(dtype)
        if c.scale_embeddings:  # by a factor that transformers too rounds to the compute dtype
            x = x * jnp.asarray(c.hidden_size**0.5, dtype)
        x = constrain(x, FREE, FREE, None)

        layers = pick(deltas, "layers")
        if c.scan_layers or self.is_initializing():
            x, kv = self._scan_layers(x, layers, kv, context)
            if queries is not None:
                x = jnp.take_along_axis(x, queries.row_index[..., None], axis=1)
        else:
            x, kv = self._unroll_layers(x, layers, kv, context, queries)
        x = make_norm(c, "norm")(x, pick(deltas, "norm"))
        return x, kv

    def _scan_layers(
        self, x: jax.Array, deltas: Deltas, kv: Any, context: Context
    ) -> tuple[jax.Array, Any]:
        c = self.config
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_remat_policy(c))
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=c.num_hidden_layers,
        )
        out, _ = layers(c, self.segments, name="layers")((x, kv), scanned(c), deltas, context)
        return out

    def _unroll_layers(
        self,
        x: jax.Array,
        deltas: Sequence[Any],
        kv: Any,
        context: Context,
        queries: Queries | None,
    ) -> tuple[jax.Array, Any]:
        """The same function, but the last layer computes only the queries."""
        c = self.config
        layers = cut_layers(self.variables["params"]["layers"], c)
        last = c.num_hidden_layers - 1
        kinds = layer_kinds(c)[1]

        def apply(layer: int, x: jax.Array, kv: Any, params: Params, deltas: Deltas) -> Any:
            block = Block(c, self.segments, parent=None)
            asked = queries if layer == last else None
            which = Layer(jnp.asarray(0), kinds[layer])  # the first in a cache of its own
            return block.apply({"params": params}, (x, kv), which, deltas, context, asked)[0]

        caches: list[Any] = []
        for layer in range(c.num_hidden_layers):
            function: Callable[..., Any] = functools.partial(apply, layer)
            if c.remat != "none":
                function = jax.checkpoint(function, policy=_remat_policy(c))
            own = kv and tuple(arrays[layer] for arrays in kv)
            x, own = function(x, own, layers[layer], tuple(delta[layer] for delta in deltas))
            caches.append(own)
        return x, kv and tuple(zip(*caches, strict=True))


def ready_deltas(deltas: Deltas, config: DecoderConfig, batch: int) -> Deltas:
    """Deltas for `batch` rows in the form that layers take (`layers.ready`), cut by layer where layers are unrolled.

    Raises:
        DitError: a delta does not fit this model: what no layer asks for would be silently left out.
    """
    for i, delta in enumerate(deltas):
        check_modules(delta, config, f"deltas[{i}]", batch)
    done = ready(deltas, config.dtype)
    if config.scan_layers:
        return done
    return tuple(
        {**delta, "layers": cut_layers(delta["layers"], config)} if "layers" in delta else delta
        for delta in done
    )


def _remat_policy(config: DecoderConfig) -> Any:
    if config.remat == "dots":
        # By name: a rule for all products would keep the products with W and with each LoRA besides their sum.
        return jax.checkpoint_policies.save_only_these_names(PROJECTION)
    return None


class _Table(nn.Module):
    module: Module
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        init, module = nn.initializers.normal(0.02), self.module
        return self.param(module.leaf, init, module.shape, self.dtype)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    *,
    deltas: Deltas = (),
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    segments: Segments | None = None,
    position: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [B, T, D] of token ids [B, T], or [B, P, D] at some positions.

    Args:
        deltas: any number of delta trees, which are added. The batch may share a LoRA, or have one per example.
        lengths: [B] number of real tokens of right-padded rows (the fast path), or
        mask: [B, T] True at real tokens, with padding anywhere. Neither: no padding.
        segments: (tokens, positions) of each text, where a row holds several texts side by side that do not see each
            other; `lengths` is then [B, segments]. None: one text in each row.
        position: [B, P] positions in their segments whose hidden states are returned; only without a mask.

    Raises:
        DitError: a delta does not fit this model.
    """
    batch, length = tokens.shape
    if mask is not None and not (lengths is None and segments is None and position is None):
        raise ValueError("lengths, segments and position cannot be combined with a mask")
    queries = None
    if mask is None:
        if segments is None:
            segments = ((length, length if position is None else position.shape[1]),)
        if lengths is None:
            lengths = jnp.array([size for size, _ in segments])[None].repeat(batch, axis=0)
        inside = np.concatenate([np.arange(size) for size, _ in segments])
        context = Context(
            jnp.broadcast_to(inside, (batch, length)),
            lengths.reshape(batch, len(segments)),
            None,
            None,
        )
        if position is not None:
            starts = np.cumsum([0, *(size for size, _ in segments[:-1])])
            offset = np.repeat(starts, [count for _, count in segments])
            queries = Queries(position, position + offset)
    else:
        mask = mask.astype(bool)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        windows = [window_over(config, kind, length) for kind in range(len(layer_kinds(config)[0]))]
        windows = windows if len(set(windows)) > 1 else windows[:1]
        masks = tuple(causal_mask(None, length, w) & mask[:, None, :] for w in windows)
        context = Context(positions, None, masks, None)
    deltas = ready_deltas(deltas, config, batch)
    with precision(config.dtype):
        model = Decoder(config, segments)
        hidden, _ = model.apply({"params": params}, tokens, deltas, None, context, queries)
    return hidden


def forward_cached(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    valid: jax.Array,
    cache: Cache,
    deltas: Deltas = (),
) -> tuple[jax.Array, Cache]:
    """Appends T tokens per row to the cache. tokens, valid: [B, T]; returns hidden states [B, T, D] and the cache.

    Rows are left padded: `valid` is False at padding, which no later token attends to. The deltas come from
    `ready_deltas`, so that a loop of calls prepares them once.
    """
    seen = jnp.sum(cache.valid, axis=1, keepdims=True)
    positions = seen + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    masks, all_valid = cached_masks(config, cache, valid)
    context = Context(positions, None, masks, view(config, cache))
    with precision(config.dtype):
        hidden, kv = Decoder(config).apply(
            {"params": params}, tokens, deltas, (cache.k, cache.v), context
        )
    k, v = kv
    return hidden, Cache(k, v, all_valid, cache.end + tokens.shape[1])


def unembed(
    params: Params, config: DecoderConfig, hidden: jax.Array, deltas: Deltas = ()
) -> jax.Array:
    """fp32 logits [..., V] of hidden states [..., D]."""
    return head.logits(config, head.head_weight(params, config, deltas), hidden)


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters (normal, 0.02), as plain nested dicts of arrays in `config.dtype`."""
    # `_init` is compiled: run eagerly, the scan over layers would compile piece by piece.
    return _init(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(config: DecoderConfig, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    context = Context(tokens, None, (jnp.ones((1, 1, 1), bool),), None)
    return Decoder(config).init(key, tokens, (), None, context)["params"]
