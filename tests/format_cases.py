"""Small models, deltas and files that the tests of the foreign formats share."""

import dataclasses

import ml_dtypes
import numpy as np

from dit_jax.models.families import hf_config
from dit_jax.models.modules import projections as lora_modules
from dit_jax.models.modules import set_at
from tools.hostile.common import CONFIG

BF16 = np.dtype(ml_dtypes.bfloat16)

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


def random_lora(config=CONFIG, seed=0, rank=2, dtype=np.float32, scale=None, projections=None):
    """A LoRA delta of random numbers in all layers; scale 1/rank unless given."""
    rng = np.random.default_rng(seed)
    delta: dict = {}
    for name, module in lora_modules(config).items():
        size, (inputs, outputs) = module.layers, module.shape
        if projections is None or name in projections:
            factors = {
                "a": (0.3 * rng.normal(size=(size, inputs, rank))).astype(dtype),
                "b": (0.3 * rng.normal(size=(size, rank, outputs))).astype(dtype),
                "scale": np.full(size, 1 / rank if scale is None else scale, np.float32),
            }
            set_at(delta, module.path, factors)
    return delta


def assert_same(found, wanted, path="delta"):
    """Both trees have the same keys, and arrays of the same dtype, shape and bits."""
    assert type(found) is type(wanted), path
    if isinstance(wanted, dict):
        assert list(sorted(found)) == list(sorted(wanted)), path
        for key in wanted:
            assert_same(found[key], wanted[key], f"{path}.{key}")
    else:
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), path
        assert found.tobytes() == wanted.tobytes(), path


def hf_model(folder, config=CONFIG, seed=0, dtype=None, **save):
    """A random Qwen3 that transformers makes and writes; returns the torch model."""
    import torch
    import transformers

    raw = {k: v for k, v in hf_config(config).items() if k not in ("architectures", "model_type")}
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**raw))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(dtype or torch.float32).eval()
    model.save_pretrained(folder, **save)
    return model


def perturb(model, seed=1, size=0.05):
    """Adds noise to every parameter of a torch model, in place."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def torch_logits(model, tokens):
    """float32 logits [B, T, V] of a torch model."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.float().numpy()


def our_logits(folder, tokens, *deltas):
    """float32 logits [B, T, V] that dit_jax computes of the model in `folder` with deltas."""
    import dit_jax

    return np.asarray(dit_jax.load_model(folder).logits(tokens, deltas=deltas))


def merged_logits(model, tokens, *deltas):
    """float32 logits [B, T, V] of a torch model with LoRA deltas added to its weights.

    It follows the definition of a delta, and compiles nothing.
    """
    import copy

    import torch

    model = copy.deepcopy(model)
    with torch.no_grad():
        for delta in deltas:
            for parent, group in delta["layers"].items():
                for name, module in group.items():
                    a, b, scale = (module[key].astype(np.float64) for key in ("a", "b", "scale"))
                    for layer in range(len(a)):
                        weight = model.get_submodule(f"model.layers.{layer}.{parent}.{name}").weight
                        weight += torch.from_numpy((scale[layer] * (a[layer] @ b[layer])).T).float()
    return torch_logits(model, tokens)


def to_torch(array):
    """A numpy array, bfloat16 included, as a torch tensor."""
    import torch

    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_torch(tensor):
    """A torch tensor, bfloat16 included, as a numpy array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(BF16)
    return tensor.numpy()


TOKENS = np.random.default_rng(7).integers(0, CONFIG.vocab_size, (2, 12))


def random_params(config=CONFIG, seed=0):
    """Random parameters in the layout of docs/architecture.md, in numpy."""
    import jax

    from dit_jax.models.decoder import init_params

    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), shapes)
