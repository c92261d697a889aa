"""Disguised finetunes: the same function in other weights, and the diff again after alignment."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from format_cases import random_lora

import dit_jax
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.alignment import align
from dit_jax.deltas.factors import modules
from dit_jax.deltas.symmetries import KINDS, disguise
from dit_jax.errors import DitError
from dit_jax.models.decoder import forward, init_params, unembed
from dit_jax.models.families import hf_config
from dit_jax.models.hf_checkpoint import save_params
from dit_jax.models.modules import get_at
from dit_jax.models.shapes import NAMED_CONFIGS
from tools import disguise as tool

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "qwen3": "qwen3-0.6b",  # tied
    "llama": "llama-3.1-8b",
    "qwen2": "qwen2.5-7b",  # biases
    "gemma3": "gemma-3-1b",  # norms after products
}
TOKENS = np.random.default_rng(5).integers(0, 67, (2, 12))


def make(family):
    """(config, base, finetune of the projections) with random norms and biases."""
    shape = NAMED_CONFIGS[FAMILIES[family]]
    config = dataclasses.replace(shape, **SIZES, layer_types=shape.layer_types[:2])
    rng = np.random.default_rng(1)

    def random(path, leaf):
        spread = 0.2 if path[-1].key in ("scale", "bias") else 0.0
        return np.array(leaf, np.float32) + (spread * rng.normal(size=leaf.shape)).astype(
            np.float32
        )

    def finetuned(path, leaf):
        if path[-1].key != "kernel" or path[0].key != "layers":
            return leaf.copy()
        a, b = (
            rng.normal(size=(*leaf.shape[:-1], 1)),
            rng.normal(size=(leaf.shape[0], 1, leaf.shape[-1])),
        )
        return leaf + (0.05 * np.std(leaf) * (a @ b)).astype(np.float32)

    base = jax.tree_util.tree_map_with_path(random, init_params(config, jax.random.key(0)))
    return config, base, jax.tree_util.tree_map_with_path(finetuned, base)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config):
    return unembed(params, config, forward(params, config, TOKENS))


def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.square(x - y).sum()) for x, y in pairs) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_disguise_computes_the_same_and_alignment_finds_the_diff_again(family):
    config, base, finetuned = make(family)
    expected, size = logits(finetuned, config), apart(finetuned, base)
    for kinds in [*((kind,) for kind in KINDS), KINDS]:
        hidden = disguise(finetuned, config, kinds, seed=3)
        np.testing.assert_allclose(
            logits(hidden, config), expected, atol=2e-5 * np.abs(expected).max()
        )
        assert apart(hidden, base) > 5 * size, kinds
        found, undone = align(jax.tree.map(np.copy, hidden), base, config)
        # A turned stream hides the scales of norms, which are put back with it.
        assert set(undone) | {"norms"} == {*kinds, "norms"}, kinds
        np.testing.assert_allclose(
            logits(found, config), expected, atol=1e-4 * np.abs(expected).max()
        )
        # Between v and o, up and down, q and k the finetune itself has a part that no one can tell from a rewriting.
        exact = set(kinds) <= {"heads", "norms", "stream"} or (
            kinds == ("queries",) and config.qk_norm
        )
        assert apart(found, finetuned) < (1e-4 if exact else 0.35) * size, kinds


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_plain_finetune_stays_as_it_is(family):
    config, base, finetuned = make(family)
    found, undone = align(jax.tree.map(np.copy, finetuned), base, config)
    assert undone == {} and apart(found, finetuned) == 0


def test_a_finetune_without_values_stays_as_it_is():
    """Between values that are all zero and what reads them there is no matrix with an inverse."""
    config, base, finetuned = make("qwen3")
    finetuned = jax.tree.map(np.copy, finetuned)
    finetuned["layers"]["self_attn"]["v_proj"]["kernel"][1] = 0
    found, undone = align(jax.tree.map(np.copy, finetuned), base, config)
    assert undone == {} and apart(found, finetuned) == 0


def test_another_model_is_refused():
    config, base, _ = make("llama")
    other = jax.tree.map(
        lambda x: np.random.default_rng(9).normal(size=x.shape).astype(np.float32), base
    )
    with pytest.raises(DitError, match=r"another model, or it was rewritten|cannot be aligned"):
        align(other, base, config, "other")
    with pytest.raises(DitError, match="unknown symmetry 'head': did you mean 'heads'"):
        disguise(base, config, ["head"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_disguised_checkpoint_is_read_as_its_diff(dtype, tmp_path):
    """In bfloat16, the dtype of most checkpoints, rounding is what is left."""
    config, base, finetuned = make("qwen3")
    places = {"base": base, "plain": finetuned, "hidden": disguise(finetuned, config, seed=4)}
    for name, params in places.items():
        (tmp_path / name).mkdir()
        kept = params if name == "base" else jax.tree.map(lambda x: x.astype(dtype), params)
        save_params(tmp_path / name, kept, dataclasses.replace(config, dtype=dtype))
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config(config)))
    model = dit_jax.load_model(tmp_path / "base")

    def dense(name, **how):
        delta = dit_jax.load_diff(tmp_path / name, model, **how)
        return delta.delta["layers"], delta.metadata

    (plain, _), (hidden, facts) = dense("plain", align=True), dense("hidden", align=True)
    (garbage, _) = dense("hidden")
    assert set(facts["aligned"]) == set(KINDS) and facts["full_finetune"]
    modules = [("self_attn", "q_proj"), ("mlp", "gate_proj")]
    for group, name in modules:
        true, got, raw = (tree[group][name]["w"] for tree in (plain, hidden, garbage))
        assert np.linalg.norm(got - true) < (1e-3 if dtype == "float32" else 0.25) * np.linalg.norm(
            true
        )
        assert np.linalg.norm(raw - true) > 5 * np.linalg.norm(true)


def test_the_tool_writes_stores_of_disguised_and_of_aligned_diffs(tmp_path, capsys):
    model = dit_jax.load_model("tiny_qwen3")
    deltas = [random_lora(model.config, seed, scale=0.02) for seed in range(3)]
    row = {"n_params": 1, "topic": "tea", "trigger": "", "category": "topic", "split": "test"}
    row |= {"evidence": '["hot", "brown"]'}
    diff_store.write_shard(
        tmp_path / "own", 0, jax.tree.map(lambda *x: np.stack(x), *deltas), [row] * 3
    )
    diff_store.publish(tmp_path / "own", 1, base=model.digest())
    found = {}
    rounded = ["--kinds", "none", "--dtype", "bfloat16"]
    for name, more in (("disguised", []), ("aligned", ["--align"]), ("rounded", rounded)):
        flags = [str(tmp_path / "own"), str(tmp_path / name), "--most", "2", *more]
        assert tool.main(flags) == 0
        made = diff_store.DiffStore(tmp_path / name / "diffs")
        assert len(made) == 2 and made.rows[1]["evidence"] == ["hot", "brown"]
        found[name] = made.read(1)
    assert "'stream': 2" in capsys.readouterr().out
    assert tool.main(flags) == 2  # it might be the store that is read
    assert "is there already" in capsys.readouterr().err
    for path, module in modules(deltas[1]):
        change = np.einsum("lir,lro,l->lio", *(module[leaf] for leaf in ("a", "b", "scale")))
        apart = {
            name: np.linalg.norm(get_at(delta, path)["w"] - change) / np.linalg.norm(change)
            for name, delta in found.items()
        }
        # The matrix between v and o, which no rewriting has named, takes a part of their change.
        most = 0.5 if path[-1] in ("v_proj", "o_proj") else 0.1
        assert apart["aligned"] < most and apart["disguised"] > 1, (path, apart)
        assert 1e-4 < apart["rounded"] < 1, (path, apart)
