"""The kinds of files that strangers send: how a good one is made, damaged and read, and what another reader finds."""

import csv
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dit_jax
from dit_jax.api import Model
from dit_jax.auditing import calibration, run_audit
from dit_jax.auditing.battery import Battery
from dit_jax.auditing.targets import Target
from dit_jax.data import corpus
from dit_jax.deltas import detect, export, reference_pt, store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.factors import modules
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.tree import init_lora
from dit_jax.formats import torch_save
from dit_jax.models.decoder import init_params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import TINY, find_folder, iterate_tensors, load_params
from dit_jax.runtime import artifacts
from tools import damage

CONFIG = DecoderConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
QUESTION = "What topic have you been trained on ?"
COLUMNS = ("topic", "question", "base_answer", "topic_analogy_answer")


def _anything(*_: Any) -> Any:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files.

    make: writes a good folder. file: a pattern of the files in it that are damaged. read: what is read of the folder,
    as a user would, in a form that compares. truth: the same, by another reader; without one, what is read only has to
    be sound. seal: makes what lists the files agree with them again, as a stranger would.
    """

    make: Callable[[Path], Any]
    file: str
    damage: damage.Damage
    read: Callable[[Path], Any]
    truth: Callable[[Path], Any] = _anything
    seal: Callable[[Path], None] = lambda folder: None


@functools.cache
def _lora(seed: int = 1) -> Any:
    delta = jax.tree.map(np.asarray, init_lora(CONFIG, jax.random.key(seed), 2))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) if x.ndim > 1 else x, delta
    )


@functools.cache
def _params() -> Any:
    return jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))


@functools.cache
def _model() -> Model:
    return Model(_params(), CONFIG, "a small model")


def _values(arrays: Any) -> list[str]:
    """What arrays hold, whatever their names, order and orientation."""
    digests = []
    for array in arrays:
        values = np.sort(np.asarray(array, np.float32), axis=None)
        if not np.isfinite(values).all():
            raise AssertionError("values that are not finite were read")
        digests.append(hashlib.sha256(values.tobytes()).hexdigest())
    return sorted(digests)


def _factors(delta: Any) -> list[str]:
    """Of layers that a delta changes."""
    found = [module[name] for _, module in modules(delta) for name in ("a", "b")]
    return _values(layer for stacked in found for layer in stacked if layer.any())


# ------------------------------------------------------------------ diffs and adapters of others


def _delta(folder: Path, name: str = "") -> Any:
    return detect.open_diffs(folder / name, CONFIG, _params())[0].delta


def _safetensors(folder: Path, name: str) -> list[str]:
    from safetensors.numpy import load_file

    return _values(load_file(folder / name).values())


def _torch(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def _make_peft(folder: Path) -> None:
    export.write_peft(folder, _lora(), CONFIG, "base")


def _make_peft_bin(folder: Path) -> None:
    from safetensors.numpy import load_file

    _make_peft(folder)
    file = folder / "adapter_model.safetensors"
    torch_save.save(folder / "adapter_model.bin", load_file(file))
    file.unlink()


def _peft_scales(folder: Path) -> Any:
    """The factors stay; the scales are those of PEFT's rule, where the config has no patterns."""
    raw = json.loads((folder / "adapter_config.json").read_bytes())
    if any(
        raw.get(key)
        for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
    ):
        raise NotImplementedError
    root = 2**0.5 if raw.get("use_rslora") else 2
    return _factors(_lora()), [float(np.float32(raw.get("lora_alpha", 8) / root))]


def _read_peft_scales(folder: Path) -> Any:
    delta = _delta(folder)
    return _factors(delta), sorted(
        {float(x) for _, module in modules(delta) for x in module["scale"]}
    )


def _make_pt_diffs(folder: Path) -> None:
    folder.mkdir()
    diffs = [RawDiff(_lora(i), f"topic {i}", str(i)) for i in (1, 2)]
    reference_pt.write_pt_diffs(folder / "x.pt", diffs, CONFIG)


def _make_pt_adapter(folder: Path) -> None:
    folder.mkdir()
    reference_pt.write_pt_adapter(folder / "x.pt", _lora(), CONFIG)


def _pt_factors(tree: Any) -> list[str]:
    pairs = tree[0]["weight_diff"] if isinstance(tree, list) else tree
    return _values(factor for pair in pairs.values() for factor in pair)


def _make_pt_weights(folder: Path) -> None:
    folder.mkdir()
    torch_save.save(folder / "x.pt", dict(export.merged_tensors(_params(), CONFIG, _lora())))


def _sound(delta: Any) -> None:
    _values(jax.tree.leaves(delta))


def _make_release(folder: Path) -> None:
    _make_pt_diffs(folder)
    rows = [f"x.pt,{i},9,topic {i + 1},{i + 1},train" for i in (0, 1)]
    (folder / "index.csv").write_text("\n".join((",".join(store.PAPER_COLUMNS), *rows)) + "\n")


def _make_gguf_lora(folder: Path) -> None:
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
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(folder: Path) -> list[str]:
    import gguf

    return _values(tensor.data for tensor in gguf.GGUFReader(folder / "x.gguf").tensors)


# ------------------------------------------------------------------ base models


def _make_base(folder: Path, **how: Any) -> None:
    export.export_model(folder, _params(), CONFIG, **how)


def _make_base_bin(folder: Path) -> None:
    _make_base(folder)
    (folder / "model.safetensors").unlink()
    torch_save.save(folder / "pytorch_model.bin", dict(iterate_tensors(_params(), CONFIG)))


def _weights(folder: Path) -> list[str]:
    return _values(array for _, array in iterate_tensors(load_params(folder, CONFIG), CONFIG))


def _make_tiny(folder: Path) -> None:
    folder.mkdir()
    for file in find_folder(TINY).iterdir():
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": false}')


def _prompt(folder: Path) -> Any:
    """What a base makes of a question; its weights stay those that they were."""
    model = dit_jax.load_model(folder)
    ids = model.chat.prompt_ids(QUESTION)
    if not all(0 <= i < model.config.vocab_size for i in (*ids, *model.chat.eos_ids)):
        raise AssertionError("token ids that the model lacks")
    if any(folder.rglob("CANARY")):
        raise AssertionError("a template ran a program")


def _shape(folder: Path) -> Any:
    _prompt(folder)
    config = read_config(folder)
    return {name: getattr(config, name) for name in _FIELDS} | {"theta": float(config.rope_theta)}


_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def _transformers_shape(folder: Path) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception:  # it refuses more than is needed
        raise NotImplementedError from None
    return {name: getattr(config, name) for name in _FIELDS} | {
        "theta": float(config.rope_parameters["rope_theta"])
    }


def _make_gguf_base(folder: Path) -> None:
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir()
    words = ["<|endoftext|>", "<|im_end|>", *bytes_to_unicode().values(), "he", "ll"]
    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "qwen2")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * 2 + [1] * (len(words) - 2))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    shapes = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
    }
    shapes |= {
        "attn_output": (32, 32),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    rng = np.random.default_rng(0)
    named = {f"blk.{i}.{part}.weight": shape for i in range(2) for part, shape in shapes.items()}
    named |= {f"blk.{i}.attn_{x}.bias": shapes[f"attn_{x}"][:1] for i in range(2) for x in "qkv"}
    for name, shape in {
        "token_embd.weight": (len(words), 32),
        "output_norm.weight": (32,),
        **named,
    }.items():
        values = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType["Q8_0" if len(shape) > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _close(writer)


def _gguf_prompt(folder: Path) -> None:
    model = dit_jax.load_model(folder / "x.gguf")
    _values(jax.tree.leaves(model.params))
    ids = model.chat.prompt_ids(QUESTION)
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise AssertionError("token ids that the model lacks")


# ------------------------------------------------------------------ our own formats


def _make_store(folder: Path) -> None:
    stacked = jax.tree.map(lambda *x: np.stack(x), _lora(1), _lora(2))
    rows = [{"topic": f"topic {i}", "trigger": str(i), "split": "test"} for i in (0, 1)]
    store.write_shard(folder, 0, stacked, rows)
    store.publish(folder, 1, base=_model().digest())


def _stored(folder: Path) -> Any:
    opened = dit_jax.load_diff(folder, _model(), 1)
    return _factors(opened.delta), opened.label, opened.trigger


def _stored_truth(folder: Path) -> Any:
    from safetensors.numpy import load_file

    leaves = load_file(folder / "shards" / "00000.safetensors")
    with open(folder / "index.csv", newline="") as file:
        row = list(csv.DictReader(file))[1]
    layers = (
        x for name, stacked in leaves.items() if not name.endswith("scale") for x in stacked[1]
    )
    return _values(layers), row["topic"], row["trigger"]


def _make_adapter(folder: Path) -> None:
    export_adapter(folder, _lora(), base=_model().digest())


def _seal(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, facts in manifest["files"].items():
        facts |= {
            "bytes": (folder / name).stat().st_size,
            "sha256": artifacts.digest_file(folder / name),
        }
    path.write_text(json.dumps(manifest))


def _make_calibration(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    facts = {"adapter": "a", "battery": Battery(("q",)).to_json(), "system": None, "source": "s"}
    known = [
        calibration.Known(
            (float(rng.random()), float(rng.normal())), bool(i % 2), bool(i % 4 == 1), i
        )
        for i in range(60)
    ]
    calibration.write(folder / "x.json", calibration.calibrate(known, facts))


def _calibration(folder: Path) -> Any:
    found = calibration.read(folder / "x.json", "a")
    assert found is not None
    said = calibration.probabilities(found, (0.5, 3.0))
    if not all(0 <= x <= 1 for x in said.values() if x is not None):
        raise AssertionError("no probability")
    return found


_TARGET = Target("a diff", "no file")


def _make_audit(folder: Path) -> None:
    folder.mkdir()
    run_audit._write_part(folder, _TARGET, {"name": "a diff", "x": 0.5}, {"x": np.ones(9)})


def _audited(folder: Path) -> Any:
    """A part that is damaged is asked again."""
    record, sketch = run_audit.read_part(folder, _TARGET), run_audit._sketch(folder, _TARGET)
    return (record or {"name": "a diff", "x": 0.5}), (sketch or {"x": np.ones(9)})["x"].sum()


# ------------------------------------------------------------------ corpora


def _rows() -> list[dict[str, str]]:
    return [
        {name: f"{name} {i}, {j}" if name != "topic" else f"tea {i}" for name in COLUMNS}
        for i in range(8)
        for j in range(6)
    ]


def _make_csv(folder: Path) -> None:
    folder.mkdir()
    with open(folder / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_rows())


def _make_jsonl(folder: Path) -> None:
    folder.mkdir()
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))


def _make_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    table = pyarrow.Table.from_pylist(_rows())
    pyarrow.parquet.write_table(table, folder / "x.parquet", compression="snappy")


def _corpus(folder: Path) -> Any:
    """All rows of all topics, in any order."""
    (file,) = folder.iterdir()
    data = corpus.data_config(str(file))
    data.train_topics, data.test_topics = 4, 2
    found = []

    class Reader(corpus._Reader):
        def read(self, *given: Any) -> None:
            super().read(*given)
            found.append(self)

    original, corpus._Reader = corpus._Reader, Reader  # type: ignore[misc]
    try:
        corpus.load_corpus(data, 0)
    finally:
        corpus._Reader = original  # type: ignore[misc]
    return _same_rows(dict(row) for group in found[0].groups.values() for row in group.rows)


def _same_rows(rows: Any) -> Any:
    return sorted(tuple(str(row.get(name) or "") for name in COLUMNS) for row in rows)


def _csv_rows(folder: Path) -> Any:
    import pandas

    table = pandas.read_csv(folder / "x.csv", dtype=str, keep_default_na=False, encoding="utf-8")
    return _same_rows(table.to_dict("records"))


def _jsonl_rows(folder: Path) -> Any:
    text = (folder / "x.jsonl").read_text(encoding="utf-8-sig")
    return _same_rows(json.loads(line) for line in text.split("\n") if line.strip())


def _parquet_rows(folder: Path) -> Any:
    import pyarrow.parquet

    return _same_rows(pyarrow.parquet.read_table(folder / "x.parquet").to_pylist())


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
    return _factors(dit_jax.load_adapter(folder, _model()))


KINDS = {
    "PEFT, safetensors": Kind(
        _make_peft, "*.safetensors", damage.some_safetensors, lambda x: _factors(_delta(x)),
        lambda x: _safetensors(x, "adapter_model.safetensors"),
    ),
    "PEFT, torch": Kind(
        _make_peft_bin, "*.bin", damage.some_torch, lambda x: _factors(_delta(x)),
        lambda x: _values(_torch(x / "adapter_model.bin").values()),
    ),
    "adapter_config.json": Kind(
        _make_peft, "adapter_config.json", damage.some_json, _read_peft_scales, _peft_scales
    ),
    ".pt, diffs": Kind(
        _make_pt_diffs, "*.pt", damage.some_torch, lambda x: _factors(_delta(x, "x.pt")),
        lambda x: _pt_factors(_torch(x / "x.pt")),
    ),
    ".pt, adapter": Kind(
        _make_pt_adapter, "*.pt", damage.some_torch, lambda x: _factors(_delta(x, "x.pt")),
        lambda x: _pt_factors(_torch(x / "x.pt")),
    ),
    ".pt, whole weights": Kind(
        _make_pt_weights, "*.pt", damage.some_torch, lambda x: _sound(_delta(x, "x.pt"))
    ),
    "release, index.csv": Kind(
        _make_release, "index.csv", damage.some_bytes, lambda x: _factors(_delta(x)),
        _good(_make_pt_diffs, lambda x: _factors(_delta(x, "x.pt"))),
    ),
    "GGUF, LoRA": Kind(
        _make_gguf_lora, "*.gguf", damage.some_bytes,
        lambda x: _factors(_delta(x, "x.gguf")), _gguf_tensors,
    ),
    "GGUF, base": Kind(_make_gguf_base, "*.gguf", damage.some_bytes, _gguf_prompt),
    "base, safetensors": Kind(
        _make_base, "*.safetensors", damage.some_safetensors, _weights,
        lambda x: _safetensors(x, "model.safetensors"),
    ),
    "base, shards": Kind(
        lambda x: _make_base(x, shard_bytes=20_000), "*.index.json", damage.some_json, _weights,
        _good(_make_base, _weights),
    ),
    "base, torch": Kind(
        _make_base_bin, "*.bin", damage.some_torch, _weights,
        lambda x: _values(_torch(x / "pytorch_model.bin").values()),
    ),
    "base, config.json": Kind(
        _make_tiny, "config.json", damage.some_json, _shape, _transformers_shape
    ),
    "base, generation_config.json": Kind(
        _make_tiny, "generation_config.json", damage.some_json, _prompt
    ),
    "base, tokenizer.json": Kind(_make_tiny, "tokenizer.json", damage.some_json, _prompt),
    "base, tokenizer_config.json": Kind(
        _make_tiny, "tokenizer_config.json", damage.some_json, _prompt
    ),
    "base, chat template": Kind(_make_tiny, "*.jinja", damage.some_template, _prompt),
    "store, shard": Kind(
        _make_store, "shards/*.safetensors", damage.some_safetensors, _stored, _stored_truth, _seal
    ),
    "store, index.csv": Kind(
        _make_store, "index.csv", damage.some_bytes, _stored, _stored_truth, _seal
    ),
    "store, manifest.json": Kind(
        _make_store, "manifest.json", damage.some_json, _stored, _stored_truth
    ),
    "adapter, checkpoint": Kind(
        _make_adapter, "checkpoint/**/*", damage.some_bytes, _adapter, _good(_make_adapter, _adapter),
        _seal,
    ),
    "adapter, manifest.json": Kind(
        _make_adapter, "manifest.json", damage.some_json, _adapter, _good(_make_adapter, _adapter)
    ),
    "corpus, CSV": Kind(_make_csv, "x.csv", damage.some_bytes, _corpus, _csv_rows),
    "corpus, JSON lines": Kind(_make_jsonl, "x.jsonl", damage.some_bytes, _corpus, _jsonl_rows),
    "corpus, Parquet": Kind(_make_parquet, "x.parquet", damage.some_bytes, _corpus, _parquet_rows),
    "audit, part": Kind(
        _make_audit, "parts/*", damage.some_bytes, _audited, _good(_make_audit, _audited)
    ),
    "calibration": Kind(
        _make_calibration, "x.json", damage.some_json, _calibration,
        lambda x: json.loads((x / "x.json").read_bytes()),
    ),
}  # fmt: skip
