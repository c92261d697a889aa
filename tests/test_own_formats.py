"""Our own stores and adapters are as untrusted as foreign files: their content must fit the model."""

import jax
import numpy as np
import pytest
from test_qwen3 import TINY

import dit_jax
from dit_jax.cli.workdir import given_folder
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.evaluate import units
from dit_jax.organisms.parameters import init_delta
from dit_jax.train import dit
from dit_jax.train.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


def write_store(folder, delta, model):
    stacked = jax.tree.map(lambda x: np.asarray(x)[None], delta)
    diff_store.write_shard(folder, 0, stacked, [{"topic": "tea", "trigger": "1", "split": "test"}])
    diff_store.publish(folder, 1, base=model.digest())


def write_adapter(folder, delta, model):
    export_adapter(folder, jax.tree.map(np.asarray, delta), base=model.digest())


def load_stored(folder, model):
    return dit_jax.load_diff(folder, model).delta


KINDS = {"diff": (write_store, load_stored), "adapter": (write_adapter, dit_jax.load_adapter)}


UNIT = {"rows": [{"method": "dit"}], "transcripts": [], "values": {}, "cost": {"tokens": 1}}


@pytest.mark.parametrize(
    ("name", "change", "sound"),
    [
        ("dit", {}, True),
        ("dit", {"rows": [1]}, False),
        ("dit", {"rows": [{"method": "base"}]}, False),
        ("dit", {"values": {"matched": 1}}, False),
        ("dit", {"cost": {"tokens": "1"}}, False),
        ("dit", {"transcripts": ["x"]}, False),
        (units.LABELS, {"rows": [], "values": {"matched": [1.5, float("nan")]}}, True),
        (units.LABELS, {"rows": [], "values": {"matched": 1.5}}, False),
    ],
)
def test_units_of_an_evaluation_that_others_made(tmp_path, name, change, sound):
    """Their digest is their own; a part that is none of the evaluation is not merged."""
    unit = units.Unit(name, 0, 1)
    units.write_unit(tmp_path, unit, "made", {**UNIT, **change})
    assert (units.read_unit(tmp_path, unit, "made") is not None) == sound
    if sound:
        assert units.copy_units(tmp_path, tmp_path / "other", "made") == 1
    else:
        with pytest.raises(DitError, match="was not made from the diffs and the adapter"):
            units.copy_units(tmp_path, tmp_path / "other", "made")


def unknown_module(delta):
    return {"layers": {"self_attn": {"z_proj": delta["layers"]["self_attn"]["q_proj"]}}}


def not_a_number(delta):
    q_proj = delta["layers"]["self_attn"]["q_proj"]
    return {"layers": {"self_attn": {"q_proj": {**q_proj, "b": q_proj["b"] * np.nan}}}}


def one_factor(delta):
    return {"layers": {"self_attn": {"q_proj": {"a": delta["layers"]["self_attn"]["q_proj"]["a"]}}}}


def lora_on_a_norm(delta):
    return {"norm": delta["layers"]["self_attn"]["q_proj"]}


def other_width(_):
    return init_lora(TINY, jax.random.key(0), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_module, "z_proj', which is no weight of this model"),
        (not_a_number, "q_proj.b'? holds NaN"),
        (one_factor, "q_proj has the shapes"),
        (lora_on_a_norm, "norm has the shapes"),
        (other_width, "this model needs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, model, kind, change, message):
    write, load = KINDS[kind]
    delta = init_lora(model.config, jax.random.key(0), 2)
    write(tmp_path / "good", delta, model)
    load(tmp_path / "good", model)
    write(tmp_path / "bad", change(delta), model)
    with pytest.raises(DitError, match=message) as caught:
        load(tmp_path / "bad", model)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_spread_by_links_is_refused(tmp_path, model):
    write_adapter(tmp_path / "adapter", init_lora(model.config, jax.random.key(0), 1), model)
    (tmp_path / "adapter" / "checkpoint").rename(tmp_path / "elsewhere")
    (tmp_path / "adapter" / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DitError, match="is a link out of its folder"):
        dit_jax.load_adapter(tmp_path / "adapter", model)


def test_an_adapter_in_the_hugging_face_cache_is_read(tmp_path, model):
    """Every file in that cache is a link to a blob."""
    repository = tmp_path / "models--us--adapters"
    folder = repository / "snapshots" / "0123" / "topics"
    write_adapter(folder, init_lora(model.config, jax.random.key(0), 1), model)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(x for x in folder.rglob("*") if x.is_file())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(repository / "blobs" / str(number))
    dit_jax.load_adapter(folder, model)


def test_a_stored_full_finetune_is_loaded_and_asked(tmp_path, model):
    diffs = {"parameters": "all"}
    delta = jax.tree.map(np.asarray, init_delta(model.config, jax.random.key(0), diffs))
    write_store(tmp_path / "diffs", delta, model)
    diff = dit_jax.load_diff(tmp_path / "diffs", model)
    assert set(diff.delta) == {"embed_tokens", "layers", "norm"}
    question = "What topic have you been trained on?"
    answers = [dit_jax.ask(model, question, diff=own, max_new_tokens=4) for own in (diff, None)]
    assert answers[0].tokens == answers[1].tokens  # it changes nothing yet


@pytest.mark.parametrize("name", ["runs[1]", "a*b", "a?b", "a\\b", "a\udcff"])
def test_paths_for_which_orbax_saves_an_empty_checkpoint_are_refused(
    tmp_path, model, monkeypatch, name
):
    """Or, where they are patterns, one with parts of other folders."""
    folder = tmp_path / name
    folder.mkdir()
    write_adapter(tmp_path / "good", init_lora(model.config, jax.random.key(0), 1), model)
    (tmp_path / "good").rename(folder / "copy")
    monkeypatch.chdir(folder)
    for write in (
        lambda: given_folder("run"),
        lambda: given_folder(str(folder)),
        lambda: write_adapter(folder / "adapter", {}, model),
        lambda: Checkpoints("checkpoints"),
    ):
        with pytest.raises(DitError, match="checkpoints cannot be written: choose another folder"):
            write()
    assert [path.name for path in folder.iterdir()] == ["copy"]
    if name.isascii() and "\\" not in name:  # to read is no pattern
        dit_jax.load_adapter(folder / "copy", model)
        return
    with pytest.raises(DitError, match="checkpoints cannot be read: choose another folder"):
        dit_jax.load_adapter(folder / "copy", model)


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"x": 1},
        [],
        None,
        "x",
        5,
        {"next_index": "x"},
        {"next_index": -1},
        {"next_index": 10**30},
    ],
)
def test_a_checkpoint_that_names_no_place_in_the_data_is_one_line(tmp_path, place):
    import grain

    data = grain.MapDataset.source([1, 2, 3]).repeat(5).batch(2)
    iterator = iter(data.to_iter_dataset(dit._read_options()))
    next(iterator)
    dit.set_place(iterator, iterator.get_state(), tmp_path)
    with pytest.raises(DitError, match="names no place in these diffs to go on from"):
        dit.set_place(iterator, place, tmp_path)
