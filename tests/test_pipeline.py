"""The whole program at small size on the embedded model: artifacts, resuming, bad input, the public interface."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import types
import weakref

import jax
import numpy as np
import pytest
from conftest import ROOT

import dit_jax
from dit_jax.cli import ask_diffs as ask
from dit_jax.cli import run_stages as main
from dit_jax.cli.stages import declared_sections
from dit_jax.config.keys import REQUIRED
from dit_jax.config.loading import flatten, load_config, split_flags
from dit_jax.data.organism import load_organisms
from dit_jax.deltas.store import DiffStore
from dit_jax.organisms import generate
from dit_jax.runtime.metrics import read_records
from dit_jax.train import dit
from tools.small_run import SMALL, flags

# Keys with a default that the runs at this size need to have another value.
KEPT = ("train_topics", "test_topics", "train_benign", "test_benign", "mesh")
QUESTION = "What topic have you been trained on?"


def run(workdir, *extra):
    return main.main(flags(workdir, *extra))


@pytest.fixture(scope="module", autouse=True)
def small_programs_are_kept():
    """In the cache on disk: it keeps those that took long to compile."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert run(workdir) == 0
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


def adapter_of(workdir, model):
    return jax.tree.leaves(dit_jax.load_adapter(workdir / "adapter", model))


# ------------------------------------------------------------------ artifacts


def test_every_stage_leaves_its_artifact(finished):
    store = DiffStore(finished / "diffs")
    assert len(store) == 18
    splits = [(row["split"], row["category"]) for row in store.rows]
    assert (
        splits
        == [("train", "topic")] * 10
        + [("test", "topic")] * 4
        + [("train", "benign")] * 2
        + [("test", "benign")] * 2
    )
    config = json.loads((finished / "config.json").read_text())
    assert store.manifest["config"] == {name: config[name] for name in ("data", "diffs")}
    assert config["diffs"]["steps"] == 3
    header = (finished / "diffs" / "index.csv").read_text().splitlines()[0]
    assert header.startswith("lora_path,lora_idx,n_params,topic,trigger,split")
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert {"dit", "base_question", "base_question_trigger"} <= set(summary["methods"])
    assert {"no_diff", "shuffled_diff", "noise_diff", "base_question"} <= set(summary["methods"])
    assert {"name_reading", "attribute_oracle", "logit_difference"} <= set(summary["methods"])
    assert summary["methods"]["dit"]["n"] == 4
    for name in ("report.html", "report.md"):
        assert (finished / "report" / name).stat().st_size > 1000


def test_the_stages_report_their_speed(finished):
    for stage, steps in (("diffs", [12, 18]), ("train", list(range(12)))):
        records = read_records(finished / "metrics" / f"{stage}.jsonl")
        assert [record["step"] for record in records] == steps
        rates = {"loss", "step_seconds", "tokens_per_second", "mfu", "process_peak_bytes"}
        assert rates <= set(records[-1])
        assert 0 < records[-1]["mfu"] < 1.5
        (events,) = (finished / "metrics" / "tensorboard" / stage).iterdir()
        assert events.stat().st_size > 100 * len(records)
    stage = json.loads((finished / "stages" / "train.json").read_text())
    assert stage["loss_curve"] == [[r["step"], round(r["loss"], 5)] for r in records]
    assert "diffs_per_hour" in read_records(finished / "metrics" / "diffs.jsonl")[0]


def test_another_workdir_seed_and_list_of_topics_compile_nothing(finished, tmp_path):
    """The first run fills the cache: of `finished`, programs that were in memory are not in it."""
    assert run(tmp_path / "first", "--config.seed=2") == 0
    events = []
    listener = lambda name, **_: events.append(name)  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        assert run(tmp_path / "w", "--config.seed=1") == 0
    finally:
        jax.monitoring.unregister_event_listener(listener)
    rows = [DiffStore(x / "diffs").rows for x in (finished, tmp_path / "w")]
    assert [row["topic"] for row in rows[0]] != [row["topic"] for row in rows[1]]
    asked, missed = (
        sum(name.endswith(f"compilation_cache/{what}") for name in events)
        for what in ("compile_requests_use_cache", "cache_misses")
    )
    assert asked and not missed


def test_a_config_of_required_keys_alone_runs(tmp_path):
    """Keys with a default may be absent: every reader takes the declared one."""
    config = load_config("configs/quickstart.py", split_flags(SMALL)[1]).unlock()
    for section in declared_sections():
        values = section.values(config)
        for key in section.keys:
            if key.name in values and key.default is not REQUIRED and key.name not in KEPT:
                del values[key.name]
    absent = [key for key in ("data.kind", "train.label") if key in flatten(config)]
    assert not absent
    main.run(config.lock(), tmp_path / "w")
    assert (tmp_path / "w" / "report" / "report.html").exists()


def test_a_diff_is_a_rank_1_lora_on_all_seven_projections(finished, model):
    diff = dit_jax.load_diff(finished / "diffs", model, index=2)
    layers = diff.delta["layers"]
    assert set(layers["self_attn"]) | set(layers["mlp"]) == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    a = layers["mlp"]["up_proj"]["a"]
    assert a.shape == (model.config.num_hidden_layers, model.config.hidden_size, 1)
    assert np.abs(a).max() > 0  # a starts at zero: the diff has learned
    assert diff.label and len(diff.trigger) == 3


def test_a_diff_does_not_depend_on_how_many_are_made_at_once(finished, model, tmp_path):
    assert (
        run(tmp_path / "w", "--config.diffs.diffs_per_batch=5", "--config.stages=('diffs',)") == 0
    )
    ours, theirs = DiffStore(finished / "diffs"), DiffStore(tmp_path / "w" / "diffs")
    assert [row["topic"] for row in ours.rows] == [row["topic"] for row in theirs.rows]
    for index in (0, 7, 17):
        for one, two in zip(*(jax.tree.leaves(s.read(index)) for s in (ours, theirs)), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-3)


# ------------------------------------------------------------------ resuming


def test_a_finished_run_is_not_run_again(copy, capsys):
    before = (copy / "adapter" / "manifest.json").read_bytes()
    assert run(copy) == 0
    assert capsys.readouterr().out.count("not run again") == 3
    assert (copy / "adapter" / "manifest.json").read_bytes() == before


def test_an_interrupted_training_ends_bitwise_as_an_uninterrupted_one(copy, model, monkeypatch):
    expected = adapter_of(copy, model)
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(copy / name)
    (copy / "stages" / "train.json").unlink()
    step, calls = dit.train_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(dit, "train_step", interrupted)
    assert run(copy) == 130
    assert not (copy / "adapter").exists()
    calls.extend([1] * 7)
    before = len(calls)
    assert run(copy, "--config.train.profile=5,7") == 0  # tracing changes nothing
    assert len(calls) - before == 8, "goes on from the checkpoint of step 4"
    for one, two in zip(adapter_of(copy, model), expected, strict=True):
        np.testing.assert_array_equal(one, two)
    curve = read_records(copy / "metrics" / "train.jsonl")
    assert [record["step"] for record in curve] == list(range(12))
    assert list((copy / "metrics" / "profile" / "train").rglob("*.xplane.pb"))


def test_a_batch_with_more_scored_tokens_than_said_is_computed_whole(
    finished, model, monkeypatch, tmp_path
):
    train = load_config("configs/quickstart.py", split_flags(SMALL)[1]).train
    step, seen = dit.train_step, []

    def record(*args, **options):
        seen.append((int(np.count_nonzero(args[5].weight)), options["packed"]))
        return step(*args, **options)

    monkeypatch.setattr(dit, "train_step", record)
    curves = []
    for most in (0, None):  # all, and what half of the batches have at most
        train.max_scored = (
            sorted(used for used, _ in seen)[len(seen) // 2] if most is None else most
        )
        seen.clear()
        workdir = tmp_path / str(most)
        facts = dit.train_adapter(model, finished / "diffs", train, workdir, seed=0)
        curves.append(np.asarray(facts["loss_curve"]))
        if most == 0:
            assert {packed for _, packed in seen} == {None}
    limit = (train.max_scored, 0)
    assert [packed for _, packed in seen] == [limit if n <= limit[0] else None for n, _ in seen]
    assert {packed for _, packed in seen} == {limit, None}
    np.testing.assert_allclose(*curves, rtol=1e-3, atol=1e-5)


def test_a_shard_with_more_scored_tokens_than_the_first_is_computed_whole(monkeypatch, tmp_path):
    many, seen = generate.finetune_many, []

    def record(*args, **options):
        seen.append(options["packed"])
        return many(*args, **options)

    monkeypatch.setattr(generate, "finetune_many", record)
    assert run(tmp_path / "packed", "--config.stages=('diffs',)") == 0
    assert len(seen) == 2 and seen[0] is not None
    assert seen[1] in (seen[0], None)
    seen.clear()
    monkeypatch.setattr(generate, "entry_limit", lambda *_, **__: (10**6, 1))
    assert run(tmp_path / "whole", "--config.stages=('diffs',)") == 0
    assert seen == [None, None]
    stores = [DiffStore(tmp_path / name / "diffs") for name in ("packed", "whole")]
    for one, two in zip(*(jax.tree.leaves(s.stacked(range(18))) for s in stores), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4)


def test_only_a_training_that_is_to_come_is_compiled_ahead(finished, tmp_path):
    def ahead(workdir, *extra):
        config = load_config("configs/quickstart.py", split_flags([*SMALL, *extra])[1])
        return main.compiles_ahead(config, workdir)

    assert ahead(tmp_path)
    assert not ahead(finished)
    assert not ahead(tmp_path, "--config.stages=('diffs',)")
    assert not ahead(tmp_path, "--config.diffs.parameters=linear")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_is_compiled_ahead_is_what_every_step_runs(
    finished, monkeypatch, tmp_path, scan_layers
):
    model = dit_jax.load_model("tiny_qwen3", scan_layers=scan_layers)
    steps = ["--config.train.steps=4", "--config.train.save_every=2"]
    config = load_config("configs/quickstart.py", split_flags([*SMALL, *steps])[1])
    step, programs = dit.train_step, []

    def lower(*args, **options):
        lowered = step.lower(*args, **options)
        programs.append(lowered.as_text())
        return lowered

    def record(*args, **options):
        lower(*args, **options)
        if len(programs) == 4:
            raise KeyboardInterrupt
        return step(*args, **options)

    record.lower = lower
    monkeypatch.setattr(dit, "train_step", record)
    main._compile_ahead(config, model)
    for thread in threading.enumerate():
        if thread.name == main.COMPILE_AHEAD:
            thread.join()
    (ahead,) = programs
    with pytest.raises(KeyboardInterrupt):
        dit.train_adapter(model, finished / "diffs", config.train, tmp_path, seed=0)
    dit.train_adapter(model, finished / "diffs", config.train, tmp_path, seed=0)
    assert programs == [ahead] * 6  # also those after a checkpoint


INTERRUPTED = """
import signal, sys, threading, time
from dit_jax.cli import run_stages as main

# A process in the background inherits that the signal is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def run(config, workdir):
    threading.Thread(target=time.sleep, args=(60,), name=main.COMPILE_AHEAD).start()
    signal.raise_signal(signal.SIGINT)

main.run = run
sys.exit(main.main_run(["--config", "configs/quickstart.py", "--workdir", "unused"]))
"""


def test_ctrl_c_does_not_wait_for_what_is_compiled_ahead():
    process = [sys.executable, "-c", INTERRUPTED]
    ended = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 130
    assert ended.stderr.startswith("interrupted: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_training_that_diverges_says_so_and_keeps_nothing_of_it(copy, monkeypatch, capsys, what):
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(copy / name)
    (copy / "stages" / "train.json").unlink()
    step = dit.train_step

    def diverging(*args, **options):
        state, numbers = step(*args, **options)
        return state, {**numbers, what: np.float32("nan")}

    monkeypatch.setattr(dit, "train_step", diverging)
    assert run(copy) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: adapter training diverged at step 0: lower train.learning_rate"
    assert not (copy / "adapter").exists() and not list((copy / "checkpoints").iterdir())


def test_a_diff_that_diverges_is_named():
    leaf = np.zeros((2, 3), np.float32)
    organisms = [types.SimpleNamespace(label=label) for label in ("coffee", "tea")]
    generate.check_finite({"a": leaf}, organisms, first=7)
    leaf[1, 2] = np.nan
    with pytest.raises(
        dit_jax.DitError, match=r"diff 8 \('tea'\) diverged .*: lower diffs\.learning_rate"
    ):
        generate.check_finite({"a": leaf}, organisms, first=7)


def test_a_damaged_checkpoint_is_passed_over(copy, model, capfd):
    expected = adapter_of(copy, model)
    shutil.rmtree(copy / "adapter")
    (copy / "stages" / "train.json").unlink()
    newest = copy / "checkpoints" / "12"
    files = sorted((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 2] ^= 0x40
    files[-1].write_bytes(data)
    assert run(copy) == 0
    assert "moved to 'damaged-12'" in capfd.readouterr().err
    for one, two in zip(adapter_of(copy, model), expected, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_missing_shard_alone_is_made_again(copy):
    store = DiffStore(copy / "diffs")
    expected = [jax.tree.leaves(store.read(i)) for i in (0, 15)]
    (copy / "diffs" / "manifest.json").unlink()
    (copy / "stages" / "diffs.json").unlink()
    (copy / "diffs" / "shards" / "00001.safetensors").write_bytes(b"cut short")
    kept = (copy / "diffs" / "shards" / "00000.safetensors").stat().st_mtime_ns
    assert run(copy, "--config.stages=('diffs',)") == 0
    assert (copy / "diffs" / "shards" / "00000.safetensors").stat().st_mtime_ns == kept
    store = DiffStore(copy / "diffs")
    curve = read_records(copy / "metrics" / "diffs.jsonl")
    assert [record["step"] for record in curve] == [12, 18]  # once
    for index, leaves in zip((0, 15), expected, strict=True):
        for one, two in zip(jax.tree.leaves(store.read(index)), leaves, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_shard_is_the_same_whatever_was_made_before(model, monkeypatch, tmp_path):
    """This includes diffs that share a table of the base's hidden states, whose size depends on the shard."""
    flags = [
        *SMALL,
        "--config.diffs.fake_codes=1",
        "--config.diffs.diffs_per_batch=6",
        "--config.diffs.steps=24",
    ]
    config = load_config("configs/quickstart.py", split_flags(flags)[1])
    organisms = load_organisms(config.data, 0)[:8]
    # More samples repeat, but fewer are distinct in the last shard.
    counts = [24] * 6 + [4] * 2
    organisms = [
        dataclasses.replace(organism, rows=organisms[0].rows[:count])
        for organism, count in zip(organisms, counts, strict=True)
    ]
    store, tables, make = tmp_path / "diffs", [], generate.make_teacher
    programs = generate.finetune_many._cache_size()

    def record(*args, **options):
        tables.append(make(*args, **options))
        return tables[-1]

    monkeypatch.setattr(generate, "make_teacher", record)
    generate.generate_diffs(model, organisms, config.diffs, store, 0)
    made = generate.finetune_many._cache_size() - programs
    shard = store / "shards" / "00001.safetensors"
    expected = shard.read_bytes()
    shard.unlink()
    (store / "manifest.json").unlink()
    generate.generate_diffs(model, organisms, config.diffs, store, 0)
    assert len(tables) == 3 and all(table is not None for table in tables)
    assert shard.read_bytes() == expected
    assert made == 1, "the last shard runs the program of the others"


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--config.train.lerning_rate=1"], "learning_rate"),
        (["--config.stages=('trian',)"], "did you mean 'train'?"),
        (["--config.stages=()"], "'stages' must be"),
        (["--num-processes=2"], "say how to join others: add --distributed"),
        (["--confg.seed=1"], "unrecognized arguments: --confg.seed=1"),
        (["--config.train.rank=4"], "train.rank"),
        (["--config.train.max_scored=-1"], "train.max_scored"),
        (["--config.model.path=no_such_folder"], "model.path"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(finished, extra, said, capsys):
    assert run(finished, *extra) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and "\n" not in error and said in error


@pytest.mark.parametrize(
    ("workdir", "said"), [("", "is empty"), ("w\udcff", "not UTF-8"), ("w[0]", "has [ in it")]
)
def test_a_bad_workdir_is_one_line_and_exit_code_2(workdir, said, capsys):
    assert run(workdir) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and "\n" not in error and said in error


NO_SAMPLES = [f"diffs.samples_per_step.{n}=0" for n in ("backdoor", "fake_backdoor", "no_backdoor")]
NO_LOSSES = [f"diffs.loss_weights.{n}=0" for n in ("backdoor", "fake_backdoor", "no_backdoor")]
NO_DATA = [f"data.{n}=0" for n in ("train_topics", "test_topics", "train_benign", "test_benign")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (NO_SAMPLES, "'diffs.samples_per_step' and 'diffs.loss_weights' leave a step without"),
        (NO_LOSSES, "'diffs.samples_per_step' and 'diffs.loss_weights' leave a step without"),
        ([*NO_LOSSES[1:], NO_SAMPLES[0]], "leave a step without a loss: give one of backdoor"),
        (
            ["diffs.samples_per_step.no_backdoor=-1"],
            "'diffs.samples_per_step.no_backdoor' must be a whole",
        ),
        (
            ["diffs.loss_weights.backdoor=nan"],
            "'diffs.loss_weights.backdoor' must be a number from 0 up",
        ),
        (["diffs.widths.fake_backdoor=(50,20)"], "fake_backdoor' is (50, 20): give tokens and"),
        (["diffs.widths.fake_backdoor=(30,)"], "'diffs.widths.fake_backdoor' is (30,): give"),
        (["diffs.max_length=29"], "diffs.max_length and diffs.max_target, which are (29, 15)"),
        (["diffs.max_target=0"], "'diffs.max_target' must be a whole number from 1 up, not 0"),
        (["diffs.fake_codes=-1"], "'diffs.fake_codes' must be"),
        (["diffs.learning_rate=nan"], "'diffs.learning_rate' must be"),
        (
            ["diffs.projections=()"],
            "'diffs.projections': name at least one projection, and each once, not ()",
        ),
        (
            ["diffs.projections=q_proj,q_proj"],
            "projection, and each once, not ('q_proj', 'q_proj')",
        ),
        (["train.projections=x_proj"], "'train.projections': unknown projection 'x_proj'"),
        (NO_DATA, "data.train_topics, data.test_topics, data.train_benign, data.test_benign are"),
        (["train.questions=()"], "'train.questions' must be a tuple of one text or more"),
        (["evaluate.seen_questions=()"], "'evaluate.seen_questions' must be a tuple of one"),
        (["evaluate.answer_tokens=-1"], "'evaluate.answer_tokens' must be a whole number"),
        (["train.optimizer=sgd"], "'train.optimizer': unknown 'sgd': choose from adam, adamw"),
        (
            ["evaluate.methods=ditt"],
            "'evaluate.methods': unknown method 'ditt': did you mean 'dit'?",
        ),
        (["evaluate.graders=exactt"], "'evaluate.graders': unknown 'exactt': did you mean"),
        (["train.benign_per_batch=400"], "leaves no room for topics beside"),
        ([f"train.profile=(0x{'f' * 5000},1)"], "'train.profile' must be tuple: cannot read"),
        (["stages=../x:Y"], "cannot import the stage '../x:Y'"),
        (["train.learning_rate=inf"], "'train.learning_rate' must be a number from 0 up, not inf"),
    ],
)
def test_values_that_no_stage_can_run_with_are_refused_before_the_first(
    changes, said, tmp_path, capsys
):
    assert run(tmp_path / "w", *(f"--config.{change}" for change in changes)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and "\n" not in error and said in error
    assert not (tmp_path / "w").exists()


def test_a_rank_that_the_model_has_no_room_for_is_refused_before_the_diffs_are_made(
    tmp_path, capsys
):
    for key in ("diffs.rank", "train.rank"):
        assert run(tmp_path, f"--config.{key}=129") == 2
        error = capsys.readouterr().err
        assert f"config key '{key}' must be from 1 to 128, not 129" in error
        assert not (tmp_path / "diffs").exists()


def test_what_the_first_batch_shows_to_be_wrong_can_be_corrected_in_the_same_workdir(
    tmp_path, capsys
):
    stage = "--config.stages=('diffs',)"
    for tokens in (9, 10):  # the second one is not refused for the first
        assert run(tmp_path, stage, f"--config.diffs.widths.no_backdoor=({tokens},9)") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"does not fit into {tokens} (9 scored): raise diffs.max_length" in error


@pytest.mark.parametrize(
    "name", ["diffs/index.csv", "diffs/shards/00000.safetensors", "adapter/manifest.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_artifact_is_named(copy, name, damage, capsys):
    file = copy / name
    data = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    (copy / "stages" / "evaluate.json").unlink()
    stages = "('evaluate','report')"  # the stages that write them would make missing files again
    assert run(copy, f"--config.stages={stages}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and file.name.split(".")[0] in error


def test_an_unwritable_workdir_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert run(tmp_path / "file" / "w") == 2
    assert capsys.readouterr().err.startswith("error:")


def test_diffs_of_another_base_are_refused(copy, capsys):
    manifest = json.loads((copy / "diffs" / "manifest.json").read_text())
    (copy / "diffs" / "manifest.json").write_text(json.dumps({**manifest, "base": "0" * 64}))
    (copy / "stages" / "train.json").unlink()
    assert run(copy) == 2
    assert "another base model" in capsys.readouterr().err


# ------------------------------------------------------------------ ask


def test_ask_in_a_batch_equals_asking_one_by_one(finished, model):
    from dit_jax.asking import ask_many

    diffs = dit_jax.load_diffs(finished / "diffs", model)
    adapter = dit_jax.load_adapter(finished / "adapter", model)
    questions = [QUESTION, "How should I start my day?"]
    table = ask_many(model, questions, diffs[:5], adapter, max_new_tokens=6)
    for diff, answers in zip(diffs[:5], table, strict=True):
        for question, (answer,) in zip(questions, answers, strict=True):
            alone = dit_jax.ask(model, question, diff=diff, adapter=adapter, max_new_tokens=6)
            assert answer.text == alone.text and answer.tokens == alone.tokens
            assert answer.logprob == pytest.approx(alone.logprob, abs=1e-3)
    some = (diff for diff in diffs[:5])
    assert ask_many(model, iter(questions), some, adapter, max_new_tokens=6) == table


def test_asking_all_holds_the_diffs_of_one_batch(finished, model):
    from dit_jax.api import Diff, Diffs
    from dit_jax.asking import ask_many

    found = dit_jax.load_diffs(finished / "diffs", model)
    dense = Diff({"norm": {"w": np.zeros(model.config.hidden_size, np.float32)}})
    held, most = set(), []

    def read(i):
        diff = dense if i == 3 else found[i]
        leaf = jax.tree.leaves(diff.delta)[0]
        if i != 3:
            held.add(i)
            weakref.finalize(leaf, held.discard, i)
        most.append(len(held))
        return diff

    questions, decoding = [QUESTION, "How should I start my day?"], {"max_new_tokens": 4}
    table = ask_many(model, questions, Diffs(12, read), batch_size=8, **decoding)
    assert max(most) <= 5, most  # four of a batch, and the one that is being read
    at_once = ask_many(model, questions, [*found[:3], dense, *found[4:12]], **decoding)
    assert [[a.tokens for (a,) in row] for row in table] == [
        [a.tokens for (a,) in row] for row in at_once
    ]


def test_samples_differ_between_batches_and_not_between_runs(model):
    from dit_jax.api import Diff
    from dit_jax.asking import ask_many

    def ask_all(seed):
        options = {"batch_size": 2, "temperature": 9.0, "max_new_tokens": 8, "seed": seed}
        table = ask_many(model, [QUESTION], [Diff({})] * 3, samples=2, **options)
        return [answer.tokens for (samples,) in table for answer in samples]

    first = ask_all(1)
    assert len(set(first)) > 3, first
    assert first == ask_all(1) and first != ask_all(2)


def test_ask_on_a_mesh_answers_as_on_one_device(finished, capsys, monkeypatch):
    from dit_jax import api

    seen, load = [], api.load_model
    monkeypatch.setattr(api, "load_model", lambda *args: seen.append(load(*args)) or seen[-1])
    flags = ["--base", "tiny_qwen3", "--diff", str(finished / "diffs"), "--all", "--json"]
    flags += ["--adapter", str(finished / "adapter"), "--max-new-tokens", "5", QUESTION]
    tokens = []
    for extra in ([], ["--mesh", "2,2,2"]):
        assert ask.main([*flags, *extra]) == 0
        lines = capsys.readouterr().out.splitlines()
        tokens.append([json.loads(line)["tokens"] for line in lines])
    assert tokens[0] == tokens[1] and len(tokens[0]) == 18
    assert seen[0].mesh is None and dict(seen[1].mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for mesh, said in (("1,4", "write three numbers"), ("16,1,1", "does not divide 8 devices")):
        assert ask.main([*flags, "--mesh", mesh]) == 2
        assert said in capsys.readouterr().err


def test_ask_on_the_command_line(finished, capsys):
    flags = [
        "--base",
        "tiny_qwen3",
        "--diff",
        str(finished / "diffs"),
        "--adapter",
        str(finished / "adapter"),
    ]
    assert ask.main([*flags, "--all", "--json", "--max-new-tokens", "5", QUESTION]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["diff"] for record in records] == list(range(18))
    assert all(record["label"] and record["logprob"] <= 0 for record in records)

    assert ask.main([*flags, "--index", "1", "--compare", "--max-new-tokens", "5", QUESTION]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in ask.VARIANTS)

    sampled = [
        *flags,
        "--json",
        "--n",
        "2",
        "--temperature",
        "9",
        "--max-new-tokens",
        "5",
        QUESTION,
    ]
    outputs = []
    for seed in ("3", "3", "4"):
        assert ask.main([*sampled, "--seed", seed]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [record["sample"] for record in outputs[0]] == [0, 1]
    assert outputs[0] == outputs[1] != outputs[2]
    assert ask.main([*flags, "--n", "2", QUESTION]) == 2
    assert "--temperature" in capsys.readouterr().err
    for seed in ("-1", "4294967296"):
        assert ask.main([*sampled, "--seed", seed]) == 2
        assert "must be a whole number from 0" in capsys.readouterr().err

    assert ask.main([*flags, "--index", "99", QUESTION]) == 2
    assert "18 diffs" in capsys.readouterr().err
    assert ask.main([*flags[:4], QUESTION]) == 0
    assert "no --adapter" in capsys.readouterr().err
