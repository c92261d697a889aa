"""Untrusted files: each ends in one clear error or a correct load, and nothing runs.

DIT_JAX_FUZZ sets the number of mutated files per reader (400 makes more than 2,000 in all).
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from format_cases import CONFIG, random_lora, random_params
from hostile import outcome, peak, reset_peak, watch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dit_jax.deltas import detect, export, reference_pt, torch_pickle, torch_save
from dit_jax.deltas.names import RawDiff
from dit_jax.errors import DitError

FUZZ = int(os.environ.get("DIT_JAX_FUZZ", "25"))


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def good(tmp_path_factory, params):
    """Well-formed files of every format; all readers have been used, so their imports are done."""
    root = tmp_path_factory.mktemp("good")
    delta = random_lora()
    (root / "diffs").mkdir()
    diffs = [RawDiff(random_lora(seed=i), f"topic {i}", str(i)) for i in range(2)]
    reference_pt.write_pt_diffs(root / "diffs" / "x.pt", diffs, CONFIG)
    (root / "adapter").mkdir()
    reference_pt.write_pt_adapter(root / "adapter" / "x.pt", delta, CONFIG)
    export.export_model(root / "model", params, CONFIG, delta)
    export.export_model(root / "shards", params, CONFIG, delta, shard_bytes=40_000)
    (root / "weights").mkdir()
    tensors = dict(export.merged_tensors(params, CONFIG, delta))
    torch_save.save(root / "weights" / "x.pt", tensors)
    export.write_peft(root / "peft", delta, CONFIG, "base")
    (root / "release" / "weight-diffs").mkdir(parents=True)
    shutil.copy(root / "diffs" / "x.pt", root / "release" / "weight-diffs" / "a.pt")
    rows = "lora_path,lora_idx,n_params,topic,trigger,split\na.pt,1,9,topic 1,1,train\n"
    (root / "release" / "index.csv").write_text(rows)
    for name in KINDS:
        assert outcome(lambda name=name: read(root, name, params), root / name) == "loaded"
    return root


# folder -> the file in it that detection is given
KINDS = {"diffs": "x.pt", "adapter": "x.pt", "weights": "x.pt", "model": "", "shards": "", "peft": "",
         "release": ""}  # fmt: skip


def read(root, name, params):
    return detect.open_diffs(root / name / KINDS[name], CONFIG, params)[0]


# ------------------------------------------------------------------ pickles that want to run something


class Evil:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as an object that is built by NEWOBJ and BUILD."""

    def __init__(self):
        self.x = 1


def torch_file(path, pickled, storages=(b"\0" * 64,)):
    """A torch zip file around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for index, content in enumerate(storages):
            archive.writestr(f"x/data/{index}", content)
    return path


def tensor(storage=b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\x10tQ",
           offset=b"K\0", shape=b"K\x10\x85", stride=b"K\1\x85"):  # fmt: skip
    """Instructions that make a tensor of 16 floats, or one that lies about its shape."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + offset
        + shape
        + stride
        + b"\x89"
        + hooks
        + b"tR"
    )


def long(value):
    raw = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + raw


MARKER = "executed"
TOUCH = f"touch {MARKER}"

RUNNING = {
    "os.system": pickle.dumps(Evil(os.system, TOUCH), 2),
    "os.system, protocol 0": pickle.dumps(Evil(os.system, TOUCH), 0),
    "os.system, protocol 5": pickle.dumps([Evil(os.system, TOUCH)], 5),
    "eval": pickle.dumps(Evil(eval, f"open({MARKER!r}, 'w')"), 4),
    "open": pickle.dumps(Evil(open, MARKER, "w"), 2),
    "getattr": pickle.dumps(Evil(getattr, {}, "clear"), 2),
    "import": b"\x80\x02cantigravity\nfly\n.",
    "numpy": pickle.dumps(np.ones(3), 2),
    "instance": pickle.dumps(Stateful(), 2),
    "instance, protocol 0": pickle.dumps(Stateful(), 0),
    "INST": f"(S'{TOUCH}'\nios\nsystem\n.".encode(),
    "OBJ": f"(cos\nsystem\nS'{TOUCH}'\no.".encode(),
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "EXT": b"\x80\x02\x82\x01.",
    "persistent id": b"Pos.system\n.",
    "dotted name": b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.",
    "module of a module": b"\x80\x02ctorch._utils\nsys\n.",
    "storage as a call": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "call of a text": b"\x80\x02X\1\0\0\0a)R.",
    "call of a tensor": b"\x80\x02" + tensor() + b")R.",
    "OrderedDict of pairs": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "BUILD on a tensor": b"\x80\x02" + tensor() + b"}X\1\0\0\0aK\1sb.",
    "BUILD on a list": b"\x80\x02]}b.",
    "BUILD with slots": b"\x80\x02}}}\x86b.",
    "rebuild with 2 arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\1K\2\x86R.",
    "parameter of a text": b"\x80\x02ctorch._utils\n_rebuild_parameter\nX\1\0\0\0a\x85R.",
    "parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
    "bytearray": pickle.dumps(bytearray(5), 5),
    "set": pickle.dumps({1}, 4),
    "append to a dict": b"\x80\x02}K\1a.",
    "append to a text": b"\x80\x02X\1\0\0\0aK\1a.",
    "items of a list": b"\x80\x02]K\1K\2s.",
    "tuple as a key": b"\x80\x02})K\1s.",
    "odd items": b"\x80\x02}(K\1u.",
    "empty": b"",
    "only stop": b".",
    "two results": b"\x80\x02K\1K\2.",
    "no stop": b"\x80\x02K\1",
    "more after the stop": b"\x80\x02K\1.K\2.",
    "no such memo": b"\x80\x02h\5.",
    "memo of nothing": b"\x80\x02q\0.",
    "mark left": b"\x80\x02(K\1.",
    "no mark": b"\x80\x02K\1t.",
    "protocol 9": b"\x80\x09K\1.",
    "text without an end": b"\x80\x02X\xff\xff\xff\xff.",
    "text of 10 MB": b"\x80\x02X" + struct.pack("<I", 10**7) + b"a" * 10**7 + b".",
    "text that is none": b"\x80\x02X\1\0\0\0\xff.",
    "integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "integer of 200 bytes": b"\x80\x02\x8a\xc8" + b"\x7f" * 200 + b".",
    "global without an end": b"\x80\x02c" + b"a" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("case", RUNNING)
def test_pickles_run_nothing(good, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    torch_file(tmp_path / "x.pt", RUNNING[case])
    with watch(tmp_path), pytest.raises(DitError) as caught:
        torch_pickle.load(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value) and len(str(caught.value)) < 1000
    assert os.listdir(tmp_path) == ["x.pt"]


def test_this_machine_would_run_them(tmp_path, monkeypatch):
    # Otherwise the test above would prove nothing.
    monkeypatch.chdir(tmp_path)
    pickle.loads(RUNNING["os.system"])
    assert os.listdir(tmp_path) == [MARKER]
    with pytest.raises(AssertionError, match="os.system"), watch(tmp_path):
        os.system("true")
    with pytest.raises(AssertionError, match="opened"), watch(tmp_path):
        open("/dev/null").close()


DEEP = 200_000
LARGE = {
    "deep lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * DEEP + b".",
    "deep dicts": b"\x80\x02" + b"}K\1" * DEEP + b"K\1" + b"s" * DEEP + b".",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "a dict in itself": b"\x80\x02}q\0X\x0b\0\0\0weight_diffh\0s.",
    "doubling": b"\x80\x02]q\0" + b"".join(b"](h\0h\0eq\0" for _ in range(60)) + b".",
    "many instructions": b"\x80\x02" + b"]0" * 10 + b"N0" * 10**7,
    "many lists": b"\x80\x02](" + b"]" * 10**7 + b"e.",
    "many memos": b"\x80\x02N" + b"\x94" * 10**7 + b".",
    "many marks": b"\x80\x02" + b"(" * 10**7 + b".",
    "many diffs in one": b"\x80\x02](}q\0X\x0b\0\0\0weight_diff}s" + b"h\0" * 200_000 + b"e.",
}


@pytest.mark.parametrize("case", LARGE)
def test_pickles_take_bounded_time_and_memory(good, tmp_path, params, case):
    path = torch_file(tmp_path / "x.pt", LARGE[case])
    assert outcome(lambda: detect.open_diffs(path, CONFIG, params)[0], tmp_path, True) == "error"
    assert outcome(lambda: detect.open_adapter(path, CONFIG), tmp_path, True) == "error"


HUGE = long(2**62)
LYING = {
    "shape": tensor(shape=HUGE + b"\x85"),
    "two shapes": tensor(shape=long(2**32) * 2 + b"\x86", stride=b"K\0K\0\x86"),
    "negative shape": tensor(shape=long(-4) + b"\x85"),
    "negative stride": tensor(stride=long(-1) + b"\x85"),
    "negative offset": tensor(offset=long(-1)),
    "offset": tensor(offset=b"K\1"),
    "stride": tensor(stride=b"K\2\x85"),
    "stride of zero": tensor(shape=long(2**40) + b"\x85", stride=b"K\0\x85"),
    "overlap": tensor(shape=b"K\x0fK\x0f\x86", stride=b"K\1K\0\x86"),
    "more strides": tensor(stride=b"K\1K\1\x86"),
    "bool as shape": tensor(shape=b"\x88\x85"),
    "float as shape": tensor(shape=b"G" + struct.pack(">d", 4) + b"\x85"),
    "text as shape": tensor(shape=b"X\1\0\0\0a\x85"),
    "list as shape": tensor(shape=b"]"),
    "many dimensions": tensor(shape=b"(" + b"K\1" * 99 + b"t", stride=b"(" + b"K\1" * 99 + b"t"),
    "text as storage": tensor(storage=b"X\1\0\0\0a"),
    "storage in a list": tensor(storage=b"]"),
    "other storage": tensor(storage=b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"7X\0\0\0\0K\x10tQ"),
    "path as storage": tensor(
        storage=b"(X\7\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0../data.pklX\0\0\0\0K\x10tQ"
    ),
    "larger storage": tensor(storage=b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\0\0\0\0K\x11tQ"),
    "negative storage": tensor(
        storage=b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\0\0\0\0" + long(-16) + b"tQ"
    ),
    "wider storage": tensor(storage=b"(X\7\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0" + b"0X\0\0\0\0K\x10tQ"),
    "module as storage": tensor(storage=b"(X\7\0\0\0storagecos\npath\nX\1\0\0\0" + b"0X\0\0\0\0K\x10tQ"),
    "no storage": tensor(storage=b"(X\6\0\0\0moduleNNNNtQ"),
    "short storage": tensor(storage=b"(X\7\0\0\0storagetQ"),
}  # fmt: skip


def test_an_honest_tensor_is_read(tmp_path):
    torch_file(tmp_path / "x.pt", b"\x80\x02" + tensor() + b".")
    assert torch_pickle.load(tmp_path / "x.pt").read().shape == (16,)


@pytest.mark.parametrize("case", LYING)
def test_tensors_that_lie_are_refused(good, tmp_path, case):
    torch_file(tmp_path / "x.pt", b"\x80\x02" + LYING[case] + b".")
    with watch(tmp_path), pytest.raises(DitError):
        torch_pickle.load(tmp_path / "x.pt").read()


# ------------------------------------------------------------------ zip archives


def zip_bytes(compression=zipfile.ZIP_STORED, entries=(("x/data.pkl", b"\x80\x02N."),)):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def patched(offset_from, where, value, size=4, content=None):
    """A zip whose field at `where` after the last `offset_from` signature has another value."""
    content = zip_bytes() if content is None else content
    at = content.rindex(offset_from) + where
    content[at : at + size] = value.to_bytes(size, "little")
    return content


def overlapping():
    content = zip_bytes(entries=(("x/data.pkl", b"\x80\x02N."), ("x/data/0", b"0" * 99)))
    return patched(
        b"PK\1\2", 42, 0, content=content
    )  # the second entry begins where the first does


END, ENTRY = b"PK\5\6", b"PK\1\2"
ZIPS = {
    "bomb": lambda: zip_bytes(zipfile.ZIP_DEFLATED, [("x/data.pkl", b"\0" * 2**26)]),
    "bomb in a storage": lambda: zip_bytes(
        zipfile.ZIP_DEFLATED, [("x/data.pkl", b"\x80\x02N."), ("x/data/0", b"\0" * 2**26)]
    ),
    "overlap": overlapping,
    "count": lambda: patched(END, 10, 50_000, 2),
    "both counts": lambda: patched(END, 8, 50_000 * 65537),
    "directory size": lambda: patched(END, 12, 2**31),
    "directory offset": lambda: patched(END, 16, 2**31),
    "directory elsewhere": lambda: patched(END, 16, 3),
    "zip64 without one": lambda: patched(END, 16, 2**32 - 1),
    "comment length": lambda: patched(END, 20, 500, 2),
    "disk": lambda: patched(END, 4, 1, 2),
    "entry offset": lambda: patched(ENTRY, 42, 10**6),
    "entry offset inside": lambda: patched(ENTRY, 42, 7),
    "entry size": lambda: patched(ENTRY, 24, 10**6, content=patched(ENTRY, 20, 10**6)),
    "entry sizes differ": lambda: patched(ENTRY, 24, 3),
    "entry zip64": lambda: patched(ENTRY, 24, 2**32 - 1),
    "entry name length": lambda: patched(ENTRY, 28, 60_000, 2),
    "encrypted": lambda: patched(ENTRY, 8, 1, 2),
    "checksum": lambda: patched(ENTRY, 16, 12345),
    "two roots": lambda: zip_bytes(entries=[("x/data.pkl", b"N."), ("y/data.pkl", b"N.")]),
    "deeper": lambda: zip_bytes(entries=[("x/y/data.pkl", b"N.")]),
    "root only": lambda: zip_bytes(entries=[("data.pkl", b"N.")]),
    "parent": lambda: zip_bytes(entries=[("../data.pkl", b"N.")]),
    "big endian": lambda: zip_bytes(entries=[("x/data.pkl", b"N."), ("x/byteorder", b"big")]),
    "long byteorder": lambda: zip_bytes(entries=[("x/data.pkl", b"N."), ("x/byteorder", b"l" * 99)]),
    "nothing in it": lambda: zip_bytes(entries=()),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_false_archives_are_refused(good, tmp_path, case):
    (tmp_path / "x.pt").write_bytes(ZIPS[case]())
    assert (
        outcome(lambda: detect.open_adapter(tmp_path / "x.pt", CONFIG), tmp_path, True) == "error"
    )


def test_an_entry_listed_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        content = zip_bytes(entries=[("x/data.pkl", b"N.")] * 2)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DitError, match="twice"):
        torch_pickle.load(tmp_path / "x.pt")


# ------------------------------------------------------------------ safetensors


def header(entries, data=64, length=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + b"\0" * data


def entry(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty file": b"",
    "short": b"\1\2\3",
    "length": header({}, length=2**63),
    "length past the end": header({}, length=10**6),
    "length of zero": header(b"", data=0),
    "no JSON": header(b"{" * 20),
    "deep JSON": header(b"[" * 200_000 + b"]" * 200_000),
    "deep metadata": header(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "list": header([]),
    "metadata list": header({"__metadata__": [1], "a": entry()}),
    "not text": header(b'{"\xff":1}'),
    "entry number": header({"a": 1}),
    "entry list": header({"a": []}),
    "no dtype": header({"a": {"shape": [16], "data_offsets": [0, 64]}}),
    "dtype list": header({"a": entry(dtype=["F32"])}),
    "dtype dict": header({"a": entry(dtype={})}),
    "dtype": header({"a": entry(dtype="F128")}),
    "huge shape": header({"a": entry(shape=[2**62])}),
    "overflowing shape": header({"a": entry(shape=[2**33, 2**33])}),
    "wrapping shape": header({"a": entry(shape=[2**32, 2**32, 16])}),
    "many dimensions": header({"a": entry(shape=[1] * 5000)}),
    "negative shape": header({"a": entry(shape=[-16])}),
    "negative shapes": header({"a": entry(shape=[-4, -4])}),
    "float shape": header({"a": entry(shape=[16.0])}),
    "bool shape": header({"a": entry(shape=[True], offsets=(0, 4))}, data=4),
    "text shape": header({"a": {"dtype": "F32", "shape": "16", "data_offsets": [0, 64]}}),
    "integer of 10,000 digits": header(b'{"a":{"dtype":"F32","shape":[1' + b"0" * 10_000 + b'],"data_offsets":[0,64]}}'),
    "negative offset": header({"a": entry(offsets=(-64, 0))}),
    "reversed offsets": header({"a": entry(offsets=(64, 0))}),
    "offset past the end": header({"a": entry(offsets=(64, 128))}),
    "huge offsets": header({"a": entry(offsets=(2**63, 2**63 + 64))}),
    "one offset": header({"a": entry(offsets=(0,))}),
    "offset text": header({"a": entry(offsets=("0", "64"))}),
    "overlap": header({"a": entry(), "b": entry()}),
    "partial overlap": header({"a": entry(), "b": entry(shape=(8,), offsets=(32, 64))}),
    "gap": header({"a": entry(shape=(8,), offsets=(0, 32)), "b": entry(shape=(4,), offsets=(48, 64))}),
    "data left over": header({"a": entry(shape=(8,), offsets=(0, 32))}),
    "same name twice": header(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'),
    "name of 10 MB": header({"a" * 10**7: entry()}),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("name", ["peft", "model"])
def test_false_safetensors_headers_are_refused(good, tmp_path, params, name, case):
    shutil.copytree(good / name, tmp_path / name)
    file = "adapter_model.safetensors" if name == "peft" else "model.safetensors"
    (tmp_path / name / file).write_bytes(HEADERS[case])
    assert outcome(lambda: read(tmp_path, name, params), tmp_path / name, True) == "error"


def test_a_tensor_of_another_size_is_refused_before_it_is_read(good, tmp_path, params):
    shutil.copytree(good / "model", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {name: np.zeros((30_000, 1000), np.float32)}, tmp_path / "model" / "model.safetensors"
    )
    start = tmp_path / "model"
    before = reset_peak()
    assert outcome(lambda: read(tmp_path, "model", params), start) == "error"
    assert peak() - before < 2**24  # of 114 MiB


# ------------------------------------------------------------------ paths, links, JSON, CSV


OUTSIDE = ["../secret.pt", "/etc/passwd", "weight-diffs/../../secret.pt", "a/b.pt", "..", ".", "",
           "..\\secret.pt", "secret.pt\0", "weight-diffs/weight-diffs/a.pt", "weight-diffs/",
           "C:\\secret.pt", "~/secret.pt", "file:///etc/passwd", "x" * 5000, "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_lead_out_of_its_folder(good, tmp_path, params, name):
    shutil.copytree(good / "release", tmp_path / "release")
    shutil.copy(good / "diffs" / "x.pt", tmp_path / "secret.pt")
    row = f'"{name}",1,9,topic 1,1,train\n'.encode("utf-8", "surrogatepass")
    header_row = b"lora_path,lora_idx,n_params,topic,trigger,split\n"
    (tmp_path / "release" / "index.csv").write_bytes(header_row + row)
    assert outcome(lambda: read(tmp_path, "release", params), tmp_path / "release") == "error"


@pytest.mark.parametrize("name", [n for n in OUTSIDE if n.isprintable()])
def test_a_shard_index_cannot_lead_out_of_its_folder(good, tmp_path, params, name):
    shutil.copytree(good / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(good / "model" / "model.safetensors", tmp_path / "secret.pt")
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    assert outcome(lambda: read(tmp_path, "shards", params), tmp_path / "shards") == "error"


LINKS = [
    ("peft", "adapter_config.json"),
    ("peft", "adapter_model.safetensors"),
    ("model", "config.json"),
    ("model", "model.safetensors"),
    ("shards", "model-00001-of-00002.safetensors"),
    ("shards", "model.safetensors.index.json"),
    ("release", "index.csv"),
    ("release", "weight-diffs/a.pt"),
    ("release", "weight-diffs"),
]


@pytest.mark.parametrize(("name", "file"), LINKS, ids=[f"{a}-{b}" for a, b in LINKS])
def test_links_out_of_the_folder_are_refused(good, tmp_path, params, name, file):
    folder = tmp_path / name
    shutil.copytree(good / name, folder)
    if not (folder / file).exists():  # the number of shards depends on their size
        file = sorted(p.name for p in folder.glob("model-00001*"))[0]
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    assert outcome(lambda: read(tmp_path, name, params), folder) == "error"
    (folder / file).unlink()
    (folder / file).symlink_to(folder / file)  # a link to itself
    assert outcome(lambda: read(tmp_path, name, params), folder) == "error"
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    assert outcome(lambda: read(tmp_path, name, params), folder) == "error"
    (folder / file).unlink()
    os.mkfifo(folder / file)  # opening it would wait for ever
    assert outcome(lambda: read(tmp_path, name, params), folder) == "error"


def test_links_inside_the_folder_and_in_the_hub_cache_are_followed(good, tmp_path, params):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    shutil.copytree(good / "peft", snapshot)
    (tmp_path / "models--x--y" / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        blob = tmp_path / "models--x--y" / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(f"../../blobs/{file.name}")
    cache = tmp_path / "models--x--y"
    assert outcome(lambda: detect.open_diffs(snapshot, CONFIG)[0], cache) == "loaded"
    shutil.copytree(good / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "model" / "real")
    weights.symlink_to("real")
    assert outcome(lambda: read(tmp_path, "model", params), tmp_path / "model") == "loaded"


JSON_FILES = [
    ("peft", "adapter_config.json"),
    ("model", "config.json"),
    ("shards", "model.safetensors.index.json"),
    ("shards", "config.json"),
]
BAD_JSON = {
    "empty": b"",
    "list": b"[]",
    "text": b'"x"',
    "number": b"1e999",
    "null": b"null",
    "object": b"{}",
    "not text": b"\xff\xfe{}",
    "deep": b"[" * 10**6,
    "deep object": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "truncated": b'{"peft_type": "LORA", "r',
    "10 MB field": json.dumps({"peft_type": "a" * 10**7, "model_type": "b" * 10**7}).encode(),
    "10 MB digits": b'{"r": ' + b"1" * 10**7 + b', "weight_map": 1}',
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize(("name", "file"), JSON_FILES, ids=[f"{a}-{b}" for a, b in JSON_FILES])
def test_broken_json_is_refused(good, tmp_path, params, name, file, case):
    shutil.copytree(good / name, tmp_path / name)
    (tmp_path / name / file).write_bytes(BAD_JSON[case])
    assert outcome(lambda: read(tmp_path, name, params), tmp_path / name, True) == "error"


STRANGE = [None, True, -1, 0, 1.5, 2**70, 10**400, "x", "", "a" * 10**6, [], [[]], {}, {"a": [1]}, [None],
           float("nan"), float("inf"), ["../x"], "../../x", "(" * 50, "[" * 300]  # fmt: skip


@pytest.mark.parametrize(("name", "file"), JSON_FILES, ids=[f"{a}-{b}" for a, b in JSON_FILES])
def test_every_field_of_a_json_file_may_be_anything(good, tmp_path, params, name, file):
    folder = tmp_path / name
    shutil.copytree(good / name, folder)
    original = json.loads((folder / file).read_text())
    extra = {"peft": ["use_dora", "modules_to_save", "runtime_config"]}.get(name, [])
    seen = set()
    for key in [*original, *extra]:
        for value in STRANGE:
            (folder / file).write_text(json.dumps({**original, key: value}))
            seen.add(outcome(lambda: read(tmp_path, name, params), folder))
    assert "error" in seen


BAD_CSV = {
    "empty": b"",
    "no text": b"\xff\xfe\0",
    "header only": b"lora_path,lora_idx,n_params,topic,trigger,split\n",
    "quote": b'lora_path,lora_idx,n_params,topic,trigger,split\n"a.pt,1',
    "quote in a field": b'lora_path,lora_idx,n_params,topic,trigger,split\n"a"b.pt,1,9,t,1,s\n',
    "10 MB field": b"lora_path,lora_idx,n_params,topic,trigger,split\na.pt,1,9,"
    + b"t" * 10**7
    + b",1,x\n",
    "10 MB name": b"lora_path,lora_idx,n_params,topic,trigger,split\n"
    + b"a" * 10**5
    + b".pt,1,9,t,1,x\n",
    "10 MB header": b"lora_path,lora_idx,n_params,topic,trigger," + b"s" * 10**7 + b"\n",
    "many columns": b"lora_path,lora_idx,n_params,topic,trigger,split\n" + b"a," * 10**6 + b"\n",
    "digits": b"lora_path,lora_idx,n_params,topic,trigger,split\na.pt,"
    + b"1" * 10**5
    + b",9,t,1,x\n",
    "other digits": "lora_path,lora_idx,n_params,topic,trigger,split\na.pt,²,9,t,1,x\n".encode(),
    "NUL": b"lora_path,lora_idx,n_params,topic,trigger,split\na.pt\0,1,9,t,1,x\n",
    "CR": b"lora_path,lora_idx,n_params,topic,trigger,split\ra.pt\r,1,9,t,1,x\r",
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_broken_indexes_are_refused(good, tmp_path, params, case):
    shutil.copytree(good / "release", tmp_path / "release")
    (tmp_path / "release" / "index.csv").write_bytes(BAD_CSV[case])
    assert outcome(lambda: read(tmp_path, "release", params), tmp_path / "release", True) == "error"


@pytest.mark.parametrize(
    "content", [b"{}", b'{"format": []}', b'{"format": "x"}', b"[", b'{"format": {}}']
)
def test_manifests_of_other_things_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DitError):
        detect.detect_format(tmp_path)


def test_nothing_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path, Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(DitError):
            detect.detect_format(path)


# ------------------------------------------------------------------ truncations, flipped bits, fuzz


FILES = [
    ("diffs", "x.pt"),
    ("adapter", "x.pt"),
    ("weights", "x.pt"),
    ("peft", "adapter_model.safetensors"),
    ("peft", "adapter_config.json"),
    ("model", "model.safetensors"),
    ("model", "config.json"),
    ("shards", "model.safetensors.index.json"),
    ("release", "index.csv"),
]
FILE_IDS = [f"{a}-{b}" for a, b in FILES]


@pytest.mark.parametrize(("name", "file"), FILES, ids=FILE_IDS)
def test_truncated_files(good, tmp_path, params, name, file):
    shutil.copytree(good / name, tmp_path / name)
    content = (good / name / file).read_bytes()
    sizes = {*range(0, min(64, len(content)), 7), *np.linspace(0, len(content) - 1, 20).astype(int)}
    for size in sorted(int(size) for size in sizes):
        (tmp_path / name / file).write_bytes(content[:size])
        found = outcome(lambda: read(tmp_path, name, params), tmp_path / name)
        # The last line break of a text may go, and the end of the last field of a table.
        assert found == "error" or content[size:] == b"\n" or file == "index.csv", size


@pytest.mark.parametrize(("name", "file"), FILES, ids=FILE_IDS)
def test_flipped_bits(good, tmp_path, params, name, file):
    shutil.copytree(good / name, tmp_path / name)
    content = bytearray((good / name / file).read_bytes())
    rng = np.random.default_rng(5)
    head = rng.integers(0, min(2000, len(content)), 25)
    tail = len(content) - 1 - rng.integers(0, min(2000, len(content)), 25)
    for position in (*head, *tail, *rng.integers(0, len(content), 25)):
        bit = 1 << int(rng.integers(0, 8))
        content[position] ^= bit
        (tmp_path / name / file).write_bytes(content)
        outcome(lambda: read(tmp_path, name, params), tmp_path / name)
        content[position] ^= bit


INTERESTING = st.sampled_from(
    [b"\0", b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"9" * 40, b'"', b"[", b"{", b"../", b"-1", b"1e999",
     b"null", b"cos\nsystem\n", b"R", b"b", b"\x81", b"PK\1\2", b"PK\5\6", b"NaN", b",", b"\n"]
)  # fmt: skip
POSITION = st.one_of(
    st.floats(0, 1), st.floats(0, 0.02), st.floats(0.98, 1)
)  # the headers and directories are at the ends
MUTATION = st.tuples(
    st.sampled_from(["flip", "replace", "insert", "delete", "copy"]),
    POSITION,
    POSITION,
    INTERESTING,
)


def mutate(content, mutations):
    for kind, first, second, piece in mutations:
        size = max(len(content), 1)
        start, stop = int(first * (size - 1)), int(second * (size - 1))
        if kind == "flip" and content:
            content[start] ^= 1 << (stop % 8)
        elif kind == "replace":
            content[start : start + len(piece)] = piece
        elif kind == "insert":
            content[start:start] = piece
        elif kind == "delete":
            del content[start : start + 1 + stop % 64]
        else:
            content[start:start] = content[stop : stop + 64]
    return content


@pytest.mark.parametrize(("name", "file"), FILES, ids=FILE_IDS)
def test_mutated_files(good, tmp_path_factory, params, name, file):
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(good / name, root / name)
    content = (good / name / file).read_bytes()

    @settings(
        max_examples=FUZZ, deadline=None, database=None, derandomize=FUZZ < 100,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(MUTATION, min_size=1, max_size=6))
    def run(mutations):
        (root / name / file).write_bytes(mutate(bytearray(content), mutations))
        outcome(lambda: read(root, name, params), root / name)

    run()


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("name", "file"), [("peft", "adapter_model.safetensors"), ("model", "model.safetensors")]
)
def test_mutated_safetensors_headers(good, tmp_path_factory, params, name, file):
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(good / name, root / name)
    content = (good / name / file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = sorted(table)

    @settings(
        max_examples=FUZZ, deadline=None, database=None, derandomize=FUZZ < 100,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.sampled_from(names), st.sampled_from(["", "dtype", "shape", "data_offsets"]), JSON_VALUES
    )
    def run(tensor_name, field, value):
        changed = json.loads(json.dumps(table))
        if field and isinstance(changed[tensor_name], dict):
            changed[tensor_name][field] = value
        else:
            changed[tensor_name] = value
        raw = json.dumps(changed).encode()
        (root / name / file).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        outcome(lambda: read(root, name, params), root / name)

    run()
