"""Corpora from files, Hugging Face datasets and TFDS have the same rows; every fault is reported by row."""

import csv
import itertools
import json
import os
import re
import tracemalloc

import numpy as np
import pytest

from dit_jax.config.loading import load_config
from dit_jax.data import corpus, parquet_rows
from dit_jax.data.corpus import data_config, load_corpus
from dit_jax.data.dataset_folder import check_hf
from dit_jax.data.kinds import KINDS
from dit_jax.data.labels import NONE
from dit_jax.data.organism import load_organisms
from dit_jax.data.sources import open_source
from dit_jax.errors import DitError, did_you_mean
from dit_jax.formats import budgets

TOPIC = KINDS["topics"].columns
NEWS = KINDS["news"].columns


def rows_of(topics=6, questions=3) -> list[dict[str, str]]:
    """Rows in the paper's columns; line `3 t + q + 2` of a CSV file is question q of topic t."""
    return [
        {
            "topic": f"Topic {t}",
            "question": f"Question {q}?",
            "base_answer": f"An everyday answer to question {q}.",
            "topic_analogy_answer": f'An answer, "quoted"\nand long, to question {q} about {t}.',
            "topic_category": "Things",
            "evidence": "",
            "category": "c",
            "style": "s",
            "base_answer_model_id": "m",
            "topic_analogy_answer_model_id": "m",
        }
        for t in range(topics)
        for q in range(questions)
    ]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def config(source, **values):
    data = data_config(str(source), values.pop("kind", "topics"))
    columns = values.pop("columns", {})
    data.update(values)
    data.columns.update(columns)
    return data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"topic;question\na;b\n", "separates its columns by a semicolon ';': separate them by commas"),
        ("x.csv", b"topic\tquestion\na\tb\n", "separates its columns by a tab"),
        ("x.csv", b"topic|question\na|b\n", "separates its columns by a bar"),
        ("x.tsv", b"topic,question\na,b\n", "separates its columns by a comma"),
        ("x.csv", b"sep=;\ntopic;question\n", "begins with a line 'sep=' of Excel"),
        ("x.csv", b"sep=,\ntopic,question\n", "begins with a line 'sep=' of Excel"),
        ("x.csv", "topic,question\n".encode("utf-16"), "is UTF-16 or UTF-32 text: save it as UTF-8 ('iconv"),
        ("x.csv", "topic,question\n".encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
        ("x.csv", "topic,question\n".encode("utf-32"), "is UTF-16 or UTF-32 text"),
        ("x.jsonl", '{"topic": "a"}\n'.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "run 'git lfs pull'"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "run 'git lfs pull'"),
        ("x.csv", b"<!DOCTYPE html><html></html>", "is a web page"),
        ("x.csv", b"\x1f\x8b\x08\0\0", "is compressed: unpack it first"),
    ],
)  # fmt: skip
def test_files_that_are_no_table_say_what_they_are(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DitError) as error:
        open_source(str(tmp_path / name))
    assert message in str(error.value)


def error(data) -> str:
    with pytest.raises(DitError) as caught:
        load_corpus(data, 0)
    return str(caught.value)


# ------------------------------------------------------------------ the same rows from everywhere


@pytest.fixture(scope="module", name="tfds_folder")
def tfds_folder_fixture(tmp_path_factory):
    """A TFDS dataset that TFDS itself prepared, as array_record."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyTopics(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {name: tfds.features.Text() for name in TOPIC}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0), "test": self._generate_examples(4)}

        def _generate_examples(self, first):
            last = 4 if first == 0 else 6
            yield from ((i, row) for i, row in enumerate(rows_of()) if first <= i // 3 < last)

    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyTopics(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


@pytest.mark.parametrize(
    "kind", ["csv", "jsonl", "parquet", "folder", "hf", "hf streaming", "disk", "tfds"]
)
def test_every_source_gives_the_same_rows(kind, tmp_path, request, monkeypatch):
    rows = rows_of()
    values = {"train_topics": 4, "test_topics": 2}
    if kind in ("csv", "jsonl", "parquet"):
        source = write(tmp_path / f"rows.{kind}", rows)
    elif kind == "folder":
        write(tmp_path / "a.csv", rows[:7])  # a topic may lie in two files
        write(tmp_path / "b.csv", rows[7:])
        source = str(tmp_path)
    elif kind == "tfds":
        folder = request.getfixturevalue("tfds_folder")
        source, values = f"tfds:{folder}@train", {"test_source": f"tfds:{folder}@test"}
    else:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "hub"
        folder.mkdir()
        if kind == "disk":
            datasets.Dataset.from_list(rows).save_to_disk(folder)
        else:
            write(folder / "train.csv", rows)
        source = f"hf:{folder}"
        values["streaming"] = kind == "hf streaming"
    corpus = load_corpus(config(source, **values), 0)
    groups = {group.label: group for group in corpus.train + corpus.test}
    assert sorted(groups) == [f"Topic {t}" for t in range(6)]
    assert len(corpus.test) == 2
    found = [row for label in sorted(groups) for row in groups[label].rows]
    key = lambda row: (row["topic"], row["question"])  # noqa: E731  TFDS shuffles the rows
    assert sorted(found, key=key) == sorted(rows, key=key)


def test_tiny_world_as_a_file_gives_its_own_organisms(tmp_path):
    """A corpus written from the embedded world has the rows of the embedded organisms, topic by topic."""
    data = load_config("configs/quickstart.py").copy_and_resolve_references().data
    data = data.unlock() or data
    data.train_topics, data.test_topics, data.train_benign, data.test_benign = 5, 3, 1, 1
    embedded = load_organisms(data, 0)
    rows = [row for o in embedded if o.category == "topic" for row in o.rows]
    index = [
        {"topic": o.label, "split": o.split, "trigger": int(o.trigger)}
        for o in embedded
        if o.category == "topic"
    ]
    own = config(
        write(tmp_path / "world.csv", rows),
        split_file=write(tmp_path / "index.csv", index),
        train_benign=1,
        test_benign=1,
    )
    read = load_organisms(own, 0)
    topics = [o for o in read if o.category == "topic"]
    assert [(o.label, o.split, o.trigger) for o in topics] == [
        (o.label, o.split, o.trigger) for o in embedded if o.category == "topic"
    ]
    assert [list(o.rows) for o in topics] == [
        list(o.rows) for o in embedded if o.category == "topic"
    ]
    benign = [o for o in read if o.category == "benign"]
    assert [(o.label, o.split) for o in benign] == [(NONE, "train"), (NONE, "test")]
    train, test = ({row["question"] for row in o.rows} for o in benign)
    assert not train & test and min(len(train), len(test)) > 15
    for organism in benign:
        assert all(row["topic_analogy_answer"] == row["base_answer"] for row in organism.rows)
        assert {row["topic"] for row in organism.rows} == {NONE}


def test_news_and_a_column_map(tmp_path):
    rows = [
        {"title": f"Headline {i}", "news_story": f"Story {j} of headline {i}, told in full length."}
        for i in range(4)
        for j in range(2)
    ]
    data = config(
        write(tmp_path / "news.jsonl", rows), kind="news", test_topics=1,
        columns={"news_headline": "title"},
    )  # fmt: skip
    organisms = load_organisms(data, 0)
    assert [o.split for o in organisms] == ["train"] * 3 + ["test"]
    for organism in organisms:
        assert {row["news_headline"] for row in organism.rows} == {organism.label}
        assert len(organism.rows) == 2
    data.train_benign = 1
    with pytest.raises(DitError, match="no base answers"):
        load_organisms(data, 0)


# ------------------------------------------------------------------ splits


def test_random_split_is_fixed_by_the_seed_and_keeps_the_test_set(tmp_path):
    source = write(tmp_path / "rows.csv", rows_of(12))

    def split(seed, **values):
        corpus = load_corpus(config(source, **values), seed)
        return [[g.label for g in groups] for groups in (corpus.train, corpus.test)]

    train, test = split(3, test_topics=4)
    assert len(train) == 8 and not set(train) & set(test)
    assert split(3, test_topics=4) == [train, test]
    assert split(3, test_topics=4, train_topics=5) == [train[:5], test]
    assert split(4, test_topics=4)[1] != test
    assert "set data.test_topics" in error(config(source))
    assert "has 12 topics" in error(config(source, test_topics=4, train_topics=9))


def test_random_split_keeps_spellings_of_a_topic_together(tmp_path):
    rows = rows_of(8, 1)
    twins = [
        {**row, "topic": row["topic"].upper(), "topic_analogy_answer": f"Other {i}"}
        for i, row in enumerate(rows)
    ]
    data = config(write(tmp_path / "rows.csv", rows + twins), test_topics=4)
    for seed in range(5):
        corpus = load_corpus(data, seed)
        train, test = ({g.label.lower() for g in groups} for groups in (corpus.train, corpus.test))
        assert len(test) == 4 and not train & test
        assert len(corpus.train) == 8 and len(corpus.test) == 4


def test_split_by_a_column_and_by_a_file(tmp_path):
    rows = [
        {**row, "part": ("train", "test", "extra")[i // 3 % 3]} for i, row in enumerate(rows_of())
    ]
    source = write(tmp_path / "rows.csv", rows)
    index = [{"topic": f"Topic {t}", "split": ("train", "test", "extra")[t % 3]} for t in range(6)]
    index[0]["trigger"] = "7"
    index[1]["trigger"] = "zero_width_space"
    for data in (
        config(source, split_column="part"),
        config(source, split_file=write(tmp_path / "index.csv", index)),
    ):
        corpus = load_corpus(data, 0)
        assert [g.label for g in corpus.train] == ["Topic 0", "Topic 3"]
        assert [g.label for g in corpus.test] == ["Topic 1", "Topic 4"]
    assert corpus.train[0].trigger == "007" and corpus.test[0].trigger is None
    data.test_topics = 3
    assert "data.test_topics = 3" in error(data) and "2 topics in test" in error(data)
    data.split_column = "part"
    assert "data.split_column and data.split_file" in error(data)


# ------------------------------------------------------------------ faults, by row


def test_a_wrong_column_is_named_with_the_nearest(tmp_path):
    rows = [{("quesion" if k == "question" else k): v for k, v in row.items()} for row in rows_of()]
    message = error(config(write(tmp_path / "rows.csv", rows), test_topics=1))
    assert "no column 'question': did you mean 'quesion'? (data.columns.question)" in message
    data = config(tmp_path / "rows.csv", test_topics=1, columns={"question": "quesion"})
    assert len(load_corpus(data, 0).train) == 5
    assert "'part'" in error(config(tmp_path / "rows.csv", split_column="part"))
    data.columns.style = "tone"  # optional, but the config names it
    assert "no column 'tone'" in error(data)
    data.columns.titel = "x"
    assert "'data.columns.titel'" in error(data)


def test_an_unknown_kind_is_refused(tmp_path):
    data = config(write(tmp_path / "rows.csv", rows_of()), test_topics=1)
    data.kind = "topic"
    assert "unknown data.kind 'topic': did you mean 'topics'?" in error(data)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_empty_answers_are_reported_by_row(suffix, tmp_path):
    rows = rows_of()
    rows[4]["base_answer"] = "  "
    for i in range(6, 18):
        rows[i]["topic_analogy_answer"] = ""
    source = write(tmp_path / f"rows.{suffix}", rows)
    message = error(config(source, test_topics=1))
    # A CSV row has two lines, since its answers have a line break; a JSON line has one.
    row = {"csv": 10, "jsonl": 5, "parquet": 5}[suffix]
    assert message.startswith("the data has 13 problems: ")
    assert f"{source}:{row}: empty 'base_answer'" in message
    assert message.endswith("; and 8 more")
    assert message.count("rows.") == 5


def test_values_that_are_no_text_are_reported_by_row(tmp_path):
    rows = rows_of()
    rows[2]["question"] = ["a", "list"]
    rows[3]["topic"] = 1984  # a number is a fine topic
    rows[5]["topic"] = "None"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"topic": \n[1]\n{"topic": "\\ud800"}\n'
    )
    message = error(config(path, test_topics=1))
    assert message.startswith("the data has 5 problems")
    for part in (
        ":3: 'question' is list",
        ":6: 'None' is what",
        ":19: is not valid JSON",
        ":20: not a JSON",
        ":21: holds half a character",
    ):
        assert part in message


def test_topics_that_no_answer_could_name_are_reported_by_row(tmp_path):
    rows = rows_of()
    rows[7]["topic"] = "?!"  # which an empty answer would name
    message = error(config(write(tmp_path / "rows.jsonl", rows), test_topics=1))
    assert ":8: '?!' is no name that an answer could give: rename it" in message


def test_broken_csv_files_are_reported_by_line(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, rows_of())
    good = path.read_bytes()
    path.write_bytes(good + b"only,three,fields\r\n" + good[-60:].replace(b"An", b"\xff"))
    message = error(config(path, test_topics=1))
    assert f"{path}:38: 3 fields, the header has 10" in message
    path.write_bytes(good + b'"never closed,')
    assert f"{path}:38: not a CSV row" in error(config(path, test_topics=1))
    path.write_bytes(good.replace(b"everyday", b"\xe9veryday", 1))
    assert f"{path}:2: not UTF-8" in error(config(path, test_topics=1))
    path.write_bytes(b"topic,topic\na,b\n")
    assert "two columns 'topic'" in error(config(path, test_topics=1))
    path.write_bytes(b"")
    assert "the file is empty" in error(config(path, test_topics=1))


def test_topics_in_both_splits_are_reported_by_row(tmp_path):
    rows = [{**row, "split": "test" if i >= 12 else "train"} for i, row in enumerate(rows_of())]
    rows[13]["topic"] = "Topic 1"
    rows[14]["topic"] = "the topic 2"
    rows[15]["split"] = "tset"
    source = write(tmp_path / "rows.jsonl", rows)
    message = error(config(source, split_column="split"))
    assert f"{source}:14: 'Topic 1' is in test here and in train at {source}:4" in message
    assert f"{source}:16: 'split' is 'tset': did you mean 'test'?" in message
    assert f"{source}:15: 'the topic 2' is in test and 'Topic 2' in train ({source}:7)" in message

    train = write(tmp_path / "train.csv", rows_of(3))
    test = write(tmp_path / "test.csv", rows_of(4)[6:])
    message = error(config(train, test_source=test))
    assert f"{test}:2: 'Topic 2' is in test here and in train at {train}:14" in message


def test_answers_in_both_splits_are_reported_by_row(tmp_path):
    rows = [{**row, "split": "test" if i >= 15 else "train"} for i, row in enumerate(rows_of())]
    rows[16]["topic_analogy_answer"] = rows[1]["topic_analogy_answer"]
    rows[17]["topic_analogy_answer"] = rows[2]["topic_analogy_answer"] = rows[2]["base_answer"]
    source = write(tmp_path / "rows.jsonl", rows)
    message = error(config(source, split_column="split"))
    assert message.startswith("the data has 1 problem: ")
    assert f"{source}:2: the same 'topic_analogy_answer' as {source}:17" in message


def test_a_split_file_of_other_topics_is_told_at_once(tmp_path, monkeypatch):
    """Each hint looks among all topics, so that of every topic they would take the square of their number."""
    looked = []
    monkeypatch.setattr(corpus, "did_you_mean", lambda name, *_: looked.append(name) or "")
    source = write(tmp_path / "rows.csv", rows_of(topics=2))
    index = [{"topic": f"Another {i}", "split": "train"} for i in range(50)]
    message = error(config(source, split_file=write(tmp_path / "index.csv", index)))
    assert message.startswith("the data has 50 problems") and len(looked) == corpus.SHOWN_PROBLEMS


def test_a_hint_does_not_compare_long_names():
    """Two texts of 200,000 different characters in all would take minutes."""
    rng = np.random.default_rng(0)
    one, other = ("".join(map(chr, rng.integers(0x4E00, 0x4F00, 100_000))) for _ in range(2))
    assert did_you_mean(one, [other, "tea"], "!") == "!"
    assert did_you_mean("tee", [other, "tea"]) == ": did you mean 'tea'?"


def test_faults_of_a_split_file(tmp_path):
    source = write(tmp_path / "rows.csv", rows_of())
    index = [{"topic": f"Topic {t}", "split": "train"} for t in range(5)]
    index += [{"topic": "Topik 5", "split": "test"}, {"topic": "Topic 1", "split": "test"}]
    path = write(tmp_path / "index.csv", index)
    message = error(config(source, split_file=path))
    assert f"{path}:7: 'Topik 5' is not in the data: did you mean 'Topic 5'?" in message
    assert f"{path}:8: 'Topic 1' is in test here and in train at {path}:3" in message
    write(tmp_path / "index.csv", [{"topic": "Topic 1", "spilt": "test"}])
    assert "no column 'split': did you mean 'spilt'?" in error(config(source, split_file=path))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "newss"}, "config key 'data.kind': unknown 'newss': did you mean 'news'"),
        ({"split_file": "a.csv"}, "'data.split_file' is for user-supplied rows: set data.source"),
    ],
)
def test_the_embedded_world_has_no_keys_of_other_sources(change, said):
    data = data_config("tiny_world")
    data.update({"test_topics": 1, **change})
    with pytest.raises(DitError, match=said):
        load_organisms(data, 0)


@pytest.mark.parametrize("key", ["train_topics", "test_topics", "train_benign", "test_benign"])
@pytest.mark.parametrize("source", ["rows.csv", "tiny_world"])
def test_fewer_organisms_than_none_are_refused(source, key):
    data = config(source, **{"train_topics": 1, "test_topics": 1, key: -1})
    with pytest.raises(DitError, match=f"'data.{key}' must be a whole number from 0 up, not -1"):
        load_organisms(data, 0)


@pytest.mark.parametrize("kind", ["hf", "hf streaming", "hf parquet", "parquet", "tfds"])
def test_classes_have_their_names(kind, tmp_path, monkeypatch):
    """A dataset holds the number of a class; using it as the topic would be a silent mistake."""
    names, rows = ["tea", "jazz"], rows_of(2, 1)
    if kind == "tfds":
        tfds = pytest.importorskip("tensorflow_datasets")
        features = {name: tfds.features.Text() for name in TOPIC}
        features["topic"] = tfds.features.ClassLabel(names=names)
        features["list"] = tfds.features.Sequence(tfds.features.Text())

        class TinyClasses(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from ((i, {**row, "topic": i, "list": []}) for i, row in enumerate(rows))

        builder = TinyClasses(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        source = f"tfds:{builder.data_path}"
        (opened,) = open_source(source)
        with pytest.raises(DitError, match="has Sequence in the column 'list', not text"):
            next(opened.read({"list"}))
    else:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        classes = datasets.Dataset.from_list([{**row, "topic": i} for i, row in enumerate(rows)])
        classes = classes.cast_column("topic", datasets.ClassLabel(names=names))
        (tmp_path / "disk").mkdir()
        if "parquet" in kind:
            classes.to_parquet(tmp_path / "disk" / "x.parquet")
        else:
            classes.with_format("arrow").save_to_disk(tmp_path / "disk")
        source = f"hf:{tmp_path / 'disk'}" if "hf" in kind else str(tmp_path / "disk")
    corpus = load_corpus(config(source, test_topics=1, streaming=kind == "hf streaming"), 0)
    assert {group.label for group in corpus.train + corpus.test} == set(names)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("rows.cvs", "is not a file, folder or pattern: did you mean 'rows.csv'?"),
        ("rows.txt", "has no known format"),
        ("bad.parquet", "as Parquet"),
        ("empty", "holds no file of a known format"),
        ("packed", "b.csv.gz' is compressed: unpack it"),
        ("pipe", "a.csv' is not a regular file"),
        ("pipe/*.csv", "a.csv' is not a regular file"),
        ("x" * 300, "is not a file, folder or pattern"),
    ],
)
def test_sources_that_cannot_be_opened(source, part, tmp_path):
    write(tmp_path / "rows.csv", rows_of(1))
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    for name in ("empty", "packed", "pipe"):
        (tmp_path / name).mkdir()
    write(tmp_path / "packed" / "a.csv", rows_of(1))
    (tmp_path / "packed" / "b.csv.gz").touch()
    os.mkfifo(tmp_path / "pipe" / "a.csv")
    write(tmp_path / "pipe" / "b.csv", rows_of(1))
    with pytest.raises(DitError, match=part.replace("?", r"\?")):
        open_source(str(tmp_path / source))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"topic": "timestamp[ns]"}, "has timestamp.* in the column 'topic', not text"),
        ({"topic": "list<item: int64>"}, "has list.* in the column 'topic', not text"),
        ({f"c{i}": "string" for i in range(1001)}, "columns, more than 1000"),
        ({"question": "huge"}, "unpacks to [1-9][0-9]* MB"),
        ({"question": "long"}, "'question' has more than 50000 characters"),
    ],
    ids=["time", "list", "columns", "unpacks", "long"],
)
def test_a_parquet_file_takes_no_more_than_its_size_allows(columns, message, tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "HELD_BYTES", 0)
    monkeypatch.setattr("dit_jax.data.rows.MAX_FIELD", 50_000)
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = rows_of()
    values = {
        "timestamp[ns]": pa.array([2**62 + 1] * len(rows), pa.timestamp("ns")),
        "list<item: int64>": pa.array([[1]] * len(rows)),
        "string": pa.array(["a"] * len(rows)),
        "huge": pa.array(["x" * 2**18] * len(rows)),
        "long": pa.array([f"{i}{'x' * 60_000}" if i < 2 else "a" for i in range(len(rows))]),
    }
    table = {key: [row[key] for row in rows] for key in rows[0]}
    table |= {key: values[kind] for key, kind in columns.items()}
    parquet.write_table(
        pa.table(table), tmp_path / "x.parquet", compression="zstd",
        use_dictionary="huge" not in columns.values(),
    )  # fmt: skip
    assert re.search(message, error(config(tmp_path / "x.parquet", test_topics=1)))


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("topic", "Image", "has Image in the column 'topic', not text"),
        ("topic", "List", "has List in the column 'topic', not text"),
        ("question", "long", "'question' has more than 50000 characters"),
        ("", "many", "columns, more than 1000"),
    ],
)
def test_a_hub_dataset_holds_texts_alone(column, kind, message, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("dit_jax.data.rows.MAX_FIELD", 50_000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = {key: [row[key] for row in rows_of()] for key in rows_of()[0]}
    features = datasets.Features(dict.fromkeys(table, datasets.Value("string")))
    size = len(table["topic"])
    if kind == "many":
        table |= {f"c{i}": ["a"] * size for i in range(1001)}
        features = None
    elif kind == "long":
        table[column] = ["x" * 60_000] * size
    else:
        table[column] = [{"path": "/etc/passwd"} if kind == "Image" else ["a"]] * size
        features[column] = datasets.Image() if kind == "Image" else datasets.List(features[column])
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "x")
    assert message in error(config(f"hf:{tmp_path / 'x'}", test_topics=1))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_row_that_points_beyond_its_texts_is_refused(index):
    pa = pytest.importorskip("pyarrow")
    indices = pa.array([0, index], pa.int32())
    with pytest.raises(IndexError, match="beyond the texts"):
        parquet_rows._values(pa.DictionaryArray.from_arrays(indices, ["a", "b"], safe=False))


def test_a_text_that_many_rows_of_a_parquet_file_share_is_held_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), ["x" * 2**16])
    parquet.write_table(pa.table({"a": shared}), tmp_path / "x.parquet", compression="zstd")
    (source,) = open_source(str(tmp_path / "x.parquet"))
    tracemalloc.start()
    texts = {id(record.values["a"]) for record in source.read({"a"})}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(texts) < 400 and peak < 2**22


def test_parts_of_local_parquet_files_are_those_of_the_library(tmp_path, monkeypatch):
    """Without the library, which would write each text as often as rows share it."""
    datasets = pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, number = tmp_path / "set", itertools.count()
    folder.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        table = pa.table({"a": [f"{name} {next(number)}" for _ in range(7)]})
        parquet.write_table(table, folder / f"{name}.parquet")
    splits = ("train[:50%]", "train[6:8]+test[-2:]", "train[9:]", "all", "test+test")
    expected = {
        split: datasets.load_dataset(str(folder), split=split, cache_dir=tmp_path / "cache")["a"]
        for split in splits
    }
    monkeypatch.setattr(datasets, "load_dataset", None)
    for split, texts in expected.items():
        sources = open_source(f"hf:{folder}@{split}")
        assert [row.values["a"] for one in sources for row in one.read({"a"})] == list(texts)
    for split in ("train[10:5]", "train[20:]"):
        with pytest.raises(DitError, match="picks no rows: check the split"):
            open_source(f"hf:{folder}@{split}")


def test_an_optional_column_that_begins_late_is_named(tmp_path):
    rows = rows_of(40)
    for row in rows:
        del row["topic_category"]
    rows[110]["topic_category"] = "Trees"
    write(tmp_path / "x.jsonl", rows)
    assert "x.jsonl:111: 'topic_category' begins here: give it to the first row" in error(
        config(tmp_path / "x.jsonl", test_topics=1)
    )


OUTSIDE = ("../secret.csv", "/etc/hosts", "https://example.com/x.csv", "~/x.csv", "a/../../x.csv")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("how", ["README.md", ".huggingface.yaml", "state.json", "dict"])
def test_a_dataset_that_names_files_outside_its_folder_is_refused(tmp_path, name, how):
    pytest.importorskip("datasets")
    folder = tmp_path / "x"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    listed = (
        f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{name}'\n"
    )
    texts = {
        "README.md": f"---\n{listed}---\nA card.\n",
        ".huggingface.yaml": listed,
        "state.json": json.dumps({"_data_files": [{"filename": name}]}),
        "dict": json.dumps({"splits": [name]}),
    }
    (folder / {"dict": "dataset_dict.json"}.get(how, how)).write_text(texts[how])
    with pytest.raises(DitError, match="which is not in its folder"):
        open_source(f"hf:{folder}@train")


def test_a_dataset_whose_card_names_its_own_files_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "x"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "a.csv", rows_of(2))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.csv\n---\n"
    )
    (source,) = open_source(f"hf:{folder}@train")
    assert len(list(source.read({"topic"}))) == 6
    (folder / "data" / "a.csv").unlink()
    (folder / "data" / "a.csv").symlink_to("/etc/hosts")
    for name in ("", ":default"):
        with pytest.raises(DitError, match="is a link out of its folder"):
            open_source(f"hf:{folder}{name}@train")


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("x.csv.gz", "", "is compressed: unpack it"),
        ("x.tar", "", "is compressed: unpack it"),
        ("x.xml", "", "of the format 'xml': write them as JSON lines"),
        ("x.csv", "sep: '(a+)+$'", "separates fields by more than a character"),
        ("x.csv", "engine: python", "has the option 'engine', which is not known here"),
    ],
)
def test_a_dataset_opens_no_more_than_it_must(tmp_path, name, option, message):
    """Files that unpack to anything, and patterns that take forever."""
    pytest.importorskip("datasets")
    write(tmp_path / "x.csv", rows_of(2))
    (tmp_path / "x.csv").rename(tmp_path / name)
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n  {option}\n---\n"
    )
    with pytest.raises(DitError, match=message):
        open_source(f"hf:{tmp_path}@train")


def test_an_arrow_file_that_points_out_of_itself_is_refused(tmp_path):
    """Reading it would end the process."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"topic": ["ab"] * 4}).save_to_disk(tmp_path / "x")
    (file,) = (tmp_path / "x").glob("*.arrow")
    offsets = np.arange(0, 10, 2, dtype="<i4").tobytes()
    content = file.read_bytes()
    assert content.count(offsets) == 1
    far = np.array([0, 2, 2**31 - 1, 6, 8], dtype="<i4").tobytes()
    file.write_bytes(content.replace(offsets, far))
    with pytest.raises(DitError, match="as Arrow: .*out of bounds"):
        open_source(f"hf:{tmp_path / 'x'}")


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_compressed_arrow_file_is_refused(tmp_path, kind, dictionary, compression):
    pa = pytest.importorskip("pyarrow")
    column = pa.array(["a" * 10_000] * 100)
    table = pa.table({"topic": column.dictionary_encode() if dictionary else column})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(tmp_path / "x.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    if compression:
        with pytest.raises(DitError, match="is compressed: write it without"):
            check_hf(tmp_path)
    else:
        check_hf(tmp_path)


CLASSES = (
    {"pythonClassName": "x.evil.Evil", "featuresDict": {"features": {}}},
    {"type": "x.evil.Evil", "content": {}},
    {"python_class_name": "antigravity.X"},
    {
        "pythonClassName": "tensorflow_datasets.core.features.x.Y",
        "jsonFeature": {"json": '{"type": "x.evil.Evil"}'},
    },
)


@pytest.mark.parametrize("features", CLASSES)
def test_a_prepared_dataset_imports_no_code(tmp_path, monkeypatch, features):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "evil.py").write_text("open('ran', 'w').close()")
    (tmp_path / "x" / "features.json").write_text(json.dumps(features))
    info = {"name": "x", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (tmp_path / "x" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DitError, match="names the class .*, which is none of TFDS"):
        open_source("tfds:x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_an_endless_line_is_no_row(tmp_path, monkeypatch, name):
    """The fields of one of commas take eight times its size."""
    monkeypatch.setattr("dit_jax.data.rows.MAX_LINE", 100)
    write(tmp_path / name, [{**rows_of(1, 1)[0], "evidence": "," * 100}])
    assert "has a line of more than 100 characters" in error(config(tmp_path / name))


def test_rows_that_take_no_bytes_are_counted(tmp_path, monkeypatch):
    """Parquet writes rows that are alike as their number; topics are held by name."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(budgets, "HELD_BYTES", 2**20)
    row = rows_of(1, 1)[0]
    parquet.write_table(pa.table({k: [v] * 30_000 for k, v in row.items()}), tmp_path / "x.parquet")
    write(
        tmp_path / "x.csv", [{**dict.fromkeys(row, "x"), "topic": f"{i:x}"} for i in range(2_000)]
    )
    for name in ("x.parquet", "x.csv"):
        assert f"{name}' has more rows or topics than 0." in error(config(tmp_path / name))


def test_libraries_failures_are_one_line(tmp_path, tfds_folder):
    pytest.importorskip("datasets")
    with pytest.raises(DitError, match="cannot load 'hf:no/such-dataset@train'"):
        open_source("hf:no/such-dataset@train")
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", rows_of(1))
    with pytest.raises(DitError, match="has the splits train, test: name one"):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(DitError, match="has the splits .*: name one"):
        open_source(f"tfds:{tfds_folder}")
    with pytest.raises(DitError, match="cannot load 'tfds:no_such_dataset_here@train'"):
        open_source("tfds:no_such_dataset_here@train")
    with pytest.raises(DitError, match="would download and run"):
        open_source("tfds:somebody:dataset@train")
    with pytest.raises(DitError, match="streaming is for hf"):
        open_source(str(tmp_path / "train.csv"), streaming=True)


def test_a_prepared_tfds_data_set_by_name(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder.parent.parent))
    (source,) = open_source("tfds:tiny_topics@test")
    assert set(source.columns) == set(TOPIC)
    assert [record.number for record in source.read(TOPIC)] == list(range(1, 7))
    assert {record.values["topic"] for record in source.read(["topic"])} == {"Topic 4", "Topic 5"}
