"""Mistakes in a config are reported before the first stage, as one line, whatever its values are."""

import copy
import functools
import math

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from dit_jax.cli.config_checks import check_config, check_values
from dit_jax.config.loading import flatten, load_config
from dit_jax.errors import DitError
from tools import config_page
from tools.pretrain import model_config

ODD = (None, True, -1, 1.5, 2**40, math.nan, "", "x", (), ("x", 2), {}, {"x": 1})


@functools.cache
def tree_of(path):
    return load_config(str(ROOT / path)).to_dict()


def changed(path, key, value):
    """The config of a file with another value, as in a config that somebody wrote anew."""
    tree = copy.deepcopy(tree_of(path))
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return ConfigDict(tree).lock()


def refusal(config):
    with pytest.raises(DitError) as error:
        check_config(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_key_that_nothing_reads_is_refused_in_a_config_of_its_own():
    for key, said in (
        (
            "train.exlude_failed",
            "'train.exlude_failed' is unknown: did you mean 'exclude_failed'?",
        ),
        ("evaluate.zzz", "'evaluate.zzz' is unknown: keys of 'evaluate' are "),
        ("diffs.raank", "'diffs.raank' is unknown: did you mean 'rank'?"),
        ("pretrain.seed", "'pretrain.seed' is unknown"),
    ):
        base = (
            "configs/tiny_world_base.py" if key.startswith("pretrain") else "configs/quickstart.py"
        )
        assert said in refusal(changed(base, key, 1))
    own = ConfigDict({"behaviour": "my.module:make", "colour": "red"})
    check_values(ConfigDict({"diffs": own}))  # a user-defined behaviour may have its own keys


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stages", "diffs", "'stages' must be a tuple of stages, not 'diffs'"),
        ("stages", 3, "'stages' must be a tuple of stages, not 3"),
        ("stages", ("diffs", "train", "trian"), "unknown stage 'trian': did you mean 'train'?"),
        ("seed", 2**32, "'seed' must be a whole number below"),
        ("seed", -1, "'seed' must be a whole number from 0 up, not -1"),
        ("train", 3, "'train' must be a section, not 3"),
        ("diffs.widths", (30, 10), "'diffs.widths' must be a section, not (30, 10)"),
        ("train.steps", 1e3, "'train.steps' must be a whole number from 1 up, not 1000.0"),
        ("train.steps", True, "'train.steps' must be a whole number from 1 up, not True"),
        ("diffs.steps", "72", "'diffs.steps' must be a whole number from 1 up, not '72'"),
        ("train.learning_rate", "3e-3", "'train.learning_rate' must be a number from 0 up, not '3"),
        ("train.list_evidence", "False", "'train.list_evidence' must be True or False, not 'Fal"),
        ("model.path", "", "'model.path' must be text, not ''"),
        ("data.source", " ", "'data.source' must be text, not ' '"),
        ("data.source", None, "'data.source' must be text, not None"),
        ("data.test_topics", -1, "'data.test_topics' must be a whole number from 0 up, not -1"),
        ("data.test_topics", 1.0, "'data.test_topics' must be a whole number from 0 up, not 1.0"),
        ("data.test_topics", 1, "two held-out topics or more (each is another's shuffled contr"),
        ("data.train_topics", 0, "training needs a topic or more: raise data.train_topics"),
        ("train.max_diffs", 257, "training needs train.max_diffs = 257 topics: raise data.train_"),
        ("diffs.adam_betas", (0.9,), "'diffs.adam_betas' must be two numbers from 0 up, below 1"),
        ("diffs.adam_betas", (0.9, 1.0), "'diffs.adam_betas' must be two numbers from 0 up, bel"),
        ("diffs.adam_betas", 0.9, "'diffs.adam_betas' must be two numbers from 0 up, below 1, not"),
        ("train.profile", (10,), "'train.profile' must be two whole numbers"),
        ("train.profile", (13, 10), "'train.profile' must be two whole numbers"),
        ("diffs.profile", "10,13", "'diffs.profile' must be two whole numbers"),
        (
            "diffs.part",
            "8/8",
            "'diffs.part' must be I/N with I from 0 to N - 1, such as 0/8, not '8/8'",
        ),
        ("diffs.part", "1", "'diffs.part' must be I/N with I from 0 to N - 1"),
        (
            "diffs.part",
            "0/2",
            "the stage 'train' needs all of 'diffs', and part '0/2' makes some: choose",
        ),
        ("evaluate.part", "3/3", "'evaluate.part' must be I/N with I from 0 to N - 1"),
        ("evaluate.part", "1/3", "the stage 'report' needs all of 'evaluate', and part '1/3'"),
        ("diffs.parameters", "lorra", "'diffs.parameters': unknown 'lorra': did you mean 'lora'?"),
        ("diffs.parameters", "all", "an adapter cannot be trained on diffs of all parameters"),
        (
            "diffs.gate",
            {"min_rigth": 0.8},
            "'diffs.gate.min_rigth' is not a limit of the gate: did",
        ),
        ("diffs.gate", {"min_right": math.nan}, "'diffs.gate.min_right' must be a number, not na"),
        (
            "diffs.samples_per_step.backdoor",
            1.5,
            "'diffs.samples_per_step.backdoor' must be a whole number from 0 to 1000, not 1.5",
        ),
        (
            "diffs.loss_weights.story",
            1.0,
            "'diffs.loss_weights.story' is of no use: behaviour hidden_topic has the kinds",
        ),
        ("diffs.widths.no_backdoor", (23.0, 10), "'diffs.widths.no_backdoor' is (23.0, 10): give"),
        ("evaluate.label", "topik", "'evaluate.label': 'topik' is no column of diffs/index.csv to"),
        ("train.label", "final_ce", "'train.label': 'final_ce' is no column of diffs/index.csv"),
        ("train.vary_size", 1e3, "'train.vary_size' must be a number from 0 to 5, not 1000.0"),
        ("evaluate.contrast", 1.5, "'evaluate.contrast' must be a number from 0 to 1, not 1.5"),
        ("evaluate.methods", "dit", "'evaluate.methods' must be a tuple of texts, not 'dit'"),
        ("evaluate.graders", "exact", "'evaluate.graders' must be a tuple of texts, not 'exact'"),
        ("evaluate.unseen_questions", "Why?", "'evaluate.unseen_questions' must be a tuple of te"),
        ("evaluate.logit_prompts", (1, 2), "'evaluate.logit_prompts' must be a tuple of texts"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key, value, said):
    assert said in refusal(changed("configs/quickstart.py", key, value))


def test_values_that_exclude_each_other():
    config = changed("configs/quickstart.py", "train.reference_labels", True).unlock()
    config.model.attention = "cudnn"
    assert "train.reference_labels scores padding" in refusal(config)
    config = changed("configs/paper/news.py:tiny", "evaluate.label", "trigger")
    assert "diffs of the behaviour news have no trigger of their own" in refusal(config)
    config = changed("configs/tiny_world_base.py", "pretrain.parts", 193)
    assert "'pretrain.parts' is 193: a batch of pretrain.batch_size = 192" in refusal(config)


def test_what_the_stages_do_not_need_is_not_refused():
    evaluation = ("diffs", "evaluate", "report")
    for key, value in (
        ("data.train_topics", 0),
        ("diffs.parameters", "all"),
        ("train.max_diffs", 999),
    ):
        config = changed("configs/quickstart.py", key, value).unlock()
        config.stages = evaluation
        check_config(config)
    # A store from elsewhere may have other columns, and fewer topics.
    for key, value in (("evaluate.label", "language"), ("data.test_topics", 0)):
        config = changed("configs/quickstart.py", key, value).unlock()
        config.stages = ("evaluate",)
        check_config(config)
    # For user-supplied rows, 0 topics means all.
    config = changed("configs/quickstart.py", "data.source", "rows.csv").unlock()
    config.data.train_topics = config.data.test_topics = 0
    config.evaluate.methods = ("dit",)
    check_config(config)


@pytest.mark.parametrize(
    "path",
    ["configs/quickstart.py", "configs/tiny_world_base.py", "configs/paper/tables.py:graded"],
)
def test_no_value_of_any_key_ends_in_a_traceback(path):
    """This includes missing keys."""
    whole = load_config(str(ROOT / path))
    check_config(whole)
    keys = flatten(whole)
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    for key in (*keys, *sections):
        for value in (*ODD, KeyError):
            config = changed(path, key, value)
            try:
                check_config(config)
            except DitError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hiden_size", 64, "'model.hiden_size' says nothing of a base to make: did you mean 'hid"),
        ("hidden_size", 0, "'hidden_size' must be a positive integer, not 0"),
        ("num_attention_heads", 3, "num_attention_heads must be a multiple"),
        ("attention", "flash", "unknown attention 'flash'"),
    ],
)
def test_a_base_that_cannot_be_made_is_refused(key, value, said):
    config = changed("configs/tiny_world_base.py", f"model.{key}", value)
    with pytest.raises(DitError, match=said):
        model_config(config, 100)


def test_a_method_with_triggers_is_refused_before_diffs_without_any_are_made():
    path = "configs/readings.py:untriggered"
    check_config(changed(path, "evaluate.methods", ("dit", "base_question")))
    said = "'evaluate.methods': 'base_question_trigger' needs diffs with a trigger, and diffs of the behaviour "
    assert said in refusal(changed(path, "evaluate.methods", ("dit", "base_question_trigger")))
    with pytest.raises(DitError, match="name a model behind the file, as in FILE.py:tiny: choose"):
        load_config(str(ROOT / "configs/paper/hidden_topic.py"))


def test_the_page_of_keys_is_current():
    """Write it anew with `python -m tools.config_page`."""
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page()
