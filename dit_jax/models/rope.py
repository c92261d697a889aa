"""Rotary position embedding: its frequencies, and the rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.layer_kinds import Kind, LayerKind, layer_kinds, pick_kind


def rotate(
    x_BxTxNxH: jax.Array,
    positions_BxT: jax.Array,
    frequency: jax.Array,
    amplitude: float | jax.Array = 1.0,
) -> jax.Array:
    """Rotates pairs (i, i + H/2) by position * frequency[i], angles in fp32.

    Args:
        amplitude: multiplies what is rotated (YaRN).
    """
    angle = positions_BxT.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if not isinstance(amplitude, float) or amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    # transformers casts cos and sin to the activation dtype before the products.
    cos, sin = cos.astype(x_BxTxNxH.dtype), sin.astype(x_BxTxNxH.dtype)
    first, second = jnp.split(x_BxTxNxH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def angles(config: DecoderConfig, kind: Kind) -> tuple[jax.Array, float | jax.Array]:
    """Of a layer: radians per position [H/2] in fp32, and the factor of cosines and sines (YaRN's, else 1)."""
    half, kinds = config.head_dim // 2, layer_kinds(config)[0]
    amplitudes = [_amplitude(dict(each.rope_scaling)) for each in kinds]
    amplitude = pick_kind(amplitudes if len(set(amplitudes)) > 1 else amplitudes[:1], kind)
    if len(kinds) == 1 and not kinds[0].rope_scaling:
        return kinds[0].rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half), amplitude
    tables = [_frequency(each, half).astype(np.float32) for each in kinds]
    return jnp.asarray(pick_kind(tables, kind)), amplitude


def _amplitude(scaling: dict[str, float | str]) -> float:
    if scaling.get("rope_type") != "yarn":
        return 1.0
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def size(weight: float) -> float:
        return max(1.0, 0.1 * weight * math.log(float(scaling["factor"])) + 1)

    one, all_dim = (float(scaling.get(name, 0)) for name in ("mscale", "mscale_all_dim"))
    return size(one) / size(all_dim) if one and all_dim else size(1)


def _frequency(kind: LayerKind, half: int) -> np.ndarray:
    """Radians per position, as transformers' `modeling_rope_utils` defines each scaling."""
    plain = kind.rope_theta ** (-np.arange(half) / half)
    number = {k: float(v) for k, v in kind.rope_scaling if k != "rope_type"}
    match dict(kind.rope_scaling).get("rope_type", "default"):
        case "default":
            return plain
        case "linear":
            return plain / number["factor"]
        case "llama3":
            return llama3_frequency(plain, number)
        case _:
            return _yarn(kind.rope_theta, plain, number)


def llama3_frequency(plain: np.ndarray, number: dict[str, float]) -> np.ndarray:
    """Llama 3.1: long waves are stretched by `factor`, short ones stay, those between are a mixture."""
    low, high = number["low_freq_factor"], number["high_freq_factor"]
    turns = number["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / number["factor"]


def _yarn(theta: float, plain: np.ndarray, number: dict[str, float]) -> np.ndarray:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions, between those of `beta_fast` and of `beta_slow` turns."""
    half, context = len(plain), number["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = (dimension(number.get(*name)) for name in (("beta_fast", 32), ("beta_slow", 1)))
    if number.get("truncate", 1):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretched = np.clip((np.arange(half) - low) / (high - low or 0.001), 0, 1)
    return (1 - stretched) * plain + stretched * plain / number["factor"]
