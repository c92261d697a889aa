"""Hostile diff stores and adapters in our own formats, with manifests that agree with them."""

import json
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hostile import outcome
from safetensors.numpy import save_file
from test_qwen3 import TINY

import dit_jax
from dit_jax.api import Model
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.decoder import init_params
from dit_jax.runtime import artifacts, orbax_errors

LEAF = "layers.mlp.up_proj.a"
SHARD = "shards/00000.safetensors"


@pytest.fixture(scope="module")
def delta():
    return jax.tree.map(np.asarray, init_lora(TINY, jax.random.key(1), 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory, delta):
    model = Model(init_params(TINY, jax.random.key(0)), TINY, "a tiny model")
    folder = tmp_path_factory.mktemp("good") / "adapter"
    export_adapter(folder, delta, base=model.digest())
    dit_jax.load_adapter(folder, model)  # the imports of the first load do not count in the others
    return model


@pytest.fixture
def adapter(tmp_path, model, delta):
    export_adapter(tmp_path / "adapter", delta, base=model.digest())
    return tmp_path / "adapter"


@pytest.fixture
def stored(tmp_path, model, delta):
    folder = tmp_path / "store"
    stacked = jax.tree.map(lambda x: np.stack([x, x]), delta)
    rows = [{"topic": topic, "trigger": "1", "split": "test"} for topic in ("tea", "oak")]
    diff_store.write_shard(folder, 0, stacked, rows)
    diff_store.publish(folder, 1, base=model.digest())
    return folder


def read(folder, model):
    """Reads a store or an adapter through the public interface, watched: 'error' or 'loaded'."""

    def load():
        if folder.name == "adapter":
            loaded = dit_jax.load_adapter(folder, model)
            return SimpleNamespace(delta=jax.tree.map(np.asarray, loaded))
        return dit_jax.load_diff(folder, model, 1)

    return outcome(load, folder, memory=True)


def edit(folder, **changes):
    """Changes the manifest so that it still agrees with the files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, facts in manifest["files"].items():
        file = folder / name
        if file.is_file():
            facts |= {"bytes": file.stat().st_size, "sha256": artifacts.digest_file(file)}
    path.write_text(json.dumps({**manifest, **changes}))


def leaves(folder, **changes):
    return {**json.loads((folder / "manifest.json").read_text())["leaves"], **changes}


def test_the_unharmed_are_read(adapter, stored, model):
    assert read(adapter, model) == read(stored, model) == "loaded"
    edit(adapter), edit(stored)
    assert read(adapter, model) == read(stored, model) == "loaded"


@pytest.mark.parametrize("load", [dit_jax.load_adapter, dit_jax.load_diff])
def test_another_base_and_values_that_are_no_numbers_are_refused(tmp_path, model, delta, load):
    broken = jax.tree.map(np.copy, delta)
    broken["layers"]["mlp"]["up_proj"]["a"][0, 0, 0] = np.nan
    cases = (delta, "0" * 64, "another base"), (broken, model.digest(), "NaN or infinity")
    for number, (held, base, said) in enumerate(cases):
        folder = tmp_path / str(number)
        if load is dit_jax.load_adapter:
            export_adapter(folder, held, base=base)
        else:
            rows = [{"topic": "tea", "trigger": "1", "split": "test"}]
            diff_store.write_shard(folder, 0, jax.tree.map(lambda x: x[None], held), rows)
            diff_store.publish(folder, 1, base=base)
        with pytest.raises(dit_jax.DitError, match=said):
            load(folder, model)


@pytest.mark.parametrize(
    "entry",
    [
        [[3, 32, 2**40], "float32"],
        [[3, 32, 2**20], "float32"],
        [[3, 32, -2], "float32"],
        [[3, 32, 2.0], "float32"],
        [[3] * 100_000, "float32"],
        [[3, 32, 2], "object"],
        [[3, 32, 2], "(9999999,9999)f8"],
        [[3, 32, 2], "int32"],
        [[3, 32, 2], 7],
        [[3, 32, 4], "float32"],
        [[3, 32], "float32"],
        [],
        None,
        "x",
    ],
    ids=str,
)
def test_shapes_of_an_adapter_are_not_believed(adapter, model, entry):
    edit(adapter, leaves=leaves(adapter, **{LEAF: entry}))
    assert read(adapter, model) == "error"


@pytest.mark.parametrize("listed", [None, [], {}, "x", {"." * 100_000: [[1], "float32"]}], ids=type)
def test_leaves_of_an_adapter_may_be_anything(adapter, model, listed):
    edit(adapter, leaves=listed)
    assert read(adapter, model) == "error"


@pytest.mark.parametrize("kind", ["adapter", "store"])
@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a" * 300, "ä" * 200, "a\0b", "\ud800", "", ".", "a/" * 5000]
)
def test_files_that_a_manifest_may_not_list(adapter, stored, model, kind, name):
    folder = adapter if kind == "adapter" else stored
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files={**files, name: {"bytes": 1, "sha256": "0"}})
    assert read(folder, model) == "error"


def test_a_listed_link_out_of_an_adapter_is_not_opened(adapter, tmp_path, model):
    (tmp_path / "secret").write_text("x")
    (adapter / "link").symlink_to(tmp_path / "secret")
    files = json.loads((adapter / "manifest.json").read_text())["files"]
    edit(adapter, files={**files, "link": {"bytes": 1, "sha256": "0"}})
    assert read(adapter, model) == "error"


def test_a_chunk_that_unpacks_to_more_than_its_array_is_refused(adapter, model):
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "ocdbt", "base": f"file://{adapter}/checkpoint/state/", "path": LEAF}
    chunk = [3, 32, 8_000_000]  # 3 GB of zeros, packed to a few kilobytes
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": place},
        create=True,
        delete_existing=True,
        dtype=tensorstore.float32,
        shape=[3, 32, 2],
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunk),
    ).result()
    assert array.chunk_layout.read_chunk.shape == tuple(chunk)
    edit(adapter)
    assert read(adapter, model) == "error"


def test_damaged_checkpoints_with_a_manifest_that_agrees(adapter, model, caplog):
    rng = np.random.default_rng(3)
    files = sorted(
        f for f in (adapter / "checkpoint").rglob("*") if f.is_file() and f.stat().st_size
    )
    for file in files:
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged[: int(rng.integers(len(content)))] if rng.integers(2) else damaged)
        edit(adapter)
        read(adapter, model)
        file.write_bytes(content)
    assert not caplog.records  # nothing beside the line of ours


def test_what_asyncio_forgets_of_tensorstore_is_not_told_again(caplog):
    orbax_errors.say_errors_once()
    logger = logging.getLogger("asyncio")
    known = ('DATA_LOSS: Error reading "a"', 'Error opening "zarr3" driver: Error reading "a"')
    for error in map(ValueError, (*known, "another bug")):
        logger.error("Task exception was never retrieved", exc_info=error)
    assert [str(record.exc_info[1]) for record in caplog.records] == ["another bug"]


def test_a_checkpoint_of_deep_or_large_metadata(adapter, model):
    (metadata,) = (adapter / "checkpoint").rglob("_METADATA")
    good = json.loads(metadata.read_text())
    key = [{"key": "x", "key_type": 2}] * 50_000
    entry = {"key_metadata": key, "value_metadata": {"value_type": "np.ndarray"}}
    for content in ({**good, "tree_metadata": {"x": entry}}, {**good, "x": "y" * 64_000_000}):
        metadata.write_text(json.dumps(content))
        edit(adapter)
        assert read(adapter, model) == "error"


# ------------------------------------------------------------------ stores


def test_a_leaf_that_is_too_large_is_refused_before_it_is_read(stored, delta, model, monkeypatch):
    lora = init_lora(TINY, jax.random.key(1), 1, projections=["q_proj"])["layers"]["self_attn"][
        "q_proj"
    ]
    wide = {**lora, "a": np.repeat(lora["a"], 2000, -1), "b": np.repeat(lora["b"], 2000, -2)}
    wide = {"layers": {"self_attn": {"q_proj": jax.tree.map(lambda x: np.stack([x, x]), wide)}}}
    save_file(diff_store.flatten(wide), stored / SHARD)
    edit(stored)
    monkeypatch.setattr(SafetensorsFile, "read_row", None)
    assert read(stored, model) == "error"


@pytest.mark.parametrize(
    "names",
    [
        ["." * 300_000],
        ["a." * 300_000 + "a"],
        ["layers", "layers.mlp.up_proj.a"],
        ["layers.mlp.up_proj.a", "layers"],
        ["layers.mlp.up_proj.a", "layers.mlp.up_proj.a.b"],
        [""],
        ["a", "b", "scale"],
        [LEAF],
    ],
    ids=lambda names: names[0][:10],
)
def test_names_of_leaves_may_be_anything(stored, model, names):
    save_file({name: np.zeros((2, 3, 32, 2), np.float32) for name in names}, stored / SHARD)
    edit(stored)
    assert read(stored, model) == "error"


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_values_that_are_no_floats_are_refused(stored, delta, model, dtype):
    stacked = jax.tree.map(lambda x: np.stack([x, x]).astype(dtype), delta)
    save_file(diff_store.flatten(stacked), stored / SHARD)
    edit(stored)
    assert read(stored, model) == "error"


HEADER = "lora_path,lora_idx,n_params,topic,trigger,split"
ROW = "00000.safetensors,{},1,tea,1,test"


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEADER,
        "lora_path,lora_idx\n00000.safetensors,0\n",
        f"{HEADER}\n{ROW.format(9)}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format(9)}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format(-1)}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format('²')}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format('1' * 5000)}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format('')}\n" * 2,
        f"{HEADER}\n" + f"{ROW.format(1)},more\n" * 2,
        f"{HEADER}\n" + "00000.safetensors,1\n" * 2,
        f"{HEADER}\n" + "../00000.safetensors,1,1,tea,1,test\n" * 2,
        f"{HEADER}\n" + f"{'x' * 10_000_000},1,1,tea,1,test\n",
        f"{HEADER},evidence\n" + f"{ROW.format(1)},[1]\n" * 2,
        f"{HEADER},evidence\n" + f"{ROW.format(1)},{'[' * 100_000}\n" * 2,
        f"{HEADER},keywords\n" + f'{ROW.format(1)},"{{}}"\n' * 2,
        f'{HEADER}\n"{ROW.format(1)}',
        "\udcff" * 10,
        HEADER,
    ],
    ids=range(19),
)
def test_broken_indexes_of_a_store(stored, model, text):
    (stored / "index.csv").write_bytes(text.encode(errors="surrogateescape"))
    edit(stored)
    assert read(stored, model) == "error"


@pytest.mark.parametrize("config", [None, [], {"diffs": 5}, {"diffs": {"kinds": {"a": 5}}}])
def test_a_manifest_says_what_manifests_say(stored, model, config):
    edit(stored, config=config)
    assert read(stored, model) == "error"


def test_damaged_shards_with_a_manifest_that_agrees(stored, model):
    content = (stored / SHARD).read_bytes()
    rng = np.random.default_rng(4)
    for position in (*rng.integers(0, 1500, 10), *rng.integers(0, len(content), 3)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        (stored / SHARD).write_bytes(damaged[: -int(position) or None] if position % 3 else damaged)
        edit(stored)
        read(stored, model)


def test_a_store_is_checked_before_adapters_are_trained_or_asked_with_it(stored, delta, model):
    """Several diffs are read at once, as training and evaluation do."""
    diff_store.DiffStore(stored).stacked([0, 1])
    good = (stored / "index.csv").read_text()
    (stored / "index.csv").write_text(good.replace("00000.safetensors,1,", "00000.safetensors,2,"))
    edit(stored)
    with pytest.raises(DitError, match="has no number 2 of 'layers.*which index.csv lists"):
        diff_store.DiffStore(stored).stacked([0, 1])
    (stored / "index.csv").write_text(good)
    for name, value in ((LEAF, np.nan), ("layers.mlp.up_proj.scale", np.inf)):
        stacked = diff_store.flatten(jax.tree.map(lambda x: np.stack([x, x]), delta))
        stacked[name].reshape(2, -1)[1, -1] = value
        save_file(stacked, stored / SHARD)
        edit(stored)
        store = diff_store.DiffStore(stored)
        store.check_fits([0, 1], TINY)
        store.read(0)
        for read_it in (lambda: store.stacked([0, 1]), lambda: store.read(1)):  # noqa: B023
            with pytest.raises(DitError, match=f"'{name}' holds NaN or infinity"):
                read_it()
    save_file({LEAF: np.zeros((2, 3, 32, 2), np.float32)}, stored / SHARD)
    edit(stored)
    with pytest.raises(DitError, match="diff 1: layers.mlp.up_proj"):
        diff_store.DiffStore(stored).check_fits([0, 1], TINY)
