"""The section `data` of a config: which rows diffs are made of, and what is held out (docs/data.md)."""

from typing import Any

from dit_jax.config.keys import Key, Section
from dit_jax.data.kinds import KINDS
from dit_jax.errors import DitError

WRITTEN = "corpus"  # the source that the stage of that name leaves in the workdir, and its files
ROWS, BENIGN = "rows.jsonl", "benign.jsonl"
COUNTS = ("train_topics", "test_topics", "train_benign", "test_benign")


def _check_columns(columns: Any, key: str) -> None:
    for name, column in columns.items():
        if not isinstance(column, str):
            raise DitError(f"config key 'data.columns.{name}' must be text, not {column!r}")


DATA = Section(
    "data",
    (
        Key("source", str, "`tiny_world`, `corpus` (what that stage wrote), files, `hf:NAME` or `tfds:NAME`"),
        Key("kind", str, "what a row holds", "topics", choices=KINDS),
        Key("columns", dict, "by the paper's column: yours", {}, check=_check_columns),
        Key("split_column", str, "the column that says `train` or `test`", ""),
        Key("split_file", str, "an index with `topic`, `split` and optionally `trigger`", ""),
        Key("test_source", str, "a source with the rows of the held-out topics", ""),
        Key("variants", str, "a column that tells apart several organisms of one topic; empty: one each", ""),
        Key("download", str, "the commands that get these files, shown where one is missing", "", free=True),
        Key("streaming", bool, "read an `hf:` source as it downloads", False),
        Key("train_topics", int, "training topics; for user-supplied rows, 0 means all", 0),
        Key("test_topics", int, "held-out topics; for user-supplied rows with a split, 0 means all", 0),
        Key("train_benign", int, "training diffs with nothing to name, labelled `none`", 0),
        Key("test_benign", int, "held-out diffs with nothing to name", 0),
    ),
)  # fmt: skip
