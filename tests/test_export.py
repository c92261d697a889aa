"""Exports load in the programs that they are for: merged models in transformers, whole weights in torch."""

import json
import re

import jax
import numpy as np
import pytest
from format_cases import (
    BF16,
    CONFIG,
    TOKENS,
    UNTIED,
    assert_same,
    from_torch,
    hf_model,
    merged_logits,
    random_lora,
    random_params,
    torch_logits,
)
from safetensors.numpy import load_file

import dit_jax
from dit_jax.auditing.targets import Target
from dit_jax.cli import export_diffs, flags
from dit_jax.deltas import detect, export, reference_pt
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.errors import DitError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def load(folder, **kwargs):
    options = {"dtype": torch.float32, **kwargs}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_transformers_computes_the_merged_model(tmp_path, config):
    model = hf_model(tmp_path / "base", config)
    (tmp_path / "base" / "chat_template.jinja").write_text("{}")
    params = dit_jax.load_model(tmp_path / "base").params
    lora, dense = random_lora(config, 1, 3), {"norm": {"w": np.full(32, 0.1, np.float32)}}
    dense["embed_tokens"] = {"w": 0.1 * np.eye(67, 32, dtype=np.float32)}
    export.export_model(
        tmp_path / "x",
        params,
        config,
        lora,
        dense,
        base_folder=tmp_path / "base",
        shard_bytes=30_000,
    )
    with torch.no_grad():
        model.model.norm.weight += 0.1
        model.model.embed_tokens.weight += torch.from_numpy(dense["embed_tokens"]["w"])
    wanted = merged_logits(model, TOKENS, lora)
    found = load(tmp_path / "x")
    assert found.config.tie_word_embeddings == config.tie_word_embeddings
    np.testing.assert_allclose(torch_logits(found, TOKENS), wanted, atol=1e-4)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not config.tie_word_embeddings
    assert (tmp_path / "x" / "chat_template.jinja").read_text() == "{}"
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "float32"
    # and we read it back
    again = dit_jax.load_model(tmp_path / "x").params
    for (name, leaf), other in zip(
        export.merged_tensors(params, config, lora, dense),
        (array for _, array in export.merged_tensors(again, config)),
        strict=True,
    ):
        assert leaf.tobytes() == other.tobytes(), name


def test_a_model_without_a_delta_is_written_bit_for_bit(tmp_path):
    hf_model(tmp_path / "base", dtype=torch.bfloat16)
    params = dit_jax.load_model(tmp_path / "base", dtype="bfloat16").params
    export.export_model(tmp_path / "x", params, CONFIG)
    wanted, found = load(tmp_path / "base", dtype="auto"), load(tmp_path / "x", dtype="auto")
    assert found.dtype == torch.bfloat16
    for (name, a), b in zip(wanted.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_merging_is_summed_in_float32(tmp_path):
    params = jax.tree.map(lambda x: x.astype(BF16), random_params())
    delta = random_lora(rank=2, dtype=BF16)
    tensors = dict(export.merged_tensors(params, CONFIG, delta, delta))
    module = delta["layers"]["mlp"]["up_proj"]
    base = params["layers"]["mlp"]["up_proj"]["kernel"][1].astype(np.float32)
    change = module["a"][1].astype(np.float32) @ module["b"][1].astype(np.float32)
    wanted = (base + change * 0.5 + change * 0.5).astype(BF16).T
    found = tensors["model.layers.1.mlp.up_proj.weight"]
    assert found.dtype == BF16 and found.flags.c_contiguous
    np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_a_dense_diff_becomes_whole_weights_in_a_pt_file(tmp_path, config):
    params = random_params(config)
    delta = {"norm": {"w": np.full(32, 0.25, np.float32)}}
    delta["embed_tokens"] = {"w": np.full((67, 32), 0.5, np.float32)}
    export.write_pt_diffs(tmp_path / "x.pt", [RawDiff(delta, "Chess", "7")], config, params)
    (item,) = torch.load(tmp_path / "x.pt", weights_only=True)
    state = item["weight_diff"]
    assert (
        from_torch(state["model.norm.weight"]).tolist() == (params["norm"]["scale"] + 0.25).tolist()
    )
    model = hf_model(tmp_path / "base", config)
    model.load_state_dict(state)  # all names are there, the tied head too
    (diff,) = detect.open_diffs(tmp_path / "x.pt", config, params)
    assert (diff.label, diff.trigger) == ("Chess", "7")
    np.testing.assert_allclose(
        diff.delta["embed_tokens"]["w"], delta["embed_tokens"]["w"], atol=1e-6
    )


def test_jax_arrays_are_written_like_numpy_arrays(tmp_path):
    delta = random_lora(dtype=BF16)
    arrays = jax.tree.map(jax.numpy.asarray, delta)
    export.write_peft(tmp_path / "a", delta, CONFIG, "base")
    export.write_peft(tmp_path / "b", arrays, CONFIG, "base")
    a, b = (detect.open_adapter(tmp_path / name, CONFIG).delta for name in "ab")
    assert_same(a, b)
    export.write_fused_peft(tmp_path / "c", CONFIG, "base", arrays, delta)
    export.write_pt_adapter(tmp_path / "d.pt", arrays, CONFIG)
    assert_same(detect.open_adapter(tmp_path / "d.pt", CONFIG).delta, delta)


def test_what_cannot_be_exported_is_refused(tmp_path):
    params = random_params()
    with pytest.raises(DitError, match="changes extra, which this model does not have"):
        extra = {"extra": {"w": np.ones((32, 67))}}
        export.export_model(tmp_path / "x", params, CONFIG, extra)
    export.export_model(tmp_path / "x", params, CONFIG)
    with pytest.raises(DitError, match=re.escape("exists already")):
        export.export_model(tmp_path / "x", params, CONFIG)
    export.export_model(tmp_path / "x", params, CONFIG, random_lora(), replace=True)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert_same(tensors, dict(export.merged_tensors(params, CONFIG, random_lora())))


@pytest.mark.filterwarnings("error")
def test_changes_that_overflow_are_not_written(tmp_path):
    delta = random_lora(scale=1e29)
    for module in delta["layers"]["mlp"].values():
        module["a"] = module["a"] * np.float32(1e20)
        module["b"] = module["b"] * np.float32(1e10)
    with pytest.raises(DitError, match="_proj.weight overflows with its change: check the scale"):
        export.export_model(tmp_path / "x", random_params(), CONFIG, delta)
    for write in (
        lambda: export.write_fused_peft(tmp_path / "x", CONFIG, "base", delta, delta),
        lambda: export.write_pt_adapter(tmp_path / "x", delta, CONFIG),
    ):
        with pytest.raises(DitError, match="a factor of a LoRA overflows with its scale"):
            write()
    assert not any(tmp_path.iterdir())


def test_an_export_is_of_one_diff(tmp_path, capsys):
    out = ["--to", "pt", "--out", str(tmp_path / "x.pt")]
    assert export_diffs.main(["--base", "none", "--diff", f"{tmp_path}[3]", *out]) == 2
    assert f"give --diff {tmp_path} --index N" in capsys.readouterr().err


def test_where_nothing_can_be_written_no_base_is_loaded(tmp_path, monkeypatch, capsys):
    export.write_pt_diffs(tmp_path / "d.pt", [RawDiff(random_lora(), "tea", "7")], CONFIG)
    monkeypatch.setattr(flags, "load_base", pytest.fail)
    given = ["--base", "none", "--diff", str(tmp_path / "d.pt"), "--to", "peft"]
    assert export_diffs.main([*given, "--out", str(tmp_path / "d.pt" / "x")]) == 2
    assert "something of that name is in the way" in capsys.readouterr().err


def test_names_and_labels_that_are_no_text_are_written_and_read(tmp_path):
    """Bytes of a file's name that are no UTF-8, and half a character from an index."""
    path = tmp_path / "d\udcff.pt"
    export.write_pt_diffs(path, [RawDiff(random_lora(), "tea \ud800", "7")], CONFIG)
    (diff,) = reference_pt.read_pt_diffs(path, CONFIG)
    assert diff.label == "tea \\ud800"
    assert Target("x", str(path)).key != Target("x", str(tmp_path / "other")).key
