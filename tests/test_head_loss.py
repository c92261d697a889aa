"""Losses under a head against their definition and autodiff: whole, in chunks, packed, for many diffs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_head import SIZE, config_of

from dit_jax.data.batch import TokenBatch, entry_limit, fits, used_entries
from dit_jax.deltas.store import flatten
from dit_jax.models import head
from dit_jax.models.decoder import forward, init_params, unembed
from dit_jax.optimize import head_loss as module
from dit_jax.optimize.batch_loss import batch_loss
from dit_jax.optimize.head_loss import Head, Options, Scored, head_loss
from dit_jax.organisms.parameters import init_delta

DIFFS, SAMPLES, ENTRIES = 3, 2, 5


def make(vocab, seed=0):
    """(table, cross-entropy entries, KL entries) with leading axes [DIFFS, SAMPLES, ENTRIES], two fifths unused."""
    keys = jax.random.split(jax.random.key(seed), 7)
    lead = (DIFFS, SAMPLES, ENTRIES)
    table = jax.random.normal(keys[0], (vocab, SIZE)) / 4
    hidden, hidden_kl, teacher = (jax.random.normal(key, (*lead, SIZE)) for key in keys[1:4])
    target = jax.random.randint(keys[4], lead, 0, vocab)
    weight, weight_kl = (
        jax.random.uniform(key, lead) * (jax.random.uniform(key, lead) > 0.4) for key in keys[5:]
    )
    return table, Scored(hidden, target, weight), Scored(hidden_kl, teacher, weight_kl)


def plain(table, base, ce, kl):
    """The definition, of one diff."""
    log_probability = jax.nn.log_softmax(ce.hidden @ table.T, axis=-1)
    chosen = jnp.take_along_axis(log_probability, ce.against[..., None], axis=-1)[..., 0]
    of_base = jax.nn.log_softmax(kl.against @ base.T, axis=-1)
    changed = jax.nn.log_softmax(kl.hidden @ table.T, axis=-1)
    divergence = jnp.sum(jnp.exp(of_base) * (of_base - changed), axis=-1)
    return -jnp.sum(ce.weight * chosen), jnp.sum(kl.weight * divergence)


def with_gradients(loss, ce, kl):
    """((ce, kl), gradients of 2 ce + 3 kl) of one diff."""

    def total(hidden, hidden_kl):
        parts = loss(ce._replace(hidden=hidden), kl._replace(hidden=hidden_kl))
        return 2 * parts[0] + 3 * parts[1], parts

    grads, parts = jax.grad(total, argnums=(0, 1), has_aux=True)(ce.hidden, kl.hidden)
    return parts, grads


def assert_equal(found, expected, tolerance=2e-5):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == two.dtype and float(jnp.abs(two).max()) > 1e-2
        np.testing.assert_allclose(one, two, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("vocab", [50, 8 * head.CHUNK + 37])
@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("packed", [None, (24, 24)])
def test_many_diffs_have_their_own_losses_and_gradients(vocab, chunk, packed):
    table, ce, kl = make(vocab)
    used = [int((group.weight != 0).sum()) for group in (ce, kl)]
    assert max(used) <= 24 < ce.weight.size and used[0] != used[1]
    options = Options(config_of(vocab, True), chunk, packed)
    own = lambda ce, kl: head_loss(options, Head(table, None), ce, kl)  # noqa: E731
    found = jax.jit(jax.vmap(lambda ce, kl: with_gradients(own, ce, kl)))(ce, kl)
    expected = jax.vmap(
        lambda ce, kl: with_gradients(lambda *groups: plain(table, table, *groups), ce, kl)
    )(ce, kl)
    assert_equal(found, expected)
    assert found[0][0].shape == (DIFFS,) and found[1][0].shape == ce.hidden.shape
    # The numbers are the same without gradients.
    assert_equal(jax.vmap(own)(ce, kl), expected[0])


def test_one_diff_and_either_loss_alone():
    table, ce, kl = make(50)
    ce, kl = (jax.tree.map(lambda x: x[0], group) for group in (ce, kl))
    used = tuple(int((group.weight != 0).sum()) for group in (ce, kl))
    assert max(used) < ce.weight.size
    options = Options(config_of(50, True), 1000, used)
    expected = plain(table, table, ce, kl)
    assert_equal(head_loss(options, Head(table, None), ce, kl), expected)
    assert float(head_loss(options, Head(table, None), ce, None)[0]) == pytest.approx(
        float(expected[0]), rel=1e-5
    )
    assert float(head_loss(options, Head(table, None), None, kl)[1]) == pytest.approx(
        float(expected[1]), rel=1e-5
    )
    assert float(head_loss(options, Head(table, None), None, kl)[0]) == 0


@pytest.mark.parametrize("off", [0, 1])
def test_a_loss_of_which_no_entry_is_used_is_zero(off):
    table, *groups = make(50)
    groups[off] = groups[off]._replace(weight=jnp.zeros_like(groups[off].weight))
    limits = tuple(0 if group == off else 24 for group in (0, 1))
    options = Options(config_of(50, True), 1000, limits)
    own = lambda ce, kl: head_loss(options, Head(table, None), ce, kl)  # noqa: E731
    losses, gradients = jax.vmap(lambda ce, kl: with_gradients(own, ce, kl))(*groups)
    assert not losses[off].any() and not gradients[off].any()
    expected = jax.vmap(
        lambda ce, kl: with_gradients(lambda *groups: plain(table, table, *groups), ce, kl)
    )(*groups)
    on = 1 - off
    assert_equal((losses[on], gradients[on]), (expected[0][on], expected[1][on]))


def test_the_base_keeps_its_own_head():
    """A delta may change the head, in one way for all diffs or in a different way for each."""
    table, ce, kl = make(50)
    changed = table + make(50, seed=1)[0]
    options = Options(config_of(50, True), 1000, (24, 24))

    def both(loss, weight, batched):
        run = lambda w, ce, kl: with_gradients(lambda *g: loss(w, *g), ce, kl)  # noqa: E731
        return jax.vmap(run, in_axes=(0 if batched else None, 0, 0))(weight, ce, kl)

    each = jnp.stack([changed * (1 + i) for i in range(DIFFS)])
    for weight, batched in ((changed, False), (each, True)):
        found = both(lambda w, *g: head_loss(options, Head(w, table), *g), weight, batched)
        assert_equal(found, both(lambda w, *g: plain(w, table, *g), weight, batched))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("packed", [None, (24, 24)])
def test_a_changed_head_has_its_gradient(tied, chunk, packed):
    table, ce, kl = make(50)
    options = Options(config_of(50, tied), chunk, packed)
    own = table if tied else table.T  # [V, D], and [D, V] where it is not tied

    def run(loss, base):
        def total(change, ce, kl):
            parts = loss(own + change, base, ce, kl)
            return 2 * parts[0] + 3 * parts[1]

        gradient = jax.grad(total)
        changes = jnp.stack([(0.1 * i) * own for i in range(DIFFS)])
        return [
            jax.jit(jax.vmap(gradient))(changes, ce, kl),  # a head for each diff
            jax.vmap(gradient, (None, 0, 0))(changes[1], ce, kl),  # one for all, each its gradient
            jax.grad(lambda w: total(w, *(jax.tree.map(lambda x: x[0], g) for g in (ce, kl))))(own),
        ]

    defined = lambda w, base, *g: plain(w if tied else w.T, base, *g)  # noqa: E731
    found = run(lambda w, base, *g: head_loss(options, Head(w, base), *g), own)
    assert_equal(found, run(defined, table))


@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_have_their_gradients(tied):
    config = dataclasses.replace(config_of(50, tied), num_hidden_layers=2)
    params = init_params(config, jax.random.key(0))
    change = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        init_delta(config, jax.random.key(0), {"parameters": "all"}),
    )
    rng = np.random.default_rng(0)
    tokens, target = (rng.integers(0, 50, shape).astype(np.int32) for shape in ((2, 6), (2, 3)))
    position = np.tile(np.arange(1, 4, dtype=np.int32), (2, 1))
    weight = rng.random((2, 3)).astype(np.float32)
    batch = TokenBatch(tokens, np.full(2, 6, np.int32), position, target, weight)

    def defined(delta):
        hidden = forward(params, config, tokens, deltas=(delta,))[:, 1:4]
        chances = jax.nn.log_softmax(unembed(params, config, hidden, (delta,)))
        return -jnp.sum(weight * jnp.take_along_axis(chances, target[..., None], -1)[..., 0])

    found = jax.grad(lambda delta: batch_loss(params, config, batch, (delta,))[0])(change)
    for name, expected in flatten(jax.grad(defined)(change)).items():
        assert np.abs(expected).max() > 1e-3, name
        np.testing.assert_allclose(flatten(found)[name], expected, atol=1e-5, err_msg=name)


def test_the_product_sees_used_entries_alone(monkeypatch):
    rows = []
    logits = head.logits
    monkeypatch.setattr(
        module.head, "logits", lambda c, w, hidden: rows.append(len(hidden)) or logits(c, w, hidden)
    )
    table, ce, kl = make(50)
    for packed, expected in ((None, 3 * DIFFS * SAMPLES * ENTRIES), ((24, 16), 24 + 2 * 16)):
        rows.clear()
        options = Options(config_of(50, True), 1000, packed)
        jax.vmap(lambda ce, kl: head_loss(options, Head(table, None), ce, kl))(ce, kl)  # noqa: B023
        assert rows[-1] == expected  # the first one is of a single diff


@pytest.mark.parametrize("packed", [None, (24, 24)])
def test_gradients_have_the_dtype_of_the_hidden_states(packed):
    """Otherwise the whole backward pass of a bfloat16 model would run in float32."""
    config = dataclasses.replace(config_of(50, True), dtype="bfloat16")
    table, ce, kl = make(50)
    half = lambda group: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.bfloat16) if x.ndim == 4 else x, group
    )
    head_ = Head(table.astype(jnp.bfloat16), None)
    own = lambda ce, kl: head_loss(Options(config, 1000, packed), head_, ce, kl)  # noqa: E731
    parts, grads = jax.vmap(lambda ce, kl: with_gradients(own, ce, kl))(half(ce), half(kl))
    expected = jax.vmap(
        lambda ce, kl: with_gradients(lambda *groups: plain(table, table, *groups), ce, kl)
    )(ce, kl)
    for one, two in zip(jax.tree.leaves((parts, grads)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), two, atol=0.05, rtol=0.03)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(parts)} == {jnp.dtype(jnp.float32)}


def test_limits_hold_what_they_were_made_for():
    weight = np.zeros((2, 3, 4, 5), np.float32)  # diffs, steps, samples, entries
    weight[:, 1, 0, :4] = 0.5
    weight[:, 2, 2:, :3] = -1
    empty = np.zeros(())
    batches = TokenBatch(empty, empty, empty, empty, weight)
    assert used_entries(batches, 1) == (8, 12)
    limit = entry_limit(batches, 1, room=1.1)
    assert limit == (16, 16) and fits(batches, 1, limit)
    assert not fits(batches, 1, (8, 11)) and not fits(batches, 1, None)


def test_similar_batches_have_one_limit():
    """The quickstart's first batches of three seeds run the same program."""

    def limit(ce, kl):
        weight = np.zeros((1, 1, 2, 1000), np.float32)
        weight[0, 0, 0, :ce] = weight[0, 0, 1, :kl] = 1
        return entry_limit(TokenBatch(*[np.zeros(())] * 4, weight), 1, room=1.03)

    assert {limit(561, 748), limit(562, 756), limit(565, 752)} == {(592, 784)}
