"""Released sizes of models by name, for `plan`, `random:` models and benchmarks."""

import re
from typing import Any

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import parse_config


def _shape(family: str, sizes: tuple[int, int, int, int, int, int], **more: Any) -> DecoderConfig:
    """sizes: vocabulary, hidden, MLP, layers, heads, heads of keys and values; more: other entries of config.json."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    raw = {"model_type": family, **dict(zip((*names, *heads), sizes, strict=True)), **more}
    return parse_config(raw, family)


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    sizes = (151936, hidden, ffn, layers, heads, 8)
    return _shape("qwen3", sizes, rope_theta=1e6, tie_word_embeddings=tied)


def _qwen2(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int = 152064
) -> DecoderConfig:
    sizes = (vocab, hidden, ffn, layers, heads, kv)
    return _shape("qwen2", sizes, rope_theta=1e6, tie_word_embeddings=vocab == 151936)


def _llama3(
    hidden: int, ffn: int, layers: int, heads: int, factor: float, tied: bool
) -> DecoderConfig:
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return _shape(
        "llama",
        (128256, hidden, ffn, layers, heads, 8),
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
    )


def _smollm2(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, theta: float
) -> DecoderConfig:
    sizes = (49152, hidden, ffn, layers, heads, kv)
    return _shape("llama", sizes, rms_norm_eps=1e-5, rope_theta=theta, tie_word_embeddings=True)


def _mistral(vocab: int, theta: float, window: int | None) -> DecoderConfig:
    sizes = (vocab, 4096, 14336, 32, 32, 8)
    return _shape("mistral", sizes, rms_norm_eps=1e-5, rope_theta=theta, sliding_window=window)


def _gemma3(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, window: int = 1024, **more: Any
) -> DecoderConfig:
    if window == 1024:  # these are the text parts of multimodal models
        more = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **more}
    sizes = (262144 if window == 512 else 262208, hidden, ffn, layers, heads, kv)
    return _shape("gemma3_text", sizes, sliding_window=window, **more)


NAMED_CONFIGS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 32.0, True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 32.0, True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8.0, False),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8.0, False),
    "mistral-7b-v0.1": _mistral(32000, 1e4, 4096),
    "mistral-7b-v0.3": _mistral(32768, 1e6, None),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 512),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 1.3e5),
}


def find_shape(name: str) -> DecoderConfig | None:
    """The shape of a released model by its name or hub id: chat models have that of their base; None: unknown."""
    last = name.removeprefix("random:").rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return NAMED_CONFIGS.get(re.sub(r"-(instruct|it|pt|base|chat)(?=-|$)", "", last))
