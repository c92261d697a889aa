"""Configs: every mistake of a user gives one line that names the key and the remedy."""

import json
import math

import pytest
from ml_collections import ConfigDict

from dit_jax.cli.workdir import check_workdir
from dit_jax.config.loading import (
    config_diff,
    flatten,
    load_config,
    load_saved,
    save_config,
    split_flags,
    to_dict,
)
from dit_jax.errors import DitError
from dit_jax.runtime import artifacts, stage_records

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=None):
    if arg not in (None, "small"):
        raise ValueError(f"unknown argument '{arg}', use 'small'")
    config = ConfigDict()
    config.seed = 0
    config.stages = ("diffs", "train")
    config.train = ConfigDict(
        dict(learning_rate=1e-3, steps=40 if arg else 400, log_every=10, resume=True, dims=(1, 2))
    )
    config.train.warmup = config.train.get_ref("steps") // 10
    config.note = None
    config.most = config_dict.placeholder(int)
    return config
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "quickstart.py"
    file.write_text(CONFIG)
    return str(file)


def small(**train) -> ConfigDict:
    return ConfigDict(
        {"seed": 0, "stages": ("diffs",), "train": {"steps": 400, "log_every": 10, **train}}
    )


def test_loads_locked_with_the_argument(path):
    assert load_config(path).train.steps == 400
    config = load_config(f"{path}:small")
    assert config.train.steps == 40
    with pytest.raises(AttributeError):
        config.train.lerning_rate = 1.0


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),
        ("train.resume=False", "train.resume", False),
        ("stages=train,report", "stages", ["train", "report"]),
        ("stages=('train', 'report')", "stages", ["train", "report"]),
        ("stages=train", "stages", ["train"]),
        ("train.dims=3,4", "train.dims", [3, 4]),
        ("note=a=b", "note", "a=b"),
        ("most=5", "most", 5),
    ],
)
def test_overrides_take_the_type_that_they_replace(path, override, key, value):
    result = flatten(load_config(path, [override]))[key]
    assert result == value
    assert type(result) is type(value)


def test_overrides_reach_derived_values_and_accept_mappings(path):
    assert load_config(path, ["train.steps=50"]).train.warmup == 5
    config = load_config(path, {"train.steps": 60, "train": {"learning_rate": 2}})
    assert (config.train.steps, config.train.learning_rate) == (60, 2.0)


def test_an_override_sets_an_optional_key_that_the_file_leaves_out(path):
    optional = {"train.decay": 0.5, "train.names": (), "data.scale": 1.0, "options": {}}
    config = load_config(path, ["train.decay=0.25", "train.names=a,b", "options.of.x=3"], optional)
    assert (config.train.decay, config.train.names, config.options.of.x) == (0.25, ("a", "b"), 3)
    assert "decay" not in load_config(path, [], optional).train
    assert load_config(path, {"train.decay": 2}, optional).train.decay == 2.0
    for override, message in (
        ("train.decay=much", "config key 'train.decay' must be float: cannot read 'much'"),
        ("data.scale=2", "unknown config key 'data.scale'"),  # the section is not there
        ("train.dekay=2", r"unknown config key 'train.dekay': did you mean 'train.decay'\?"),
    ):
        with pytest.raises(DitError, match=message):
            load_config(path, [override], optional)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.lerning_rate=1"],
            "unknown config key 'train.lerning_rate': did you mean 'train.learning_rate'?",
        ),
        (["learning_rate=1"], "unknown config key 'learning_rate': did you mean 'train.learning_"),
        (["trian.steps=1"], "unknown config key 'trian.steps': did you mean 'train.steps'?"),
        (["train.steps.x=1"], "unknown config key 'train.steps.x'"),
        (["zzzz=1"], "unknown config key 'zzzz': known keys are most, note, seed"),
        (["train=1"], "config key 'train' is a section"),
        (["train.steps=many"], "config key 'train.steps' must be int: cannot read 'many'"),
        (["train.steps=1.5"], "config key 'train.steps' must be int: cannot read '1.5'"),
        (["train.resume=maybe"], "config key 'train.resume' must be bool: cannot read 'maybe'"),
        (["train.dims=a,b"], "config key 'train.dims' must be tuple: cannot read 'a,b'"),
        (["train.dims=(1, 'a')"], "config key 'train.dims' must be tuple"),
        (["most=x"], "config key 'most' must be int: cannot read 'x'"),
        (["train.steps"], "'train.steps' has no value"),
        ({"train.steps": "7"}, "config key 'train.steps' must be int, not str: '7'"),
        ({"train.steps": True}, "config key 'train.steps' must be int, not bool: True"),
        ({"train": {"steps_": 1}}, "unknown config key 'train.steps_': did you mean 'train.steps'"),
        ({"seed": {"x": 1}}, "config key 'seed' is a section"),
    ],
)
def test_bad_overrides_are_one_line(path, overrides, message):
    with pytest.raises(DitError) as error:
        load_config(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "arg", "message"),
    [
        (CONFIG, ":large", "quickstart.py:large', line 6: unknown argument 'large', use 'small'"),
        ("def get_config():\n  return 1", ":a", "takes no argument: drop ':a' after .py"),
        ("def get_config(arg):\n  return 1", "", "needs an argument: write ':ARG' after .py"),
        ("def get_config():\n  return {}", "", "returns dict, not a ConfigDict"),
        ("x = 1", "", "has no function get_config"),
        ("x = 1\ny = (", "", "line 2: '(' was never closed"),
        ("x = 1\nimport missing_module", "", ", line 2: ModuleNotFoundError: No module named"),
        ("x = 1\ny = z", "", ", line 2: NameError: name 'z' is not defined"),
        ("raise SystemExit('no')", "", ", line 1: SystemExit: no"),
        ("def get_config():\n  raise SystemExit(0)", "", ", line 2: SystemExit: 0"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, text, arg, message):
    file = tmp_path / "quickstart.py"
    file.write_text(text)
    with pytest.raises(DitError) as error:
        load_config(f"{file}{arg}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_made_from_a_locked_one_cannot_add_keys(tmp_path):
    file = tmp_path / "derived.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "  config = ConfigDict({'train': {'learning_rate': 1.0}}).lock()\n"
        "  config.train.lerning_rate = 2.0\n"
        "  return config\n"
    )
    message = r"line 4: unknown config key 'lerning_rate': did you mean 'learning_rate'\?$"
    with pytest.raises(DitError, match=message):
        load_config(str(file))


def test_missing_file_suggests_its_neighbour(path, tmp_path):
    with pytest.raises(
        DitError, match=r"no config file '.*quikstart.py': did you mean '.*/quickst"
    ):
        load_config(str(tmp_path / "quikstart.py"))


def test_values_that_must_be_set(tmp_path):
    file = tmp_path / "needs.py"
    file.write_text(
        "from ml_collections import ConfigDict, config_dict\n"
        "def get_config():\n"
        "  return ConfigDict({'a': {'base': config_dict.required_placeholder(str)}})\n"
    )
    assert load_config(str(file), ["a.base=x"]).a.base == "x"
    with pytest.raises(DitError, match=r"'a.base' is not set: add --config.a.base=VALUE"):
        load_config(str(file))
    with pytest.raises(DitError, match=r"unknown config key 'a.bas': did you mean 'a.base'"):
        load_config(str(file), ["a.bas=x"])


@pytest.mark.parametrize("text", ["{[1]: 2}", "-" * 9_000 + "1", "[1," * 200, "9" * 5_000])
def test_what_python_cannot_read_is_text(path, text):
    assert load_config(path, [f"note={text}"]).note == text


def test_split_flags_takes_both_spellings():
    argv = ["--config", "x.py:small", "--config.a.b=1", "--workdir", "w", "--config.c", "2=3"]
    assert split_flags(argv) == (["--config", "x.py:small", "--workdir", "w"], ["a.b=1", "c=2=3"])
    with pytest.raises(DitError, match=r"'--config.c' has no value: write --config.c=VALUE"):
        split_flags(["--config.c"])


def test_config_diff_is_readable():
    old = small(rate=math.nan)
    new = small(steps=800, rate=math.nan, extra=True)
    new.stages = ("diffs", "train")
    assert config_diff(old, old.copy_and_resolve_references()) == []
    assert config_diff(old, new) == [
        "stages: ['diffs'] -> ['diffs', 'train']",
        "train.extra: absent -> True",
        "train.steps: 400 -> 800",
    ]
    assert config_diff(new, old, ignore=("stages", "*steps")) == ["train.extra: True -> absent"]
    assert config_diff(new, old, ignore=("stages", "train")) == []
    assert config_diff(ConfigDict({"a": 1}), ConfigDict({"a": True})) == ["a: 1 -> True"]


def test_save_and_load_round_trip(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "saved.json")
    loaded = load_saved(tmp_path / "saved.json")
    assert config_diff(config, loaded) == []
    assert loaded.stages == ("diffs", "train")
    assert loaded.is_locked
    assert to_dict(config)["train"]["warmup"] == 40
    with pytest.raises(DitError, match="config key 'x' holds function: use numbers"):
        save_config(ConfigDict({"x": load_saved}), tmp_path / "bad.json")


def test_a_workdir_belongs_to_one_config(tmp_path):
    workdir = tmp_path / "runs" / "a"
    check_workdir(small(), workdir)
    written = (workdir / "config.json").read_text()
    assert json.loads(written) == to_dict(small())

    (workdir / "metrics").mkdir()  # the first batch could not be made
    check_workdir(small(steps=800), workdir)  # nothing was made yet: no need for another folder
    check_workdir(small(), workdir)
    artifacts.write_text(workdir / "diffs" / "shard", "")
    free = small(log_every=1)
    free.stages = ("report",)
    check_workdir(free, workdir)  # neither key changes results
    check_workdir(small(steps=800), workdir)  # nor was anything made with this one
    check_workdir(small(), workdir)
    (workdir / "checkpoints").mkdir()
    check_workdir(small(steps=900), workdir)  # training failed before the first of them
    check_workdir(small(), workdir)
    (workdir / "checkpoints" / "4").mkdir()
    with pytest.raises(
        DitError, match=r"\(train.steps: 400 -> 800\): delete '.*/a/checkpoints' to"
    ):
        check_workdir(small(steps=800), workdir)
    graded = small()
    graded.unlock().evaluate = ConfigDict({"graders": ("exact",)})
    check_workdir(graded, workdir)  # answers are graded with the report
    assert load_saved(workdir / "config.json").evaluate.graders == ("exact",)
    check_workdir(small(), workdir)
    another = small()
    another.seed = 5
    with pytest.raises(DitError, match=r"another config \(seed: .*\): use a new --w"):
        check_workdir(another, workdir)
    with pytest.raises(DitError, match=r"stages: "):
        check_workdir(free, workdir, ignore=())
    many = ConfigDict({f"k{i}": i for i in range(9)})
    with pytest.raises(DitError, match=r"; and 6 more\)"):
        check_workdir(many, workdir)
    assert (workdir / "config.json").read_text() == written  # a refusal changes nothing


def test_a_list_may_move_and_must_not_change_once_it_was_used(tmp_path):
    def at(place, text="birds: owl"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "topics.txt").write_text(text)
        config = small()
        config.unlock().corpus = ConfigDict({"topics": str(tmp_path / place / "topics.txt")})
        return config

    workdir = tmp_path / "run"
    check_workdir(at("old"), workdir)
    check_workdir(at("old", "birds: owl, duck"), workdir)  # nothing was made of it yet
    artifacts.write_text(workdir / "corpus" / "rows", "")
    (tmp_path / "old" / "topics.txt").unlink()
    check_workdir(moved := at("new", "birds: owl, duck"), workdir)
    assert load_saved(workdir / "config.json").corpus.topics == moved.corpus.topics
    refusal = r"\(corpus.topics: its lines have changed\): delete '.*/run/corpus' to"
    with pytest.raises(DitError, match=refusal):
        check_workdir(at("new", "birds: duck"), workdir)


def test_a_damaged_config_is_written_anew_or_refused(tmp_path, capsys):
    check_workdir(small(), tmp_path)
    artifacts.write_text(tmp_path / "diffs" / "shard", "")
    file, copy = tmp_path / "config.json", tmp_path / ".config.json"
    written = file.read_text()
    file.write_text(written[:20])
    check_workdir(small(), tmp_path)  # diffs that took hours are not lost with it
    assert file.read_text() == written and "written anew" in capsys.readouterr().out
    file.write_text(written[:20])
    copy.write_text(written[:20])
    with pytest.raises(DitError, match="config.json' is truncated or not JSON"):
        check_workdir(small(), tmp_path)
    file.unlink()
    copy.unlink()
    stage_records.mark_done(tmp_path, "diffs", 1.0)
    with pytest.raises(DitError, match="is missing beside finished stages"):
        check_workdir(small(), tmp_path)
    with pytest.raises(DitError, match="a part of the path is a file"):
        check_workdir(small(), tmp_path / "stages" / "diffs.json" / "w")
