"""Undoes rewritings of a finetuned model that leave its function as it is, so that M' − M is the finetune again.

A checkpoint can be rewritten so that it computes the same, and the difference to the base says nothing: `symmetries`
lists the ways. Because M' is close to a rewritten M, each can be found by comparison with M. A rewriting is undone only
where that brings the weights a good deal nearer to the base: a plain finetune stays exactly as it is.

Sources: weight-space symmetries of transformers are collected in arXiv 2405.20231; orthogonal Procrustes and linear
assignment are scipy's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes, solve_sylvester
from scipy.optimize import linear_sum_assignment

from dit_jax.deltas.raw_diff import check_values
from dit_jax.deltas.symmetries import LayerView, complex_pairs, layer_views, paired, real_pairs
from dit_jax.deltas.whole_weights import Weights, base_weight, place
from dit_jax.errors import DitError, first_line
from dit_jax.models.decoder import forward, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import HEAD, module_table, set_at, tensor_names, weight

Array = NDArray[Any]
NEARER = 0.8  # undone where the squared distance to the base shrinks to less than this share
MOST_LEFT = 0.5  # of the base's norm: what is farther away is no finetune of it
_TOLERANCE = 1e-3  # of the largest logit
_SOLVER_STEPS = 3


def aligned(
    weights: Weights, config: DecoderConfig, base_params: Any
) -> tuple[Weights, dict[str, int]]:
    """Whole weights of a finetuned model, rewritten by `align`, and what that undid.

    Memory holds both models in float32. Raises DitError: see `align` and `whole_weights.place`.
    """
    found = place(weights, config)
    if (HEAD, None) in found:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    names = tensor_names(config)
    mine: Any = {}
    own: Any = {}
    for path, module in module_table(config).items():
        parts: list[tuple[Array, Array]] = []
        for layer in module.indices:
            base = base_weight(base_params, module, layer).astype(np.float32)
            name = found.get((path, layer))
            read = (
                base
                if name is None
                else module.turn(check_values(weights.read(name), name, weights.source))
            )
            parts.append((np.array(read, np.float32), base))
        stacked = [
            np.stack(part) if module.layers else part[0] for part in zip(*parts, strict=True)
        ]
        for tree, leaf in zip((mine, own), stacked, strict=True):
            set_at(tree, (*path, module.leaf), leaf)
    try:
        with np.errstate(all="ignore"):  # then the logits differ, which is refused
            params, undone = align(mine, own, config, weights.source)
    except ValueError as error:  # of scipy, for what is not finite by then
        raise DitError(
            f"'{weights.source}' cannot be aligned with the base ({first_line(error)}): drop --align"
        ) from None

    def tensor(name: str) -> Array:
        module, layer = names[name]
        return np.asarray(module.turn(weight(params, module, layer)))

    shapes = {name: module.file_shape for name, (module, _) in names.items()}
    return Weights(weights.source, shapes, tensor, "nothing"), undone


def align(
    params: Any, base: Any, config: DecoderConfig, source: object = ""
) -> tuple[Any, dict[str, int]]:
    """Rewrites a finetuned model so that its weights stand where the base has them.

    Args:
        params: the finetuned model's, float32 numpy arrays, a head of its own included where it has one. They are
            changed in place.
        base: the base's, the same tree; where the base's head is tied and this one is not, with the head written out.
        config: of both trees.
        source: the finetuned model, for messages.

    Returns:
        (the rewritten parameters, how many layers each kind of rewriting was undone in; "stream" counts as 1).

    Raises:
        DitError: the result would not compute the same logits, or what is left is as large as the base: another model,
            or a rewriting of another kind.
    """
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    before = _logits(params, config, tokens)
    undone: dict[str, int] = {"stream": int(_stream(params, base, config))}
    for name, undo in _IN_LAYERS.items():
        pairs = zip(layer_views(params, config), layer_views(base, config), strict=True)
        undone[name] = sum(undo(mine, theirs) for mine, theirs in pairs)
    undone["norms"] += int(_final_norm(params, base, config))
    after = _logits(params, config, tokens)
    if not np.abs(after - before).max() <= _TOLERANCE * np.abs(before).max():
        raise DitError(
            f"'{source}' cannot be aligned with the base: the result would compute other logits: drop --align"
        )
    left = _distance(params, base)
    if left > MOST_LEFT:
        raise DitError(
            f"'{source}' differs from the base by {100 * left:.0f} % of its norm, also after alignment: it is another "
            "model, or it was rewritten in a way that cannot be undone"
        )
    return params, {name: count for name, count in undone.items() if count}


def _logits(params: Any, config: DecoderConfig, tokens: Array) -> Array:
    plain = {"dtype": "float32", "scan_layers": True, "remat": "none", "attention": "xla"}
    return np.asarray(_run(params, dataclasses.replace(config, **plain), tokens))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="config")
def _run(params: Any, config: DecoderConfig, tokens: Any) -> jax.Array:
    return unembed(params, config, forward(params, config, tokens))


def _distance(params: Any, base: Any) -> float:
    """|M' − M| / |M| over all weights."""
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True))
    apart = sum(float(np.square(mine - np.asarray(own, np.float32)).sum()) for mine, own in leaves)
    return (
        apart / sum(float(np.square(np.asarray(own, np.float32)).sum()) for _, own in leaves)
    ) ** 0.5


def _keep_if_nearer(mine: list[Array], theirs: list[Array], changed: list[Array]) -> bool:
    """Writes `changed` over `mine` if that is a good deal nearer to `theirs`."""
    now = sum(float(np.square(a - b).sum()) for a, b in zip(mine, theirs, strict=True))
    then = sum(float(np.square(a - b).sum()) for a, b in zip(changed, theirs, strict=True))
    if not then < NEARER * now:
        return False
    for weights, new in zip(mine, changed, strict=True):
        weights[...] = new
    return True


# ------------------------------------------------------------------ the residual stream


def _stream(params: Any, base: Any, config: DecoderConfig) -> bool:
    """A rotation of the residual stream, or a permutation of its dimensions with signs."""
    mine = params["embed_tokens"]["embedding"]
    theirs = np.asarray(base["embed_tokens"]["embedding"], np.float64)
    turn, _ = orthogonal_procrustes(theirs, mine.astype(np.float64))  # theirs @ turn ≈ mine
    signed = np.sign(turn) * (np.abs(turn) > 0.5)
    is_permutation = np.array_equal(np.abs(signed).sum(0), np.ones(len(turn)))
    is_permutation &= np.array_equal(np.abs(signed).sum(1), np.ones(len(turn)))
    if is_permutation:
        turn = signed
    if not _keep_if_nearer([mine], [theirs], [mine @ turn.T]):
        return False
    if not is_permutation and (config.sandwich_norm or "lm_head" not in params):
        raise DitError(
            "the embeddings are those of the base in rotated axes, which the norms of this family do not allow: it is "
            "another model"
        )
    for layer, own in zip(layer_views(params, config), layer_views(base, config), strict=True):
        for norm, consumers in layer.consumers():
            kernels = [layer.kernel(name) for name in consumers]
            _turn_inputs(
                layer.norms[norm], own.norms[norm], kernels, turn, is_permutation, layer.offset
            )
        for name in ("o_proj", "down_proj"):
            layer.kernel(name)[...] = layer.kernel(name) @ turn.T
            if (bias := layer.bias(name)) is not None:
                bias[...] = bias @ turn.T
        for norm in layer.output_norms():
            layer.norms[norm][...] = np.abs(turn) @ layer.norms[norm]
    head = [params["lm_head"]["kernel"]] if "lm_head" in params else []
    offset = float(config.unit_offset_norm)
    scales = params["norm"]["scale"], np.asarray(base["norm"]["scale"])
    _turn_inputs(*scales, head, turn, is_permutation, offset)
    return True


def _turn_inputs(
    scale: Array, own: Array, kernels: list[Array], turn: Array, is_permutation: bool, offset: float
) -> None:
    """x' = x turn: what reads the stream through a norm reads it in the base's axes again."""
    if is_permutation:
        scale[...] = np.abs(turn) @ scale
        for kernel in kernels:
            kernel[...] = turn @ kernel
        return
    # Between the axes no scale commutes: all of it goes through the kernels, and the norm becomes the base's.
    factors = np.diag(1 / _nonzero(own + offset)) @ turn @ np.diag(scale + offset)
    for kernel in kernels:
        kernel[...] = factors @ kernel
    scale[...] = own


def _nonzero(scale: Array) -> Array:
    if not np.abs(scale).min() > 1e-6:
        raise DitError(
            "a norm of the base has a scale of zero: the finetuned model cannot be aligned with it"
        )
    return scale


# ------------------------------------------------------------------ inside a layer


def _norms(mine: LayerView, own: LayerView) -> bool:
    """Scales of norms that were folded into the products after them."""
    found = False
    for norm, consumers in mine.consumers():
        kernels = [mine.kernel(name) for name in consumers]
        found |= _unfold(
            mine.norms[norm],
            own.norms[norm],
            kernels,
            [own.kernel(name) for name in consumers],
            mine.offset,
        )
    return found


def _final_norm(params: Any, base: Any, config: DecoderConfig) -> bool:
    if "lm_head" not in params:
        return False
    scales = params["norm"]["scale"], np.asarray(base["norm"]["scale"])
    kernels = [params["lm_head"]["kernel"]], [np.asarray(base["lm_head"]["kernel"])]
    return _unfold(*scales, *kernels, float(config.unit_offset_norm))


def _unfold(
    scale: Array, own: Array, kernels: list[Array], theirs: list[Array], offset: float
) -> bool:
    usable = np.abs(own + offset) > 1e-6
    factor = np.where(usable, (scale + offset) / np.where(usable, own + offset, 1), 1)
    changed = [np.where(usable, own, scale), *(factor[:, None] * kernel for kernel in kernels)]
    return _keep_if_nearer([scale, *kernels], [own, *theirs], changed)


def _heads(mine: LayerView, own: LayerView) -> bool:
    """The order of KV groups, and of the query heads in each."""
    groups, per = own.groups, own.heads_per_group
    like = _head_similarity(mine, own).reshape(groups, per, groups, per)
    best = np.zeros((groups, groups))
    inner = {}
    for a in range(groups):
        for b in range(groups):
            rows, columns = linear_sum_assignment(like[a, :, b], maximize=True)
            best[a, b], inner[a, b] = like[a, rows, b, columns].sum(), columns
    _, order = linear_sum_assignment(best, maximize=True)  # own group a is my group order[a]
    heads = np.concatenate([order[a] * per + inner[a, order[a]] for a in range(groups)])
    if np.array_equal(heads, np.arange(len(heads))):
        return False
    mine.take_heads(order, heads)
    return True


def _head_similarity(mine: LayerView, own: LayerView) -> Array:
    """Cosine [own heads, my heads] of each head's v o product, which no choice of axes between them changes."""

    def parts(layer: LayerView) -> tuple[Array, Array]:
        v = layer.heads("v_proj").astype(np.float64)
        v = np.repeat(v, layer.heads_per_group, axis=1)  # [D, N, H]
        return v.transpose(1, 0, 2), layer.output_heads().astype(np.float64)  # [N, D, H], [N, H, D]

    (v, o), (v2, o2) = parts(own), parts(mine)

    def inner(va: Array, oa: Array, vb: Array, ob: Array) -> Array:
        left = np.einsum("adh,bdk->abhk", va, vb, optimize=True)
        right = np.einsum("ahd,bkd->abhk", oa, ob, optimize=True)
        return np.einsum("abhk,abhk->ab", left, right)

    norms = np.diag(inner(v, o, v, o))[:, None] * np.diag(inner(v2, o2, v2, o2))[None]
    return inner(v, o, v2, o2) / np.sqrt(np.maximum(norms, 1e-30))


def _values(mine: LayerView, own: LayerView) -> bool:
    """An invertible matrix between v and o of each KV group."""
    per, found = own.heads_per_group, False
    for group in range(own.groups):
        v, v_own = (layer.with_bias("v_proj", group) for layer in (mine, own))  # [D (+ 1), H]
        heads = slice(group * per, (group + 1) * per)
        o, o_own = (layer.output_heads()[heads] for layer in (mine, own))  # [per, H, D]
        try:
            back = _between(v, v_own, np.concatenate(list(o), 1), np.concatenate(list(o_own), 1))
            changed = [v @ back, np.linalg.solve(back, o)]
        except ValueError:  # no matrix with an inverse, such as of values that are all zero
            continue
        kept = [v.copy(), o.copy()]
        if _keep_if_nearer(kept, [v_own, o_own], changed):
            mine.set_with_bias("v_proj", group, kept[0])
            mine.set_output_heads(heads, kept[1])
            found = True
    return found


def _between(v: Array, v_own: Array, o: Array, o_own: Array) -> Array:
    """The matrix B with v B ≈ v_own and B⁻¹ o ≈ o_own: least squares of both, by Newton's method."""
    v, v_own, o, o_own = (x.astype(np.float64) for x in (v, v_own, o, o_own))
    back: Array = np.linalg.lstsq(v, v_own, rcond=None)[0]
    for _ in range(_SOLVER_STEPS):
        p, q = v @ back, np.linalg.solve(back, o)
        step = solve_sylvester(p.T @ p, q @ q.T, p.T @ (v_own - p) + (q - o_own) @ q.T)
        back = back @ (np.eye(len(back)) + step)
    return back


def _queries(mine: LayerView, own: LayerView) -> bool:
    """What q and k can exchange: a factor for each rotary pair, with its angle where no norm stands between."""
    if own.config.qk_norm:
        offset = mine.offset
        (q, q_own), (k, k_own) = (  # [2, H/2]
            (paired(mine.norms[n] + offset), paired(own.norms[n] + offset))
            for n in ("q_norm", "k_norm")
        )
        factor = _exchanged(q, q_own, k, k_own)
        scales = [mine.norms["q_norm"], mine.norms["k_norm"]]
        changed = [(q / factor).reshape(-1) - offset, (k * factor).reshape(-1) - offset]
        return _keep_if_nearer(scales, [own.norms["q_norm"], own.norms["k_norm"]], changed)
    per, found = own.heads_per_group, False
    for group in range(own.groups):
        heads = range(group * per, (group + 1) * per)
        q, q_own = (
            np.concatenate([complex_pairs(layer.with_bias("q_proj", head)) for head in heads])
            for layer in (mine, own)
        )
        k, k_own = (complex_pairs(layer.with_bias("k_proj", group)) for layer in (mine, own))
        ahead = (q_own.conj() * q).sum(0) / (np.abs(q_own) ** 2).sum(0)
        behind = (k_own.conj() * k).sum(0) / (np.abs(k_own) ** 2).sum(0)
        # q' = q z and k' = k / conj(z): both estimates of z, and of the two roots the one near the first.
        factor = np.sqrt(ahead / behind.conj())
        factor = np.where((factor * ahead.conj()).real < 0, -factor, factor)
        kept = [real_pairs(q), real_pairs(k)]
        changed = [real_pairs(q / factor), real_pairs(k * factor.conj())]
        if _keep_if_nearer(kept, [real_pairs(q_own), real_pairs(k_own)], changed):
            for part, head in zip(np.split(kept[0], per), heads, strict=True):
                mine.set_with_bias("q_proj", head, part)
            mine.set_with_bias("k_proj", group, kept[1])
            found = True
    return found


def _neurons(mine: LayerView, own: LayerView) -> bool:
    """The order of the MLP's neurons, and a factor between up and down of each."""
    like = np.zeros((own.config.intermediate_size,) * 2, np.float32)
    for name in ("gate_proj", "up_proj", "down_proj"):
        ours, theirs = (_rows(layer.neurons(name)) for layer in (mine, own))
        cosine = theirs @ ours.T
        # A factor between up and down may be negative.
        like += cosine if name == "gate_proj" else np.abs(cosine)
    order = like.argmax(1)  # own neuron i is my neuron order[i]
    if len(set(order)) < len(order):
        _, order = linear_sum_assignment(like, maximize=True)
    moved = not np.array_equal(order, np.arange(len(order)))
    if moved:
        mine.take_neurons(order)
    up, down = mine.kernel("up_proj"), mine.kernel("down_proj")
    up_own, down_own = own.kernel("up_proj"), own.kernel("down_proj")
    factor = _exchanged(up, up_own, down.T, down_own.T)
    changed = [up / factor, down * factor[:, None]]
    if not _keep_if_nearer([up, down], [up_own, down_own], changed):
        return moved
    if (bias := mine.bias("up_proj")) is not None:
        bias /= factor
    return True


def _exchanged(first: Array, first_own: Array, second: Array, second_own: Array) -> Array:
    """The factor c of each column with first ≈ c first_own and second ≈ second_own / c: from both, by least squares."""

    def times(x: Array, own: Array) -> Array:
        return (x * own).sum(0) / np.maximum((own * own).sum(0), 1e-30)  # type: ignore[no-any-return]

    ahead, behind = times(first, first_own), times(second, second_own)
    factor = np.sign(ahead) * np.sqrt(np.abs(ahead / np.where(behind == 0, 1, behind)))
    return np.where(factor == 0, 1, factor)


def _rows(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


# In this order: what is matched later needs what is undone earlier.
_IN_LAYERS: dict[str, Callable[[LayerView, LayerView], bool]] = {
    "norms": _norms,
    "heads": _heads,
    "values": _values,
    "queries": _queries,
    "neurons": _neurons,
}
