"""Diffs and adapters in the formats of others."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.deltas import detect, export, reference_pt, store
from dit_jax.deltas.factors import modules
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.formats import torch_save
from tools.hostile.common import (
    CONFIG,
    close_writer,
    factors_of,
    small_lora,
    small_params,
    values_of,
)


def read_delta(folder: Path, name: str = "") -> Any:
    return detect.open_diffs(folder / name, CONFIG, small_params())[0].delta


def read_safetensors(folder: Path, name: str) -> list[str]:
    from safetensors.numpy import load_file

    return values_of(load_file(folder / name).values())


def torch_load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def make_peft(folder: Path) -> None:
    export.write_peft(folder, small_lora(), CONFIG, "base")


def make_peft_bin(folder: Path) -> None:
    from safetensors.numpy import load_file

    make_peft(folder)
    file = folder / "adapter_model.safetensors"
    torch_save.save(folder / "adapter_model.bin", load_file(file))
    file.unlink()


def peft_scales(folder: Path) -> Any:
    """The factors stay; the scales are those of PEFT's rule, where the config has no patterns."""
    raw = json.loads((folder / "adapter_config.json").read_bytes())
    if any(
        raw.get(key)
        for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
    ):
        raise NotImplementedError
    root = 2**0.5 if raw.get("use_rslora") else 2
    return factors_of(small_lora()), [float(np.float32(raw.get("lora_alpha", 8) / root))]


def read_peft_scales(folder: Path) -> Any:
    delta = read_delta(folder)
    return factors_of(delta), sorted(
        {float(x) for _, module in modules(delta) for x in module["scale"]}
    )


def make_pt_diffs(folder: Path) -> None:
    folder.mkdir()
    diffs = [RawDiff(small_lora(i), f"topic {i}", str(i)) for i in (1, 2)]
    reference_pt.write_pt_diffs(folder / "x.pt", diffs, CONFIG)


def make_pt_adapter(folder: Path) -> None:
    folder.mkdir()
    reference_pt.write_pt_adapter(folder / "x.pt", small_lora(), CONFIG)


def pt_factors(tree: Any) -> list[str]:
    pairs = tree[0]["weight_diff"] if isinstance(tree, list) else tree
    return values_of(factor for pair in pairs.values() for factor in pair)


def make_pt_weights(folder: Path) -> None:
    folder.mkdir()
    torch_save.save(
        folder / "x.pt", dict(export.merged_tensors(small_params(), CONFIG, small_lora()))
    )


def check_sound(delta: Any) -> None:
    values_of(jax.tree.leaves(delta))


def make_release(folder: Path) -> None:
    make_pt_diffs(folder)
    rows = [f"x.pt,{i},9,topic {i + 1},{i + 1},train" for i in (0, 1)]
    (folder / "index.csv").write_text("\n".join((",".join(store.PAPER_COLUMNS), *rows)) + "\n")


def make_gguf_lora(folder: Path) -> None:
    import gguf

    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(0)
    for layer in range(CONFIG.num_hidden_layers):
        for part, inputs, outputs in (("ffn_down", 48, 32), ("attn_v", 32, 32), ("ffn_up", 32, 48)):
            name = f"blk.{layer}.{part}.weight"
            writer.add_tensor(f"{name}.lora_a", rng.normal(size=(2, inputs)).astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", rng.normal(size=(outputs, 2)).astype(np.float32))
    close_writer(writer)


def gguf_tensors(folder: Path) -> list[str]:
    import gguf

    return values_of(tensor.data for tensor in gguf.GGUFReader(folder / "x.gguf").tensors)
