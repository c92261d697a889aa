"""Writes docs/config.md from the declarations of stages and config keys: python -m tools.config_page"""

from collections.abc import Iterable
from pathlib import Path

from dit_jax.cli.stages import RUN, STAGES, Stage, declared_sections
from dit_jax.config.keys import REQUIRED, Key, Section
from dit_jax.models.model_keys import MODEL
from dit_jax.runtime import artifacts
from dit_jax.train.train_keys import STORE, TRAIN
from tools.pretrain import STAGE as PRETRAIN

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRODUCTION = """\
# Configs

<!-- Written by `python -m tools.config_page` from the declarations beside the code. Edit those. -->

A config is a Python file with a function `get_config(arg=None)` that returns an `ml_collections.ConfigDict`. It is code
and runs with your rights: load only files that you trust. `configs/` has some, and a config may build on another one.

    python -m dit_jax.main --config configs/quickstart.py:ARG --workdir runs/mine --config.train.steps=400

`:ARG` goes to `get_config`, and `--config.key=value` replaces a value of the file, or sets a key that has a default. A
config is checked before the first stage runs: one line names the key that is unknown, missing or wrong, and the remedy.

A required key must be there if a stage of the run reads its section; of another key the default is taken. A key marked
with * changes no result, so two runs in one workdir may differ in it.

## Stages

`stages` names what to run, in any order. A stage that is finished does not run again; one marked with * always does.
Your own stage is named by its import path, `package.module:NAME`, where NAME is a `dit_jax.cli.stages.Stage`.

| stage | what it does | reads | leaves |
|---|---|---|---|
"""


def page() -> str:
    """The text of docs/config.md."""
    stages = "".join(_stage_row(name, stage) for name, stage in STAGES.items())
    stages += _stage_row("tools.pretrain:STAGE", PRETRAIN)
    sections = declared_sections((PRETRAIN,))
    rest = [section for section in sections if section not in (RUN, MODEL)]
    rest.insert(rest.index(TRAIN) + 1, STORE)
    return INTRODUCTION + stages + "".join(map(_section_table, (RUN, MODEL, *rest)))


def _stage_row(name: str, stage: Stage) -> str:
    read = [f"`{STAGES[other].folder}/`" for other in stage.reads]
    read += [f"`{section.name}`" for section in stage.all_sections if section.name]
    mark = " *" if stage.always else ""
    return f"| `{name}`{mark} | {stage.about} | {', '.join(read)} | `{stage.folder}/` |\n"


def _section_table(section: Section) -> str:
    read = TRAIN if section is STORE else section
    readers = [name for name, stage in STAGES.items() if read in stage.all_sections]
    readers = readers or ["tools.pretrain:STAGE"]
    title = f"`{section.name}`" if section.name else "The top of the config"
    table = "| key | type | default | |\n|---|---|---|---|\n"
    rows = "".join(_key_row(section, key) for key in section.keys)
    return f"\n## {title}\n\nRead by {_listed(readers)}.\n\n{table}{rows}"


def _key_row(section: Section, key: Key) -> str:
    default = "required" if key.default is REQUIRED else f"`{key.default!r}`"
    mark = " *" if key.free else ""
    choices = f": {_listed(key.choices)}" if key.choices else ""
    kind = key.describe() + choices
    return f"| `{section.dotted(key.name)}`{mark} | {kind} | {default} | {key.about} |\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    artifacts.write_text(PAGE, page())
    print(PAGE)
