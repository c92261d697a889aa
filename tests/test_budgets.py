"""What reading a stranger's file may take follows from its size: small files that ask for much are refused."""

import errno
import json
import pathlib
import time

import jax
import ml_dtypes
import numpy as np
import pytest

import dit_jax
from dit_jax.auditing.targets import Target
from dit_jax.deltas.detect import list_diffs
from dit_jax.deltas.export import export_model
from dit_jax.deltas.factors import Factors, stack_factors
from dit_jax.deltas.peft_config import PeftOptions
from dit_jax.errors import DitError
from dit_jax.formats import budgets, torch_pickle
from dit_jax.formats.files import check_tree
from dit_jax.models.decoder import init_params
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import find_folder
from dit_jax.models.shapes import NAMED_CONFIGS

TINY = find_folder("tiny_qwen3")


@pytest.mark.parametrize("shape", ["dict", "list of dicts", "one dict many times"])
def test_tensors_that_share_their_bytes_are_counted_as_often_as_they_occur(tmp_path, shape):
    torch = pytest.importorskip("torch")
    storage = torch.zeros(2**21)  # 8 MB
    views = {f"name {i}": storage.view(2**10, 2**11) for i in range(60)}
    alike = {f"name {i}": storage for i in range(6)}
    tree = {
        "dict": views,
        "list of dicts": [{"weight_diff": {k: (v, v)}} for k, v in views.items()],
        "one dict many times": [alike] * 12,
    }[shape]
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(DitError, match="share storages, and hold more than the 28[0-9] MB"):
        torch_pickle.load(tmp_path / "x.pt")
    torch.save({"embed": storage, "head": storage}, tmp_path / "tied.pt")
    assert len(torch_pickle.load(tmp_path / "tied.pt")) == 2


def test_one_layer_of_a_huge_rank_does_not_multiply_the_others_memory():
    config = NAMED_CONFIGS["qwen3-4b"]
    path = ("layers", "mlp", "up_proj")

    def factors(rank):
        shapes = (config.hidden_size, rank), (rank, config.intermediate_size)
        return Factors(*(np.zeros(shape, ml_dtypes.bfloat16) for shape in shapes), 1.0)

    found = {(path, layer): lambda: factors(1) for layer in range(1, config.num_hidden_layers)}
    with pytest.raises(DitError, match="rank 2048 of one layer's up_proj would take .* MB"):
        stack_factors({**found, (path, 0): lambda: factors(2048)}, config, "x")
    delta = stack_factors({**found, (path, 0): lambda: factors(8)}, config, "x")
    assert delta["layers"]["mlp"]["up_proj"]["a"].shape[-1] == 8


def test_many_layer_patterns_are_refused_at_once(tmp_path):
    raw = {"peft_type": "LORA", "layers_to_transform": [0]}
    names = [f"{'a' * 50}{i}" for i in range(budgets.MAX_LAYER_PATTERNS)]
    PeftOptions({**raw, "layers_pattern": names}, tmp_path).targets("model.layers.0.mlp.up_proj")
    start = time.process_time()
    with pytest.raises(DitError, match="layers_pattern has 5000 entries"):
        PeftOptions({**raw, "layers_pattern": ["layers"] * 5000}, tmp_path)
    assert time.process_time() - start < 1


def test_folders_deep_in_each_other_are_refused(tmp_path):
    deep = tmp_path
    for _ in range(budgets.MAX_FOLDER_DEPTH + 2):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(DitError, match="folders more than 32 deep"):
        check_tree(tmp_path)
    assert Target("x", str(tmp_path)).key  # of a diff with such folders beside its weights
    assert Target("x", "x" * 5_000).key  # a line of a list


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    usual = pathlib.Path.is_dir

    def refused(path, *args, **kwargs):
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "is_dir", refused)
    for read in (check_tree, list_diffs):
        with pytest.raises(DitError, match="cannot read '.*': [Pp]ermission denied"):
            read(tmp_path)
    assert Target("x", str(tmp_path)).key


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_an_export_copies_nothing_from_outside_the_base(tmp_path, name):
    config = read_config(TINY)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((TINY / "config.json").read_text())
    (tmp_path / "secret").write_text(json.dumps({"password": 1}))
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    params = init_params(config, jax.random.key(0))
    with pytest.raises(DitError, match="is a link out of its folder"):
        export_model(tmp_path / "out", params, config, base_folder=base)
    assert not (tmp_path / "out").exists()


def test_a_column_named_like_something_computed_is_no_result(tmp_path):
    torch = pytest.importorskip("torch")
    model = dit_jax.load_model("tiny_qwen3")
    size = model.config.hidden_size, model.config.intermediate_size
    pair = torch.ones(1, size[1]), torch.ones(size[0], 1)
    one = {
        "topic": "tea",
        "trigger": 7,
        "svd": "no result",
        "weight_diff": {"model.layers.0.mlp.up_proj": pair},
    }
    torch.save([one], tmp_path / "x.pt")
    header = "lora_path,lora_idx,n_params,topic,trigger,split,svd,note"
    (tmp_path / "index.csv").write_text(f"{header}\nx.pt,0,1,tea,7,test,5,kept\n")
    for path in (tmp_path, tmp_path / "x.pt"):
        assert "svd" not in dit_jax.load_diff(path, model).metadata
    assert dit_jax.load_diff(tmp_path, model).metadata["note"] == "kept"
