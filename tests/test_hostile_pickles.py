"""Torch files that try to execute something, to lie about their tensors, or to cost time and memory."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from format_cases import CONFIG, random_params
from hostile import make_good, outcome, watch

from dit_jax.deltas import detect
from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def good(tmp_path_factory, params):
    """Well-formed files of every format."""
    return make_good(tmp_path_factory.mktemp("good"), params)


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
    "name that is nested tuples": b"\x80\x04)" + b"\x85" * 400_000 + b"X\1\0\0\0a\x93.",
    "size of a list": b"\x80\x02ctorch\nSize\n](K\1e\x85R.",
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


@pytest.mark.parametrize("case", ["many lists", "many memos", "many marks"])
def test_storages_of_no_bytes_do_not_allow_more_memory(tmp_path, params, case):
    """Real files need more instructions for more storages."""
    path = torch_file(tmp_path / "x.pt", LARGE[case], storages=[b""] * 3_000)
    assert outcome(lambda: detect.open_diffs(path, CONFIG, params)[0], tmp_path, True) == "error"


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
    "outside": lambda: zip_bytes(entries=[("x/data.pkl", b"N."), ("../../y", b"")]),
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
