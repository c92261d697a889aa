"""Deltas: applied functionally = merged into the weights; any number at once; nothing leaks between rows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_qwen3 import TINY, dense, logits, random_lora

import dit_jax
from dit_jax.auditing.battery import noise_of
from dit_jax.deltas import tree
from dit_jax.deltas.factors import fuse, moments
from dit_jax.deltas.factors import modules as modules_of
from dit_jax.evaluate.token_lens import _output_directions
from dit_jax.models import delta_trees, modules
from dit_jax.models.decode import generate
from dit_jax.models.decoder import forward, init_params
from dit_jax.models.layers import Lora, lora


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 9), 0, TINY.vocab_size)


def test_applied_equals_merged_for_lora_dense_and_both(params, tokens):
    lora, other = random_lora(TINY, 1), random_lora(TINY, 2, rank=5)
    formed = dense(other)
    for deltas in [(lora,), (formed,), (lora, other), (lora, formed, other)]:
        merged = logits(tree.merge(params, *deltas), TINY, tokens)
        np.testing.assert_allclose(logits(params, TINY, tokens, deltas=deltas), merged, atol=2e-5)
    assert (
        np.abs(logits(params, TINY, tokens, deltas=(lora,)) - logits(params, TINY, tokens)).max()
        > 0.1
    )


def test_dense_deltas_reach_every_parameter(params, tokens):
    def rename(path, leaf):
        return 0.05 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape)

    changes = jax.tree_util.tree_map_with_path(rename, params)

    def as_delta(node):
        if not isinstance(next(iter(node.values())), dict):
            return {"w": next(iter(node.values()))}
        return {name: as_delta(child) for name, child in node.items()}

    delta = as_delta(changes)
    expected = logits(jax.tree.map(jnp.add, params, changes), TINY, tokens)
    np.testing.assert_allclose(logits(params, TINY, tokens, deltas=(delta,)), expected, atol=2e-5)
    np.testing.assert_allclose(logits(tree.merge(params, delta), TINY, tokens), expected, atol=2e-5)


def test_an_absent_delta_is_exactly_the_base(params, tokens):
    base = np.asarray(logits(params, TINY, tokens))
    np.testing.assert_array_equal(logits(params, TINY, tokens, deltas=({}, {"layers": {}})), base)
    fresh = tree.init_lora(TINY, jax.random.key(0), 4)
    np.testing.assert_array_equal(logits(params, TINY, tokens, deltas=(fresh,)), base)


def test_one_lora_per_example_equals_a_loop_and_rows_do_not_mix(params, tokens):
    diffs = [random_lora(TINY, s) for s in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *diffs)
    adapter = random_lora(TINY, 7, rank=4)
    together = logits(params, TINY, tokens, deltas=(tree.per_example(stacked), adapter))
    for row, diff in enumerate(diffs):
        alone = logits(params, TINY, tokens[row : row + 1], deltas=(diff, adapter))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    changed = jax.tree.map(lambda x: x.at[1].multiply(3.0), stacked)
    other = logits(params, TINY, tokens, deltas=(tree.per_example(changed), adapter))
    np.testing.assert_array_equal(other[0], together[0])
    np.testing.assert_array_equal(other[2], together[2])
    assert np.abs(other[1] - together[1]).max() > 1e-3


def test_vmap_over_diffs_equals_a_loop(params, tokens):
    diffs = [random_lora(TINY, s) for s in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *diffs)
    mapped = jax.vmap(lambda diff: logits(params, TINY, tokens, deltas=(diff,)))(stacked)
    for out, diff in zip(mapped, diffs, strict=True):
        np.testing.assert_allclose(out, logits(params, TINY, tokens, deltas=(diff,)), atol=1e-5)


def test_concatenated_along_the_rank_is_the_sum(params, tokens):
    diff, adapter = random_lora(TINY, 1), random_lora(TINY, 2, rank=5)
    fused = fuse(diff, adapter)
    expected = logits(params, TINY, tokens, deltas=(diff, adapter))
    np.testing.assert_allclose(logits(params, TINY, tokens, deltas=(fused,)), expected, atol=1e-5)
    assert fused["layers"]["mlp"]["up_proj"]["a"].shape[-1] == 7


def test_noise_has_the_norms_of_the_diff_and_nothing_else_of_it():
    diff = random_lora(TINY, 1)
    size = np.arange(1.0, 1 + TINY.num_hidden_layers)[:, None]
    diff["layers"]["input_layernorm"] = {"w": jnp.asarray(size) * jnp.ones((1, TINY.hidden_size))}
    diff["norm"] = {"w": jnp.ones(TINY.hidden_size)}
    noise = tree.noise_like(diff, jax.random.key(3))

    def compare(path, module):
        other = noise
        for name in path:
            other = other[name]
        layers = TINY.num_hidden_layers if path[0] == "layers" else 1
        for factor in module.keys() - {"scale"}:
            one, two = (np.asarray(x[factor]).reshape(layers, -1) for x in (module, other))
            np.testing.assert_allclose(
                np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1), rtol=1e-5
            )
            cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
            assert np.abs(cosine).max() < 0.6
        return module

    delta_trees.map_modules(compare, diff)


@pytest.mark.parametrize("shift", [1e-25, 1.0, 1e22])
def test_readings_do_not_hang_on_the_sizes_of_factors_whose_product_is_the_same(shift):
    """Squares of float32 overflow and vanish."""
    diff = jax.tree.map(np.asarray, random_lora(TINY, 1, rank=1))

    def change(_, module):
        a, b = module["a"] * np.float32(shift), module["b"] / np.float32(shift)
        return {**module, "a": a, "b": b}

    shifted = delta_trees.map_modules(change, diff)
    for of_diff, of_shifted in zip(
        (*modules_of(noise_of([diff], 3).read(0)), *modules_of(diff)),
        (*modules_of(noise_of([shifted], 3).read(0)), *modules_of(shifted)),
        strict=True,
    ):
        one, two = ({**module} for _, module in (of_diff, of_shifted))
        np.testing.assert_allclose(two["a"] / np.float32(shift), one["a"], rtol=1e-4)
        np.testing.assert_allclose(two["b"] * np.float32(shift), one["b"], rtol=1e-4)
        np.testing.assert_allclose(_output_directions(two), _output_directions(one), rtol=1e-4)
    matrices = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    squares, fourths = moments({"w": matrices}, True)
    large = moments({"w": matrices * np.float32(shift)}, True)
    np.testing.assert_allclose(large[0], squares * shift**2, rtol=1e-4)
    np.testing.assert_allclose(large[1], fourths * shift**4, rtol=1e-4)


def test_noise_in_half_precision_has_its_size():
    """Of so many numbers the sum of squares is beyond float16."""
    diff = {"norm": {"w": jnp.full(100_000, 2.0, jnp.float16)}}
    noise = np.asarray(tree.noise_like(diff, jax.random.key(0))["norm"]["w"], np.float32)
    np.testing.assert_allclose(np.sqrt((noise**2).mean()), 2.0, rtol=1e-2)


def test_unknown_projections_and_ranks_are_refused():
    with pytest.raises(dit_jax.DitError, match="'q_porj'"):
        tree.init_lora(TINY, jax.random.key(0), 1, projections=("q_porj",))
    with pytest.raises(dit_jax.DitError, match="rank"):
        tree.init_lora(TINY, jax.random.key(0), 0)


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


PROJECTION = random_lora(TINY, 1)["layers"]["mlp"]["up_proj"]
NOT_OF_THE_MODEL = {
    "a misspelt module": (nested("layers.mlpp.up_proj", PROJECTION), "layers.mlpp.up_proj"),
    "without `layers`": (nested("mlp.up_proj", PROJECTION), "mlp.up_proj"),
    "a head of another shape": (nested("lm_head.w", np.zeros((97, 32))), "lm_head has the shapes"),
    "a LoRA of a norm": (nested("layers.input_layernorm", PROJECTION), "layers.input_layernorm"),
    "too few layers": (
        nested("layers.mlp.up_proj", jax.tree.map(lambda x: x[:2], PROJECTION)),
        "layers.mlp.up_proj has the shapes",
    ),
    "another width": (nested("norm.w", np.zeros(31, np.float32)), "norm has the shapes"),
    "one per example of another batch": (
        nested("layers.mlp.up_proj", jax.tree.map(lambda x: jnp.stack([x] * 2, 1), PROJECTION)),
        "layers.mlp.up_proj has the shapes",
    ),
    "no scale": (tree.trainable(random_lora(TINY, 1)), "has no `scale`"),
    "a number": (nested("norm.w", 1), "norm"),
    "an array": (np.zeros(3, np.float32), "a delta is a dict of modules"),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("what", NOT_OF_THE_MODEL)
def test_a_delta_that_is_not_one_of_the_model_is_refused(params, tokens, what, scan):
    """If it were silently left out, its answers would be those of the base."""
    config = dataclasses.replace(TINY, scan_layers=scan)
    delta, message = NOT_OF_THE_MODEL[what]
    with pytest.raises(dit_jax.DitError, match=re.escape(message)):
        forward(params, config, tokens, deltas=(random_lora(TINY, 2), delta))
    with pytest.raises(dit_jax.DitError, match=re.escape(message)):
        mask = jnp.ones_like(tokens, bool)
        generate(params, config, tokens, mask, deltas=(delta,), max_new_tokens=2)


def test_checking_a_delta_takes_its_shapes_alone(params):
    """Programs can then be compiled ahead, and a wrong delta costs no computation."""
    lower = jax.jit(lambda p, t, d: forward(p, TINY, t, deltas=(d,))).lower
    shapes = jax.eval_shape(lambda: random_lora(TINY, 1))
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    lower(params, tokens, shapes)
    with pytest.raises(dit_jax.DitError, match="no `scale`"):
        lower(params, tokens, tree.trainable(shapes))


def test_the_backward_pass_of_a_lora_is_that_of_its_products():
    """The hand-written backward pass against the one that jax derives from the plain products."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, wanted = jax.random.normal(keys[0], (3, 5, 8)), jax.random.normal(keys[1], (3, 5, 6))
    shared = jax.random.normal(keys[2], (8, 2)), jax.random.normal(keys[3], (2, 6)), None
    scale = jax.random.normal(keys[4], (3,))
    each = *(jnp.stack([y, -y, 2 * y]) for y in shared[:2]), scale

    def applied(x, a, b, scale):
        return jnp.sum(wanted * lora(x, Lora(a, b, scale), (None, None), 1))

    def plain(x, a, b, scale):
        return jnp.sum(wanted * (x @ a @ b) * (1 if scale is None else scale[:, None, None]))

    for factors, argnums in ((shared, (0, 1, 2)), (each, (0, 1, 2, 3))):
        found, expected = (jax.grad(f, argnums)(x, *factors) for f in (applied, plain))
        for one, two in zip(found, expected, strict=True):
            assert float(jnp.abs(two).max()) > 1
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_a_fresh_lora_has_the_published_bounds():
    """b is uniform in ±sqrt(6 / fan_in), where fan_in is rank · out for a diff and the rank for the adapter."""
    bound = {"out": (6 / (4 * 48)) ** 0.5, "rank": (6 / 4) ** 0.5}
    for fan_in, size in (("out", 1.0), ("rank", 1.0), ("out", 0.3)):
        delta = tree.init_lora(TINY, jax.random.key(0), 4, fan_in=fan_in, init_scale=size)
        module = delta["layers"]["mlp"]["up_proj"]
        largest = size * bound[fan_in]
        assert 0.97 * largest < np.abs(module["b"]).max() <= largest
        assert abs(float(module["b"].mean())) < 0.1 * largest and not module["a"].any()
        np.testing.assert_array_equal(module["scale"], 1 / 4)
    ends = sum(sum(module.shape) for module in modules.projections(TINY).values())
    assert tree.num_parameters(delta) == TINY.num_hidden_layers * 4 * ends  # without the scales
    # Each projection draws its own numbers.
    b = delta["layers"]["self_attn"]
    assert not np.array_equal(b["k_proj"]["b"], b["v_proj"]["b"])
