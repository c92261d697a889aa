"""The stages of a run, one entry each, in the order in which they run.

A config may also name a user-defined stage by its import path, `package.module:NAME`, where NAME is a `Stage`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dit_jax.config.keys import REQUIRED, TEXTS, Key, Section
from dit_jax.config.user_code import import_object
from dit_jax.data.data_keys import DATA
from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.models.model_keys import MODEL
from dit_jax.organisms.corpus_keys import CORPUS
from dit_jax.organisms.diffs_keys import DIFFS, kinds_of
from dit_jax.report.tables.stage import TABLES
from dit_jax.runtime.outgoing import show
from dit_jax.train.train_keys import TRAIN

Facts = dict[str, Any]
RUN = Section(
    "",
    (
        Key("stages", TEXTS, "the stages to run, see the table above", free=True),
        Key("seed", int, "seed of everything that is drawn at random"),
        Key("mesh", dict, "devices along `data`, `fsdp` and `tensor`; -1: all that are left", {"data": -1}, free=True),
    ),
    takes_others=lambda config: True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run, which leaves a folder in the workdir.

    name: what configs, records and messages call it.
    folder: what it leaves in the workdir.
    about: one line for the documentation.
    run: (config, workdir, model) -> facts for its record. It imports what it needs when it runs.
    reads: the stages whose artifacts it reads. It runs again when one of them has changed.
    reads_others: (config) -> folders of artifacts of other runs, relative to the workdir, of which the same holds.
    sections: the config sections that it reads; `model` and the top come with `needs_model`.
    traces: what its first step leaves in the workdir. Until then its sections may change; (): they are bound as soon as
        anything is made.
    needs_model: whether `run` gets a model; otherwise None.
    always: whether it runs again every time, on process 0 alone, because it is cheap.
    has_manifest: whether its artifact ends with a manifest, without which it is incomplete.
    check: (config) -> None. It raises DitError for values that exclude each other, before the first stage runs.
    check_inputs: (config) -> None. It raises DitError for missing files, before a model is loaded.
    """

    name: str
    folder: str
    about: str
    run: Callable[[Any, Path, Any], Facts]
    reads: tuple[str, ...] = ()
    reads_others: Callable[[Any], Iterable[str]] = lambda config: ()
    sections: tuple[Section, ...] = ()
    traces: tuple[str, ...] = ()
    needs_model: bool = False
    always: bool = False
    has_manifest: bool = False
    check: Callable[[Any], None] = lambda config: None
    check_inputs: Callable[[Any], None] = lambda config: None

    @property
    def all_sections(self) -> tuple[Section, ...]:
        """The sections that it reads, with those of the model and the top where it needs a model."""
        return (*self.sections, MODEL, RUN) if self.needs_model else self.sections


def _check_diffs(config: Any) -> None:
    from dit_jax.data.organism import check_counts

    check_counts(config.data)
    readers = [stage.name for stage in chosen_stages(config.stages) if "diffs" in stage.reads]
    _check_alone(DIFFS, config.diffs, readers)


def _check_alone(section: Section, values: Any, readers: Iterable[str]) -> None:
    """Raises DitError: a run that makes a part of a stage is to run a stage that reads the whole."""
    part = section.get(values, "part")
    for name in readers if part else ():
        raise DitError(
            f"config key '{section.name}.part': the stage '{name}' needs all of '{section.name}', and part '{part}' "
            f"makes some: choose --config.stages={section.name} and join the parts with dit_jax.gather"
        )


def _earlier_finetunes(config: Any) -> Iterable[str]:
    return filter(None, [DIFFS.get(kind, "after") for kind in kinds_of(config.diffs).values()])


def _other_stores(config: Any) -> Iterable[str]:
    return [options["path"] for options in TRAIN.get(config.train, "stores").values()]


def _other_adapter(config: Any) -> Iterable[str]:
    return filter(None, [EVALUATE.get(config.evaluate, "adapter")])


def _check_train(config: Any) -> None:
    from dit_jax.train.examples import check_attention, check_room

    check_room(config.train)
    check_attention(config.train, MODEL.get(config.model, "attention"))


def _check_evaluate(config: Any) -> None:
    from dit_jax.evaluate.guessers import check_guesser
    from dit_jax.evaluate.methods import check_methods

    _check_alone(EVALUATE, config.evaluate, {"report"} & set(config.stages))
    check_methods(config)
    check_guesser(*(EVALUATE.get(config.evaluate, key) for key in ("guesser", "guesser_options")))


def _check_graders(config: Any) -> None:
    from dit_jax.graders import check_grader

    values = EVALUATE.values(config)
    options = EVALUATE.get(values, "grader_options")
    for name in EVALUATE.get(values, "graders"):
        check_grader(name, **dict(options.get(name, {})))


def _check_data_files(config: Any) -> None:
    from dit_jax.data.organism import check_files

    check_files(config.data)


def _check_facts(config: Any) -> None:
    from dit_jax.evaluate.capability import read_facts

    if path := EVALUATE.get(config.evaluate, "facts"):
        read_facts(path)


def _write_corpus(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.organisms.write_corpus import write_corpus

    return write_corpus(model, config.corpus, workdir / "corpus", config.seed)


def _check_lists(config: Any) -> None:
    from dit_jax.organisms.corpus_lists import read_lists

    read_lists(config.corpus)


def _make_diffs(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.data.organism import load_organisms
    from dit_jax.organisms.generate import generate_diffs

    organisms = load_organisms(config.data, config.seed, workdir / STAGES["corpus"].folder)
    return generate_diffs(
        model, organisms, config.diffs, workdir / "diffs", config.seed, config.data
    )


def _train(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.train.dit import train_adapter

    return train_adapter(model, workdir / "diffs", config.train, workdir, config.seed)


def _evaluate(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.evaluate.run import evaluate_run

    return evaluate_run(model, workdir, config.evaluate, config.seed)


def _report(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.config.loading import to_dict
    from dit_jax.report.run_report import write_report
    from dit_jax.report.terminal import print_headline

    print_headline(write_report(workdir, to_dict(config).get("evaluate", {})))
    show(f"report: {workdir / 'report' / 'report.html'}")
    return {}


def _make_tables(config: Any, workdir: Path, model: Any) -> Facts:
    from dit_jax.report.tables.stage import write_tables

    facts = write_tables(config, workdir)
    show(f"tables: {workdir / 'tables' / 'tables.html'}")
    return facts


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "corpus", "corpus", "asks the base for the rows that organisms are finetuned on", _write_corpus,
            sections=(CORPUS,), traces=("corpus",), needs_model=True, has_manifest=True, check_inputs=_check_lists,
        ),
        Stage(
            "diffs", "diffs", "finetunes the base once for each organism", _make_diffs,
            reads=("corpus",), reads_others=_earlier_finetunes, sections=(DATA, DIFFS), needs_model=True,
            has_manifest=True,
            check=_check_diffs, check_inputs=_check_data_files,
        ),
        Stage(
            "train", "adapter", "trains the DIT adapter on the diffs", _train,
            reads=("diffs",), reads_others=_other_stores, sections=(TRAIN,), traces=("adapter", "checkpoints"),
            needs_model=True, has_manifest=True, check=_check_train,
        ),
        Stage(
            "evaluate", "evaluate", "asks about the held-out diffs, with controls and baselines", _evaluate,
            reads=("diffs", "train"), reads_others=_other_adapter, sections=(EVALUATE,), traces=("evaluate",),
            needs_model=True, has_manifest=True, check=_check_evaluate, check_inputs=_check_facts,
        ),
        Stage("report", "report", "grades the answers and writes the report", _report, always=True,
              check=_check_graders),
        Stage("tables", "tables", "rebuilds the paper's tables from graded answers", _make_tables,
              sections=(TABLES,), always=True),
    )
}  # fmt: skip


def get_stage(name: Any) -> Stage:
    """The stage that a config calls `name`. Raises DitError: an unknown name, or an import path without a `Stage`."""
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    known = f"stages are {', '.join(STAGES)}, or the import path 'package.module:NAME' of your own"
    if ":" not in str(name):
        raise DitError(f"unknown stage {name!r}{did_you_mean(str(name), STAGES, f': {known}')}")
    stage = import_object(name, "stage")
    if not isinstance(stage, Stage):
        raise DitError(f"stage {name!r} is a {type(stage).__name__}, not a Stage")
    if stage.name in STAGES:
        raise DitError(f"stage {name!r} has the name '{stage.name}' of another stage: rename it")
    return stage


def chosen_stages(names: Any) -> list[Stage]:
    """The stages that a config's `stages` names, each once, in the order in which they run.

    That is the order of `STAGES`. A user-defined stage comes after the one that is named before it.

    Raises:
        DitError: no tuple of stages, or see `get_stage`.
    """
    if not isinstance(names, list | tuple) or not names:
        raise DitError(
            f"config key 'stages' must be a tuple of stages, not {names!r}: stages are {', '.join(STAGES)}"
        )
    order, place = list(STAGES), -1
    placed: dict[str, tuple[int, Stage]] = {}
    for stage in map(get_stage, names):
        place = order.index(stage.name) if stage.name in STAGES else place
        placed.setdefault(stage.name, (place, stage))
    return [stage for _, stage in sorted(placed.values(), key=lambda pair: pair[0])]


def declared_sections(stages: Iterable[Stage] = ()) -> list[Section]:
    """The sections that the package's stages and these read, each once."""
    read = [section for stage in (*STAGES.values(), *stages) for section in stage.all_sections]
    return [section for i, section in enumerate(read) if section not in read[:i]]


def optional_keys() -> dict[str, Any]:
    """What an override may set though the config does not have it, see `load_config`."""
    return {
        section.dotted(key.name): {} if key.kind is dict else key.default
        for section in declared_sections()
        for key in section.keys
        if key.kind is dict or key.default is not REQUIRED
    }


def free_keys(config: Any) -> list[str]:
    """The keys that change no result, dotted, so that two runs in one workdir may differ in them."""
    stages = chosen_stages(config.stages) if "stages" in config else ()
    return [s.dotted(key.name) for s in declared_sections(stages) for key in s.keys if key.free]


def named_files(config: Any) -> dict[str, str]:
    """The text files that a config names: dotted key -> path."""
    named = {
        section.dotted(key.name): section.values(config).get(key.name, "")
        for section in declared_sections()
        for key in section.keys
        if key.file
    }
    return {key: path for key, path in named.items() if path}
