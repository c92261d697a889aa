"""Files of torch.save, read without torch and compared with what torch reads."""

import collections
import re
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, NO_GOLDEN
from format_cases import from_torch

from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle, torch_save
from dit_jax.formats.torch_pickle import LazyTensor

torch = pytest.importorskip("torch")


def assert_equal(found, wanted):
    """Same containers, same tensors bit for bit; returns the number of tensors."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, LazyTensor)
        values, expected = found.read(), from_torch(wanted.detach())
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
        assert values.flags.c_contiguous
        assert values.tobytes() == np.ascontiguousarray(expected).tobytes()
        return 1
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        return sum(assert_equal(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        assert type(found) is (tuple if isinstance(wanted, tuple) else list)
        assert len(found) == len(wanted)
        return sum(assert_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found == wanted and type(found) is type(wanted)
    return 0


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_reads(tmp_path, protocol):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    value = {
        **{name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in DTYPES},
        "bool": torch.tensor([True, False]),
        "row": base[1],
        "column": base[:, :, 2],
        "transposed": base.permute(2, 0, 1),
        "step": base[::2, 1:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "again": [base, base],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "others": (None, True, -1, 300, 70000, 2**40, 1.5, "é" * 300, [], {}, ()),
        "ordered": collections.OrderedDict(a=torch.ones(1)),
        3: "integer key",
    }
    torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
    found = torch_pickle.load(tmp_path / "x.pt")
    value["ordered"] = dict(value["ordered"])
    assert assert_equal(found, value) == len(DTYPES) + 11


def test_reads_the_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    state = module.state_dict()  # it carries version numbers as an attribute: a BUILD instruction
    torch.save(state, tmp_path / "x.pt")
    assert assert_equal(torch_pickle.load(tmp_path / "x.pt"), dict(state)) == 4


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=NO_GOLDEN)
def test_reads_the_golden_files():
    files = sorted(GOLDEN.glob("*/*.pt"))
    assert files
    for file in files:
        assert assert_equal(torch_pickle.load(file), torch.load(file, weights_only=True)) > 0


def test_one_tensor_costs_its_own_bytes(tmp_path):
    stacked = torch.randn(64, 2**17)  # 32 MiB, of which a diff is one row of 512 KiB
    torch.save([row for row in stacked], tmp_path / "x.pt")
    tensors = torch_pickle.load(tmp_path / "x.pt")
    tracemalloc.start()
    row = tensors[40].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(row, stacked[40].numpy())
    assert peak < 4 * row.nbytes


def test_thousands_of_diffs_may_share_a_storage(tmp_path):
    rows = torch.arange(40_000).reshape(20_000, 2).float()
    torch.save(list(rows), tmp_path / "x.pt")
    found = torch_pickle.load(tmp_path / "x.pt")
    assert len(found) == 20_000 and list(found[-1].read()) == [39_998, 39_999]


def refused(path, message):
    with pytest.raises(DitError, match=re.escape(message)) as caught:
        torch_pickle.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    refused(path, "torch's old format")
    path.write_bytes(b"hello")
    refused(path, "not a file that torch.save wrote")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "no data.pkl")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    refused(path, "TorchScript")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, "'torch.nn.modules.linear.Linear', which is not allowed")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path)
    refused(path, "ComplexFloatStorage")
    torch.save({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    refused(path, "not allowed")
    torch.save({"a": torch.ones(1).expand(1000)}, path)
    refused(path, "reaches outside its storage")
    torch.save({"a": torch.complex(torch.ones(2), torch.ones(2)).conj().imag}, path)
    refused(path, "negated or conjugated")
    refused(tmp_path / "absent.pt", "is missing")
    refused(tmp_path, "not a regular file")


def test_damage_is_found(tmp_path):
    values = np.arange(1000, dtype=np.float32)
    torch_save.save(tmp_path / "x.pt", {"a": values})
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(values.tobytes()) + 100] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    tensor = torch_pickle.load(tmp_path / "x.pt")["a"]
    with pytest.raises(DitError, match="checksum"):
        tensor.read()


def test_torch_reads_what_we_write(tmp_path):
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = {
        "a": shared,
        "again": shared,
        "transposed": shared.T,
        "bf16": np.asarray([1.5, -2], ml_dtypes.bfloat16),
        "f16": np.float16([[1]]),
        "i64": np.arange(3),
        "scalar": np.full((), 3, np.float32),
        "others": [
            1,
            -1,
            255,
            256,
            -(2**40),
            1.5,
            True,
            False,
            None,
            "é",
            (),
            (1, (2, [])),
            {"x": {}},
        ],
    }
    torch_save.save(tmp_path / "x.pt", value, "x")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert assert_equal(torch_pickle.load(tmp_path / "x.pt"), found) == 7
    assert found["others"] == value["others"]
    assert found["a"].data_ptr() == found["again"].data_ptr()
    for key in ("a", "transposed", "bf16", "f16", "i64", "scalar"):
        assert from_torch(found[key]).tobytes() == value[key].tobytes()
        assert found[key].shape == value[key].shape
    assert torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)["a"].sum() == 15


def test_unwritable_values_are_refused(tmp_path):
    with pytest.raises(DitError, match="complex64"):
        torch_save.save(tmp_path / "x.pt", [np.ones(1, np.complex64)])
    with pytest.raises(TypeError):
        torch_save.save(tmp_path / "x.pt", [object()])
