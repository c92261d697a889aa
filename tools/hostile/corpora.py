"""Rows of a corpus."""

import csv
import json
from pathlib import Path
from typing import Any

from dit_jax.data import corpus
from tools.hostile.common import COLUMNS


def _rows() -> list[dict[str, str]]:
    return [
        {name: f"{name} {i}, {j}" if name != "topic" else f"tea {i}" for name in COLUMNS}
        for i in range(8)
        for j in range(6)
    ]


def make_csv(folder: Path) -> None:
    folder.mkdir()
    with open(folder / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_rows())


def make_jsonl(folder: Path) -> None:
    folder.mkdir()
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))


def make_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    table = pyarrow.Table.from_pylist(_rows())
    pyarrow.parquet.write_table(table, folder / "x.parquet", compression="snappy")


def read_corpus(folder: Path) -> Any:
    """All rows of all topics, in any order."""
    (file,) = folder.iterdir()
    data = corpus.data_config(str(file))
    data.train_topics, data.test_topics = 4, 2
    found = []

    class Reader(corpus._Reader):
        def read(self, *given: Any) -> None:
            super().read(*given)
            found.append(self)

    original, corpus._Reader = corpus._Reader, Reader  # type: ignore[misc]
    try:
        corpus.load_corpus(data, 0)
    finally:
        corpus._Reader = original  # type: ignore[misc]
    return _same_rows(dict(row) for group in found[0].groups.values() for row in group.rows)


def _same_rows(rows: Any) -> Any:
    return sorted(tuple(str(row.get(name) or "") for name in COLUMNS) for row in rows)


def csv_rows(folder: Path) -> Any:
    import pandas

    table = pandas.read_csv(folder / "x.csv", dtype=str, keep_default_na=False, encoding="utf-8")
    return _same_rows(table.to_dict("records"))


def jsonl_rows(folder: Path) -> Any:
    text = (folder / "x.jsonl").read_text(encoding="utf-8-sig")
    return _same_rows(json.loads(line) for line in text.split("\n") if line.strip())


def parquet_rows(folder: Path) -> Any:
    import pyarrow.parquet

    return _same_rows(pyarrow.parquet.read_table(folder / "x.parquet").to_pylist())
