"""Families of models that are not computed here, by what people call them."""

from typing import Any

# Entries of config.json that only mixtures of experts have.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MIXTURE, _HYBRID = "a mixture of experts", "with hybrid (linear and full) attention"
_SEES = "a model of images and text"
# By the start of the model_type; the longest start counts.
_OTHERS = {
    "qwen3_moe": f"Qwen3, {_MIXTURE}",
    "qwen3_next": f"Qwen3-Next, {_HYBRID}",
    "qwen3_5": f"Qwen3.5 or 3.6, {_HYBRID}",
    "qwen3_vl": f"Qwen3-VL, {_SEES}",
    "qwen3_omni": f"Qwen3-Omni, {_SEES}",
    "qwen2_moe": f"Qwen2, {_MIXTURE}",
    "qwen2_vl": f"Qwen2-VL, {_SEES}",
    "qwen2_5_vl": f"Qwen2.5-VL, {_SEES}",
    "qwen": "the first Qwen",
    "llama4": f"Llama 4, {_MIXTURE}",
    "mllama": f"Llama 3.2 Vision, {_SEES}",
    "mixtral": f"Mixtral, {_MIXTURE}",
    "mistral3": f"Mistral 3, {_SEES}",
    "ministral": "Ministral",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2, with softcapped logits",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "phi": "Phi",
    "olmo": "OLMo",
    "olmoe": f"OLMoE, {_MIXTURE}",
    "gpt_oss": f"gpt-oss, {_MIXTURE}",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "gpt2": "GPT-2",
    "deepseek": f"DeepSeek, {_MIXTURE}",
    "glm": "GLM",
    "granite": "Granite",
    "smollm3": "SmolLM3, of which some layers have no rope",
    "falcon": "Falcon",
    "cohere": "Command R or Aya",
    "mamba": "Mamba, without attention",
}


def what_it_is(kind: Any) -> str:
    """(what a model_type stands for), for messages; "" where it is not known."""
    start = max((k for k in _OTHERS if str(kind).startswith(k)), key=len, default=None)
    if start is not None:
        return f" ({_OTHERS[start]})"
    return f" ({_MIXTURE})" if "moe" in str(kind) else ""
