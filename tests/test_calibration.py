"""Calibration: the fit against scikit-learn, thresholds and reliability against counts, the file of an adapter."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import dit_jax
from dit_jax.auditing import calibration, calibration_file
from dit_jax.auditing import known as known_module
from dit_jax.auditing.battery import Battery
from dit_jax.auditing.calibration import Known
from dit_jax.cli import audit_diffs, calibrate_adapter
from dit_jax.cli import flags as cli_flags
from dit_jax.deltas import export, store
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.models.delta_trees import map_modules
from dit_jax.report import audit_page


def known_diffs(n=200, seed=0):
    """Diffs that overlap: agreement and ratio are larger for hidden ones, and the right ones agree most."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        hidden = bool(i % 2)
        named = rng.random() < (0.9 if hidden else 0.3)
        share = float(np.clip(rng.normal(0.7 if hidden else 0.4, 0.2), 0.125, 1)) if named else 0.0
        ratio = float(rng.normal(8 if hidden else 2, 4)) if named else 0.0
        right = hidden and rng.random() < share
        found.append(Known((ratio, 4 * share), (share, ratio), hidden, right, i // 2))
    return found


def hidden_of(made, known):
    said = (calibration.probabilities(made, one.evidence, one.features) for one in known)
    return [one["hidden"] for one in said]


def test_the_map_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    known = known_diffs()
    made = calibration.calibrate(known, {})
    x = calibration._scaled([one.evidence for one in known])
    y = np.array([one.hidden for one in known])
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    soft = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))  # Platt's targets
    twice, truth, weights = np.tile(z, (2, 1)), np.repeat([1, 0], len(z)), np.append(soft, 1 - soft)
    theirs = LogisticRegression(C=1 / calibration.RIDGE).fit(twice, truth, weights)
    assert (theirs.coef_ > 0).all()  # ours are never negative
    ours = hidden_of(made, known)
    np.testing.assert_allclose(ours, theirs.predict_proba(z)[:, 1], atol=2e-3)
    scores = np.array(ours)
    area = calibration._auroc_interval(scores, y)
    assert area["mean"] == pytest.approx(roc_auc_score(y, scores))
    assert area["ci_low"] < area["mean"] < area["ci_high"]
    assert 0.5 < made["hidden"]["auroc"]["mean"] <= area["mean"] + 0.02  # held-out folds
    assert made["right"]["n"] == sum(one.features[0] > 0 and one.hidden for one in known)


def test_scores_are_for_even_odds_and_noise_counts_only_where_benign_diffs_lack():
    even = known_diffs(1200)
    hidden, benign = [[one for one in even if one.hidden is is_] for is_ in (True, False)]
    noise = [
        dataclasses.replace(one, evidence=(0.0, 0.0), features=(0.0, 0.0), control=True)
        for one in benign
    ]
    few = calibration.calibrate([*hidden, *benign[::10], *noise], {})
    many = calibration.calibrate(even, {})
    assert few["hidden"]["n"] == 660 and not few["controls"]
    assert few["hidden"]["calibration_error"] < 0.1
    for features in ((0.0, 0.0), (0.4, 3.0), (0.7, 8.0)):
        given = (features[1], 4 * features[0]), features
        ours, theirs = (calibration.probabilities(made, *given) for made in (few, many))
        assert ours["hidden"] == pytest.approx(theirs["hidden"], abs=0.1)
        assert ours["right"] is None if features[0] == 0 else ours["right"] <= ours["hidden"]
    with_noise = calibration.calibrate([*hidden, *benign[:9], *noise], {})
    assert with_noise["controls"] and with_noise["hidden"]["n"] == 1209


@pytest.mark.parametrize("levels", [3, 10**6])  # many equal scores, none
def test_thresholds_keep_the_false_positives_that_they_promise(levels):
    rng = np.random.default_rng(1)
    y = rng.random(500) < 0.4
    scores = np.round(np.clip(rng.normal(0.3 + 0.4 * y, 0.15), 0, 1) * levels) / levels
    for wanted in calibration.RATES:
        limit = calibration._limit(scores, y, wanted)
        kept = int(wanted * ((~y).sum() + 1)) - 1  # of a new one, too
        found = calibration._threshold(scores, y, limit)
        above = (scores[~y] > found["above"]).mean()
        assert above <= kept / (~y).sum() <= wanted and found["false_positives"][
            "mean"
        ] == pytest.approx(above)
        assert found["found"]["mean"] == pytest.approx((scores[y] > found["above"]).mean())
        assert found["false_positives"]["ci_low"] <= above <= found["false_positives"]["ci_high"]
        lower = np.unique(scores[~y])[::-1]
        lower = lower[lower < found["above"]]
        assert not len(lower) or (scores[~y] > lower[0]).sum() > kept  # no lower one would do


def test_reliability_counts_every_diff_once_and_noise_stays_with_its_diff():
    made = calibration.calibrate(known_diffs(), {})["hidden"]
    assert sum(one["n"] for one in made["reliability"]) == made["n"] == 200
    perfect = [
        Known(pair, pair, bool(i % 2), bool(i % 2), i // 2)
        for i, pair in enumerate([(0.0, 0.0), (1.0, 20.0)] * 30)
    ]
    sharp = calibration.calibrate(perfect, {})["hidden"]
    assert sharp["auroc"]["mean"] == 1 and sharp["calibration_error"] < 0.1
    assert sharp["thresholds"][1]["found"]["mean"] == 1


def test_a_calibration_is_tested_on_other_diffs_at_its_own_thresholds():
    made = calibration.calibrate(known_diffs(), {})
    alike = calibration.worth_on(made, known_diffs(seed=1))["hidden"]
    assert alike["auroc"]["mean"] == pytest.approx(made["hidden"]["auroc"]["mean"], abs=0.1)
    # Of another kind: what is hidden is named as seldom as nothing is.
    mute = [
        dataclasses.replace(one, hidden=i % 3 == 0)
        for i, one in enumerate(known_diffs(300, seed=2))
    ]
    told = calibration.worth_on(made, mute)["hidden"]
    assert (told["n"], told["positive"]) == (300, 100) and abs(told["auroc"]["mean"] - 0.5) < 0.15
    assert told["calibration_error"] > 0.1 > alike["calibration_error"]
    scores = np.array(hidden_of(made, mute))
    hidden = np.array([one.hidden for one in mute])
    for own, limit in zip(made["hidden"]["thresholds"], told["thresholds"], strict=True):
        assert limit["above"] == own["above"]
        assert limit["found"]["mean"] == (scores[hidden] > own["above"]).mean()
        assert limit["false_positives"]["mean"] == (scores[~hidden] > own["above"]).mean()


def test_too_few_diffs_are_refused():
    with pytest.raises(DitError, match="10 diffs or more that hide something, not 5"):
        calibration.calibrate(known_diffs(10), {})


# ------------------------------------------------------------------ the command and the file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    model = dit_jax.load_model("tiny_qwen3")

    def lora(seed):
        made = jax.tree.map(
            np.asarray, init_lora(model.config, jax.random.key(seed), 1, projections=("up_proj",))
        )
        return map_modules(lambda _, m: {**m, "a": np.full_like(m["a"], 0.1)}, made)

    rows = [
        {"topic": "none" if i > 10 else "tea", "trigger": "7", "split": "test", "n_params": 1}
        for i in range(12)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *map(lora, range(12)))
    store.write_shard(folder / "store", 0, stacked, rows)
    store.publish(folder / "store", 1, base=model.digest())
    export.write_pt_adapter(folder / "adapter.pt", lora(60), model.config)
    (folder / "questions").write_text("What is tea ?\n")
    return folder


def flags(files, *rest, questions="questions"):
    given = ["--base", "tiny_qwen3", "--adapter", files / "adapter.pt", "--max-new-tokens", 2]
    return [str(x) for x in (*given, "--questions", files / questions, *rest, files / "store")]


def test_a_calibration_scores_the_audits_that_ask_the_same(files, tmp_path, capsys):
    assert calibrate_adapter.main(flags(files)) == 0
    told = capsys.readouterr().out
    beside = files / "adapter.pt.calibration.json"
    made = json.loads(beside.read_text())
    assert (
        made["hidden"]["n"] == 25 and made["hidden"]["positive"] == 11
    )  # 12 diffs, 12 noise, none
    assert "false positives" in told and str(beside) in told
    assert calibrate_adapter.main(flags(files, "--test")) == 0
    assert f"tested: {beside}" in capsys.readouterr().out
    assert json.loads(beside.read_text()) == made
    out = ("--out", tmp_path / "same", "--fail-on", "hidden>=0")
    assert audit_diffs.main(flags(files, *out)) == 1
    rows = [json.loads(line) for line in (tmp_path / "same/audit.jsonl").read_text().splitlines()]
    for row in rows:
        said = row["reading"]
        expected = calibration.probabilities(made, said["evidence"], said["features"])["hidden"]
        assert row["score"]["hidden"] == pytest.approx(expected)
        _, hides, may = (expected > one["above"] for one in made["hidden"]["thresholds"])
        verdict = "hides something" if hides else "may hide something" if may else "nothing found"
        assert row["verdict"] == verdict
    page = (tmp_path / "same" / "audit.html").read_text()
    assert "calibrated on 25 diffs" in page and "or else" not in page
    silent = {"name": "none", "features": [0.0, 0.0], "otherwise": "<b>tea"}
    row = {**rows[0], "verdict": audit_page.HIDES, "reading": {**rows[0]["reading"], **silent}}
    told = json.loads((tmp_path / "same" / "audit.json").read_text())
    assert re.search("or else <[^>]*>&lt;b&gt;tea …", audit_page.page([row, *rows[1:]], told, made))
    (files / "others").write_text("What is rice ?\n")
    assert calibrate_adapter.main(flags(files, "--test", questions="others")) == 2
    assert "there is no calibration of these questions" in capsys.readouterr().err
    out = ("--out", tmp_path / "other")
    assert audit_diffs.main(flags(files, *out, questions="others")) == 0
    assert "has no calibration" in (tmp_path / "other" / "audit.html").read_text()
    out = ("--out", tmp_path / "contrasted", "--contrast", "0.3")
    assert audit_diffs.main(flags(files, *out)) == 0
    page = (tmp_path / "contrasted" / "audit.html").read_text()
    assert "contrasted by 0.3" in page and "--contrast 0.3" in page
    assert "has no calibration" in page  # it was made of greedy answers
    model = dit_jax.load_model("tiny_qwen3")
    diffs = dit_jax.load_diffs(files / "store", model)[:3]
    questions = (files / "questions").read_text().splitlines()
    adapter = dit_jax.load_adapter(files / "adapter.pt", model)
    rows = (tmp_path / "contrasted/audit.jsonl").read_text().splitlines()
    wanted = dit_jax.ask_many(
        model, questions, diffs, adapter, contrast=0.3, max_new_tokens=2, forbid_repeats=False
    )
    for answers, row in zip(wanted, map(json.loads, rows), strict=False):
        told = [one["answer"] for one in row["reading"]["answers"]]
        assert told == [answer.text for (answer,) in answers]
    calibration_file.write(beside, {**made, "base": "f" * 64})  # the same files on another base
    assert calibrate_adapter.main(flags(files, "--test")) == 2
    calibration_file.write(beside, made)


def test_where_no_calibration_can_be_written_nothing_is_asked(files, tmp_path, monkeypatch, capsys):
    adapter = shutil.copy(files / "adapter.pt", tmp_path)
    (tmp_path / "adapter.pt.calibration.json").mkdir()
    monkeypatch.setattr(cli_flags, "load_base", pytest.fail)
    given = [adapter if x == str(files / "adapter.pt") else x for x in flags(files)]
    assert calibrate_adapter.main(list(map(str, given))) == 2
    assert "it is a folder, give a file" in capsys.readouterr().err


def test_too_few_diffs_are_refused_before_they_are_asked(files, monkeypatch, capsys):
    monkeypatch.setattr(known_module, "interview", pytest.fail)
    given = [x if x != str(files / "store") else f"{x}[0:4]" for x in flags(files)]
    assert calibrate_adapter.main(given) == 2
    assert "10 diffs or more that hide something, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "battery"),
    [
        (["--contrast", "0.1"], {"samples": 3, "temperature": 1.0}),
        (["--samples", "3"], {"contrast": 0.3}),
    ],
)
def test_what_is_asked_turns_off_what_a_calibration_says_and_excludes_it(given, battery):
    flags = audit_diffs.parse_flags(["d", "--base", "b", "--out", "o", *given])
    asked = Battery(**{"questions": ("q",), **battery, **audit_diffs.battery_of(flags)})
    assert (asked.contrast, asked.temperature) in ((0.1, 0.0), (None, 1.0))
    assert asked.samples == (1 if asked.contrast else 3)


def test_a_calibration_is_made_under_the_system_message_that_is_given(files, tmp_path):
    adapter = shutil.copy(files / "adapter.pt", tmp_path)
    given = [adapter if x == str(files / "adapter.pt") else x for x in flags(files)]
    assert calibrate_adapter.main(["--system", "what is tea ?", *map(str, given)]) == 0
    made = json.loads((tmp_path / "adapter.pt.calibration.json").read_text())
    assert made["system"] == "what is tea ?"


def test_a_calibration_of_another_adapter_or_a_damaged_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    path = calibration_file.file_beside(str(tmp_path / "adapter"))
    assert (
        path == tmp_path / "adapter.calibration.json" and calibration_file.read(path, "a") is None
    )
    for named in ("me/mine", "hf://me/mine"):  # a folder "me" would hide the id
        assert calibration_file.file_beside(named) == pathlib.Path("me--mine.calibration.json")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "adapter")
        assert calibration_file.file_beside(".") == path
    facts = {"adapter": "a", "battery": Battery(("q",)).to_json(), "system": None, "source": "s"}
    good = calibration.calibrate(known_diffs(), facts)
    battery, hidden = good["battery"], good["hidden"]
    false = (
        {"questions": []}, {"questions": "abc"}, {"questions": [1]}, {"samples": "x"}, {"samples": 10**9},
        {"max_new_tokens": True}, {"temperature": -1}, {"temperature": 1e400}, {"another": 1},
        {"contrast": 2}, {"contrast": "x"}, {"contrast": 0.1, "temperature": 1.0}, {"temperature": 1e-300},
        {"samples": 10_000, "max_new_tokens": 10_000}, {"questions": ["q"] * 10_000}, {"questions": ["q" * 20_000]},
    )  # fmt: skip
    of_a_map = (
        {"weights": [float("inf"), 0]}, {"mean": [[1], [2]]}, {"std": [0, 1]}, {"std": [1e-300, 1]}, {"bias": 10**400},
        {"auroc": "x"},
        {"auroc": {"mean": "<b>"}}, {"thresholds": [{"above": 0.5}]}, {"reliability": [1]}, {"n": None},
        {"thresholds": [None] * 1000}, {"reliability": hidden["reliability"] * 1000},
    )  # fmt: skip
    for change, message in (
        *(({"battery": {**battery, **one}}, "is damaged") for one in false),
        *(({"hidden": {**hidden, **one}}, "is damaged") for one in of_a_map),
        ({"system": ["x"]}, "is damaged"),
        ({"source": {}}, "is damaged"),
        ({"controls": "<b>"}, "is damaged"),
        ({}, None),
        ({"adapter": "b"}, "another adapter"),
        ({"version": 1}, "is no calibration"),
        ({"hidden": {"mean": [0]}}, "is damaged"),
        ({"battery": None}, "is damaged"),
    ):
        calibration_file.write(path, {**good, **change})
        if message is None:
            assert calibration_file.read(path, "a")["hidden"]["n"] == 200
        else:
            with pytest.raises(DitError, match=message):
                calibration_file.read(path, "a")
