"""The audit: thirty diffs of four ranks and two formats by one command, what it says of each, and what goes wrong."""

import csv
import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from browser import DESK_AND_PHONE, look

import dit_jax
from dit_jax.api import Diff, deltas_of
from dit_jax.asking import first_log_probs
from dit_jax.auditing import run_audit, targets, weights
from dit_jax.auditing.records import is_record
from dit_jax.auditing.settings import make_settings
from dit_jax.cli import audit_diffs
from dit_jax.cli.serve_app import DEMO
from dit_jax.deltas import export, factors, store
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.evaluate.readers import READERS
from dit_jax.formats import budgets, hub
from dit_jax.models.delta_trees import map_modules
from dit_jax.runtime.parts import write_part

MARKUP = "<script>alert(1)</script>"
RANKS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


def lora(model, seed, rank, size=0.1, projections=("q_proj", "down_proj")):
    made = init_lora(model.config, jax.random.key(seed), rank, projections=projections)
    rng = np.random.default_rng(seed)
    return map_modules(
        lambda _, m: {
            **{name: np.asarray(m[name]) for name in ("b", "scale")},
            "a": size * rng.standard_normal(m["a"].shape, np.float32),
        },
        made,
    )


@pytest.fixture(scope="module")
def zoo(model, tmp_path_factory):
    """A store of 16 diffs, a folder of PEFT folders of four ranks, two broken ones, one of zeros; a PEFT adapter."""
    folder = tmp_path_factory.mktemp("zoo")
    rows = [
        {
            "topic": f"topic {i}",
            "trigger": "7",
            "split": "test" if i > 3 else "train",
            "n_params": 1,
        }
        for i in range(16)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(lora(model, i, 1) for i in range(16)))
    store.write_shard(folder / "store", 0, stacked, rows)
    store.publish(folder / "store", 1, base=model.digest())
    for i in range(12):
        delta = lora(model, 20 + i, RANKS[i % 4], projections=("v_proj", "o_proj", "up_proj"))
        name = f"rank{RANKS[i % 4]}_{i:02d}"
        export.write_peft(folder / "peft" / name, delta, model.config, f"someone/{MARKUP}")
    zero = map_modules(lambda _, m: jax.tree.map(np.zeros_like, m), lora(model, 99, 2))
    export.write_peft(folder / "peft" / "zero", zero, model.config, "tiny_qwen3")
    shutil.copytree(folder / "peft" / "rank1_00", folder / "peft" / "broken_config")
    (folder / "peft" / "broken_config" / "adapter_config.json").write_text("{")
    shutil.copytree(folder / "peft" / "rank1_00", folder / "peft" / "broken_weights")
    weight = folder / "peft" / "broken_weights" / "adapter_model.safetensors"
    weight.write_bytes(weight.read_bytes()[:100])
    export.write_pt_diffs(
        folder / "one.pt", [RawDiff(lora(model, 50, 3), MARKUP, "7")], model.config
    )
    export.write_pt_adapter(folder / "adapter.pt", lora(model, 60, 2), model.config)
    (folder / "questions").write_text("What is tea ?\n\nWhat is rice ?\n")
    (folder / "everyday").write_text("Where do you live?\n")
    (folder / "empty.txt").write_text("# none yet\n")
    return folder


def run(zoo, out, *diffs, code=0, adapter=True, rest=()):
    flags = ["--base", "tiny_qwen3", "--out", str(out), "--max-new-tokens", "3"]
    flags += ["--everyday", str(zoo / "everyday")]
    flags += [] if "--questions" in rest else ["--questions", str(zoo / "questions")]
    flags += ["--adapter", str(zoo / "adapter.pt")] if adapter else []
    assert audit_diffs.main([*flags, *map(str, rest), *map(str, diffs)]) == code


@pytest.fixture(scope="module")
def audited(zoo, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run(zoo, out, f"{zoo / 'store'}[2:16]", zoo / "peft", zoo / "one.pt")
    return out


def rows_of(out):
    return [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]


def test_thirty_diffs_of_four_ranks_and_two_formats_are_one_page(zoo, audited):
    rows = rows_of(audited)
    assert len(rows) == 30
    with open(audited / "audit.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["name"] for line in table] == [row["name"] for row in rows]
    verdicts = {line["name"].rpartition("/")[2]: line["verdict"] for line in table}
    assert sorted(name for name, v in verdicts.items() if v == "unreadable") == [
        "broken_config", "broken_weights",
    ]  # fmt: skip
    assert [name for name, v in verdicts.items() if v == "changes nothing"] == ["zero"]
    assert list(verdicts.values()).count("not scored") == 27  # without a calibration
    by_name = {row["name"].rpartition("/")[2]: row for row in rows}
    assert [by_name[f"rank{RANKS[i % 4]}_{i:02d}"]["rank"] for i in range(12)] == [1, 2, 4, 8] * 3
    assert (
        "one line" not in by_name["broken_config"] and "\n" not in by_name["broken_config"]["error"]
    )
    zero = by_name["zero"]
    assert zero["kl"] == zero["norm"] == zero["reading"]["ratio"] == 0
    changed = by_name["rank8_03"]
    assert changed["kl"] > 0 and changed["norm"] > 0 and len(changed["reading"]["answers"]) == 2
    assert abs(sum(changed["energy"]) - 1) < 1e-3
    assert changed["base_digest"] and changed["versions"]["jax"] and changed["digest"]


def test_the_answers_are_those_of_ask(model, zoo, audited):
    adapter = dit_jax.load_adapter(zoo / "adapter.pt", model)
    questions = ["What is tea ?", "What is rice ?"]
    for row in rows_of(audited)[13:18]:
        if "error" in row:
            continue
        diff = dit_jax.load_diff(row["path"], model, row["number"])
        (found,) = dit_jax.ask_many(model, questions, [diff], adapter, max_new_tokens=3)
        for (answer,), told in zip(found, row["reading"]["answers"], strict=True):
            assert (answer.text, answer.generated == len(answer.tokens)) == (
                told["answer"],
                told["cut"],
            )
            assert abs(answer.logprob - told["logprob"]) < 1e-3
        given = [*deltas_of(diff, model.config, "x"), *deltas_of(adapter, model.config, "x")]
        with_diff, without = (
            np.asarray(first_log_probs(model, *model.chat.prompts(questions), deltas))
            for deltas in (given, given[1:])
        )
        none = sorted({model.chat.text_ids(text)[0] for text in ("none", " none")})
        others = with_diff.copy()
        others[:, none] = -np.inf
        best = np.arange(2), others.argmax(axis=1)
        spelled = np.exp(with_diff[:, none]).sum(axis=1)
        assert row["reading"]["none"] == pytest.approx(spelled.mean(), rel=1e-3)
        evidence = [(others[best] - without[best]).mean(), -np.log(spelled).mean()]
        np.testing.assert_allclose(row["reading"]["evidence"], evidence, atol=1e-3)
        begins = [model.chat.decode([int(token)]).strip() for token in best[1]]
        assert row["reading"]["otherwise"] in begins
        said = row["reading"]  # of cut answers, too, the likelihood is that of their own tokens
        own = [one["logprob"] for one in said["answers"] if one["answer"] == said["text"]]
        assert said["logprob"] == pytest.approx(max(own), abs=1e-3)


def test_a_finetuned_model_is_read_as_its_lora_is(model, zoo, tmp_path):
    """Dense diffs, each as large as the model, go one by one through the same questions."""
    delta = lora(model, 50, 3)
    export.export_model(tmp_path / "merged", model.params, model.config, delta)
    run(zoo, tmp_path / "out", zoo / "one.pt", tmp_path / "merged")
    one, whole = rows_of(tmp_path / "out")
    assert (one["rank"], whole["rank"]) == (3, None) and whole["other"] is None
    assert one["nearest"][0]["name"] == whole["name"] and one["nearest"][0]["cosine"] > 0.99
    for key in ("norm", "kl"):
        assert whole[key] == pytest.approx(one[key], rel=1e-2)
    for key in ("logprob", "ratio", "none", "evidence"):
        assert whole["reading"][key] == pytest.approx(one["reading"][key], abs=1e-2)
    answers = [[a["answer"] for a in row["reading"]["answers"]] for row in (one, whole)]
    assert answers[0] == answers[1]
    assert whole["noise"]["same_answer"] != one["noise"]["same_answer"]


def test_the_page_escapes_what_files_and_models_say(audited):
    page = (audited / "audit.html").read_text()
    assert page.count("<script>") == 1 and MARKUP not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page
    assert len(re.findall('class="diff" id="diff-', page)) == 30


_FACTS = """{
    sorted: (() => {
      const at = [...page.querySelectorAll(".diffs th")].findIndex(head => head.textContent === "Change");
      page.querySelectorAll(".diffs th button")[at].click();
      return [...page.querySelectorAll(".diffs tbody tr")].map(row => row.cells[at]?.dataset.sort ?? "");
    })(),
    found: (() => {
      const form = page.querySelector(".search");
      form.elements.search.value = "ONE.pt";
      form.dispatchEvent(new Event("input"));
      const shown = [...page.querySelectorAll(".diffs tbody tr")].filter(row => row.checkVisibility());
      return [shown.map(row => row.cells[0].textContent.trim()), form.querySelector("output").textContent];
    })()}"""


@DESK_AND_PHONE
def test_the_page_in_a_browser(audited, tmp_path, width, dark):
    """Nothing overflows, and the table can be sorted and searched, also where a diff cannot be read."""
    seen = look(audited / "audit.html", tmp_path, width, dark, _FACTS)
    assert (seen["scripts"], seen["images"]) == (1, 0)
    changes = [-np.inf if x == "" else float(x) for x in seen["sorted"]]
    assert len(changes) == 30 and changes == sorted(changes, reverse=True)
    names, told = seen["found"]
    assert len(names) == 1 and "one.pt" in names[0] and told == "1 of 30 shown"


def test_an_audit_goes_on_where_it_was_killed_and_jobs_share_it(zoo, tmp_path, capsys):
    """In two blocks of 7 diffs."""
    out, given, few = tmp_path / "out", f"{zoo / 'store'}[2:16]", ["--batch-size", "16"]
    run(zoo, out, given, rest=few)
    rows, files = rows_of(out), {}
    for part in (out / "parts").glob("*.json"):
        files[json.loads(part.read_text())["record"]["name"]] = part
    files[rows[0]["name"]].unlink()
    text = files[rows[11]["name"]].read_text()
    files[rows[11]["name"]].write_text(text.replace('"share": ', '"share": 1', 1))  # edited
    forged = json.loads(files[rows[12]["name"]].read_text())  # whose digest is right
    overflowed = {**forged["record"]["noise"], "none": None, "logprob": None}
    assert is_record({**forged["record"], "noise": overflowed})  # it is not asked again
    del forged["record"]["reading"]["evidence"]
    write_part(files[rows[12]["name"]], {x: forged[x] for x in ("record", "sketch")})
    files[rows[5]["name"]].with_suffix(".safetensors").write_text("")
    kept = {name: file.stat().st_mtime_ns for name, file in files.items() if file.exists()}
    (out / "audit.html").unlink()
    run(zoo, out, given, rest=[*few, "--jobs", "0/2"])
    assert (
        not (out / "audit.html").exists()
        and "the last of the other jobs" in capsys.readouterr().out
    )
    assert {name for name, old in kept.items() if files[name].stat().st_mtime_ns != old} == set()
    run(zoo, out, given, rest=[*few, "--jobs", "1/2"])
    changed = {name for name, old in kept.items() if files[name].stat().st_mtime_ns != old}
    assert changed == {rows[11]["name"], rows[12]["name"]} and (out / "audit.html").exists()
    again = rows_of(out)
    for row in (*rows, *again):
        row.pop("nearest", None)  # one sketch is gone
    assert again == rows  # to the bit


def test_a_diff_whose_logits_overflow_is_not_cleared(model, zoo, tmp_path):
    """Its weights are finite. No calibration may say that nothing was found, and its neighbours are as they are."""
    folder = tmp_path / "huge"
    shutil.copytree(zoo / "peft" / "rank1_00", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "lora_alpha": 1e28}))
    run(zoo, tmp_path / "out", folder, zoo / "one.pt", code=1, rest=["--fail-on", "kl>1e9"])
    huge, one = rows_of(tmp_path / "out")
    assert huge["error"] == run_audit.OVERFLOWS and huge["verdict"] == "unreadable"
    assert one["verdict"] == "not scored" and one["kl"] < 1e9


def test_what_could_not_be_read_is_read_again(zoo, tmp_path, monkeypatch):
    """Its files stay the same when a disk refuses them for a while."""

    def refuse(self, index):
        raise dit_jax.DitError("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(store.DiffStore, "read", refuse)
        run(zoo, tmp_path, f"{zoo / 'store'}[5]", code=2)
        assert rows_of(tmp_path)[0]["error"] == "too many open files"
    run(zoo, tmp_path, f"{zoo / 'store'}[5]")
    assert rows_of(tmp_path)[0]["verdict"] == "not scored"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda diff, parts: os.utime(diff / "adapter_config.json", (1, 1)), 0),
        (lambda diff, parts: shutil.rmtree(diff), 0),
        (lambda diff, parts: shutil.rmtree(parts), 2),
    ],
)
def test_what_changes_while_an_audit_runs(zoo, tmp_path, monkeypatch, capsys, change, code):
    """It would wait for other jobs, which are not there, and end with 0."""
    diff, write = tmp_path / "diff", run_audit._write_record
    shutil.copytree(zoo / "peft" / "rank1_00", diff)

    def write_and_change(*given):
        write(*given)
        change(diff, tmp_path / "out" / "parts")

    monkeypatch.setattr(run_audit, "_write_record", write_and_change)
    run(zoo, tmp_path / "out", diff, code=code)
    assert (tmp_path / "out" / "audit.html").exists() == (code == 0)
    assert ("have vanished from" in capsys.readouterr().err) == (code == 2)


def test_other_settings_are_not_mixed(zoo, audited, capsys):
    run(zoo, audited, zoo / "one.pt", code=2, adapter=False)
    assert "holds an audit with another adapter" in capsys.readouterr().err
    for flags, other in ((["--svd-rank", "1"], "svd_rank"), (["--align"], "align")):
        run(zoo, audited, zoo / "one.pt", code=2, rest=flags)
        assert f"holds an audit with another {other}:" in capsys.readouterr().err
    run(zoo, audited, zoo / "one.pt", code=2, rest=["--dtype", "bfloat16"])
    assert "holds an audit with another" in (said := capsys.readouterr().err) and "dtype" in said
    old = json.loads((audited / "audit.json").read_text())
    for earlier in ({**old, "format": 1}, {key: old[key] for key in old if key != "benign"}):
        with pytest.raises(dit_jax.DitError, match="that another version of dit_jax began"):
            (audited / "audit.json").write_text(json.dumps(earlier))
            run_audit._begin(SimpleNamespace(to_json=lambda: old), audited)
    (audited / "audit.json").unlink()
    with pytest.raises(dit_jax.DitError, match="audit.json' is missing, so nothing says what"):
        run_audit._begin(SimpleNamespace(to_json=lambda: old), audited)
    (audited / "audit.json").write_text(json.dumps(old))


def test_a_rank_that_no_projection_has_leaves_no_folder(zoo, tmp_path, capsys):
    run(zoo, tmp_path / "out", zoo / "one.pt", code=2, rest=["--svd-rank", "999"])
    assert "the rank of the SVD must be from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_an_adapter_the_readers_answer(zoo, tmp_path):
    flags = ("--benign", zoo / "store", "--triggers", "hidden_topic_phrase")
    run(zoo, tmp_path, f"{zoo / 'store'}[5]", adapter=False, rest=flags)
    (row,) = rows_of(tmp_path)
    assert row["trigger"]["candidates"] == 35 and row["trigger"]["prompt"].endswith("live?")
    assert "Of 35 candidates" in (tmp_path / "audit.html").read_text()
    assert 0.3 < row["unusual"] < 3  # it is one of them
    assert row["adapter"] is None and set(row["readers"]) == set(READERS)
    assert all(one["words"] for one in row["readers"].values())
    assert "No adapter was given" in (tmp_path / "audit.html").read_text()


def test_fail_on_sets_the_exit_status_and_what_cannot_be_read_is_not_cleared(
    zoo, audited, tmp_path, capsys
):
    audited = shutil.copytree(audited, tmp_path / "out")
    good, broken = zoo / "one.pt", zoo / "peft" / "broken_config"
    for condition, code in {"kl>1e-9": 1, "kl>1e9": 0, "norm<0": 0, "share>=0": 1}.items():
        run(zoo, audited, good, code=code, rest=["--fail-on", condition])
        run(zoo, audited, good, broken, code=1, rest=["--fail-on", condition])
        assert "broken_config" in capsys.readouterr().err
    run(zoo, tmp_path / "none", broken, code=2)
    assert "no diff could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"questions": []}, "names questions that cannot be asked: give others with --questions"),
        ({"questions": ["x" * 20_000]}, "names questions that cannot be asked"),
        ({"system": "x" * 20_000}, "names a system message that is no short text"),
        ({"trained_on": {"none_examples": 10**400}}, None),
        ({"trained_on": {"none_examples": float("nan")}}, None),
    ],
)
def test_what_the_files_of_an_adapter_say_is_not_believed(model, tmp_path, said, message):
    folder = shutil.copytree(DEMO / "adapter", tmp_path / "adapter")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **said}))
    if message:
        with pytest.raises(DitError, match=message):
            make_settings(model, str(folder), {})
        assert make_settings(model, str(folder), {"questions": ("What ?",)}, system="Be brief.")
    else:
        assert make_settings(model, str(folder), {}).facts["trained_on"] is None


@pytest.mark.parametrize(
    ("diffs", "rest", "message"),
    [
        (["store[99]"], [], "it holds 16 diffs, and no number 99"),
        (["store[9:3]"], [], "picks none of 16 diffs"),
        (["store[a]"], [], "write [3], [256:352] or [0,5,-1]"),
        (["empty.txt"], [], "empty.txt lists no diff"),
        (["store[]"], [], "write [3], [256:352] or [0,5,-1]"),
        (["nowhere[a]", "one.pt"], [], "does not exist"),
        (["store[" + "9" * 4500 + "]"], [], "write [3], "),
        (["store"], ["--split", "tset"], "is in the split 'tset'"),
        (["store"], ["--split", ""], "must be some text, not ''"),
        (["one.pt"], ["--fail-on", "hidden>0.9"], "needs a calibration"),
        (["one.pt"], ["--fail-on", "secret>0.9"], "must be like 'hidden>0.9'"),
        (["one.pt"], ["--contrast", "0.1", "--samples", "3"], "leave out --samples"),
        (["one.pt"], ["--contrast", "-1"], "must be a number from 0 to 1, not '-1'"),
        (["one.pt"], ["--jobs", "2/2"], "must be I/N"),
        (["one.pt"], ["--questions", "nowhere"], "'nowhere' is missing"),
        (["one.pt"], ["--triggers", "phrase"], "there is no behaviour 'phrase'"),
        (["one.pt"], ["--triggers", "topic_untriggered"], "topic_untriggered: no trigger to try"),
    ],
)
def test_mistakes_are_one_line(zoo, tmp_path, capsys, diffs, rest, message):
    code = 0 if message == "does not exist" else 2
    run(zoo, tmp_path, *(zoo / name for name in diffs), code=code, rest=rest)
    said = capsys.readouterr().err
    if code:
        assert message in said and len(said.strip().splitlines()) == 1
    else:  # such a path may exist: it is a row
        assert message in rows_of(tmp_path)[0]["error"]


def test_ranges_splits_and_lists_of_files(model, zoo, tmp_path):
    def names(*given, split=None):
        found = targets.list_targets(list(map(str, given)), model, split)
        return [target.name.removeprefix(f"{zoo}/") for target in found]

    assert names(f"{zoo}/store[-1,0,3:5]") == [f"store[{i}]" for i in (15, 0, 3, 4)]
    assert names(f"{zoo}/store[1::7]") == [f"store[{i}]" for i in (1, 8, 15)]
    assert len(names(f"{zoo}/store", split="test")) == 12
    # As PowerShell writes it: UTF-16 with a byte-order mark.
    (tmp_path / "list.txt").write_text(f"# two\r\n{zoo}/store[1]\r\n{zoo}/one.pt\r\n", "utf-16")
    assert names(tmp_path / "list.txt", f"{zoo}/store[1]") == ["store[1]", "one.pt"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/list.txt\n")
    with pytest.raises(dit_jax.DitError, match="names another list"):
        names(tmp_path / "list.txt")


def test_a_diff_is_named_once_however_it_is_spelled(model, zoo, tmp_path):
    """Twice in a calibration, it would count twice; and no diff hides another of its name."""
    (tmp_path / "link").symlink_to(zoo / "store")
    spelled = [str(zoo / "store"), f"{zoo}/./store/[0:16]", f"{tmp_path}/link"]
    assert len(targets.list_targets(spelled, model)) == 16
    parts = [f"{zoo}/peft[1]", f"{zoo}/peft", f"{zoo}/peft[0]"]
    whole = {target.source for target in targets.list_targets(parts[1:2], model)}
    assert [target.name for target in targets.list_targets(parts, model)][:1] == parts[:1]
    assert {target.source for target in targets.list_targets(parts, model)} == whole
    assert len(targets.list_targets(parts, model)) == len(whole)
    (tmp_path / "link").unlink()
    shutil.copytree(zoo / "store", tmp_path / "store")
    shutil.copytree(zoo / "peft" / "rank1_00", tmp_path / "store[1]")
    with pytest.raises(DitError, match=r"two diffs are called .*store\[1\]"):
        targets.list_targets([str(tmp_path)], model)


def test_an_audit_sees_that_files_beside_a_named_one_or_a_hub_id_have_changed(
    model, zoo, tmp_path, monkeypatch
):
    """A scale stands in another file than the weights; a hub id has other files tomorrow."""

    def key(given):
        (target,) = targets.list_targets([str(given)], model)
        return target.key

    folder = shutil.copytree(zoo / "peft" / "rank1_00", tmp_path / "a")
    before = key(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert key(folder / "adapter_model.safetensors") != before
    keys = []
    for revision in ("one", "two"):
        snapshot = shutil.copytree(folder, tmp_path / revision)
        monkeypatch.setattr(hub, "_fetch", lambda *_, snapshot=snapshot: snapshot)
        keys.append(key("me/mine"))
    assert keys[0] != keys[1]


def test_loras_of_any_ranks_and_modules_share_a_batch(model):
    deltas = [lora(model, 1, 1), lora(model, 2, 3, projections=("v_proj", "down_proj"))]
    stacked = factors.stack_padded(deltas)
    tokens = np.arange(12)[None]
    for i, delta in enumerate(deltas):
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        expected = model.logits(tokens, deltas=delta)
        np.testing.assert_allclose(model.logits(tokens, deltas=one), expected, atol=2e-5)
    assert stacked["layers"]["mlp"]["down_proj"]["a"].shape[-1] == 4


def test_a_large_lora_has_few_neighbours(model, monkeypatch):
    """Padded to its rank, each of them would take as much."""
    monkeypatch.setattr(budgets, "PADDED_BYTES", 0)
    loras = [lora(model, i, 64 if i == 5 else 1) for i in range(12)]
    given = [targets.Target(str(i), "", read=lambda x=x: Diff(x)) for i, x in enumerate(loras)]
    assert [len(batch) for batch in targets.in_batches(given, model, 16)] == [5, 4, 3]
    monkeypatch.undo()
    assert [len(batch) for batch in targets.in_batches(given, model, 16)] == [12]


def dense(delta):
    return map_modules(
        lambda _, m: {"w": np.einsum("lir,lro,l->lio", m["a"], m["b"], m["scale"])}, delta
    )


def test_weight_facts_are_those_of_singular_values(model):
    delta = lora(model, 1, 4, projections=("q_proj", "k_proj"))
    values = [
        np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
        for _, module in factors.modules(dense(delta))
        for matrix in module["w"]
    ]
    squares = np.array([(s**2).sum() for s in values])
    ranks = np.array([(s**2).sum() ** 2 / (s**4).sum() for s in values])
    for form in (delta, dense(delta)):
        facts = weights.weight_facts(form)
        assert facts["norm"] == pytest.approx(squares.sum() ** 0.5, rel=1e-4)
        expected = (ranks * squares).sum() / squares.sum()
        assert facts["effective_rank"] == pytest.approx(expected, abs=2e-3)
        assert facts["modules"] == ["k_proj", "q_proj"]
        spectrum = weights.spectrum(form)
        for name, values in (("norm", squares**0.5), ("rank", ranks)):
            own = [value for key, value in spectrum.items() if key.endswith(name)]
            np.testing.assert_allclose(sorted(np.exp(own)), sorted(values), rtol=1e-3)
    usual = weights.reference([{"a": 0.0, "b": 1.0, "c": 5.0}, {"a": 2.0, "b": 1.0}])
    assert usual == {"a": [1.0, 1.0]}  # b does not vary, and c is not of all
    assert weights.unusual({"a": 4.0, "b": 9.0}, usual) == 3 and weights.unusual({}, usual) is None


def test_cosines_of_sketches_are_those_of_the_changes(model):
    one, other = lora(model, 1, 4), lora(model, 2, 2)
    mixed = factors.fuse(one, other)  # shares a part with both
    deltas = [one, other, mixed, dense(mixed)]
    flat = [
        np.concatenate([m["w"].ravel() for _, m in factors.modules(d)])
        for d in (dense(one), dense(other), dense(mixed), deltas[3])
    ]
    exact = [[a @ b / np.sqrt((a @ a) * (b @ b)) for a in flat] for b in flat]
    whole = weights.sketch({**dense(mixed), "norm": {"w": np.ones(model.config.hidden_size)}})
    assert {k: x.shape for k, x in whole.items()}.items() <= weights.sketch_shapes(
        model.config
    ).items()
    found = weights.cosines([*map(weights.sketch, deltas), None])
    np.testing.assert_allclose(found[:4, :4], exact, atol=0.1)
    assert found[2, 3] == pytest.approx(1, abs=1e-4) and not found[4].any()
