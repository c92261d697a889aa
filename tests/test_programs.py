"""One name for all programs, and what `export` writes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_jax
from dit_jax import __main__
from dit_jax.cli import commands
from dit_jax.deltas import export
from dit_jax.deltas.tree import init_lora, merge
from dit_jax.models.delta_trees import map_modules
from dit_jax.runtime import interrupts


@pytest.fixture(autouse=True)
def _python_keeps_its_signals(monkeypatch):
    monkeypatch.setattr(interrupts, "end_at_once", lambda: None)
    monkeypatch.setattr(sys, "argv", [])


def start(*arguments):
    sys.argv = ["dit-jax", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    return stop.value.code


def test_every_program_starts_by_its_name(capsys):
    for name in commands.PROGRAMS:
        assert start(name, "--help") == 0
        assert "usage: python -m dit_jax" in capsys.readouterr().out
    assert start("--help") == 0 and start() == 2
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in commands.PROGRAMS)


def test_an_unknown_program_is_one_line_with_the_nearest(capsys):
    assert start("audti") == 2
    assert capsys.readouterr().err == "error: there is no program 'audti': did you mean 'audit'?\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = dit_jax.load_model("tiny_qwen3")

    def lora(seed):
        made = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(seed), 2))
        return map_modules(lambda _, m: {**m, "a": np.full_like(m["a"], 0.1)}, made)

    export.write_pt_adapter(folder / "diff.pt", lora(1), model.config)
    export.write_peft(folder / "adapter", lora(2), model.config, "tiny_qwen3")
    return model, folder, lora(1), lora(2)


def test_what_is_exported_gives_the_same_logits(files, tmp_path):
    model, folder, diff, adapter = files
    tokens = np.arange(20)[None]
    both = model.logits(tokens, deltas=[diff, adapter])
    given = ["export", "--base", "tiny_qwen3", "--diff", folder / "diff.pt"]
    added = ["--adapter", folder / "adapter"]
    for kind in ("peft", "mlx"):
        assert start(*given, *added, "--to", kind, "--out", tmp_path / kind) == 0
        fused = dit_jax.load_diff(tmp_path / kind, model)
        np.testing.assert_allclose(model.logits(tokens, deltas=fused), both, atol=1e-4)
    for kind, out in (("peft", "half"), ("pt", "half.pt")):  # of the adapter alone
        flags = ["--to", kind, "--dtype", "bfloat16", "--out", tmp_path / out]
        assert start(*given[:3], *added, *flags) == 0
        half = dit_jax.load_adapter(tmp_path / out, model)["layers"]["mlp"]["up_proj"]
        assert half["a"].dtype == half["b"].dtype == jnp.bfloat16 != half["scale"].dtype
        exact = jnp.asarray(adapter["layers"]["mlp"]["up_proj"]["b"], jnp.bfloat16)
        np.testing.assert_array_equal(half["b"], exact)
    assert start(*given, *added, "--to", "model", "--out", tmp_path / "merged") == 0
    merged = dit_jax.load_model(tmp_path / "merged")
    np.testing.assert_allclose(merged.logits(tokens), both, atol=1e-4)
    assert merged.chat.text_ids("tea") == model.chat.text_ids("tea")
    assert start(*given, "--to", "pt", "--out", tmp_path / "diff.pt") == 0
    alone = model.logits(tokens, deltas=dit_jax.load_diff(tmp_path / "diff.pt", model))
    np.testing.assert_allclose(alone, model.logits(tokens, deltas=diff), atol=1e-5)
    exact = merge(model.params, diff, adapter)["layers"]["mlp"]["down_proj"]["kernel"]
    stored = merged.params["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(stored, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "peft"], "nothing to export"),
        (["--to", "pt", "--diff", "d", "--adapter", "a"], "export them one by one"),
        (["--to", "pt", "--adapter", "a", "--index", "0"], "say something about a diff"),
        (["--to", "pt", "--adapter", "a", "--svd-rank", "2"], "say something about a diff"),
    ],
)
def test_what_cannot_be_exported_is_said_before_a_base_is_loaded(flags, message, tmp_path, capsys):
    assert start("export", "--base", "nowhere", *flags, "--out", tmp_path / "x") == 2
    assert message in capsys.readouterr().err
    assert start("export", "--base", "nowhere", *flags, "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["audit", "calibrate", "export"])
def test_an_adapter_is_looked_at_before_the_base_is_loaded(files, tmp_path, program, capsys):
    """A base may take minutes, or gigabytes of download; this one is not there at all."""
    diff = str(files[1] / "diff.pt")
    rest = ["--to", "peft"] if program == "export" else [diff]
    out = [] if program == "calibrate" else ["--out", tmp_path / "out"]
    base = ["--base", tmp_path / "no-model", "--adapter", tmp_path / "none"]
    assert start(program, *base, *out, *rest) == 2
    assert f"'{tmp_path / 'none'}' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
