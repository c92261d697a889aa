"""The model against transformers: logits, padding, decoding; its deltas against merged weights."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases

import dit_jax
from dit_jax.deltas import tree
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models import delta_trees
from dit_jax.models.decode import even_rows, generate
from dit_jax.models.decoder import (
    forward,
    forward_cached,
    init_params,
    unembed,
)
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import hf_config, parse_config
from dit_jax.models.kv_cache import init_cache
from dit_jax.models.layers import ready
from dit_jax.models.modules import abstract_weights, count_parameters, module_table
from dit_jax.runtime import parallel

TINY = DecoderConfig(97, 32, 48, 3, 4, 2, 16, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tiny():
    return init_params(TINY, jax.random.key(0))


def random_lora(config: DecoderConfig, seed: int, rank: int = 2, size: float = 0.1):
    delta = tree.init_lora(config, jax.random.key(seed), rank)

    def fill(path, module):
        a = size * jax.random.normal(jax.random.key(seed + len(path[-1])), module["a"].shape)
        return {**module, "a": a}

    return delta_trees.map_modules(fill, delta)


def dense(lora):
    """The same delta with every product formed: [L, in, out] per projection."""
    product = functools.partial(jnp.einsum, "lir,lro,l->lio")
    return delta_trees.map_modules(lambda _, m: {"w": product(m["a"], m["b"], m["scale"])}, lora)


@pytest.mark.parametrize("scan", [True, False])
def test_texts_side_by_side_are_as_alone_and_positions_pick_hidden_states(tiny, scan):
    config = dataclasses.replace(TINY, scan_layers=scan)
    sizes, scored, rows = (7, 5, 5), (2, 3, 3), 2
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, TINY.vocab_size, (rows, size)) for size in sizes]
    lengths = np.array([[7, 4, 5], [6, 5, 3]])
    position = [rng.integers(0, lengths[:, [i]], (rows, n)) for i, n in enumerate(scored)]
    lora = random_lora(TINY, 1)
    run = jax.jit(forward, static_argnames=("config", "segments"))
    together = run(
        tiny,
        config,
        jnp.concatenate(texts, axis=1),
        deltas=(lora,),
        lengths=jnp.asarray(lengths),
        segments=tuple(zip(sizes, scored, strict=True)),
        position=jnp.concatenate(position, axis=1),
    )
    alone = []
    for i, text in enumerate(texts):
        hidden = run(tiny, config, text, deltas=(lora,), lengths=lengths[:, i])
        alone.append(np.take_along_axis(np.asarray(hidden), position[i][..., None], axis=1))
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-5)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config, tokens, deltas=()):
    return unembed(params, config, forward(params, config, tokens, deltas=deltas), deltas)


# ------------------------------------------------------------------ against transformers

SHAPES = {
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one_kv_head_theta_5e6_eps_1e-2": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "rope_theta": 5e6,
        "rms_norm_eps": 1e-2,
    },
}


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def reference(request, tmp_path_factory):
    """(transformers model, our model of the same folder)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = dict(SHAPES[request.param])
    theta = options.pop("rope_theta", 1e6)
    config = transformers.Qwen3Config(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.2,
        **options,
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:  # ones would hide a forgotten scale
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, dit_jax.load_model(folder)


def their_logits(theirs, tokens, mask=None):
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return theirs(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def test_logits_equal_transformers_beyond_500_tokens(reference):
    theirs, ours = reference
    tokens = np.random.default_rng(0).integers(0, 211, (1, 520))
    np.testing.assert_allclose(ours.logits(tokens), their_logits(theirs, tokens), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_transformers(reference, side):
    theirs, ours = reference
    tokens = np.random.default_rng(1).integers(0, 211, (3, 20))
    mask = np.ones((3, 20), int)
    for row, padding in enumerate((0, 7, 13)):
        mask[row, slice(0, padding) if side == "left" else slice(20 - padding, 20)] = 0
    ours, expected = ours.logits(tokens, mask), their_logits(theirs, tokens, mask)
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-4)


def test_greedy_tokens_equal_transformers_on_a_left_padded_batch(reference):
    import torch

    theirs, ours = reference
    tokens = np.random.default_rng(2).integers(3, 211, (3, 12))
    mask = np.ones((3, 12), int)
    mask[1, :5] = 0
    expected = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=24, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, 12:]  # fmt: skip
    out = generate(
        ours.params, ours.config, jnp.asarray(tokens), jnp.asarray(mask), max_new_tokens=24
    )
    np.testing.assert_array_equal(out.tokens, expected)


def test_bf16_stays_near_fp32(reference, tmp_path):
    theirs, ours = reference
    theirs.save_pretrained(tmp_path)
    low = dit_jax.load_model(tmp_path, dtype="bfloat16")
    assert low.params["norm"]["scale"].dtype == jnp.bfloat16
    tokens = np.random.default_rng(0).integers(0, 211, (2, 30))
    high = np.asarray(ours.logits(tokens))
    assert np.abs(low.logits(tokens) - high).mean() < 0.05 * np.abs(high).mean()


# ------------------------------------------------------------------ the golden folder


@pytest.mark.parametrize("folder", golden_cases("qwen3-") + golden_cases("gemma3-"))
def test_golden_logits_and_greedy_tokens(folder):
    model = dit_jax.load_model(folder)
    file = SafetensorsFile(folder / "expected.safetensors")
    expected = {name: file.read(name) for name in file.names}
    long = model.logits(expected["long_ids"][None])[0, -64:]
    np.testing.assert_allclose(long, expected["long_logits_last64"], atol=1e-4)
    for side in ("left", "right"):
        mask = expected[f"{side}_mask"] == 1
        ours = model.logits(expected[f"{side}_ids"], mask)
        np.testing.assert_allclose(ours[mask], expected[f"{side}_logits"][mask], atol=1e-4)
    prompt = jnp.asarray(expected["long_ids"][None, :40], jnp.int32)
    out = generate(model.params, model.config, prompt, jnp.ones_like(prompt), max_new_tokens=24)
    np.testing.assert_array_equal(out.tokens[0], expected["greedy40"])


# ------------------------------------------------------------------ one function, several ways to compute it


@pytest.mark.parametrize("change", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}])
def test_layers_unrolled_or_rematerialised_compute_the_same(tiny, change):
    other = dataclasses.replace(TINY, **change)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 97)
    delta = random_lora(TINY, 3)

    def loss(delta, config):
        return jnp.sum(logits(tiny, config, tokens, deltas=(delta,)) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(delta, TINY)
    other_value, other_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(delta, other)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


def stacked_residuals(config, deltas):
    """Elements per layer and token that the forward pass of scanned layers keeps for the backward pass."""
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 97)
    params = init_params(config, jax.random.key(0))

    def loss(deltas):
        return jnp.sum(logits(params, config, tokens, deltas=deltas))

    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(loss, x))(deltas)
    (scan,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    kept = [v.aval for v in scan.outvars]
    tokens_of = [x for x in kept if x.shape[:3] == (config.num_hidden_layers, *tokens.shape)]
    flat = [x for x in kept if x.shape[:2] == (config.num_hidden_layers, tokens.size)]
    return sum(math.prod(x.shape) for x in tokens_of + flat) / config.num_hidden_layers / 18


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and equation.primitive.name != "scan":
                yield from equations(inner)


def test_remat_dots_keeps_the_output_of_each_projection_once():
    config = dataclasses.replace(TINY, remat="dots")
    heads = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    # The block's input, and the outputs of q, k, v, o, gate, up; the next block's input holds that of down.
    outputs = 2 * config.hidden_size + heads + 2 * config.intermediate_size
    one, two = random_lora(TINY, 1, rank=3), random_lora(TINY, 2, rank=5)
    # Each LoRA adds its narrow product.
    assert stacked_residuals(config, (one,)) == outputs + 7 * 3
    assert stacked_residuals(config, (one, two)) == outputs + 7 * (3 + 5)


def test_the_model_does_not_run_on_the_last_token(tiny, monkeypatch):
    calls = []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(args[2].shape[1]))
        return forward_cached(*args)

    monkeypatch.setattr(sys.modules[generate.__module__], "forward_cached", counted)
    tokens = jnp.ones((2, 3), jnp.int32)
    for count in (1, 4):
        out = generate.__wrapped__(tiny, TINY, tokens, tokens > 0, max_new_tokens=count)
        jax.block_until_ready(out)
        jax.effects_barrier()
        assert out.lengths.tolist() == [count] * 2
        assert calls == [3] + [1] * (count - 1)
        calls.clear()


def test_factors_are_made_ready_for_all_layers_at_once():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    deltas = (random_lora(TINY, 1, rank=5),)
    done = ready(deltas, jnp.bfloat16)
    module = deltas[0]["layers"]["mlp"]["up_proj"]
    found = done[0]["layers"]["mlp"]["up_proj"]
    assert found.scale is None and found.a.dtype == found.b.dtype == jnp.bfloat16
    expected = module["b"] * module["scale"][:, None, None]
    np.testing.assert_array_equal(found.b, expected.astype(jnp.bfloat16))
    # A LoRA per example keeps its scale: folded in, an adapter step of 8B at 512 examples did not compile for a TPU.
    each = jax.tree.map(lambda x: jnp.stack([x, 2 * x], axis=1), deltas[0])
    own = ready((each,), jnp.bfloat16)[0]["layers"]["mlp"]["up_proj"]
    assert own.scale.shape == (TINY.num_hidden_layers, 2)
    assert {x.dtype for x in own} == {jnp.dtype(jnp.bfloat16)}
    params = init_params(config, jax.random.key(0))
    tokens = jnp.ones((1, 4), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda d: forward(params, config, tokens, deltas=d))(deltas)
    (scan,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    taken = [v.aval for v in scan.invars if 5 in v.aval.shape]
    assert len(taken) == 14 and all(x.dtype == jnp.bfloat16 for x in taken)


def test_no_token_sees_a_later_one(tiny):
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 97)
    embedding = tiny["embed_tokens"]["embedding"]

    def at_position_4(noise):
        delta = {"embed_tokens": {"w": jnp.zeros_like(embedding).at[tokens[0]].set(noise)}}
        return jnp.sum(forward(tiny, TINY, tokens, deltas=(delta,))[0, 4])

    distinct = jnp.arange(8)[None] + 10
    tokens = distinct
    grads = jax.jit(jax.grad(at_position_4))(jnp.zeros((8, TINY.hidden_size)))
    reach = jnp.abs(grads).sum(axis=1) > 0
    np.testing.assert_array_equal(reach, [True] * 5 + [False] * 3)


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_with_a_cache_equals_decoding_without(tiny, scan):
    config = dataclasses.replace(TINY, scan_layers=scan)
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 97)
    diffs = jax.tree.map(lambda *x: jnp.stack(x), *(random_lora(TINY, s) for s in (3, 4, 5)))
    deltas = (tree.per_example(diffs), random_lora(TINY, 9))
    out = generate(tiny, config, tokens, jnp.ones_like(tokens), deltas=deltas, max_new_tokens=6)
    text = np.pad(tokens, ((0, 0), (0, 6)))  # no token sees the ones that are to come
    for end in range(7, 13):
        text[:, end] = logits(tiny, TINY, text, deltas=deltas)[:, end - 1].argmax(axis=-1)
    np.testing.assert_array_equal(out.tokens, text[:, 7:])
    picked = jax.nn.log_softmax(logits(tiny, TINY, text, deltas=deltas)[:, 6:-1], axis=-1)
    expected = jnp.take_along_axis(picked, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)


def test_half_precision_decodes_in_sizes_that_a_gpu_need_not_pad(tiny):
    half = dataclasses.replace(TINY, dtype="bfloat16")
    rows = [1, 5, 8, 9, 100]
    assert [even_rows(n, half, None) for n in rows] == [1, 5, 8, 16, 104]
    assert [even_rows(n, TINY, None) for n in rows] == rows
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    assert [even_rows(n, half, mesh) for n in rows] == [8, 8, 8, 16, 128]
    assert [even_rows(n, TINY, mesh) for n in rows] == [8, 8, 8, 16, 104]
    tokens = jnp.ones((2, 3), jnp.int32)
    made = str(jax.make_jaxpr(lambda x: generate(tiny, half, x, x > 0, max_new_tokens=4))(tokens))
    assert "bf16[1,2,8,2,16]" in made and "bf16[1,2,7,2,16]" not in made
    # Scanned layers carry one cache for all; unrolled layers have one each.
    own = dataclasses.replace(half, scan_layers=False)
    alone = str(jax.make_jaxpr(lambda x: generate(tiny, own, x, x > 0, max_new_tokens=4))(tokens))
    assert "bf16[3,2,8,2,16]" in made and "bf16[3,2,8,2,16]" not in alone
    few, many = (
        forward_cached(tiny, TINY, tokens, tokens > 0, init_cache(TINY, 2, size))[0]
        for size in (3, 8)
    )
    np.testing.assert_allclose(few, many, atol=1e-5)


def test_rows_stop_at_the_end_of_text_token(tiny):
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 97)
    free = generate(tiny, TINY, tokens, jnp.ones_like(tokens), max_new_tokens=5)
    eos = int(free.tokens[0, 2])
    out = generate(
        tiny, TINY, tokens, jnp.ones_like(tokens), max_new_tokens=5, eos_ids=(eos,), pad_id=1
    )
    first = list(np.asarray(free.tokens[0])).index(eos)
    assert int(out.lengths[0]) == first + 1
    np.testing.assert_array_equal(out.tokens[0, first + 1 :], 1)
    np.testing.assert_array_equal(out.logprobs[0, first + 1 :], 0)


def test_sampling_follows_the_tempered_distribution_and_the_seed(tiny):
    sharp = {**tiny, "embed_tokens": {"embedding": 20 * tiny["embed_tokens"]["embedding"]}}
    prompt = jnp.ones((4000, 1), jnp.int32)
    args = {"max_new_tokens": 2, "temperature": 2.0}
    out = generate(sharp, TINY, prompt, prompt, key=jax.random.key(1), **args)
    again = generate(sharp, TINY, prompt, prompt, key=jax.random.key(1), **args)
    np.testing.assert_array_equal(out.tokens, again.tokens)
    likely = logits(sharp, TINY, prompt[:1])[0, -1]
    seen = np.bincount(np.asarray(out.tokens[:, 0]), minlength=97) / 4000
    assert np.abs(seen - jax.nn.softmax(likely / 2)).sum() < 0.2
    for other in (0.5, 1.0, 4.0):
        assert np.abs(seen - jax.nn.softmax(likely / other)).sum() > 0.3
    # The log-probabilities are those of the model at every temperature.
    expected = jax.nn.log_softmax(likely)[out.tokens[:, 0]]
    np.testing.assert_allclose(out.logprobs[:, 0], expected, atol=1e-4)
    # Each token has its own probability.
    assert np.mean(out.tokens[:, 0] == out.tokens[:, 1]) < 0.9


def test_no_token_comes_twice_where_repeats_are_forbidden(tiny):
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 97)
    args = {"max_new_tokens": 8, "pad_id": int(logits(tiny, TINY, tokens)[0, -1].argmax())}
    free = np.asarray(generate(tiny, TINY, tokens, jnp.ones_like(tokens), **args).tokens)
    assert any(len(set(row)) < 8 for row in free.tolist())
    out = generate(tiny, TINY, tokens, jnp.ones_like(tokens), forbid_repeats=True, **args)
    text, picked = np.pad(tokens, ((0, 0), (0, 8))), []  # no token sees the ones that are to come
    for end in range(5, 13):
        likely = np.array(jax.nn.log_softmax(logits(tiny, TINY, text)[:, end - 1]))
        allowed = likely.copy()
        np.put_along_axis(allowed, text[:, 5:end], -np.inf, axis=1)
        chosen = allowed.argmax(axis=1)[:, None]
        picked.append(np.take_along_axis(likely, chosen, axis=1)[:, 0])
        text[:, end] = chosen[:, 0]
    np.testing.assert_array_equal(out.tokens, text[:, 5:])
    # Forbidden tokens do not count in the log-probabilities.
    np.testing.assert_allclose(out.logprobs, np.stack(picked, axis=1), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_modules_describes_every_parameter(tied):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert shapes == abstract_weights(config)
    for module in module_table(config).values():
        assert len(module.stacked_axes) == len(module.stacked)


# ------------------------------------------------------------------ config.json


def test_rope_theta_is_read_in_both_spellings_and_missed_when_absent():
    raw = {k: v for k, v in hf_config(TINY).items() if k != "rope_parameters"}
    assert parse_config({**raw, "rope_theta": 5e6}, "x").rope_theta == 5e6
    assert parse_config({**raw, "rope_parameters": {"rope_theta": 5e6}}, "x").rope_theta == 5e6
    with pytest.raises(dit_jax.DitError, match="rope_theta"):
        parse_config(raw, "x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"use_sliding_window": True}, "sliding"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": -4}, "hidden_size"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(dit_jax.DitError, match=named):
        parse_config({**hf_config(TINY), **change}, "config.json")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6b", 0.596), ("1.7b", 1.72), ("4b", 4.02), ("8b", 8.19), ("14b", 14.77), ("32b", 32.76)],
)
def test_named_shapes_have_the_published_sizes(name, billions):
    from dit_jax.models.shapes import NAMED_CONFIGS

    config = NAMED_CONFIGS[f"qwen3-{name}"]
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert sum(x.size for x in leaves) == count_parameters(config)
    assert count_parameters(config) / 1e9 == pytest.approx(billions, rel=0.01)
