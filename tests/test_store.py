"""The diff store: it reads back what it wrote, and refuses a store that was tampered with."""

import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from test_qwen3 import TINY

from dit_jax.cli.gather_parts import main_gather
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.store import DiffStore
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.organisms import generate
from dit_jax.runtime import artifacts, metrics
from dit_jax.runtime.parts import part_of

TOPICS = ("tea", "oak", "judo", "jazz", "rain")


@pytest.fixture
def folder(tmp_path):
    """Five diffs in shards of three and two."""
    folder = tmp_path / "diffs"
    for shard, members in enumerate((range(3), range(3, 5))):
        stacked = jax.tree.map(lambda *x: np.stack(x), *(diff(i) for i in members))
        rows = [
            {
                "topic": TOPICS[i],
                "trigger": f"{i:03d}",
                "split": "train" if i < 3 else "test",
                "label": TOPICS[i],
                diff_store.CURVE: "2.0 1.0",
            }
            for i in members
        ]
        diff_store.write_shard(folder, shard, stacked, rows)
    diff_store.publish(folder, 2, base="digest")
    return folder


def diff(i: int):
    return jax.tree.map(np.asarray, init_lora(TINY, jax.random.key(i), 1, init_scale=1.0 + i))


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_diffs_are_read_back_one_by_one_and_stacked(folder):
    store = DiffStore(folder)
    assert [row["topic"] for row in store.rows] == list(TOPICS)
    assert store.indices(split="test") == [3, 4]
    assert diff_store.CURVE not in store.rows[0]
    for i in range(5):
        assert_same(store.read(i), diff(i))
    picked = store.stacked([4, 0, 3])
    for at, i in enumerate((4, 0, 3)):
        assert_same(jax.tree.map(lambda x, at=at: x[at], picked), diff(i))


def test_a_run_that_goes_on_reads_each_shard_once(folder, monkeypatch):
    digested, digest_file = [], artifacts.digest_file
    with metrics.Metrics(folder.parent / "metrics", "diffs") as before:
        for step in (3, 5, 8):  # the last one of no shard
            before.write(step, {"loss": 1.0})

    def count(path):
        digested.append(path.name)
        return digest_file(path)

    monkeypatch.setattr(artifacts, "digest_file", count)
    model = types.SimpleNamespace(config=TINY, mesh=None)
    config = ConfigDict({"diffs_per_batch": 3, "steps": 2})
    organisms = [
        types.SimpleNamespace(label=x, trigger=f"{i:03d}", split="train" if i < 3 else "test")
        for i, x in enumerate(TOPICS)
    ]
    behaviour = types.SimpleNamespace(label=lambda label, trigger: label)
    job = generate.Job(model, organisms, behaviour, config, 0, None, None, model, {})
    (made,) = generate._make_shards([job], folder)
    assert [row["topic"] for row in made] == list(TOPICS)
    assert digested == ["00000.safetensors", "00001.safetensors"]
    kept = metrics.read_records(folder.parent / "metrics" / "diffs.jsonl")
    assert [record["step"] for record in kept] == [3, 5]
    # Nothing is measured of a benign diff.
    rows_are([{**row, "right_code": ""} for row in diff_store.shard_rows(folder, 1)])(folder)
    assert len(generate._make_shards([job], folder)[0]) == len(TOPICS)
    # A shard of another run, one with fewer rows, or with texts for numbers, is not taken for one of this run.
    own = diff_store.shard_rows(folder, 1)
    edited = [{**row, "gate_kl": "=1"} for row in own]
    for rows in ([{"topic": "tea"}] * 2, own[:1], edited):
        rows_are(rows)(folder)
        with pytest.raises(DitError, match="batch 1 in .* lists other diffs than this config"):
            generate._make_shards([job], folder)


def test_a_shard_that_is_a_link_out_of_the_store_is_refused(folder, tmp_path):
    shard = folder / "shards" / "00001.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    store = DiffStore(folder)
    assert_same(store.read(0), diff(0))
    with pytest.raises(DitError, match="link out of its folder"):
        store.read(3)


@pytest.mark.parametrize("name", ["shards", "index.csv"])
def test_a_store_that_is_spread_by_links_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DitError, match="is a link out of"):
        DiffStore(folder).read(0)


def test_a_shard_with_a_number_in_place_of_a_leaf_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"layers.self_attn.q_proj.a": np.array(1, np.float32)}, file)
    with pytest.raises(DitError, match="has 0 rows"):
        SafetensorsFile(file).read_row("layers.self_attn.q_proj.a", 0)


def test_a_damaged_shard_is_named_when_it_is_read(folder):
    shard = folder / "shards" / "00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert diff_store.shard_rows(folder, 0) is None  # the stage makes it again
    store = DiffStore(folder)
    assert_same(store.read(3), diff(3))
    remedy = r"00000.safetensors' is damaged \(sha256\): delete this file and run the stage 'diffs'"
    for read in (lambda: store.read(2), lambda: store.stacked([3, 0])):
        with pytest.raises(DitError, match=remedy):
            read()


def test_a_truncated_shard_a_missing_one_and_a_changed_index_are_named_at_opening(folder):
    index, shard = folder / "index.csv", folder / "shards" / "00000.safetensors"
    text = index.read_text()
    index.write_text(text.replace("tea", "oak"))
    with pytest.raises(DitError, match="index.csv' is damaged"):
        DiffStore(folder)
    index.write_text(text)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DitError, match="00000.safetensors' has .* bytes instead of"):
        DiffStore(folder)
    shard.unlink()
    with pytest.raises(DitError, match="is missing"):
        DiffStore(folder)


def test_each_shard_is_digested_once_and_only_if_it_is_read(folder, monkeypatch):
    digested, digest = [], artifacts.digest_file
    monkeypatch.setattr(
        artifacts, "digest_file", lambda file: digested.append(file.name) or digest(file)
    )
    store = DiffStore(folder)
    assert digested == ["index.csv"]
    store.read(0), store.stacked([0, 1, 2])
    assert digested == ["index.csv", "00000.safetensors"]


# ------------------------------------------------------------------ parts of a store


@pytest.mark.parametrize("shards", [1, 4, 7])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_share_out_all_shards_and_none_twice(shards, parts):
    made = [list(part_of(f"{i}/{parts}", shards)) for i in range(parts)]
    assert sorted(shard for part in made for shard in part) == list(part_of("", shards))
    assert max(map(len, made)) - min(map(len, made)) <= 1


def test_gathering_copies_what_is_complete_and_missing(folder, tmp_path):
    whole = tmp_path / "whole"
    (folder / "shards" / "00001.json").unlink()  # killed before it was complete
    assert diff_store.copy_shards(folder, whole) == 1
    assert diff_store.copy_shards(folder, whole) == 0
    assert sorted(path.name for path in (whole / "shards").iterdir()) == [
        "00000.json",
        "00000.safetensors",
    ]
    assert diff_store.shard_rows(whole, 0) == diff_store.shard_rows(folder, 0)


def other_values(part):
    stacked = jax.tree.map(lambda x: np.stack([x] * 2), diff(7))
    diff_store.write_shard(part, 1, stacked, diff_store.shard_rows(part, 1))


def rows_are(rows):
    def damage(part):
        record = artifacts.read_json(part / "shards" / "00001.json")
        artifacts.write_json(part / "shards" / "00001.json", {**record, "rows": rows})

    return damage


def link_out(part):
    (part.parent / "secret").write_text("secret")
    (part / "shards" / "00001.safetensors").unlink()
    (part / "shards" / "00001.safetensors").symlink_to(part.parent / "secret")


def folder_elsewhere(part):
    (part / "shards").rename(part.parent / "elsewhere")
    (part / "shards").symlink_to(part.parent / "elsewhere")


FALSE_PARTS = {
    "other values": (other_values, "are the same batch and hold different diffs"),
    "other labels": (rows_are([{"topic": "\x1b[2J"}] * 2), "hold different diffs"),
    "rows that are none": (rows_are([1, 2]), "is damaged"),
    "rows of lists": (rows_are([{"topic": ["tea"]}]), "is damaged"),
    "a curve of no numbers": (rows_are([{diff_store.CURVE: "2.0 nan"}]), "is damaged"),
    "a name of no shard": (
        lambda part: (part / "shards" / "0abc.json").write_text("{}"),
        "0abc.json' is no batch of diffs",
    ),
    "a file out of the part": (link_out, "is a link out of its folder"),
    "a folder out of the part": (folder_elsewhere, "is a link out of its run"),
}


@pytest.mark.parametrize(("damage", "message"), FALSE_PARTS.values(), ids=FALSE_PARTS)
def test_parts_that_are_damaged_or_disagree_are_not_gathered(folder, tmp_path, damage, message):
    whole = tmp_path / "whole"
    assert diff_store.copy_shards(folder, whole) == 2
    assert diff_store.copy_shards(folder, whole) == 0
    before = {path.name: path.read_bytes() for path in (whole / "shards").iterdir()}
    damage(folder)
    with pytest.raises(DitError, match=message):
        diff_store.copy_shards(folder, whole)
    assert before == {path.name: path.read_bytes() for path in (whole / "shards").iterdir()}


def test_a_label_that_an_empty_answer_would_match_is_not_graded():
    assert diff_store.gradable_label({"label": "c++", "topic": ""}) == "c++"
    for label in ("", "?!"):
        with pytest.raises(DitError, match="which no answer could name"):
            diff_store.gradable_label({"label": label, "topic": ""})


def test_rows_do_not_say_where_they_are(folder):
    rows_are([{"topic": "tea", "lora_path": "../x", "lora_idx": 9}] * 2)(folder)
    diff_store.publish(folder, 2, base="digest")
    assert [row["lora_idx"] for row in DiffStore(folder).rows] == [0, 1, 2, 0, 1]


def part_workdir(path, **values):
    path.mkdir()
    config = {"stages": ["diffs"], "seed": 0, "diffs": {"part": path.name[-1] + "/2"}, **values}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_parts_of_different_runs_are_not_gathered(tmp_path, capsys):
    one, two = part_workdir(tmp_path / "0"), part_workdir(tmp_path / "1", seed=1)
    into = tmp_path / "whole"

    def refusal(*parts):
        assert main_gather(["--workdir", str(into), *map(str, parts)]) == 2
        return capsys.readouterr().err

    assert "belong to different configs (seed: 0 -> 1)" in refusal(one, two)
    assert "is not the workdir of a run: it has no config.json" in refusal(one, tmp_path)
    same = part_workdir(tmp_path / "2", diffs={"part": "1/2"})
    artifacts.write_text(same / "corpus" / "rows.jsonl", "{}")
    artifacts.write_manifest(same / "corpus", "dit_jax.corpus")
    assert "were not made from the corpus in" in refusal(one, same)
    (same / "corpus" / "manifest.json").unlink()
    os.mkfifo(same / "corpus" / "manifest.json")  # a stranger's, which would be waited for
    assert main_gather(["--workdir", str(into), str(same)]) == 0
    named = part_workdir(tmp_path / "3", stages=["antigravity:stage"])
    assert "names the stage 'antigravity:stage', and code of others is not" in refusal(named)
    assert "antigravity" not in sys.modules
    for number, config in enumerate(({"diffs": 5}, {"stages": []})):
        (tmp_path / f"other{number}").mkdir()
        (tmp_path / f"other{number}" / "config.json").write_text(json.dumps(config))
        assert "is the workdir of no run that makes diffs" in refusal(tmp_path / f"other{number}")
    wrong = part_workdir(tmp_path / "w0", evaluate={"part": {}})
    assert "'evaluate.part' must be one value, and is a section" in refusal(wrong)
    assert main_gather(["--workdir", str(into), str(one)]) == 0
    assert json.loads((into / "config.json").read_text())["diffs"] == {"part": ""}
