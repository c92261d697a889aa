"""The kinds of files that strangers send: how a good one is made, damaged and read, and what another reader finds."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dit_jax
from tools.hostile import damage
from tools.hostile.bases import (
    gguf_prompt,
    make_base,
    make_base_bin,
    make_gguf_base,
    make_tiny,
    read_prompt,
    read_shape,
    read_weights,
    transformers_shape,
)
from tools.hostile.common import Kind, factors_of, small_model, values_of
from tools.hostile.corpora import (
    csv_rows,
    jsonl_rows,
    make_csv,
    make_jsonl,
    make_parquet,
    parquet_rows,
    read_corpus,
)
from tools.hostile.others import (
    check_sound,
    gguf_tensors,
    make_gguf_lora,
    make_peft,
    make_peft_bin,
    make_pt_adapter,
    make_pt_diffs,
    make_pt_weights,
    make_release,
    peft_scales,
    pt_factors,
    read_delta,
    read_peft_scales,
    read_safetensors,
    torch_load,
)
from tools.hostile.own import (
    make_adapter,
    make_audit,
    make_calibration,
    make_store,
    read_audit,
    read_calibration,
    read_store,
    seal_folder,
    stored_truth,
)


def _good(make: Callable[[Path], Any], read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """What is read of a good folder: whatever is damaged, nothing else may be read."""

    @functools.cache
    def expected() -> Any:
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            make(Path(place) / "good")
            return read(Path(place) / "good")

    return lambda folder: expected()


def _adapter(folder: Path) -> Any:
    return factors_of(dit_jax.load_adapter(folder, small_model()))


KINDS = {
    "PEFT, safetensors": Kind(
        make_peft, "*.safetensors", damage.some_safetensors, lambda x: factors_of(read_delta(x)),
        lambda x: read_safetensors(x, "adapter_model.safetensors"),
    ),
    "PEFT, torch": Kind(
        make_peft_bin, "*.bin", damage.some_torch, lambda x: factors_of(read_delta(x)),
        lambda x: values_of(torch_load(x / "adapter_model.bin").values()),
    ),
    "adapter_config.json": Kind(
        make_peft, "adapter_config.json", damage.some_json, read_peft_scales, peft_scales
    ),
    ".pt, diffs": Kind(
        make_pt_diffs, "*.pt", damage.some_torch, lambda x: factors_of(read_delta(x, "x.pt")),
        lambda x: pt_factors(torch_load(x / "x.pt")),
    ),
    ".pt, adapter": Kind(
        make_pt_adapter, "*.pt", damage.some_torch, lambda x: factors_of(read_delta(x, "x.pt")),
        lambda x: pt_factors(torch_load(x / "x.pt")),
    ),
    ".pt, whole weights": Kind(
        make_pt_weights, "*.pt", damage.some_torch, lambda x: check_sound(read_delta(x, "x.pt"))
    ),
    "release, index.csv": Kind(
        make_release, "index.csv", damage.some_bytes, lambda x: factors_of(read_delta(x)),
        _good(make_pt_diffs, lambda x: factors_of(read_delta(x, "x.pt"))),
    ),
    "GGUF, LoRA": Kind(
        make_gguf_lora, "*.gguf", damage.some_bytes,
        lambda x: factors_of(read_delta(x, "x.gguf")), gguf_tensors,
    ),
    "GGUF, base": Kind(make_gguf_base, "*.gguf", damage.some_bytes, gguf_prompt),
    "base, safetensors": Kind(
        make_base, "*.safetensors", damage.some_safetensors, read_weights,
        lambda x: read_safetensors(x, "model.safetensors"),
    ),
    "base, shards": Kind(
        lambda x: make_base(x, shard_bytes=20_000), "*.index.json", damage.some_json, read_weights,
        _good(make_base, read_weights),
    ),
    "base, torch": Kind(
        make_base_bin, "*.bin", damage.some_torch, read_weights,
        lambda x: values_of(torch_load(x / "pytorch_model.bin").values()),
    ),
    "base, config.json": Kind(
        make_tiny, "config.json", damage.some_json, read_shape, transformers_shape
    ),
    "base, generation_config.json": Kind(
        make_tiny, "generation_config.json", damage.some_json, read_prompt
    ),
    "base, tokenizer.json": Kind(make_tiny, "tokenizer.json", damage.some_json, read_prompt),
    "base, tokenizer_config.json": Kind(
        make_tiny, "tokenizer_config.json", damage.some_json, read_prompt
    ),
    "base, chat template": Kind(make_tiny, "*.jinja", damage.some_template, read_prompt),
    "store, shard": Kind(
        make_store, "shards/*.safetensors", damage.some_safetensors, read_store, stored_truth, seal_folder
    ),
    "store, index.csv": Kind(
        make_store, "index.csv", damage.some_bytes, read_store, stored_truth, seal_folder
    ),
    "store, manifest.json": Kind(
        make_store, "manifest.json", damage.some_json, read_store, stored_truth
    ),
    "adapter, checkpoint": Kind(
        make_adapter, "checkpoint/**/*", damage.some_bytes, _adapter, _good(make_adapter, _adapter),
        seal_folder,
    ),
    "adapter, manifest.json": Kind(
        make_adapter, "manifest.json", damage.some_json, _adapter, _good(make_adapter, _adapter)
    ),
    "corpus, CSV": Kind(make_csv, "x.csv", damage.some_bytes, read_corpus, csv_rows),
    "corpus, JSON lines": Kind(make_jsonl, "x.jsonl", damage.some_bytes, read_corpus, jsonl_rows),
    "corpus, Parquet": Kind(make_parquet, "x.parquet", damage.some_bytes, read_corpus, parquet_rows),
    "audit, part": Kind(
        make_audit, "parts/*", damage.some_bytes, read_audit, _good(make_audit, read_audit)
    ),
    "calibration": Kind(
        make_calibration, "x.json", damage.some_json, read_calibration,
        lambda x: json.loads((x / "x.json").read_bytes()),
    ),
}  # fmt: skip
