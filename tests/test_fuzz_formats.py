"""Truncated, bit-flipped and randomly mutated files give an error or load correctly, and nothing is executed.

DIT_JAX_FUZZ sets the number of mutated files per reader: 400 makes more than 4,000 in all.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from format_cases import random_params
from hostile import make_good, outcome, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = int(os.environ.get("DIT_JAX_FUZZ", "25"))


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def good(tmp_path_factory, params):
    """Well-formed files of every format."""
    return make_good(tmp_path_factory.mktemp("good"), params)


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
        # A text may lose its last line break, and a table the end of its last field.
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
