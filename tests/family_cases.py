"""Tiny random models of every family, made by transformers."""

import functools

import numpy as np
import pytest

import dit_jax

VOCAB = 211
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 2e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# Name -> (the class of transformers, what its config says beside the common sizes).
MODELS = {
    "llama": ("Llama", {"rope_theta": 3e5, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 24}),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}},
    ),
    "llama_biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "rope_theta": 3e5},
    ),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": (
        "Llama",
        {
            "rope_parameters": {
                **YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8.0, "truncate": False,
            }
        },
    ),
    "qwen2": ("Qwen2", {"rope_theta": 3e5, "tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        {"rope_theta": 3e5, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "mistral": ("Mistral", {"rope_theta": 3e5, "sliding_window": 16}),
    "mistral_head_dim": ("Mistral", {"rope_theta": 3e5, "sliding_window": None, "head_dim": 20}),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 8,
            "head_dim": 20,
            "query_pre_attn_scalar": 30,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    "gemma3_one_window": ("Gemma3Text", {"sliding_window": 16, "head_dim": 12}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
}  # fmt: skip


def make(name: str, folder, **more):
    """A tiny random model of transformers, saved in a folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, options = MODELS[name]
    options = {
        "vocab_size": VOCAB,
        **SIZES,
        "initializer_range": 0.2,
        **options,
        **more,
    }
    if "rope_theta" in options:
        theta = options.pop("rope_theta")
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    model = family.removesuffix("Text")
    theirs = getattr(transformers, f"{model}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key or key.endswith(".bias"):  # ones and zeros would hide a forgotten one
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


# One of each family: what else there is of rope and biases is seen in logits.
FAMILY = ("llama", "qwen2", "qwen2_windows", "mistral", "gemma3")


def make_pairs(tmp_path_factory):
    """name -> (transformers model, our model of the same folder), each made once."""

    @functools.cache
    def pair(name):
        folder = tmp_path_factory.mktemp(name)
        return make(name, folder), dit_jax.load_model(folder)

    return pair


def their_logits(theirs, tokens, mask=None):
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return theirs(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def assert_near(ours, expected):
    """Within 1e-4 of the largest logit."""
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
