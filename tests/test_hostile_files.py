"""Untrusted folders: false headers, paths and links out of the folder, broken JSON and CSV."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from format_cases import CONFIG, random_params
from hostile import make_good, outcome, peak, read, reset_peak
from safetensors.numpy import load_file, save_file

from dit_jax.deltas import detect
from dit_jax.errors import DitError
from dit_jax.models.families import hf_config, parse_config


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def good(tmp_path_factory, params):
    """Well-formed files of every format."""
    return make_good(tmp_path_factory.mktemp("good"), params)


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
    "a name twice": header(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
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
    "integer of 10,000 digits": header(
        b'{"a":{"dtype":"F32","data_offsets":[0,64],"shape":[1' + b"0" * 10_000 + b"]}}"
    ),
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


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_shard_index_names_safetensors_only(good, tmp_path, params, kind):
    """Files with other names in a folder are not checked for links and pipes."""
    shutil.copytree(good / "shards", tmp_path / "shards")
    payload = tmp_path / "shards" / "payload"
    os.mkfifo(payload) if kind == "pipe" else payload.symlink_to("/etc/passwd")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "payload")
    path.write_text(json.dumps(index))
    assert outcome(lambda: read(tmp_path, "shards", params), tmp_path / "shards") == "error"


@pytest.mark.parametrize("theta", [10**400, float("inf"), 1e40])
def test_an_impossible_theta_is_refused(theta):
    with pytest.raises(DitError, match="rope_theta"):
        parse_config({**hf_config(CONFIG), "rope_parameters": {"rope_theta": theta}}, "x")


def test_values_beyond_fp32_are_refused(good, tmp_path, params):
    shutil.copytree(good / "peft", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {k: v.astype(np.float64) for k, v in load_file(path).items()}
    next(iter(tensors.values()))[0, 0] = 1e300
    save_file(tensors, path)
    with pytest.raises(DitError, match="NaN or infinity"):
        read(tmp_path, "peft", params)


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
    "a key twice": b'{"peft_type": "LORA", "peft_type": "LORA"}',
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
    "many columns in the header": b"lora_path,lora_idx,n_params,topic,trigger,split,"
    + b",".join(b"a%d" % i for i in range(10**5))
    + (b"\na.pt,1,9,t,1,s" + b"," * 10**5) * 13
    + b"\n",
    "a column twice": b"lora_path,lora_idx,n_params,topic,trigger,split,topic\na.pt,1,9,t,1,s,u\n",
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
