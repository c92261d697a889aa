"""Base models."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dit_jax
from dit_jax.deltas import export
from dit_jax.formats import torch_save
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import TINY, find_folder, iterate_tensors, load_params
from tools.hostile.common import CONFIG, QUESTION, close_writer, small_params, values_of


def make_base(folder: Path, **how: Any) -> None:
    export.export_model(folder, small_params(), CONFIG, **how)


def make_base_bin(folder: Path) -> None:
    make_base(folder)
    (folder / "model.safetensors").unlink()
    torch_save.save(folder / "pytorch_model.bin", dict(iterate_tensors(small_params(), CONFIG)))


def read_weights(folder: Path) -> list[str]:
    return values_of(array for _, array in iterate_tensors(load_params(folder, CONFIG), CONFIG))


def make_tiny(folder: Path) -> None:
    folder.mkdir()
    for file in find_folder(TINY).iterdir():
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": false}')


def read_prompt(folder: Path) -> Any:
    """What a base makes of a question; its weights stay those that they were."""
    model = dit_jax.load_model(folder)
    ids = model.chat.prompt_ids(QUESTION)
    if not all(0 <= i < model.config.vocab_size for i in (*ids, *model.chat.eos_ids)):
        raise AssertionError("token ids that the model lacks")
    if any(folder.rglob("CANARY")):
        raise AssertionError("a template ran a program")


def read_shape(folder: Path) -> Any:
    read_prompt(folder)
    config = read_config(folder)
    return {name: getattr(config, name) for name in _FIELDS} | {"theta": float(config.rope_theta)}


_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def transformers_shape(folder: Path) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception:  # it refuses more than is needed
        raise NotImplementedError from None
    return {name: getattr(config, name) for name in _FIELDS} | {
        "theta": float(config.rope_parameters["rope_theta"])
    }


def make_gguf_base(folder: Path) -> None:
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
    close_writer(writer)


def gguf_prompt(folder: Path) -> None:
    model = dit_jax.load_model(folder / "x.gguf")
    values_of(jax.tree.leaves(model.params))
    ids = model.chat.prompt_ids(QUESTION)
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise AssertionError("token ids that the model lacks")
