"""Files as other programs leave them: wrapped names, torch weights in folders, and what tells of other misfits."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from format_cases import CONFIG, UNTIED, assert_same, random_lora, random_params
from hostile import NAME, run_told
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.deltas import detect, export, peft
from dit_jax.deltas.factors import modules
from dit_jax.deltas.finetuned import read_finetuned
from dit_jax.errors import DitError
from dit_jax.formats import torch_save
from dit_jax.models.file_names import WRAPPERS, find_tensor, locate, unwrap

LORA = random_lora(seed=3)
EXPORTS = {}


@pytest.fixture(scope="module")
def params():
    return random_params(UNTIED)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, params):
    """A base, its finetune and an adapter, as this program writes them."""
    root = tmp_path_factory.mktemp("exports")
    export.export_model(root / "base", params, UNTIED)
    export.export_model(root / "finetune", params, UNTIED, LORA)
    export.write_peft(root / "adapter", LORA, UNTIED, "base")
    return root


def rename(source, target, change, file="model.safetensors"):
    """A copy of a folder in which tensors have other names."""
    shutil.copytree(source, target)
    tensors = load_file(source / file)
    save_file({change(name): value for name, value in tensors.items()}, target / file)
    return target


def refused(read, *words):
    with pytest.raises(DitError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 1000
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------ names

WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
    "FSDP": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", f"_fsdp_wrapped_module.{name}"),
    "FSDP, checkpointing": lambda name: re.sub(
        r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
    ),
    "Fabric": lambda name: f"_forward_module.{name}",
    "without model.": lambda name: name.removeprefix("model."),
    "Lightning": lambda name: f"model.{name}",
    "text part": lambda name: name.replace("model.", "model.language_model.", 1),
    "PEFT's model": lambda name: f"base_model.model.{name}",
    "PEFT's layers": lambda name: f"base_model.model.{name}".replace("_proj.", "_proj.base_layer."),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_names_of_bases_and_finetunes(exports, tmp_path, params, case):
    wanted = read_finetuned(exports / "finetune", UNTIED, params).delta
    rename(exports / "finetune", tmp_path / "finetune", WRAPPED[case])
    assert_same(read_finetuned(tmp_path / "finetune", UNTIED, params).delta, wanted)
    tensors = load_file(tmp_path / "finetune" / "model.safetensors")
    torch_save.save(tmp_path / "x.pt", tensors)
    assert_same(read_finetuned(tmp_path / "x.pt", UNTIED, params).delta, wanted)
    torch_save.save(tmp_path / "x.pt", {"epoch": 3, "state_dict": tensors})
    assert_same(read_finetuned(tmp_path / "x.pt", UNTIED, params).delta, wanted)
    rename(exports / "base", tmp_path / "base", WRAPPED[case])
    plain, wrapped = (dit_jax.load_model(x / "base").params for x in (exports, tmp_path))
    for name, leaf in (("norm", "scale"), ("lm_head", "kernel")):
        np.testing.assert_array_equal(plain[name][leaf], wrapped[name][leaf])


ADAPTERS = {
    **WRAPPED,
    "no prefix": lambda name: name,
    "of another name": lambda name: "base_model.model." + re.sub(r"(lora_.)", r"\1.sft", name),
    "of the name default": lambda name: "base_model.model." + re.sub("(lora_.)", r"\1.default", name),
    "inside PEFT": lambda name: f"base_model.model._orig_mod.{name}",
    "around PEFT": lambda name: f"_orig_mod.module.base_model.model.{name}",
    "PEFT twice": lambda name: f"base_model.model.base_model.model.{name}",
}  # fmt: skip
del ADAPTERS["PEFT's layers"]


@pytest.mark.parametrize("case", ADAPTERS)
def test_wrapped_names_of_adapters(exports, tmp_path, params, case):
    change = ADAPTERS[case]
    folder = rename(
        exports / "adapter",
        tmp_path / "x",
        lambda name: change(name.removeprefix("base_model.model.")),
        peft.WEIGHTS,
    )
    assert_same(peft.read_peft(folder, UNTIED, params).delta, LORA)


def test_a_raw_state_dict_of_peft_has_the_bases_weights_too(exports, tmp_path, params):
    """As FSDP and trl scripts save: all of `peft_model.state_dict()`."""
    shutil.copytree(exports / "adapter", tmp_path / "x")
    file = tmp_path / "x" / peft.WEIGHTS
    base = load_file(exports / "base" / "model.safetensors")
    raw = {
        re.sub(r"(lora_.)\.", r"\1.default.", name): value
        for name, value in load_file(file).items()
    }
    raw |= {f"base_model.model.{k}".replace("_proj.", "_proj.base_layer."): v for k, v in base.items()}  # fmt: skip
    save_file(raw, file)
    assert_same(peft.read_peft(tmp_path / "x", UNTIED, params).delta, LORA)
    refused(lambda: peft.read_peft(tmp_path / "x", UNTIED), "base model is needed")
    for name, said in (
        ("model.layers.1.mlp.up_proj.base_layer", "made for a base with another"),
        ("model.norm", "the whole weight of 'model.norm', which is not in modules_to_save"),
    ):
        name = f"base_model.model.{name}.weight"
        save_file({**raw, name: raw[name] + 1}, file)
        refused(lambda: peft.read_peft(tmp_path / "x", UNTIED, params), said)
    two = {re.sub(r"\.default\.", ".other.", name): value for name, value in raw.items()}
    save_file({**raw, **two}, file)
    refused(
        lambda: peft.read_peft(tmp_path / "x", UNTIED, params),
        "2 adapters ('default', 'other')", "save each by itself",
    )  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_wrappers_are_left_out_in_any_order_and_depth(data):
    name = data.draw(st.sampled_from(["model.layers.2.self_attn.q_proj", "model.norm", "lm_head"]))
    segments = name.split(".")
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(segments)))
        segments.insert(at, data.draw(st.sampled_from(sorted(WRAPPERS))))
    wrapped = ".".join(segments)
    assert unwrap(wrapped) == name
    assert locate(wrapped, UNTIED, "x") == locate(name, UNTIED, "x")
    assert find_tensor(f"{wrapped}.weight", UNTIED) == find_tensor(f"{name}.weight", UNTIED)


def test_names_that_mean_one_tensor_are_refused(exports, tmp_path, params):
    for what, read in (
        ("base", lambda folder: dit_jax.load_model(folder)),
        ("finetune", lambda folder: read_finetuned(folder, UNTIED, params)),
    ):
        shutil.copytree(exports / what, tmp_path / what)
        file = tmp_path / what / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "module.model.norm.weight": tensors["model.norm.weight"]}, file)
        refused(lambda read=read, what=what: read(tmp_path / what), "model.norm.weight")


# ------------------------------------------------------------------ torch weights in folders


def to_torch(folder, shards=0, index=True):
    """Replaces the weights of a folder by pytorch_model.bin, or by so many shards of it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not shards:
        torch_save.save(folder / "pytorch_model.bin", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        names = sorted(tensors)[i::shards]
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch_save.save(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    if index:
        raw = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(raw)
    return folder


@pytest.mark.parametrize(("shards", "index"), [(0, False), (3, True), (3, False)])
def test_torch_weights_in_a_folder(exports, tmp_path, params, shards, index):
    wanted = read_finetuned(exports / "finetune", UNTIED, params).delta
    shutil.copytree(exports / "finetune", tmp_path / "x")
    to_torch(tmp_path / "x", shards, index)
    assert_same(read_finetuned(tmp_path / "x", UNTIED, params).delta, wanted)
    model = dit_jax.load_model(tmp_path / "x")
    np.testing.assert_array_equal(
        model.params["norm"]["scale"], dit_jax.load_model(exports / "finetune").params["norm"]["scale"]
    )  # fmt: skip
    if shards:
        (tmp_path / "x" / "pytorch_model-00002-of-00003.bin").unlink()
        said = (
            "lacks the shard 'pytorch_model-00002-of-00003.bin', 1 of 3 are missing",
            "get it again",
        )
        refused(lambda: read_finetuned(tmp_path / "x", UNTIED, params), *said)
        refused(lambda: dit_jax.load_model(tmp_path / "x"), *said)


def test_shards_outside_the_folder_are_refused(exports, tmp_path, params):
    shutil.copytree(exports / "finetune", tmp_path / "x")
    to_torch(tmp_path / "x", 2)
    index = tmp_path / "x" / "pytorch_model.bin.index.json"
    raw = json.loads(index.read_text())["weight_map"]
    for bad in ("../x.bin", "/etc/passwd", "model.safetensors"):
        index.write_text(json.dumps({"weight_map": {**raw, "model.norm.weight": bad}}))
        refused(lambda: read_finetuned(tmp_path / "x", UNTIED, params), "not a plain file name")
    index.write_text(json.dumps({"weight_map": raw}))
    shard = tmp_path / "x" / "pytorch_model-00001-of-00002.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    refused(lambda: read_finetuned(tmp_path / "x", UNTIED, params), "link out of its folder")


# ------------------------------------------------------------------ what misfits say

EXTRA = {
    "classifier": ({"score.weight": np.ones((1, 32), np.float32)}, ["score", "classifier", "give body.pt"]),
    "value head": ({"v_head.summary.weight": np.ones((1, 32), np.float32)}, ["v_head", "value model", "python -c"]),
    "compiled reward model": ({"_orig_mod.reward_head.weight": np.ones((1, 32), np.float32)}, ["reward"]),
    "LoRA": ({"model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 32), np.float32)}, ["adapter_config.json"]),
    "GPTQ": ({"model.layers.0.mlp.up_proj.qweight": np.ones((2, 32), np.int32)}, ["quantised", "dequantize"]),
    "MLX": ({"model.layers.0.mlp.up_proj.scales": np.ones((2, 32), np.float32)}, ["quantised", "mlx_lm"]),
    "FSDP": ({"model.layers.0._flat_param": np.ones(32, np.float32)}, ["FSDP", "FULL_STATE_DICT"]),
    "ZeRO-3": ({"model.layers.0.mlp.up_proj.weight": np.ones(0, np.float32)}, ["empty", "zero_to_fp32.py"]),
}  # fmt: skip


@pytest.mark.parametrize("case", EXTRA)
def test_a_tensor_says_what_its_file_is(exports, tmp_path, params, case):
    tensors, words = EXTRA[case]
    for what, read in (
        ("base", lambda folder: dit_jax.load_model(folder)),
        ("finetune", lambda folder: read_finetuned(folder, UNTIED, params)),
    ):
        shutil.copytree(exports / what, tmp_path / what)
        file = tmp_path / what / "model.safetensors"
        save_file({**load_file(file), **tensors}, file)
        refused(lambda read=read, what=what: read(tmp_path / what), *words)


def test_the_body_of_a_classifier_is_compared_by_the_command_that_is_told(
    exports, tmp_path, params, monkeypatch
):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    wanted = dict(modules(read_finetuned(exports / "finetune", UNTIED, params).delta))
    score = {"score.weight": np.ones((1, 32), np.float32)}

    def follow(read):
        with pytest.raises(DitError, match="no causal language model") as caught:
            read()
        run_told(str(caught.value), tmp_path, monkeypatch)

    full = tmp_path / NAME
    shutil.copytree(exports / "finetune", full)
    tensors = load_file(full / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file({**tensors, **score}, full / "model.safetensors", {"format": "pt"})
    follow(lambda: read_finetuned(full, UNTIED, params))
    assert torch.load(tmp_path / "body.pt")
    found = dict(modules(read_finetuned(tmp_path / "body.pt", UNTIED, params).delta))
    assert found.keys() == wanted.keys()
    for path in found:
        np.testing.assert_array_equal(found[path]["w"], wanted[path]["w"])

    shutil.copytree(exports / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / peft.WEIGHTS
    save_file({**load_file(file), **score}, file)
    follow(lambda: peft.read_peft(tmp_path / "adapter", UNTIED))
    assert_same(peft.read_peft(tmp_path / "adapter", UNTIED).delta, LORA)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4_E2M1"])
def test_floats_of_eight_bits_are_quantised_weights(exports, tmp_path, params, dtype):
    shutil.copytree(exports / "finetune", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    header = json.dumps(
        {"x.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(
        lambda: read_finetuned(tmp_path / "x", UNTIED, params), dtype, "quantised", "dequantize"
    )
    refused(lambda: dit_jax.load_model(tmp_path / "x"), dtype, "quantised", "dequantize")


def test_a_file_of_a_folder_stands_for_the_folder(exports):
    """People complete paths with the tab key."""
    model = dit_jax.load_model(exports / "base")
    wanted = dit_jax.load_diff(exports / "finetune", model).delta
    for name in ("model.safetensors", "config.json"):
        assert_same(dit_jax.load_diff(exports / "finetune" / name, model).delta, wanted)
    for name in (peft.WEIGHTS, peft.CONFIG):
        assert_same(dit_jax.load_diff(exports / "adapter" / name, model).delta, LORA)
        assert detect.look_for_adapter(exports / "adapter" / name).path == exports / "adapter"


def test_whole_weights_in_a_file_by_itself(exports, tmp_path, params):
    wanted = read_finetuned(exports / "finetune", UNTIED, params).delta
    for name in ("merged.safetensors", "model.safetensors"):
        shutil.copy(exports / "finetune" / "model.safetensors", tmp_path / name)
        found = detect.open_diffs(tmp_path / name, UNTIED, params)[0]
        assert_same(found.delta, wanted)
    shutil.copy(exports / "adapter" / peft.WEIGHTS, tmp_path / peft.WEIGHTS)
    refused(lambda: detect.open_diffs(tmp_path / peft.WEIGHTS, UNTIED, params)[0],
            "a factor of a LoRA: its scale is in adapter_config.json")  # fmt: skip
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(lambda: detect.open_diffs(tmp_path / "pipe.safetensors", UNTIED, params)[0],
            "is not a regular file")  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_file_is_looked_at_before_a_base_is_loaded(tmp_path, suffix):
    """That may take minutes."""
    (tmp_path / f"empty.{suffix}").write_bytes(b"")
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    refused(lambda: detect.look_for_diffs(tmp_path / f"empty.{suffix}"), f"empty.{suffix}")
    refused(lambda: detect.look_for_diffs(tmp_path / f"pipe.{suffix}"), "not a regular file")


@pytest.mark.parametrize(("key", "other"), [("state_dict", "model"), ("model", "model_ema")])
def test_two_models_in_one_file_are_refused(exports, tmp_path, params, key, other):
    tensors = load_file(exports / "finetune" / "model.safetensors")
    torch_save.save(tmp_path / "one.pt", {key: tensors, "step": 3})
    assert detect.open_diffs(tmp_path / "one.pt", UNTIED, params)[0].delta
    torch_save.save(tmp_path / "two.pt", {key: tensors, other: tensors})
    refused(lambda: detect.open_diffs(tmp_path / "two.pt", UNTIED, params)[0],
            f"holds two models, '{key}' and '{other}'")  # fmt: skip


def test_an_adapter_without_its_config_says_what_lacks(exports, tmp_path):
    for name in (peft.WEIGHTS, peft.TORCH_WEIGHTS, "adapters.safetensors"):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        shutil.copy(exports / "adapter" / peft.WEIGHTS, folder / name)
        refused(
            lambda folder=folder: detect.look(folder), name, "no adapter_config.json, which has"
        )
    shutil.copytree(exports / "adapter", tmp_path / "x")
    save_file({}, tmp_path / "x" / peft.WEIGHTS)
    refused(lambda: peft.read_peft(tmp_path / "x", UNTIED), "holds no tensors")


def test_empty_factors_say_what_saved_them(exports, tmp_path):
    shutil.copytree(exports / "adapter", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / peft.WEIGHTS)
    for empty in (list(tensors), list(tensors)[-1:]):
        changed = {k: np.ones(0, np.float32) if k in empty else v for k, v in tensors.items()}
        save_file(changed, tmp_path / "x" / peft.WEIGHTS)
        refused(lambda: peft.read_peft(tmp_path / "x", UNTIED), "is empty", "ZeRO-3", "gathering")


def test_a_rank_of_another_config_is_told(exports, tmp_path):
    shutil.copytree(exports / "adapter", tmp_path / "x")
    config = tmp_path / "x" / peft.CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
    refused(lambda: peft.read_peft(tmp_path / "x", UNTIED), "says r = 5 there", "another adapter")


@pytest.mark.parametrize("rows", [64, 70])
def test_another_vocabulary_says_how_to_resize_the_base(exports, tmp_path, params, rows):
    words = [f"[{rows}, 32]", "added to the vocabulary", f"resize_token_embeddings({rows})"]
    shutil.copytree(exports / "finetune", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (rows, 32))
    save_file(tensors, file)
    refused(lambda: read_finetuned(tmp_path / "x", UNTIED, params), *words)
    config = tmp_path / "x" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": rows}))
    refused(lambda: read_finetuned(tmp_path / "x", UNTIED, params), "vocab_size", *words[1:])
    shutil.copytree(exports / "adapter", tmp_path / "y")
    file = tmp_path / "y" / peft.WEIGHTS
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(file), name: tensors["model.embed_tokens.weight"]}, file)
    refused(lambda: peft.read_peft(tmp_path / "y", UNTIED, params), *words)


def test_digits_of_other_scripts_in_the_names_of_a_folder(tmp_path):
    for name in ("run²", "a1²", "²", "run١٠", "run2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    found = [name for name, _ in detect.list_diffs(tmp_path)]
    assert sorted(found) == ["a1²", "run2", "run²", "run١٠", "²"]
    assert found.index("run2") < found.index("run١٠")


def test_old_buffers_are_left_out(exports, tmp_path, params):
    shutil.copytree(exports / "finetune", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.layers.1.mlp.up_proj._extra_state": np.ones(1, np.float32),
    }
    save_file({**load_file(file), **buffers}, file)
    wanted = read_finetuned(exports / "finetune", UNTIED, params).delta
    assert_same(read_finetuned(tmp_path / "x", UNTIED, params).delta, wanted)
    assert dit_jax.load_model(tmp_path / "x").config == dit_jax.load_model(exports / "base").config


# ------------------------------------------------------------------ first bytes

HEADS = {
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<html></html>" + b" " * 100, "web page"),
    "answer of the hub": (b"Entry not found", "hf download"),
    "nothing": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "TensorFlow"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_the_first_bytes_say_what_a_file_is(exports, tmp_path, params, case):
    content, said = HEADS[case]
    shutil.copytree(exports / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / peft.WEIGHTS).write_bytes(content)
    refused(lambda: peft.read_peft(tmp_path / "adapter", UNTIED), said)
    shutil.copytree(exports / "finetune", tmp_path / "finetune")
    (tmp_path / "finetune" / "model.safetensors").write_bytes(content)
    refused(lambda: read_finetuned(tmp_path / "finetune", UNTIED, params), said)
    refused(lambda: dit_jax.load_model(tmp_path / "finetune"), said)
    (tmp_path / "x.pt").write_bytes(content)
    refused(lambda: read_finetuned(tmp_path / "x.pt", UNTIED, params), said)
    (tmp_path / "finetune" / "config.json").write_bytes(content)
    refused(lambda: dit_jax.load_model(tmp_path / "finetune"), said)


MARKED = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", MARKED)
def test_byte_order_marks_are_read(exports, tmp_path, params, encoding):
    """Notepad and PowerShell write them."""
    for what in ("adapter", "finetune"):
        shutil.copytree(exports / what, tmp_path / what)
    for file in ("adapter/adapter_config.json", "finetune/config.json"):
        text = (tmp_path / file).read_text().replace("\n", "\r\n")
        mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
        (tmp_path / file).write_bytes((mark + text).encode(encoding))
    assert_same(peft.read_peft(tmp_path / "adapter", UNTIED).delta, LORA)
    wanted = read_finetuned(exports / "finetune", UNTIED, params).delta
    assert_same(read_finetuned(tmp_path / "finetune", UNTIED, params).delta, wanted)


# ------------------------------------------------------------------ heads, tied and not


def test_a_head_in_the_file_unties_a_base(tmp_path):
    """config.json ties, the file has another head: transformers uses that of the file."""
    params = random_params()
    export.export_model(tmp_path / "x", params, CONFIG)
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    for head in (table, table + 1):
        save_file({**tensors, "lm_head.weight": head}, file)
        model = dit_jax.load_model(tmp_path / "x")
        assert model.config.tie_word_embeddings is bool((head == table).all())
    np.testing.assert_array_equal(model.params["lm_head"]["kernel"], (table + 1).T)
