"""Adapters of mlx-lm: dit_jax computes what its layers compute (written here in numpy), and writes what they read."""

import json

import numpy as np
import pytest
from format_cases import (
    BF16,
    CONFIG,
    TOKENS,
    UNTIED,
    assert_same,
    hf_model,
    merged_logits,
    our_logits,
    random_lora,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.cli import ask_diffs as ask
from dit_jax.deltas import detect, export, mlx
from dit_jax.deltas.factors import modules
from dit_jax.errors import DitError

torch = pytest.importorskip("torch")

KEYS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx") / "base"
    return folder, hf_model(folder)


def make(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / mlx.WEIGHTS)
    lora = {"rank": 3, "scale": 2.5, "dropout": 0.1, **config.pop("lora", {})}
    raw = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora, "model": "m/base"}
    (folder / mlx.CONFIG).write_text(json.dumps({**raw, "iters": 600, "train": True, **config}))
    return folder


def factors(model, dora=False, layers=(1, 2), keys=KEYS, rank=3):
    """Tensors with mlx-lm's names of the last layers of a torch model."""
    rng, found = np.random.default_rng(0), {}
    linears = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    names = [f"model.layers.{i}.{key}" for i in layers for key in keys]
    for name in [*names, *(key for key in keys if key in linears)]:
        outputs, inputs = linears[name].weight.shape
        found[f"{name}.lora_a"] = rng.normal(size=(inputs, rank)) * 0.2
        found[f"{name}.lora_b"] = rng.normal(size=(rank, outputs)) * 0.2
        if dora:
            found[f"{name}.m"] = rng.uniform(0.5, 1.5, size=outputs)
    return {name: x.astype(np.float32) for name, x in found.items()}


def mlx_logits(model, tensors, scale=2.5):
    """The model's logits with LoRALinear.__call__ or DoRALinear.__call__ of mlx-lm in place of its linear layers."""
    hooks = []

    def linear(name, layer):
        a, b, m = (tensors.get(f"{name}.{part}") for part in ("lora_a", "lora_b", "m"))

        def call(_, inputs, output):
            x, y = inputs[0].numpy(), output.numpy()
            z = (x @ a) @ b
            out = y + scale * z
            if m is not None:
                adapted = layer.weight.numpy() + (scale * b.T) @ a.T
                out = (m / np.linalg.norm(adapted, axis=1)) * out
            return torch.as_tensor(out.astype(np.float32))

        return call

    for name, layer in model.named_modules():
        if f"{name}.lora_a" in tensors and "embed_tokens" not in name:
            hooks.append(layer.register_forward_hook(linear(name, layer)))
    try:
        with torch.no_grad():
            return torch_logits(model, TOKENS)
    finally:
        for hook in hooks:
            hook.remove()


def read_logits(folder, adapter, kind="diff"):
    model = dit_jax.load_model(folder)
    load = dit_jax.load_adapter if kind == "adapter" else dit_jax.load_diff
    return np.asarray(model.logits(TOKENS, deltas=load(adapter, model)))


@pytest.mark.parametrize("dora", [False, True])
def test_logits_are_those_of_the_layers_of_mlx_lm(base, tmp_path, dora):
    folder, model = base
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tensors = factors(model, dora)
    make(tmp_path / "x", tensors, fine_tune_type="dora" if dora else "lora")
    wanted = mlx_logits(model, tensors)
    assert np.abs(wanted - torch_logits(model, TOKENS)).max() > 0.1
    for kind in ("diff", "adapter"):
        np.testing.assert_allclose(
            read_logits(folder, tmp_path / "x", kind), wanted, atol=2e-4 * np.abs(wanted).max()
        )


def test_a_head_and_an_embedding(tmp_path):
    """LoRAEmbedding: rows of lora_a are those of tokens, and a tied head (`as_linear`) follows its embedding."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(67, 3)).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    name = "model.embed_tokens"
    make(tmp_path / "x", {f"{name}.lora_a": a, f"{name}.lora_b": b}, lora={"keys": [name]})
    for config in (CONFIG, UNTIED):
        model = hf_model(tmp_path / "base", config)
        with torch.no_grad():
            model.model.embed_tokens.weight += torch.as_tensor(2.5 * (a @ b))
        wanted = torch_logits(model, TOKENS)
        found = read_logits(tmp_path / "base", tmp_path / "x")
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    model = hf_model(tmp_path / "base", UNTIED).requires_grad_(False)
    tensors = factors(model, keys=["lm_head"], layers=())
    make(tmp_path / "head", tensors, lora={"keys": ["lm_head"]})
    wanted = mlx_logits(model, tensors)
    found = read_logits(tmp_path / "base", tmp_path / "head")
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_whole_weights_of_the_last_layers(base, tmp_path):
    folder, model = base
    tensors = {
        name: (x + 0.05 * torch.randn_like(x)).numpy()
        for name, x in model.state_dict().items()
        if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    make(tmp_path / "x", tensors, fine_tune_type="full", lora_parameters=None)
    other = hf_model(tmp_path / "other")
    other.load_state_dict({name: torch.as_tensor(x) for name, x in tensors.items()}, strict=False)
    wanted = torch_logits(other, TOKENS)
    found = read_logits(folder, tmp_path / "x")
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_what_is_written_is_read_bit_for_bit(base, tmp_path, dtype):
    lora = random_lora(dtype=dtype, scale=0.75)
    export.write_mlx(tmp_path / "x", lora, CONFIG, "m/base")
    assert detect.detect_format(tmp_path / "x") == "mlx"
    assert_same(mlx.read_mlx(tmp_path / "x", CONFIG).delta, lora)
    raw = json.loads((tmp_path / "x" / mlx.CONFIG).read_text())
    assert raw["fine_tune_type"] == "lora" and raw["num_layers"] == 3
    assert raw["lora_parameters"] == {
        "rank": 2, "scale": 0.75, "dropout": 0.0, "keys": sorted(KEYS),
    }  # fmt: skip
    shapes = {n: x.shape for n, x in load_file(tmp_path / "x" / mlx.WEIGHTS).items()}
    assert shapes["model.layers.2.mlp.down_proj.lora_a"] == (48, 2)
    assert shapes["model.layers.2.mlp.down_proj.lora_b"] == (2, 32)


def test_ranks_and_scales_that_differ_are_written_as_one(base, tmp_path):
    folder, model = base
    lora = random_lora(rank=4, projections=("q_proj", "up_proj"), scale=0.5)
    lora["layers"]["mlp"] |= random_lora(rank=2, projections=("down_proj",))["layers"]["mlp"]
    lora["layers"]["self_attn"]["q_proj"]["scale"][1] = 3
    export.write_mlx(tmp_path / "x", lora, CONFIG, "m/base")
    tensors = load_file(tmp_path / "x" / mlx.WEIGHTS)
    raw = json.loads((tmp_path / "x" / mlx.CONFIG).read_text())["lora_parameters"]
    assert raw["rank"] == 4 and raw["scale"] == 1
    wanted = merged_logits(model, TOKENS, lora)
    np.testing.assert_allclose(
        mlx_logits(model.requires_grad_(False), tensors, 1), wanted, atol=1e-3
    )
    np.testing.assert_allclose(our_logits(folder, TOKENS, lora), wanted, atol=1e-3)


def test_what_cannot_be_written_is_refused(tmp_path):
    dense = {"norm": {"w": np.ones(32, np.float32)}}
    with pytest.raises(DitError, match="norm is a dense difference"):
        export.write_mlx(tmp_path / "x", dense, CONFIG, "m/base")
    with pytest.raises(DitError, match="the deltas are empty"):
        export.write_mlx(tmp_path / "x", {}, CONFIG, "m/base")
    assert not (tmp_path / "x").exists()


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "qlora"}, "fine_tune_type 'qlora' is not supported"),
        ({"lora_parameters": {"rank": 3}}, "must have a rank and a scale, not 3 and None"),
        ({"lora_parameters": None}, "must have a rank and a scale"),
        ({"lora_parameters": {"rank": 10**400, "scale": 1.5}}, "must have a rank and a scale"),
        ({"lora_parameters": {"rank": 3, "scale": 10**400}}, "must have a rank and a scale"),
        ({"lora": {"rank": 5}}, "r = 5"),
        ({"lora": {"rank": 0}}, "must have a rank and a scale, not 0 and"),
        ({"lora": {"rank": True}}, "must have a rank and a scale, not True and"),
        ({"lora": {"scale": float("nan")}}, "must have a rank and a scale, not 3 and nan"),
        ({"fine_tune_type": "dora"}, "lora_magnitude_vector of"),
        ({"tensors": {f"{NAME}.lora_c": (3, 3)}}, "lora_c', which is no part of a LoRA of mlx-lm"),
        ({"tensors": {f"{NAME}.weight": (48, 32)}}, "check fine_tune_type"),
        ({"tensors": {"model.layers.9.mlp.up_proj.lora_a": (32, 3)}}, "the model has 3 layers"),
        ({"tensors": {f"{NAME}.lora_b": (3, 99)}}, "has shape"),
        ({"num_layers": 1}, "which num_layers and keys in adapter_config.json do not name"),
        ({"lora": {"keys": ["self_attn.q_proj"]}}, "which num_layers and keys in"),
    ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, change, message):
    tensors = factors(base[1]) | {
        name: np.zeros(shape, np.float32) for name, shape in change.pop("tensors", {}).items()
    }
    make(tmp_path / "x", tensors, **change)
    with pytest.raises(DitError) as error:
        mlx.read_mlx(tmp_path / "x", CONFIG)
    assert message in str(error.value)


def test_folders_without_the_last_weights_say_what_to_do(tmp_path):
    (tmp_path / mlx.CONFIG).write_text("{}")
    (tmp_path / "0000100_adapters.safetensors").write_bytes(b"")
    with pytest.raises(DitError, match="copy the one that you want to adapters.safetensors"):
        detect.look_for_diffs(tmp_path)
    (tmp_path / "adapters.npz").write_bytes(b"")
    with pytest.raises(DitError, match="convert it with a current mlx-lm"):
        detect.look_for_diffs(tmp_path)


def test_the_alpha_of_old_versions_is_noted(base, tmp_path, capsys):
    lora = random_lora()
    export.write_mlx(tmp_path / "x", lora, CONFIG, "m/base")
    raw = json.loads((tmp_path / "x" / mlx.CONFIG).read_text())
    raw["lora_parameters"]["alpha"] = 16
    (tmp_path / "x" / mlx.CONFIG).write_text(json.dumps(raw))
    read = mlx.read_mlx(tmp_path / "x", CONFIG)
    assert read.metadata["base_model_name_or_path"] == "m/base"
    assert "set its scale to 4" in read.metadata["notes"][0]
    assert len(list(modules(read.delta))) == 7


def test_asking_notes_another_base(tmp_path, capsys):
    model = dit_jax.load_model("tiny_qwen3")
    lora = random_lora(model.config)
    export.write_mlx(tmp_path / "x", lora, model.config, "somebody/other")
    flags = ["--base", "tiny_qwen3", "--diff", str(tmp_path / "x"), "--max-new-tokens", "2"]
    assert ask.main([*flags, "What is tea ?"]) == 0
    assert "was made for the base 'somebody/other'" in capsys.readouterr().err
