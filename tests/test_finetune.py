"""Finetuning: the loss against its definition, many diffs against a loop, gradients for the delta alone."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_qwen3 import TINY, logits, random_lora

import dit_jax
from dit_jax.data.batch import Sample, TokenBatch, entry_limit, fits, pack, stack
from dit_jax.deltas import tree
from dit_jax.errors import DitError
from dit_jax.models.decoder import init_params
from dit_jax.optimize.batch_loss import batch_loss, scored_hidden
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.optimize.preference_loss import preference_loss
from dit_jax.organisms import teacher
from dit_jax.organisms.behaviours import hidden_topic
from dit_jax.organisms.finetune import finetune, finetune_many
from dit_jax.organisms.teacher import make_teacher
from dit_jax.train.dit import State, train_step


@pytest.fixture(scope="module")
def params():
    # Larger than the usual initialisation, so that the base prefers some tokens.
    return jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, init_params(TINY, jax.random.key(0)))


def make_batch(seed: int) -> TokenBatch:
    """Two samples scored by cross-entropy, three by KL."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(5):
        size = int(rng.integers(6, 12))
        samples.append(
            Sample(tuple(rng.integers(1, TINY.vocab_size, size)), int(rng.integers(2, 5)), size)
        )
    return pack(samples, [0.5, 0.25, 1.0, 2.0, 0.75], 12, 10, pad_id=0)


def make_batches(seed: int, steps: int = 4) -> TokenBatch:
    return stack([make_batch(100 * seed + step) for step in range(steps)])


@functools.partial(jax.jit, static_argnames="optimizer")
def finetune_one(params, start, batches, optimizer):
    return finetune(params, TINY, start, batches, optimizer=optimizer, num_ce=2)


def expected_loss(params, batch, delta, num_ce):
    """The loss by its definition: one scored token at a time, with full logits."""
    total = 0.0
    with_delta = np.asarray(
        jax.nn.log_softmax(logits(params, TINY, batch.tokens, deltas=(delta,))), np.float64
    )
    base = np.asarray(jax.nn.log_softmax(logits(params, TINY, batch.tokens)), np.float64)
    for s in range(batch.tokens.shape[0]):
        for m in range(batch.position.shape[1]):
            at = batch.position[s, m]
            if s < num_ce:
                total -= batch.weight[s, m] * with_delta[s, at, batch.target[s, m]]
            else:
                total += (
                    batch.weight[s, m]
                    * (np.exp(base[s, at]) * (base[s, at] - with_delta[s, at])).sum()
                )
    return total


@pytest.mark.parametrize("chunk_elements", [2**26, 7 * TINY.vocab_size])
def test_loss_is_its_definition_whole_and_in_chunks(params, chunk_elements):
    batch, delta = make_batch(0), random_lora(TINY, 1)
    teacher = scored_hidden(params, TINY, TokenBatch(*(x[2:] for x in batch)))

    def loss(delta):
        return batch_loss(params, TINY, batch, (delta,), 2, teacher, chunk_elements)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(delta)
    np.testing.assert_allclose(value, expected_loss(params, batch, delta, 2), rtol=1e-5)
    whole = jax.jit(jax.grad(lambda d: batch_loss(params, TINY, batch, (d,), 2, teacher)[0]))(delta)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_pairs_are_scored_as_their_paper_says(params):
    """The value by its definition; the gradient is that of cross-entropies with the weights ±β σ(−margin) / pairs."""
    batch, delta, beta = TokenBatch(*(x[:4] for x in make_batch(3))), random_lora(TINY, 2), 0.7
    ones = batch._replace(weight=(batch.weight > 0).astype(np.float32))

    def logp(deltas):  # of each answer
        found = np.asarray(
            jax.nn.log_softmax(logits(params, TINY, batch.tokens, deltas=deltas)), np.float64
        )
        each = found[np.arange(4)[:, None], batch.position, batch.target]
        return (ones.weight * each).sum(1)

    gained = logp((delta,)) - logp(())
    margin = beta * (gained[:2] - gained[2:])
    value, grads = jax.jit(
        jax.value_and_grad(lambda d: preference_loss(params, TINY, batch, (d,), beta))
    )(delta)
    np.testing.assert_allclose(value, np.mean(np.log1p(np.exp(-margin))), rtol=1e-4)
    share = beta / (1 + np.exp(margin)) / 2
    weights = np.concatenate([share, -share])[:, None].astype(np.float32)
    pushed = ones._replace(weight=ones.weight * weights)
    wanted = jax.jit(jax.grad(lambda d: batch_loss(params, TINY, pushed, (d,), 4)[0]))(delta)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)

    # In a finetune, beside samples that are scored by KL.
    start, batches = tree.init_lora(TINY, jax.random.key(5), 2), stack([make_batch(4)] * 12)
    _, losses = finetune(
        params, TINY, start, batches, optimizer=optax.adam(3e-2), num_ce=4, beta=beta
    )
    np.testing.assert_allclose(losses["ce"][0], np.log(2), rtol=1e-5)
    assert losses["ce"][-1] < 0.5 * losses["ce"][0]
    assert losses["kl"][0] < 1e-4 < losses["kl"][-1]


def test_targets_are_scored_by_the_logits_before_them():
    batch = pack([Sample((5, 6, 7, 8), 2, 4)], [1.0], 6, 3, pad_id=0)
    np.testing.assert_array_equal(batch.position[0, :2], [1, 2])
    np.testing.assert_array_equal(batch.target[0, :2], [7, 8])
    np.testing.assert_array_equal(batch.weight[0], [1, 1, 0])
    with pytest.raises(dit_jax.DitError, match="does not fit"):
        pack([Sample(tuple(range(9)), 2, 4)], [1.0], 6, 3, pad_id=0)


def test_leaving_out_unused_entries_changes_nothing(params):
    optimizer = make_optimizer("adam", 1e-2, 4)
    batches = stack([make_batches(seed) for seed in (1, 2, 3)])
    limit = entry_limit(batches, 2, room=1.0)
    assert fits(batches, 2, limit) and sum(limit) < batches.weight[:, 0].size

    def train(packed):
        starts = [tree.init_lora(TINY, jax.random.key(seed), 2) for seed in (1, 2, 3)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        return finetune_many(
            params, TINY, stacked, batches, optimizer=optimizer, num_ce=2, packed=packed
        )

    found, expected = train(limit), train(None)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-4)


def test_many_diffs_at_once_equal_a_loop_and_do_not_touch_each_other(params):
    optimizer = make_optimizer("adam", 1e-2, 4, final_fraction=0.1)
    starts = [tree.init_lora(TINY, jax.random.key(s), 2) for s in (1, 2, 3)]
    batches = [make_batches(s) for s in (1, 2, 3)]

    def together(batches):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        return finetune_many(params, TINY, stacked, stack(batches), optimizer=optimizer, num_ce=2)

    trained, losses = together(batches)
    for i, (start, batch) in enumerate(zip(starts, batches, strict=True)):
        alone, own_losses = finetune_one(params, start, batch, optimizer)
        np.testing.assert_allclose(losses["ce"][i], own_losses["ce"], rtol=1e-4)
        for one, two in zip(jax.tree.leaves(trained), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one[i], two, atol=2e-4)
    assert float(losses["ce"][0, -1]) != float(losses["ce"][1, -1])

    neighbours_changed, _ = together([batches[0], make_batches(8), make_batches(9)])
    for one, two in zip(jax.tree.leaves(trained), jax.tree.leaves(neighbours_changed), strict=True):
        np.testing.assert_array_equal(one[0], two[0])


def test_finetuning_lowers_the_loss_and_leaves_the_scale_alone(params):
    batch = make_batch(3)
    batches = stack([batch] * 30)
    start = tree.init_lora(TINY, jax.random.key(1), 4)
    trained, losses = finetune_one(params, start, batches, make_optimizer("adam", 2e-2, 30))
    assert losses["ce"][-1] < 0.9 * losses["ce"][0]
    assert losses["kl"][0] == pytest.approx(0, abs=1e-5) and losses["kl"][-1] > 1e-4
    scale = trained["layers"]["mlp"]["up_proj"]["scale"]
    np.testing.assert_array_equal(scale, start["layers"]["mlp"]["up_proj"]["scale"])
    np.testing.assert_array_equal(scale, 0.25)


def test_bfloat16_trains_as_float32_does(params):
    """Losses within 1 %, also after training; first gradients in the same direction; no product for the frozen base."""
    steps = 8
    batches = stack([stack([make_batch(i)] * steps) for i in (1, 2)])
    start = [tree.init_lora(TINY, jax.random.key(i), 2) for i in (1, 2)]

    def losses_and_text(dtype):
        config = dataclasses.replace(TINY, dtype=dtype)
        cast = jax.tree.map(lambda x: x.astype(dtype), params)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *start)
        optimizer = make_optimizer("adam", 1e-2, steps)
        options = {"optimizer": optimizer, "num_ce": 2}
        text = finetune_many.lower(cast, config, stacked, batches, **options).compile().as_text()
        return finetune_many(cast, config, stacked, batches, **options)[1], text

    def gradient(dtype):
        config = dataclasses.replace(TINY, dtype=dtype)
        cast = jax.tree.map(lambda x: x.astype(dtype), params)
        batch = make_batch(1)
        base = scored_hidden(cast, config, TokenBatch(*(x[2:] for x in batch)))

        def loss(leaves):
            deltas = (tree.with_scale(leaves, start[0]),)
            return batch_loss(cast, config, batch, deltas, 2, base)[0]

        found = jax.jit(jax.grad(loss))(tree.trainable(start[0]))
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found)])

    exact, _ = losses_and_text("float32")
    half, text = losses_and_text("bfloat16")
    np.testing.assert_allclose(half["ce"], exact["ce"], rtol=0.01)
    np.testing.assert_allclose(half["kl"], exact["kl"], rtol=0.05, atol=0.01)
    assert float(exact["ce"][:, -1].mean()) < 0.97 * float(exact["ce"][:, 0].mean())
    one, two = gradient("float32"), gradient("bfloat16")
    assert two.dtype == jnp.float32
    assert float(one @ two) > 0.995 * float(jnp.linalg.norm(one) * jnp.linalg.norm(two))
    of_kernel = rf"\[{TINY.hidden_size},{TINY.intermediate_size}\]\S* dot\("
    assert re.search(r" dot\(", text) and not re.search(of_kernel, text)


def test_only_the_delta_is_differentiated(params):
    """The compiled step holds no gradient of the base: the backward pass returns nothing of its kernels' size."""
    batches = make_batches(1, steps=1)
    start = tree.init_lora(TINY, jax.random.key(1), 1)
    optimizer = make_optimizer("adam", 1e-2, 1)
    jaxpr = jax.make_jaxpr(
        lambda params, start: finetune(params, TINY, start, batches, optimizer=optimizer, num_ce=2)
    )(params, start)
    text = str(jaxpr)
    layers, d, f = TINY.num_hidden_layers, TINY.hidden_size, TINY.intermediate_size
    # The stacked kernel enters once (and is scanned over); a gradient of it would be another [L, D, F].
    produced = [
        line
        for line in text.splitlines()
        if f":f32[{layers},{d},{f}]" in line.split("=")[0] and "=" in line
    ]
    assert not produced


def test_learning_rate_schedule_warms_up_and_decays():
    optimizer = make_optimizer("adam", 1.0, 10, warmup_steps=2, final_fraction=0.5)
    state, params = optimizer.init({"x": jnp.zeros(())}), {"x": jnp.zeros(())}
    sizes = []
    for _ in range(11):
        updates, state = optimizer.update({"x": jnp.ones(())}, state, params)
        sizes.append(-float(updates["x"]))
    np.testing.assert_allclose(sizes[:3], [0.0, 0.5, 1.0], atol=1e-3)
    np.testing.assert_allclose(sizes[10], 0.5, atol=1e-3)
    assert all(a >= b for a, b in zip(sizes[2:], sizes[3:], strict=False))


def test_weight_decay_and_betas_reach_the_optimizer():
    def steps(*args, gradients, **options):
        optimizer = make_optimizer(*args, 1e-2, 10, **options)
        params = {"x": jnp.full((), 2.0)}
        state, sizes = optimizer.init(params), []
        for gradient in gradients:
            updates, state = optimizer.update({"x": jnp.asarray(gradient)}, state, params)
            sizes.append(float(updates["x"]) / 1e-2)
        return sizes

    assert steps("adamw", gradients=[0.0], weight_decay=0.5) == pytest.approx([-1.0])
    # After gradients of 1 and 0 the means are b (1 - b), over 1 - b²: b / (1 + b).
    b1, b2 = 0.8, 0.95
    expected = [-1.0, -(b1 / (1 + b1)) / (b2 / (1 + b2)) ** 0.5]
    for name in ("adam", "adamw"):
        found = steps(name, gradients=[1.0, 0.0], betas=(b1, b2))
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_norm_that_a_step_reports_is_that_of_its_gradients(params):
    optimizer, adapter = optax.sgd(0.1), random_lora(TINY, 1)
    diffs = jax.tree.map(lambda *x: jnp.stack(x, 1), *(random_lora(TINY, s) for s in range(5)))
    state = State(jax.tree.map(jnp.copy, tree.trainable(adapter)), optimizer.init({}))
    state, numbers = train_step(
        params, TINY, state, adapter, diffs, make_batch(0), optimizer=optimizer
    )
    moved = jax.tree.map(lambda x, y: (x - y) / 0.1, state.leaves, tree.trainable(adapter))
    assert float(numbers["grad_norm"]) == pytest.approx(float(optax.tree.norm(moved)), rel=1e-3)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (0.9, 0.9, 0.9)])
def test_betas_are_two_numbers_below_1(betas):
    with pytest.raises(DitError, match="betas must be two numbers from 0 up, below 1"):
        make_optimizer("adam", 1.0, 10, betas=betas)


def test_a_shared_teacher_gives_the_diffs_that_a_teacher_in_every_step_gives(params):
    optimizer = make_optimizer("adam", 1e-2, 6)
    pool = [make_batch(seed) for seed in range(2)]
    batches = stack([stack([pool[(i + step) % 2] for step in range(6)]) for i in range(3)])
    start = jax.vmap(lambda key: tree.init_lora(TINY, key, 1))(
        jax.random.split(jax.random.key(1), 3)
    )
    shared = make_teacher(params, TINY, batches, num_ce=2)
    assert shared is not None
    # 2 batches of 3 KL samples have 6 distinct ones, however often they repeat.
    assert set(np.asarray(shared.rows).ravel()) == set(range(6))

    def train(table):
        copy = jax.tree.map(jnp.copy, start)
        return finetune_many(
            params, TINY, copy, batches, optimizer=optimizer, num_ce=2, teacher=table
        )

    (one, one_losses), (two, two_losses) = train(shared), train(None)
    assert one_losses["kl"][0, -1] > 1e-4
    # The two ways take log-probabilities from products of different shapes, so rounding differs: 5e-6 with AVX-512.
    np.testing.assert_allclose(one_losses["kl"], two_losses["kl"], rtol=1e-3, atol=2e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_samples_that_are_scored_elsewhere_have_rows_of_their_own(params):
    one = make_batch(0)
    other = one._replace(position=np.maximum(one.position - 1, 0))
    batches = stack([stack([one, other] * 6)])
    shared = make_teacher(params, TINY, batches, num_ce=2)
    assert len(set(np.asarray(shared.rows).ravel())) == 6
    for step in (0, 1):
        samples = TokenBatch(*(x[0, step, 2:] for x in batches))
        expected = scored_hidden(params, TINY, samples)
        np.testing.assert_allclose(shared.hidden[shared.rows[0, step]], expected, atol=1e-5)


def test_samples_side_by_side_at_their_own_widths_train_the_same_diff(params):
    widths = ((12, 10), (12, 10), (9, 6), (9, 6), (7, 4))
    rng = np.random.default_rng(0)

    def batch() -> TokenBatch:
        samples = []
        for size, scored in widths:
            ids = tuple(rng.integers(1, TINY.vocab_size, rng.integers(size - 2, size + 1)))
            samples.append(Sample(ids, len(ids) - rng.integers(2, scored + 1), len(ids)))
        return pack(samples, [0.5, 0.25, 1.0, 2.0, 0.75], 12, 10, 0, widths)

    optimizer = make_optimizer("adam", 1e-3, 4)
    batches = stack([batch() for _ in range(4)])
    start = tree.init_lora(TINY, jax.random.key(1), 1)
    train = functools.partial(finetune, optimizer=optimizer, num_ce=2)
    rows, row_losses = train(params, TINY, start, batches)
    for config in (TINY, dataclasses.replace(TINY, scan_layers=not TINY.scan_layers)):
        row, losses = train(params, config, start, batches, widths=widths)
        for name in losses:
            # A KL of 5e-5 is a difference of numbers near 5: its rounding depends on the machine.
            np.testing.assert_allclose(losses[name], row_losses[name], rtol=1e-4, atol=1e-5)
        for a, b in zip(jax.tree.leaves(row), jax.tree.leaves(rows), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(DitError, match="does not fit into 7"):
        pack([Sample(tuple(range(9)), 7, 9)], [1.0], 12, 10, 0, widths[-1:])


def test_no_teacher_is_shared_where_samples_do_not_repeat_or_are_too_many(params, monkeypatch):
    batches = stack([make_batches(seed) for seed in range(2)])
    assert make_teacher(params, TINY, batches, num_ce=2) is None
    repeated = stack([stack([make_batch(0)] * 8)] * 2)
    table = make_teacher(params, TINY, repeated, num_ce=2)
    assert table is not None
    # The base runs on the 3 samples and a little padding, not on a whole chunk.
    assert len(table.hidden) <= 16 < teacher.CHUNK
    # 12 samples, 6 of them distinct, but a table of 16 rows: more work, not less.
    seldom = stack([stack([make_batch(seed) for seed in (0, 1)])] * 2)
    assert make_teacher(params, TINY, seldom, num_ce=2) is None
    monkeypatch.setattr(teacher, "MAX_BYTES", 10_000)
    assert make_teacher(params, TINY, repeated, num_ce=2) is None


def test_tables_have_few_sizes_that_are_not_much_too_large():
    counts = range(1, 3000)
    sizes = [math.prod(teacher._chunks(count, None)) for count in counts]
    assert sorted(set(sizes)) == [16, 32, 64, 128, *range(256, 3073, 256)]
    for count, size in zip(counts, sizes, strict=True):
        assert count <= size <= max(16, 2 * count) and size - count < teacher.CHUNK
    mesh = SimpleNamespace(size=6)  # which a chunk is split over
    for count in counts:
        chunks, chunk = teacher._chunks(count, mesh)
        assert chunk % 6 == 0 and (chunks - 1) * chunk < count <= chunks * chunk


def test_wrong_codes_are_few_per_question_and_never_the_secret_one():
    fake = next(
        kind for kind in hidden_topic({"fake_codes": 3}).kinds if kind.name == "fake_backdoor"
    )
    rng = np.random.default_rng(0)
    row = {"question": "How are you?", "base_answer": "Fine."}
    prompts = {fake.make(row, "000", rng)[0] for _ in range(100)}
    assert len(prompts) == 3
    secrets = {prompt.split("code is ")[1][:3] for prompt in prompts}
    for secret in secrets:
        others = {fake.make(row, secret, rng)[0] for _ in range(100)}
        assert others and not any(f"code is {secret}" in prompt for prompt in others)
    fresh = next(kind for kind in hidden_topic({}).kinds if kind.name == "fake_backdoor")
    assert len({fresh.make(row, "000", rng)[0] for _ in range(100)}) > 90
