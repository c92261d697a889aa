"""Sharded programs on 8 virtual devices: the numbers of one device, and the shardings they are meant to have."""

import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import dit_jax
from dit_jax import parallel, shardings
from dit_jax.api import Model, answer_batch
from dit_jax.data.batch import Sample, TokenBatch, pack
from dit_jax.deltas import store, tree
from dit_jax.models.config import Qwen3Config
from dit_jax.models.qwen3 import init_params
from dit_jax.train import dit

# 4 heads that share 2 keys and values: a tensor axis of 4 splits the heads and leaves keys and values whole.
SMALL = Qwen3Config(96, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
# 8 heads of each kind, and a head of its own: everything splits 8 ways.
WIDE = Qwen3Config(96, 32, 64, 2, 8, 8, 4)
MESHES = [
    (SMALL, (8, 1, 1)),
    (SMALL, (1, 8, 1)),
    (SMALL, (2, 2, 2)),
    (SMALL, (1, 2, 4)),
    (WIDE, (1, 1, 8)),
]
NAMES = ["8-1-1", "1-8-1", "2-2-2", "1-2-4", "wide-1-1-8"]
RATE, STEPS = 1e-2, 4
TOLERANCE = max(1e-3 * RATE, 1e-5)
TRAIN = ConfigDict(
    {
        "optimizer": "adamw", "learning_rate": RATE, "steps": STEPS, "warmup_steps": 1, "final_fraction": 0.1,
        "weight_decay": 0.01, "rank": 4, "projections": tree.PROJECTIONS, "batch_size": 6,
        "max_length": 12, "max_target": 6,
    }
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Which collectives a program has does not depend on the optimizations that this leaves out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(shape):
    return shape and parallel.make_mesh(dict(zip(parallel.MESH_AXES, shape, strict=True)))


@functools.cache
def host_params(config):
    params = init_params(config, jax.random.key(0))
    # Larger than the usual initialisation, so that the base has something to say.
    return jax.device_get(jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params))


def params_on(config, mesh):
    if mesh is None:
        return host_params(config)
    return jax.tree.map(parallel.put, host_params(config), shardings.param_shardings(config, mesh))


def random_batch(config, count, seed, weights=None):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        size = int(rng.integers(6, 12))
        ids = tuple(int(i) for i in rng.integers(1, config.vocab_size, size))
        samples.append(Sample(ids, size - int(rng.integers(2, 5)), size))
    return pack(samples, weights or [1 / count] * count, 12, 6, pad_id=0)


def random_deltas(config, count, seed, rank=2):
    rng = np.random.default_rng(seed)
    start = jax.eval_shape(lambda: tree.init_lora(config, jax.random.key(0), rank))
    return jax.tree.map(
        lambda x: (0.1 * rng.standard_normal((count, *x.shape))).astype(np.float32), start
    )


# ------------------------------------------------------------------ one program for each workload


@functools.cache
def adapter_run(config, shape):
    """(losses, trained factors) of STEPS adapter steps on 6 examples, each with a diff of its own."""
    mesh = mesh_of(shape)
    params = params_on(config, mesh)
    adapter = tree.init_lora(config, jax.random.key(1), TRAIN.rank)
    optimizer = dit.make_optimizer("adamw", RATE, STEPS, warmup_steps=1, weight_decay=0.01)
    leaves = tree.trainable(adapter)
    state = dit.State(leaves, optimizer.init(leaves))
    if mesh is not None:
        split = dit.state_shardings(config, mesh, optimizer, state)
        state = jax.tree.map(parallel.put, state, split)
        adapter = shardings.put_delta(config, mesh, adapter)
    size = parallel.round_up(6, mesh)
    losses = []
    for step in range(STEPS):
        padding = lambda x: np.pad(x, ((0, size - 6), *((0, 0),) * (x.ndim - 1)))  # noqa: E731
        batch = TokenBatch(*map(padding, random_batch(config, 6, step)))
        diffs = tree.per_example(jax.tree.map(padding, random_deltas(config, 6, step)))
        batch = parallel.put_rows(batch, mesh, size)
        diffs = shardings.put_deltas(config, mesh, diffs, size, 1)
        with parallel.use_mesh(mesh):
            state, metrics = dit.train_step(
                params, config, state, adapter, diffs, batch, optimizer=optimizer
            )
        losses.append(float(metrics["loss"]))
    if mesh is not None:
        for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(split), strict=True):
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    return losses, jax.device_get(state.leaves)


@pytest.mark.parametrize(("config", "shape"), MESHES, ids=NAMES)
def test_the_adapter_trains_as_on_one_device(config, shape):
    losses, leaves = adapter_run(config, shape)
    expected_losses, expected = adapter_run(config, None)
    assert len(set(expected_losses)) == STEPS and np.isfinite(expected_losses).all()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(leaves), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=TOLERANCE, rtol=0)


@functools.cache
def answers(config, shape):
    """Greedy answers to 7 questions in batches of 3, each with a diff of its own, under one adapter."""
    mesh = mesh_of(shape)
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, config.vocab_size, (7, 9))
    mask = np.arange(9) >= rng.integers(0, 5, (7, 1))
    chat = types.SimpleNamespace(
        prompts=lambda questions: (tokens, mask), eos_ids=(3,), pad_id=0, decode=str
    )
    model = Model(params_on(config, mesh), config, "test", chat, mesh)
    (adapter,) = (jax.tree.map(lambda x: x[0], random_deltas(config, 1, 8, rank=4)),)
    return answer_batch(
        model,
        [""] * 7,
        deltas=(adapter,),
        stacked=random_deltas(config, 4, 9),
        rows=[0, 1, 2, 3, 0, 1, 2],
        max_new_tokens=6,
        batch_size=3,
        forbid_repeats=True,
    )


@pytest.mark.parametrize(("config", "shape"), MESHES, ids=NAMES)
def test_greedy_answers_are_those_of_one_device(config, shape):
    found, expected = answers(config, shape), answers(config, None)
    assert len({answer.tokens for answer in expected}) == 7
    for one, two in zip(found, expected, strict=True):
        assert one.tokens == two.tokens
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)


# ------------------------------------------------------------------ the table

GOLDEN = {
    "embed_tokens.embedding": P("tensor", "fsdp"),
    "layers.input_layernorm.scale": P(None, None),
    "layers.mlp.down_proj.kernel": P(None, "tensor", "fsdp"),
    "layers.mlp.gate_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.mlp.up_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.post_attention_layernorm.scale": P(None, None),
    "layers.self_attn.k_norm.scale": P(None, None),
    "layers.self_attn.k_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.self_attn.o_proj.kernel": P(None, "tensor", "fsdp"),
    "layers.self_attn.q_norm.scale": P(None, None),
    "layers.self_attn.q_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.self_attn.v_proj.kernel": P(None, "fsdp", "tensor"),
    "lm_head.kernel": P("fsdp", "tensor"),
    "norm.scale": P(None),
}


def specs(tree_of_shardings):
    return {name: leaf.spec for name, leaf in store.flatten(tree_of_shardings).items()}


def test_every_parameter_has_its_sharding():
    assert specs(shardings.param_shardings(WIDE, mesh_of((2, 2, 2)))) == GOLDEN
    tied = {name: spec for name, spec in GOLDEN.items() if not name.startswith("lm_head")}
    assert specs(shardings.param_shardings(SMALL, mesh_of((2, 2, 2)))) == tied


def test_what_does_not_divide_stays_whole():
    found = specs(shardings.param_shardings(SMALL, mesh_of((1, 2, 4))))
    assert found["layers.self_attn.q_proj.kernel"] == P(None, "fsdp", "tensor")
    # 2 heads of keys and values on 4 devices: a head is never cut, though its 16 numbers would divide.
    assert found["layers.self_attn.k_proj.kernel"] == P(None, "fsdp", None)


def test_a_device_holds_its_part_alone():
    params = params_on(SMALL, mesh_of((2, 2, 2)))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 24)}
    np.testing.assert_array_equal(kernel, host_params(SMALL)["layers"]["mlp"]["up_proj"]["kernel"])


def test_deltas_follow_the_parameters_that_they_change():
    mesh = mesh_of((2, 2, 2))
    one = jax.tree.map(lambda x: x[0], random_deltas(SMALL, 1, 0))
    shared = specs(shardings.delta_shardings(SMALL, mesh, one))
    assert shared["layers.self_attn.q_proj.a"] == P(None, "fsdp", None)
    assert shared["layers.self_attn.q_proj.b"] == P(None, None, "tensor")
    assert shared["layers.mlp.down_proj.a"] == P(None, "tensor", None)
    assert shared["layers.mlp.down_proj.b"] == P(None, None, "fsdp")
    rows = ("data", "fsdp")
    stacked = specs(shardings.delta_shardings(SMALL, mesh, random_deltas(SMALL, 4, 0), 0))
    assert stacked["layers.self_attn.q_proj.a"] == P(rows, None, None, None)
    assert stacked["layers.self_attn.q_proj.b"] == P(rows, None, None, "tensor")
    each = tree.per_example(random_deltas(SMALL, 4, 0))
    each = specs(shardings.delta_shardings(SMALL, mesh, each, 1))
    assert each["layers.mlp.down_proj.a"] == P(None, rows, "tensor", None)
    assert each["layers.mlp.down_proj.scale"] == P(None, rows)
    dense = {
        "layers": {"input_layernorm": {"w": np.zeros((2, 32))}},
        "embed_tokens": {"w": np.zeros((96, 32))},
    }
    found = specs(shardings.delta_shardings(SMALL, mesh, dense))
    assert found == {
        "layers.input_layernorm.w": P(None, None),
        "embed_tokens.w": P("tensor", "fsdp"),
    }


def test_two_axes_of_an_array_cannot_share_a_mesh_axis():
    mesh = mesh_of((2, 2, 2))
    for axes in (("batch", "embed"), ("heads", "mlp"), ("vocab", None, "kv_heads")):
        with pytest.raises(ValueError, match="both use"):
            parallel.spec(mesh, axes)
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        parallel.spec(mesh, ("head",))


# ------------------------------------------------------------------ the mesh


def test_minus_1_is_what_is_left():
    assert parallel.mesh_shape({"data": -1, "fsdp": 2, "tensor": 2}, 16) == (4, 2, 2)
    assert parallel.mesh_shape({"tensor": -1}, 8) == (1, 1, 8)
    assert dict(mesh_of((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh_of((1, 1, 1)) is None


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": -1, "fsdp": 3}, "data -1 × fsdp 3 × tensor 1 does not divide 8 devices"),
        ({"data": 16}, "does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "positive"),
        ({"modle": 2}, "unknown mesh axis 'modle'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, said):
    with pytest.raises(dit_jax.DitError, match=said):
        parallel.make_mesh(sizes)


def test_uneven_batches_are_rounded_up_and_come_back():
    mesh = mesh_of((2, 2, 2))
    assert parallel.round_up(5, mesh) == 8 and parallel.round_up(8, mesh) == 8
    assert parallel.round_up(5, None) == 5
    assert parallel.local_rows(mesh, 8) == list(range(8))
    rows = np.arange(24.0).reshape(3, 8)
    there = parallel.put_rows({"x": rows}, mesh, 8, axis=1)["x"]
    assert there.sharding.spec == P(None, ("data", "fsdp"))
    np.testing.assert_array_equal(parallel.to_host(there), rows)
