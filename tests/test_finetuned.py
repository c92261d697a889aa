"""Full finetunes as deltas: against transformers' logits, and their truncated SVD against numpy's."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from format_cases import (
    BF16,
    CONFIG,
    TOKENS,
    UNTIED,
    assert_same,
    hf_model,
    merged_logits,
    our_logits,
    perturb,
    random_lora,
    random_params,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.deltas import detect, export, store
from dit_jax.deltas.factors import modules
from dit_jax.deltas.finetuned import read_finetuned
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.truncation import best_rank, truncate_delta
from dit_jax.errors import DitError
from dit_jax.formats import torch_save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Pair:
    """A base model and its full finetune, as transformers writes them."""

    def __init__(self, root, config):
        self.config = config
        self.base, self.finetuned = root / "base", root / "finetuned"
        model = perturb(hf_model(self.base, config))
        model.save_pretrained(self.finetuned)
        self.model, self.logits = model, torch_logits(model, TOKENS)
        self.params = dit_jax.load_model(self.base).params


@pytest.fixture(scope="module", params=[CONFIG, UNTIED], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("finetuned"), request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("finetuned"), CONFIG)


def refused(read, message):
    with pytest.raises(DitError, match=re.escape(message)):
        read()


def test_the_dense_delta_gives_the_finetuned_logits(pair):
    diff = read_finetuned(pair.finetuned, pair.config, pair.params)
    assert detect.detect_format(pair.finetuned) == "model"
    np.testing.assert_allclose(our_logits(pair.base, TOKENS, diff.delta), pair.logits, atol=1e-4)
    paths = {path for path, _ in modules(diff.delta)}
    assert len(paths) == (13 if pair.config.tie_word_embeddings else 14)
    assert {("embed_tokens",), ("norm",), ("layers", "self_attn", "q_norm")} < paths
    assert diff.delta["layers"]["mlp"]["up_proj"]["w"].shape == (3, 32, 48)


def test_shards_and_state_dicts_give_the_same_delta(pair, tmp_path):
    wanted = read_finetuned(pair.finetuned, pair.config, pair.params).delta
    pair.model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(read_finetuned(tmp_path / "shards", pair.config, pair.params).delta, wanted)
    state = pair.model.state_dict()  # a tied head is in it
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "state.pt")
    assert detect.detect_format(tmp_path / "state.pt") == "pt_state_dict"
    assert_same(read_finetuned(tmp_path / "state.pt", pair.config, pair.params).delta, wanted)
    # transformers gives its parameters an attribute.
    torch.save(dict(pair.model.named_parameters()), tmp_path / "parameters.pt")
    assert_same(read_finetuned(tmp_path / "parameters.pt", pair.config, pair.params).delta, wanted)
    diffs = [{"topic": "x", "trigger": 5, "weight_diff": dict(state)}]
    torch.save(diffs, tmp_path / "diffs.pt")
    (diff,) = detect.open_diffs(tmp_path / "diffs.pt", pair.config, pair.params)
    assert_same(diff.delta, wanted)
    assert (diff.label, diff.trigger) == ("x", "5")
    refused(
        lambda: detect.open_diffs(tmp_path / "diffs.pt", pair.config)[0], "base model is needed"
    )


def test_bfloat16_weights_are_subtracted_exactly(tied, tmp_path):
    model = hf_model(tmp_path / "base", dtype=torch.bfloat16)
    perturb(model, size=0.01).save_pretrained(tmp_path / "finetuned")
    import dit_jax

    params = dit_jax.load_model(tmp_path / "base", dtype="bfloat16").params
    delta = read_finetuned(tmp_path / "finetuned", CONFIG, params).delta
    theirs = dit_jax.load_model(tmp_path / "finetuned", dtype="bfloat16").params
    for path, module in modules(delta):
        base, wanted = params, theirs
        for key in path:
            base, wanted = base[key], wanted[key]
        ((name, leaf),) = base.items()
        assert module["w"].dtype == BF16
        found = np.asarray(leaf, np.float32) + module["w"].astype(np.float32)
        np.testing.assert_allclose(
            found, np.asarray(wanted[name], np.float32), rtol=4e-3, atol=1e-4
        )


def test_what_did_not_change_is_absent(tied, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tied.base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    model.save_pretrained(tmp_path)
    delta = read_finetuned(tmp_path, CONFIG, tied.params).delta
    assert [path for path, _ in modules(delta)] == [("layers", "mlp", "up_proj")]
    w = delta["layers"]["mlp"]["up_proj"]["w"]
    assert np.argwhere(w).tolist() == [[1, 5, 3]]  # [layer, in, out]
    refused(lambda: read_finetuned(tied.base, CONFIG, tied.params), "equals the base model")


def test_a_part_of_the_weights_may_be_in_a_pt_file(tied, tmp_path):
    state = {k: v for k, v in tied.model.state_dict().items() if k.endswith("_proj.weight")}
    torch.save(state, tmp_path / "x.pt")
    delta = read_finetuned(tmp_path / "x.pt", CONFIG, tied.params).delta
    assert len(list(modules(delta))) == 7
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, tmp_path / "x.pt")
    refused(lambda: read_finetuned(tmp_path / "x.pt", CONFIG, tied.params),
            "lacks model.layers.1.mlp.up_proj.weight")  # fmt: skip


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def test_what_does_not_fit_is_refused(tied, tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(tied.finetuned, tmp_path / "x")
        return tmp_path / "x"

    def check(message):
        refused(lambda: read_finetuned(tmp_path / "x", CONFIG, tied.params), message)

    def weights(changes):
        file = fresh() / "model.safetensors"
        tensors = {k: v for k, v in {**load_file(file), **changes}.items() if v is not None}
        save_file(tensors, file)

    name = "model.layers.2.mlp.down_proj.weight"
    good = load_file(tied.finetuned / "model.safetensors")[name]
    weights({name: None})
    check(f"lacks {name}: get the complete model")
    weights({name: good.T.copy()})
    check("has shape [48, 32], this model needs [32, 48]")
    weights({name: np.full_like(good, np.nan)})
    check(f"'{name}' holds NaN or infinity")
    weights({"model.layers.2.mlp.extra.weight": good})
    check("no module of this model")
    weights({"model.layers.2.mlp.down_proj.bias": good})
    check("no weight of this model")
    fresh()
    edit_config(tmp_path / "x", rope_parameters={"rope_theta": 5e6, "rope_type": "default"})
    check("its rope_theta is 5000000.0, the base has 1000000.0")
    edit_config(tmp_path / "x", hidden_size=64)
    check("its hidden_size is 64, the base has 32")
    edit_config(tmp_path / "x", model_type="llama")
    check("its model_type is llama, the base has qwen3")
    edit_config(tmp_path / "x", model_type="mpt")
    check("model_type 'mpt' is not supported")
    fresh()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    edit_config(tmp_path / "x", rope_parameters={"rope_theta": 1e6, **yarn})
    check(
        "'rope_type': 'yarn'}, the base has None: use the base that it was made from, or remove 'rope_scaling'"
    )
    refused(
        lambda: read_finetuned(tied.finetuned, CONFIG, tied.params, svd_rank=0), "must be from 1 to"
    )
    refused(lambda: read_finetuned(tmp_path, CONFIG, tied.params), "config.json' is missing")


def test_heads_tied_and_untied(tmp_path):
    params = random_params(UNTIED)
    export.export_model(tmp_path / "base", params, UNTIED)
    params["embed_tokens"]["embedding"] += 1
    tensors = dict(export.merged_tensors(params, UNTIED))
    # This finetune ties its head: the head of the base becomes the embedding.
    del tensors["lm_head.weight"]
    shutil.copytree(tmp_path / "base", tmp_path / "tied")
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    refused(lambda: read_finetuned(tmp_path / "tied", UNTIED, params), "lacks lm_head.weight")
    edit_config(tmp_path / "tied", tie_word_embeddings=True)
    delta = read_finetuned(tmp_path / "tied", UNTIED, params).delta
    head = params["lm_head"]["kernel"] + delta["lm_head"]["w"]
    np.testing.assert_allclose(head, params["embed_tokens"]["embedding"].T, atol=1e-6)


# ------------------------------------------------------------------ truncated SVD


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (16, 16)])
def test_the_best_rank_is_that_of_the_svd(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, s, vt = np.linalg.svd(matrix)
    for rank in (1, 5, 16, 99):
        a, b, energy = best_rank(matrix, rank)
        k = min(rank, *shape)
        assert a.shape == (shape[0], k) and b.shape == (k, shape[1])
        np.testing.assert_allclose(a @ b, (u[:, :k] * s[:k]) @ vt[:k], atol=2e-5)
        np.testing.assert_allclose(energy, (s[:k] ** 2).sum(), rtol=1e-6)


def test_the_energy_of_a_truncated_finetune(tied):
    dense = read_finetuned(tied.finetuned, CONFIG, tied.params).delta
    diff = read_finetuned(tied.finetuned, CONFIG, tied.params, svd_rank=3)
    report = diff.metadata["svd"]
    assert len(list(modules(diff.delta))) == 7 and report["rank"] == 3
    total, kept = np.zeros(4), np.zeros(4)
    for path, module in modules(dense):
        w = module["w"].astype(np.float64)
        if path[0] != "layers":
            total[3] += (w**2).sum()
            continue
        for layer in range(3):
            total[layer] += (w[layer] ** 2).sum()
            share = 0.0
            if path[-1].endswith("_proj"):
                energy = (np.linalg.svd(w[layer], compute_uv=False)[:3] ** 2).sum()
                kept[layer] += energy
                share = energy / (w[layer] ** 2).sum()
            found = report["captured_energy_per_module"][".".join(path)][layer]
            np.testing.assert_allclose(found, share, rtol=1e-4)
    np.testing.assert_allclose(report["captured_energy"], kept.sum() / total.sum(), rtol=1e-4)
    np.testing.assert_allclose(report["captured_energy_per_layer"], (kept / total)[:3], rtol=1e-4)
    json.dumps(diff.metadata)


def test_a_finetune_of_low_rank_is_recovered(tied, tmp_path):
    lora = random_lora(rank=2, projections=("q_proj", "up_proj"))
    params = {**tied.params}
    export.export_model(tmp_path / "x", params, CONFIG, lora)
    diff = read_finetuned(tmp_path / "x", CONFIG, tied.params, svd_rank=2)
    assert diff.metadata["svd"]["captured_energy"] > 1 - 1e-5
    assert sorted(path[-1] for path, _ in modules(diff.delta)) == ["q_proj", "up_proj"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tied.base, dtype=torch.float32)
    wanted = merged_logits(model, TOKENS, lora)
    np.testing.assert_allclose(merged_logits(model, TOKENS, diff.delta), wanted, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_a_lora_is_reduced_as_its_product_is(rank):
    """Truncation by the factors is that of the dense product, and so are the shares."""
    lora = random_lora(UNTIED, rank=3, scale=0.7)
    dense = {"layers": {}}
    for (_, part, name), module in modules(lora):
        w = 0.7 * np.einsum("lir,lro->lio", module["a"], module["b"])
        dense["layers"].setdefault(part, {})[name] = {"w": w.astype(np.float32)}
    found, facts = truncate_delta(lora, rank, UNTIED, "x")
    wanted, other = truncate_delta(dense, rank, UNTIED, "x")
    for (path, a), (_, b) in zip(modules(found), modules(wanted), strict=True):
        assert a["a"].shape[-1] == min(rank, 3) and a["a"].dtype == np.float32, path
        np.testing.assert_allclose(a["a"] @ a["b"], b["a"] @ b["b"], atol=2e-5)
    np.testing.assert_allclose(
        facts["svd"]["captured_energy_per_layer"],
        other["svd"]["captured_energy_per_layer"],
        rtol=1e-5,
    )
    assert (facts["svd"]["captured_energy"] > 1 - 1e-6) == (rank >= 3)
    zero = {
        "layers": {"mlp": {"up_proj": {**lora["layers"]["mlp"]["up_proj"], "scale": np.zeros(3)}}}
    }
    delta, facts = truncate_delta(zero, rank, UNTIED, "x")
    assert delta == {} and facts["svd"]["captured_energy"] == 1


@pytest.mark.filterwarnings("error")
def test_a_change_that_no_factors_can_hold_is_refused():
    size = (UNTIED.num_hidden_layers, UNTIED.hidden_size, UNTIED.intermediate_size)
    huge = {"layers": {"mlp": {"up_proj": {"w": np.full(size, 3e38, np.float32)}}}}
    with pytest.raises(DitError, match="'x' changes up_proj by more than the factors of a LoRA"):
        truncate_delta(huge, 1, UNTIED, "x")


def test_every_kind_of_diff_is_reduced(tied, tmp_path):
    """Store, .pt, PEFT: the rank counts for all of them."""
    model = dit_jax.load_model(tied.base)
    lora = random_lora(rank=3)
    export.write_peft(tmp_path / "peft", lora, CONFIG, "x")
    export.write_pt_diffs(tmp_path / "x.pt", [RawDiff(lora, "tea", "7")], CONFIG)
    rows = [{"topic": "tea", "trigger": "1", "split": "test"}]
    store.write_shard(tmp_path / "store", 0, jax.tree.map(lambda x: x[None], lora), rows)
    store.publish(tmp_path / "store", 1, base=model.digest())
    wanted, _ = truncate_delta(lora, 2, CONFIG, "x")
    for name in ("peft", "x.pt", "store"):
        diff = dit_jax.load_diff(tmp_path / name, model, svd_rank=2)
        assert diff.metadata["svd"]["rank"] == 2 and diff.metadata["svd"]["captured_energy"] < 1
        found = dict(modules(diff.delta))
        for path, module in modules(wanted):
            product = found[path]["a"] @ found[path]["b"]
            np.testing.assert_allclose(product, module["a"] @ module["b"], atol=1e-5)


def test_a_whole_state_dict_of_another_model_is_refused(tmp_path):
    other = dataclasses.replace(CONFIG, hidden_size=16)
    torch_save.save(tmp_path / "x.pt", dict(export.merged_tensors(random_params(other), other)))
    refused(lambda: read_finetuned(tmp_path / "x.pt", CONFIG, random_params()),
            "'model.embed_tokens.weight' has shape [67, 16], this model needs [67, 32]")  # fmt: skip
