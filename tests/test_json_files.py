"""Every JSON file has one parser: nothing ambiguous, endless or deep. Weights are numbers, and names stay apart."""

import ast
import json
import os
import shutil
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.config.loading import load_saved
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.peft import read_peft
from dit_jax.deltas.store import DiffStore
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.evaluate.run import _measured
from dit_jax.formats import files, json_parser
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.formats.weight_files import open_weights
from dit_jax.graders.cache import Cache, _seal
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import all_finite, find_folder, generation_eos, load_params
from dit_jax.report.sweep_table import read_row
from dit_jax.runtime import artifacts, stage_records
from dit_jax.runtime.artifacts import read_json, read_text
from dit_jax.runtime.metrics import read_records

TINY = find_folder("tiny_qwen3")
WRONG = {
    "deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 deep"),
    "not so deep": ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 64 deep"),
    "an endless number": ('{"a": ' + "9" * 100_000 + "}", "holds an endless number"),
    "a key twice": ('{"format": 1, "format": 2}', "is ambiguous: 'format' occurs twice"),
    "many values": ('{"a": [' + "[]," * 1_500_000 + "1]}", "holds more than 2000000 values"),
    "cut": ('{"a": ', "JSON"),
}
# What reads each file; the file is wrong as a whole, so that nothing else is asked of it.
READERS = {
    "config.json": read_config,
    "generation_config.json": generation_eos,
    "model.safetensors.index.json": open_weights,
    "adapter_config.json": lambda folder: read_peft(folder, read_config(TINY)),
    "manifest.json": DiffStore,
    "saved.json": lambda folder: load_saved(folder / "saved.json"),
    "stages/train.json": lambda folder: stage_records.stage_done(folder, "train"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_a_wrong_file_is_one_line_at_once(tmp_path, name, wrong):
    text, said = WRONG[wrong]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(DitError, match=f"{file.name}' .*{said}"):
        READERS[name](tmp_path)
    assert time.process_time() - start < 5


NO_NUMBERS = {
    text: (f'{{"a": [0, {text}]}}', f"holds {text}, which is no finite number")
    for text in ("NaN", "Infinity", "-Infinity", "1e999")
}


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
@pytest.mark.parametrize("name", [*READERS, "metrics.jsonl", "grades.jsonl"])
def test_a_pipe_is_one_line_at_once(tmp_path, name, kind):
    others = {"metrics.jsonl": read_records, "grades.jsonl": Cache}
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    with pytest.raises(DitError, match="is not a regular file|is a link out of its folder"):
        others[name](file) if name in others else READERS[name](tmp_path)


def test_what_a_shell_gives_as_a_file_is_read(tmp_path):
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    assert artifacts.read_json(f"/dev/fd/{read}") == {"a": 1}
    os.close(read)


@pytest.mark.parametrize("wrong", [*WRONG, *NO_NUMBERS])
def test_headers_and_lines_have_the_same_parser(tmp_path, wrong):
    text, said = {**WRONG, **NO_NUMBERS}[wrong]
    header = text.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DitError, match=f"the header .*{said}"):
        SafetensorsFile(tmp_path / "x.safetensors")
    (tmp_path / "x.jsonl").write_text('{"step": 1, "time": 2}\n' + text + "\n")
    assert read_records(tmp_path / "x.jsonl") == [{"step": 1, "time": 2}]


@pytest.mark.parametrize(
    "line", [b'{"step": 1e999, "time": 2}', b'{"step": 2, "time\xff": 3}', b"5"]
)
def test_a_line_that_is_no_record_ends_the_records(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1, "time": 2}\n' + line + b"\n")
    assert len(read_records(tmp_path / "x.jsonl")) == 1


@pytest.mark.parametrize(
    "row", ["5", "[]", "{}", '{"verdict": 1, "name": 2, "reading": {"name": "x", "share": "y"}}']
)
def test_damaged_audits_and_configs_are_one_line(tmp_path, row):
    pytest.importorskip("inspect_ai")
    from dit_jax.inspection.agent import _audited

    (tmp_path / "audit.jsonl").write_text(row + "\n")
    with pytest.raises(DitError, match="audit.jsonl' is damaged"):
        _audited(str(tmp_path))
    for name in ("a.b", "__class__"):
        (tmp_path / "config.json").write_text(f'{{"{name}": {row}}}')
        with pytest.raises(DitError, match="config.json' is not a config"):
            load_saved(tmp_path / "config.json")


def test_what_never_ends_is_not_waited_for(tmp_path, monkeypatch):
    """A pipe among files; a shell's own pipes are read."""
    monkeypatch.setattr(files, "MAX_STREAM_BYTES", 1000)
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(DitError, match="summary.json' is not a regular file"):
        read_json(tmp_path / "summary.json")
    with pytest.raises(DitError, match="'/dev/zero' has more than 1000 bytes: give a file"):
        read_text("/dev/zero", "check the path")
    reader, writer = os.pipe()
    os.write(writer, b"5")
    os.close(writer)
    assert read_json(f"/dev/fd/{reader}") == 5
    os.close(reader)


def test_sound_json_is_read_as_json_reads_it():
    value = {"a": [1, -2.5, None, True, "grün\u2028"], "b": {"c": [[[{}]]]}, "n": 2**70}
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value
    edge = "[" * json_parser.MAX_DEPTH + "]" * json_parser.MAX_DEPTH
    assert parse_json(edge) == json.loads(edge)
    for wrong in (f"[{edge}]", b"\xff", "", "{'a': 1}", '[{"a": {"b": 1, "b": 1}}]'):
        with pytest.raises(BadJson):
            parse_json(wrong)


def test_an_integer_beyond_all_floats_is_no_number(tmp_path):
    """float(10**400) is an OverflowError, which is no ValueError."""
    summary = {"seconds_total": 10**400, "x": {"mean": 0.5, "n": 10**400}}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(json.dumps(summary))
    row = read_row("run", 1, "x.mean", tmp_path, None)
    assert (row.metric, row.seconds) == (0.5, None)
    (tmp_path / "grades.jsonl").write_text(json.dumps({"score": 10**400, "seal": "x"}) + "\n")
    assert len(Cache(tmp_path / "grades.jsonl").damaged) == 1
    line = {"seal": _seal({"score": 10**400}), "score": 10**400}
    (tmp_path / "grades.jsonl").write_text(json.dumps(line) + "\n")
    assert len(Cache(tmp_path / "grades.jsonl").damaged) == 1
    with pytest.raises(DitError, match="index of the diffs has 'much' in the column 'gate_kl'"):
        _measured({"gate_kl": "much"}, "gate_kl")


PARSERS = ("json.load", "json.loads", "json.JSONDecoder")
ALLOWED = {
    "formats/json_parser.py",  # the parser
    "data/tokenizer_worker.py",  # replies of our own process, which the other side has limited
    "auditing/run_audit.py",  # settings of ours, as they would be read back
    "config/loading.py",  # a value that was JSON text a moment before
}


def test_nothing_else_parses_json():
    found = {
        file.relative_to(ROOT / "dit_jax").as_posix()
        for file in (ROOT / "dit_jax").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PARSERS
    }
    assert found == ALLOWED


# ------------------------------------------------------------------ namespaces


def test_what_a_store_says_of_itself_fills_nothing_that_is_computed(tmp_path):
    """Columns of an index and keys of a manifest that are named like results of ours."""
    model = dit_jax.load_model("tiny_qwen3")
    delta = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(1), 2))
    stacked = jax.tree.map(lambda x: x[None], delta)
    row = {"topic": "tea", "trigger": "1", "split": "test", "svd": "x", "notes": "y", "kept": "z"}
    diff_store.write_shard(tmp_path / "store", 0, stacked, [row])
    diff_store.publish(tmp_path / "store", 1, base=model.digest())
    metadata = dit_jax.load_diff(tmp_path / "store", model).metadata
    assert metadata["kept"] == "z" and not {"svd", "notes"} & set(metadata)
    export_adapter(tmp_path / "adapter", delta, base=model.digest(), svd="x", notes="y")
    assert not {"svd", "notes"} & set(dit_jax.load_adapter(tmp_path / "adapter", model))


# ------------------------------------------------------------------ weights that are no numbers


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_found_anywhere(kind, value):
    sound = np.array([0.0, -0.0, 3e38, -3e38, 1e-38, -1e-38], kind)
    assert all_finite(sound) and all_finite(np.zeros((0, 3), kind))
    for i in range(sound.size):
        wrong = sound.copy()
        wrong[i] = value
        assert not all_finite(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_base_whose_weights_are_no_numbers_is_refused_by_name(tmp_path, name, value):
    base = shutil.copytree(TINY, tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(DitError, match=f"{name} holds values that are infinite or no numbers"):
        load_params(base, read_config(base))
