"""Sharded programs on 8 virtual devices have the numbers of one device and the intended shardings."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax import api, asking
from dit_jax.api import Model
from dit_jax.asking import answer_batch
from dit_jax.data.batch import Sample, TokenBatch, pack, stack
from dit_jax.deltas import tree
from dit_jax.errors import DitError
from dit_jax.models import decode as generate
from dit_jax.models import modules, shardings
from dit_jax.models.decoder import forward, init_params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms import generate as generate_diffs
from dit_jax.organisms.finetune import finetune_many
from dit_jax.organisms.gate import base_divergence
from dit_jax.organisms.teacher import make_teacher
from dit_jax.runtime import parallel
from dit_jax.train import dit
from dit_jax.train.checkpoints import Checkpoints

# 8 heads that share 2 keys and values: a tensor axis of 8 splits the heads and leaves keys and values whole.
SMALL = DecoderConfig(96, 32, 48, 2, 8, 2, 4)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
RATE, STEPS = 1e-3, 4
TOLERANCE = max(1e-3 * RATE, 1e-5)
TRAIN = ConfigDict(
    {
        "optimizer": "adamw", "learning_rate": RATE, "steps": STEPS, "warmup_steps": 1, "final_fraction": 0.1,
        "weight_decay": 0.01, "rank": 4, "projections": modules.PROJECTIONS, "batch_size": 6,
        "max_length": 12, "max_target": 6,
    }
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Leaves out optimizations on which the collectives of a program do not depend."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(shape):
    return shape and parallel.make_mesh(dict(zip(parallel.MESH_AXES, shape, strict=True)))


@functools.cache
def host_params(config):
    params = init_params(config, jax.random.key(0))
    # Larger than the usual initialisation, so that the base prefers some tokens.
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
    """Stacked LoRAs that change the answers: unlike in `init_lora`, no factor is zero."""
    rng = np.random.default_rng(seed)
    start = tree.abstract_lora(config, rank)

    def fill(path, leaf):
        shape = (count, *leaf.shape)
        if path[-1].key == "scale":
            return np.full(shape, 1 / rank, np.float32)
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, start)


def only(stacked):
    return jax.tree.map(lambda x: x[0], stacked)


# ------------------------------------------------------------------ one program for each workload


@functools.cache
def adapter_run(shape, attention="xla"):
    """(losses, trained factors, lowered program, compiled HLO) of STEPS steps on 6 examples, each with a diff of
    its own."""
    mesh = mesh_of(shape)
    config = dataclasses.replace(SMALL, attention=attention)
    params = params_on(SMALL, mesh)
    adapter = jax.tree.map(jnp.asarray, only(random_deltas(SMALL, 1, 1, TRAIN.rank)))
    optimizer = dit.make_optimizer(
        "adamw", RATE, STEPS, warmup_steps=1, final_fraction=0.1, weight_decay=0.01
    )
    leaves = tree.trainable(adapter)
    state = dit.State(leaves, optimizer.init(leaves))
    if mesh is not None:
        split = dit.state_shardings(SMALL, mesh, state)
        state = jax.tree.map(parallel.put, state, split)
        adapter = shardings.put_delta(SMALL, mesh, adapter)
    size = parallel.round_up(6, mesh)
    losses, lowered, compiled = [], "", None
    for step in range(STEPS):
        padding = lambda x: np.pad(x, ((0, size - 6), *((0, 0),) * (x.ndim - 1)))  # noqa: E731
        batch = TokenBatch(*map(padding, random_batch(SMALL, 6, step)))
        diffs = tree.per_example(jax.tree.map(padding, random_deltas(SMALL, 6, step)))
        batch = parallel.put_rows(batch, mesh, size)
        diffs = shardings.put_deltas(SMALL, mesh, diffs, size, 1)
        args = (params, config, state, adapter, diffs, batch)
        with parallel.use_mesh(mesh):
            if compiled is None:
                program = dit.train_step.lower(*args, optimizer=optimizer)
                lowered, compiled = program.as_text(), program.compile()
            state, metrics = compiled(params, state, adapter, diffs, batch)
        losses.append(float(metrics["loss"]))
    if mesh is not None:
        for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(split), strict=True):
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    return losses, jax.device_get(state.leaves), lowered, compiled.as_text()


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_adapter_trains_as_on_one_device(shape):
    losses, leaves, *_ = adapter_run(shape)
    expected_losses, expected, *_ = adapter_run(None)
    assert len(set(expected_losses)) == STEPS and np.isfinite(expected_losses).all()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(leaves), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=TOLERANCE, rtol=0)


def test_on_one_device_a_delta_is_put_once_and_training_from_it_compiles_once():
    host = only(random_deltas(SMALL, 1, 1, TRAIN.rank))
    before = jax.tree.map(np.copy, host)
    adapter = shardings.put_delta(SMALL, None, host)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapter))
    again = shardings.put_delta(SMALL, None, adapter)
    for one, two in zip(jax.tree.leaves(adapter), jax.tree.leaves(again), strict=True):
        assert one.unsafe_buffer_pointer() == two.unsafe_buffer_pointer()
    params = jax.tree.map(jnp.asarray, host_params(SMALL))
    optimizer = optax.adam(RATE)
    leaves = tree.trainable(adapter)
    state = dit.State(leaves, optimizer.init(leaves))
    programs = dit.train_step._cache_size()
    for step in range(3):
        diffs = shardings.put_deltas(
            SMALL, None, tree.per_example(random_deltas(SMALL, 6, step)), 6, 1
        )
        batch = random_batch(SMALL, 6, step)
        state, _ = dit.train_step(params, SMALL, state, host, diffs, batch, optimizer=optimizer)
    assert dit.train_step._cache_size() == programs + 1
    # The donated state shares its memory with the host's arrays, which must stay unchanged.
    assert jax.tree.all(jax.tree.map(np.array_equal, host, before))


DIFFS = 6
OPTIMIZER = make_optimizer("adam", RATE, STEPS, final_fraction=0.1)


@functools.cache
def diffs_run(shape, attention="xla"):
    """(losses, trained diffs, lowered program, compiled HLO) of DIFFS finetunes at once: two samples with
    cross-entropy, two with KL."""
    mesh = mesh_of(shape)
    config = dataclasses.replace(SMALL, attention=attention)
    params = params_on(SMALL, mesh)
    size = parallel.round_up(DIFFS, mesh)
    own = [i % DIFFS for i in range(size)]
    batches = stack(
        [stack([random_batch(SMALL, 4, 10 * i + step) for step in range(STEPS)]) for i in own]
    )
    deltas = jax.tree.map(lambda x: x[np.array(own)], random_deltas(SMALL, DIFFS, 7))
    deltas = shardings.put_deltas(SMALL, mesh, deltas, size, 0)
    batches = parallel.put_rows(batches, mesh, size)
    with parallel.use_mesh(mesh):
        options = {"optimizer": OPTIMIZER, "num_ce": 2, "widths": ((12, 6),) * 4}
        lowered = finetune_many.lower(params, config, deltas, batches, **options)
        compiled = lowered.compile()
        trained, losses = compiled(params, deltas, batches)
    if mesh is not None:
        for leaf, want in zip(
            jax.tree.leaves(trained),
            jax.tree.leaves(shardings.delta_shardings(SMALL, mesh, trained, 0)),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    losses, trained = jax.tree.map(lambda x: x[:DIFFS], jax.device_get((losses, trained)))
    return losses, trained, lowered.as_text(), compiled.as_text()


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_diffs_train_as_on_one_device(shape):
    losses, trained, *_ = diffs_run(shape)
    expected_losses, expected, *_ = diffs_run(None)
    for name in ("ce", "kl"):
        assert (expected_losses[name] > 0).all()
        # A KL of 0.007 is a difference of sums near 1, and carries their rounding.
        np.testing.assert_allclose(losses[name], expected_losses[name], rtol=1e-4, atol=2e-6)
    for one, two in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 1, 8)], ids=str)
def test_the_tpu_kernel_trains_as_plain_attention_does(shape, interpreted_splash):
    """On (1, 1, 8) the heads of keys and values cannot be split, so plain attention is computed."""
    for run in (adapter_run, diffs_run):
        losses, trained, *_, compiled = run(shape, "splash")
        expected_losses, expected, *_ = run(None)
        assert ("splash" in compiled) == (shape != (1, 1, 8))
        for one, two in zip(*map(jax.tree.leaves, (losses, expected_losses)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-6)
        for one, two in zip(*map(jax.tree.leaves, (trained, expected)), strict=True):
            np.testing.assert_allclose(one, two, atol=TOLERANCE, rtol=0)


def test_the_tpu_kernel_measures_divergence_and_takes_what_does_not_divide(interpreted_splash):
    batches = stack([random_batch(SMALL, 3, seed) for seed in range(4)])
    deltas = random_deltas(SMALL, 4, 7)
    found = []
    for shape, attention in ((None, "xla"), ((2, 2, 2), "splash")):
        mesh, config = mesh_of(shape), dataclasses.replace(SMALL, attention=attention)
        params = params_on(SMALL, mesh)
        with parallel.use_mesh(mesh):
            divergence = base_divergence(params, config, deltas, batches)
            one_row = jax.jit(forward, static_argnums=1)(params, config, batches.tokens[0, :1])
        found.append(jax.device_get((divergence, one_row)))
    assert found[0][0].min() > 0.02
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_labels_at_padding_need_plain_attention(tmp_path):
    model = Model(host_params(SMALL), dataclasses.replace(SMALL, attention="splash"), "small")
    train = ConfigDict({"reference_labels": True})
    with pytest.raises(DitError, match="set model.attention to 'xla'"):
        dit.train_adapter(model, tmp_path, train, tmp_path, 0)


def test_the_table_of_the_teacher_is_that_of_one_device():
    batches = stack([stack([random_batch(SMALL, 4, 0)] * 8)] * 4)  # everything repeats
    mesh = mesh_of((2, 2, 2))
    sharded = make_teacher(params_on(SMALL, mesh), SMALL, batches, 2, mesh=mesh)
    expected = make_teacher(host_params(SMALL), SMALL, batches, 2)
    np.testing.assert_array_equal(sharded.rows, expected.rows)
    np.testing.assert_allclose(sharded.hidden, expected.hidden, atol=1e-5)
    assert sharded.hidden.is_fully_replicated


# ------------------------------------------------------------------ what the compiled programs do

DIFF_SECTION = ConfigDict(
    {
        "behaviour": "hidden_topic", "fake_codes": 0, "diffs_per_batch": DIFFS, "steps": STEPS, "rank": 2,
        "samples_per_step": {"backdoor": 2, "fake_backdoor": 1, "no_backdoor": 1},
        "projections": modules.PROJECTIONS, "max_length": 12, "max_target": 6, "optimizer": "adam",
        "learning_rate": RATE, "warmup_steps": 0, "final_fraction": 0.1, "adam_betas": (0.9, 0.999),
    }
)  # fmt: skip


def collectives(hlo):
    """[(kind, shapes of its results, where in the program)] of a compiled program."""
    found = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\((.*)", hlo)
    where = lambda rest: (re.findall(r'op_name="([^"]*)"', rest) or [""])[0]  # noqa: E731
    return [
        (kind, re.findall(r"\w+\[([\d,]*)\]", shapes), where(rest)) for shapes, kind, rest in found
    ]


# On (2, 2, 2) one layer of the base (or the embedding) is gathered at a time, split over tensor; diffs never are.
KERNELS = {"1,32,16", "1,32,4", "1,16,32", "1,32,24", "1,24,32", "48,32", "32,48"}


def gathered_and_reduced(hlo):
    """(shapes of everything that is gathered, places of sums) of a program without other collectives."""
    found = collectives(hlo)
    assert {kind for kind, *_ in found} == {"all-gather", "all-reduce"}
    gathered = {shape for kind, shapes, _ in found if kind == "all-gather" for shape in shapes}
    return gathered, " ".join(where for kind, _, where in found if kind == "all-reduce")


def test_diff_generation_splits_the_base_and_keeps_the_diffs_apart():
    gathered, reduced = gathered_and_reduced(diffs_run((2, 2, 2))[-1])
    assert gathered and gathered <= KERNELS
    # Row-parallel products are summed over tensor: a program that was never split has none of these.
    assert "o_proj" in reduced and "down_proj" in reduced


def test_no_diff_needs_another_one():
    assert not collectives(diffs_run((8, 1, 1))[-1])


@functools.cache
def asking_program(shape):
    mesh = mesh_of(shape)
    args, options = generate.abstract_arguments(
        SMALL, mesh, 3, 9, 6, tree.abstract_lora(SMALL, 2), tree.abstract_lora(SMALL, 4)
    )
    with parallel.use_mesh(mesh):
        return generate.generate.lower(*args, **options).compile()


def test_training_and_asking_split_the_base_and_keep_the_diffs_apart():
    adapter, answers = {"1,32,4", "1,4,32"}, {"4", "4,6", "1,2"}
    gathered, reduced = gathered_and_reduced(adapter_run((2, 2, 2))[-1])
    assert gathered and gathered <= KERNELS | adapter
    assert "o_proj" in reduced and "down_proj" in reduced
    gathered, reduced = gathered_and_reduced(asking_program((2, 2, 2)).as_text())
    assert gathered and gathered <= KERNELS | adapter | answers
    assert "o_proj" in reduced and "down_proj" in reduced
    # Examples meet only in the adapter's gradient.
    assert {kind for kind, *_ in collectives(adapter_run((8, 1, 1))[-1])} == {"all-reduce"}


def test_the_base_is_one_product_over_all_diffs():
    *_, lowered, _ = diffs_run((2, 2, 2))
    products = re.findall(r"stablehlo\.dot_general (.*)", lowered)
    kernels = ("32x32", "32x8", "32x48", "48x32")  # q and o, k and v, gate and up, down
    base = [line for line in products if re.search(rf", tensor<({'|'.join(kernels)})xf32>", line)]
    assert len(base) >= 14  # seven of the teacher, seven of the student, and the backward pass
    assert not any("batching_dims" in line for line in base)


def test_planning_compiles_the_programs_that_run():
    mesh = mesh_of((2, 2, 2))
    args, options = generate_diffs.abstract_step(SMALL, mesh, DIFF_SECTION)
    with parallel.use_mesh(mesh):
        assert finetune_many.lower(*args, **options).as_text() == diffs_run((2, 2, 2))[2]
        args, options = dit.abstract_step(SMALL, mesh, TRAIN, tree.abstract_lora(SMALL, 2))
        assert dit.train_step.lower(*args, **options).as_text() == adapter_run((2, 2, 2))[2]
    results = jax.tree.leaves(asking_program((2, 2, 2)).output_shardings)
    assert all(leaf.is_fully_replicated for leaf in results)


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_comes_back_on_another_mesh(tmp_path):
    adapter = only(random_deltas(SMALL, 1, 3))
    for shape, other in ((None, (2, 2, 2)), ((2, 2, 2), (1, 1, 8)), ((1, 1, 8), None)):
        saved, like = (
            jax.tree.map(jnp.asarray, shardings.put_delta(SMALL, mesh_of(x), adapter))
            for x in (shape, other)
        )
        checkpoints = Checkpoints(tmp_path / str(other))
        checkpoints.save(1, saved, {"next": 5})
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path / str(other))
        step, state, iterator = checkpoints.restore(jax.tree.map(jnp.zeros_like, like))
        checkpoints.close()
        assert (step, iterator) == (1, {"next": 5})
        for found, want, value in zip(*map(jax.tree.leaves, (state, like, adapter)), strict=True):
            assert found.sharding.is_equivalent_to(want.sharding, found.ndim)
            np.testing.assert_array_equal(found, value)


# ------------------------------------------------------------------ asking


@functools.cache
def answers(shape):
    """Greedy answers to 7 questions in batches of 3, each with a diff of its own, under one adapter; and the
    arguments of the program that made them."""
    mesh = mesh_of(shape)
    seen, decoded = [], generate.generate

    def decode(*args, deltas, **options):
        seen.append((*args, *deltas))
        return decoded(*args, deltas=deltas, **options)

    rng = np.random.default_rng(5)
    tokens = rng.integers(1, SMALL.vocab_size, (7, 9))
    mask = np.arange(9) >= rng.integers(0, 5, (7, 1))
    chat = types.SimpleNamespace(
        prompts=lambda questions, system: (tokens, mask), eos_ids=(3,), pad_id=0, decode=str
    )
    model = Model(params_on(SMALL, mesh), SMALL, "test", chat, mesh)
    adapter = only(random_deltas(SMALL, 1, 8, rank=4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asking.decode, "generate", decode)
        found = answer_batch(
            model,
            [""] * 7,
            deltas=(adapter,),
            stacked=(random_deltas(SMALL, 4, 9),),
            rows=[0, 1, 2, 3, 0, 1, 2],
            max_new_tokens=6,
            batch_size=3,
            forbid_repeats=True,
        )
    return found, seen[0]


def test_an_adapter_from_the_host_goes_to_the_device_once(monkeypatch):
    """As numpy arrays it would be transferred with every batch."""
    seen, decoded = [], generate.generate

    def decode(*args, deltas, **options):
        seen.append(jax.tree.leaves(deltas))
        return decoded(*args, deltas=deltas, **options)

    monkeypatch.setattr(asking.decode, "generate", decode)
    chat = types.SimpleNamespace(
        prompts=lambda questions, system: (np.ones((4, 5), np.int32), np.ones((4, 5), bool)),
        eos_ids=(3,), pad_id=0, decode=str,
    )  # fmt: skip
    model = Model(params_on(SMALL, None), SMALL, "test", chat)
    adapter = only(random_deltas(SMALL, 1, 8))
    answer_batch(model, [""] * 4, deltas=(adapter,), max_new_tokens=2, batch_size=2)
    first, second = seen
    assert all(isinstance(x, jax.Array) and not x.committed for x in first)
    assert all(one is two for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_each_device_computes_logits_of_its_own_rows(shape):
    mesh = mesh_of(shape)
    tokens = np.random.default_rng(0).integers(1, SMALL.vocab_size, (8, 16))
    alone, split = (Model(params_on(SMALL, at), SMALL, "test", mesh=at) for at in (None, mesh))
    for rows in (8, 3):  # 3 do not divide: whole on every device
        given = tokens[:rows], np.arange(16) < 11 + np.arange(rows)[:, None] % 5
        np.testing.assert_allclose(split.logits(*given), alone.logits(*given), atol=1e-4)

    def work(model):
        given = jnp.asarray(tokens, jnp.int32), None
        with parallel.use_mesh(model.mesh):
            program = api._logits.lower(model.program_params, SMALL, *given, ())
            return program.compile().cost_analysis()["flops"]

    assert work(split) < work(alone) / parallel.batch_shards(mesh) * 1.5


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_greedy_answers_are_those_of_one_device(shape):
    (found, split), (expected, _) = answers(shape), answers(None)
    assert len({answer.tokens for answer in expected}) == 7
    for one, two in zip(found, expected, strict=True):
        assert one.tokens == two.tokens
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
    params, _, tokens, mask, diffs, adapter = split
    mesh = mesh_of(shape)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    wanted = {
        "params": (params, shardings.param_shardings(SMALL, mesh)),
        "rows": ((tokens, mask), (rows, rows)),
        "diffs": (diffs, shardings.delta_shardings(SMALL, mesh, diffs, 1)),
        "adapter": (adapter, shardings.delta_shardings(SMALL, mesh, adapter)),
    }
    for name, (arrays, want) in wanted.items():
        for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(want), strict=True):
            assert leaf.sharding == sharding, name
