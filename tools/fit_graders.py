"""Fits and measures the calibrated graders: python -m tools.fit_graders --results DIR

    python -m tools.fit_graders --results DIR [--embeddings] [--output FILE.json]
    python -m tools.fit_graders --results DIR [--embeddings] --shipped
    python -m tools.fit_graders --results DIR [--embeddings] --save FOLDER

DIR holds graded answers: DIR/<diffs>/<method>.csv with the columns `topic, guessed_topic, score` or
`summary, guessed_summary, score`. Every grader is measured on the unique (label, answer) pairs, topics
and news apart; calibrated ones are cross-validated over groups of labels, so that no label that is
graded was fitted to. --shipped measures the calibrated graders as they come instead. --save fits to
all pairs and writes the assets that dit_jax ships. Fitting needs scikit-learn.
"""

import argparse
import csv
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dit_jax.cli.flags import Parser
from dit_jax.errors import DitError
from dit_jax.graders.calibrated import (
    KINDS,
    Calibrated,
    CalibratedEmbeddings,
    Pairs,
    feature_matrix,
    names_digest,
    predict,
    settle,
)
from dit_jax.graders.embeddings import Embeddings, minilm
from dit_jax.graders.grades import Item, quadratic_kappa, to_levels
from dit_jax.graders.match import Exact, Normalised, Similarity
from dit_jax.graders.sentences import load_minilm
from dit_jax.runtime import artifacts
from dit_jax.runtime.exits import status_of
from tools import forest

COLUMNS = {"topics": ("topic", "guessed_topic"), "news": ("summary", "guessed_summary")}
FOLDS = 5
LINEAR_SHARE = 0.1
STRETCH = 1.05  # means of models are too close to the middle for the best kappa
RIDGE = 300.0


class GradedPairs(NamedTuple):
    """Unique pairs (label, answer), their whole grades [N], how many rows they come from, and how many
    rows were left out (no label, or a score that is no number from 1 to 5)."""

    pairs: list[tuple[str, str]]
    grades: NDArray[np.int64]
    rows: int
    left_out: int


def read_graded(folder: str) -> dict[str, GradedPairs]:
    """Reads every CSV file below a folder; a pair with several grades gets their median.

    Raises:
        DitError: no such folder, a file that is no CSV text, or no graded answers.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DitError(f"no folder {folder!r}: --results takes a folder of graded answers")
    found: dict[str, dict[tuple[str, str], list[float]]] = {kind: {} for kind in KINDS}
    left_out = dict.fromkeys(KINDS, 0)
    for file in sorted(root.rglob("*.csv")):
        text = artifacts.read_text(file, "give a folder of graded answers")
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows = list(reader)
        except csv.Error as error:
            raise DitError(f"'{file}' is no CSV file: {error}") from None
        for kind, (label, answer) in COLUMNS.items():
            if not {label, answer, "score"} <= set(reader.fieldnames or []):
                continue
            for row in rows:
                score = _score(row["score"])
                if score is None or not row[label]:
                    left_out[kind] += 1
                else:
                    found[kind].setdefault((row[label], row[answer] or ""), []).append(score)
    graded = {
        kind: GradedPairs(
            list(pairs),
            to_levels([np.median(scores) for scores in pairs.values()]),
            sum(map(len, pairs.values())),
            left_out[kind],
        )
        for kind, pairs in found.items()
        if pairs
    }
    if not graded:
        wanted = " or ".join(", ".join((*pair, "score")) for pair in COLUMNS.values())
        raise DitError(f"no graded answers below {folder!r}: CSV files need the columns {wanted}")
    return graded


def _score(text: str | None) -> float | None:
    try:
        score = float(text or "")
    except ValueError:
        return None
    return score if 1 <= score <= 5 else None


# ------------------------------------------------------------------ fitting


def fit(x: NDArray[np.float32], y: NDArray[np.int64], seed: int = 0) -> dict[str, NDArray[Any]]:
    """A calibrated model of grades y [N] from features x [N, F], as `calibrated.predict` takes it.

    Boosted and extremely randomised trees in equal parts, and ridge regression beside them: the
    first two find thresholds and cases, the third keeps what is smooth.
    """
    try:
        from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
    except ImportError:
        raise DitError("calibrating needs scikit-learn: pip install 'dit_jax[calibrate]'") from None
    boosted = HistGradientBoostingRegressor(
        max_iter=400,
        learning_rate=0.03,
        max_leaf_nodes=6,
        min_samples_leaf=8,
        l2_regularization=3,
        max_features=0.15,
        early_stopping=False,
        random_state=seed,
    )
    random_trees = ExtraTreesRegressor(60, min_samples_leaf=5, max_features=1.0, random_state=seed)
    trees = forest.export([boosted.fit(x, y), random_trees.fit(x, y)])
    model: dict[str, Any] = forest.compact(trees)
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    z = np.clip((x - mean) / scale, -5, 5).astype(np.float64)
    offset = z.mean(0)
    gram = (z - offset).T @ (z - offset) + RIDGE * np.eye(z.shape[1])
    coef = np.linalg.solve(gram, (z - offset).T @ (y - y.mean()))
    return {
        **model,
        "mean": mean,
        "scale": scale,
        "coef": coef.astype(np.float32),
        "intercept": np.asarray([y.mean() - offset @ coef]),
        "share": np.asarray([LINEAR_SHARE]),
        "stretch": np.asarray([STRETCH]),
    }


def folds(labels: Sequence[str], seed: int = 0) -> NDArray[np.int64]:
    """A fold number [N] for each pair: a label's pairs are all in one, folds have as many labels."""
    names = np.asarray(sorted(set(labels)), dtype=object)
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {str(name): int(place) % FOLDS for name, place in zip(names, order, strict=True)}
    return np.asarray([fold[label] for label in labels], np.int64)


def cross_validate(
    x: NDArray[np.float32], y: NDArray[np.int64], pairs: Pairs, seed: int = 0
) -> NDArray[np.float64]:
    """Continuous grades [N], each by a model that saw no pair with the same label.

    Raises:
        DitError: fewer labels than folds, or scikit-learn is not installed.
    """
    labels = len({label for label, _ in pairs})
    if labels < FOLDS:
        raise DitError(f"{labels} labels are too few to calibrate: {FOLDS} or more are needed")
    fold = folds([label for label, _ in pairs], seed)
    values = np.zeros(len(y))
    for i in range(FOLDS):
        test = fold == i
        values[test] = predict(fit(x[~test], y[~test]), x[test])
    return settle(values, pairs)


# ------------------------------------------------------------------ measuring


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where a column does not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(a, b).statistic)


def measure(graded: GradedPairs, encoder: Any, seeds: int) -> list[dict[str, Any]]:
    """Kappa and Spearman of every grader on the pairs of one kind.

    Args:
        encoder: of MiniLM, for the graders with embeddings; None without.
        seeds: cross-validations with different folds, over which calibrated ones are averaged.
    """
    pairs, y = graded.pairs, graded.grades
    items = [Item(label, answer) for label, answer in pairs]
    plain: list[Any] = [Exact(), Normalised(), Similarity()]
    if encoder is not None:
        plain.append(Embeddings())
    rows = []
    for grader in plain:
        scores = [grade.score for grade in grader(items)]
        rows.append(_row(grader.name, [quadratic_kappa(y, scores)], [spearman(y, scores)]))
    for name, use in (("calibrated", None), ("calibrated_embeddings", encoder)):
        if name == "calibrated_embeddings" and encoder is None:
            continue
        x, _ = feature_matrix(pairs, use)
        found = [cross_validate(x, y, pairs, seed) for seed in range(seeds)]
        kappas = [quadratic_kappa(y, values) for values in found]
        rows.append(_row(name, kappas, [spearman(y, values) for values in found]))
    return rows


def measure_shipped(graded: GradedPairs, kind: str, model: str | None) -> list[dict[str, Any]]:
    """Kappa and Spearman of the graders that come with dit_jax, on grades that are new to them."""
    graders = [Calibrated(kind)]
    if model is not None:
        graders.append(CalibratedEmbeddings(kind, model))
    rows = []
    for grader in graders:
        values = grader.predict(graded.pairs, kind)
        kappa = quadratic_kappa(graded.grades, values)
        rows.append(_row(grader.name, [kappa], [spearman(graded.grades, values)]))
    return rows


def _row(name: str, kappas: Sequence[float], rhos: Sequence[float]) -> dict[str, Any]:
    return {
        "grader": name,
        "kappa": round(float(np.mean(kappas)), 4),
        "kappa_min": round(float(min(kappas)), 4),
        "kappa_max": round(float(max(kappas)), 4),
        # Undefined where a grader gives everything one grade.
        "spearman": None if np.isnan(rhos).any() else round(float(np.mean(rhos)), 4),
    }


def save(graded: dict[str, GradedPairs], encoder: Any, folder: str) -> Path:
    """Fits to all pairs of both kinds and writes the asset. Raises DitError if a kind is missing."""
    if missing := [kind for kind in KINDS if kind not in graded]:
        raise DitError(f"no graded {' and '.join(missing)} in --results: both kinds are needed")
    arrays: dict[str, Any] = {}
    for kind, of_kind in graded.items():
        x, names = feature_matrix(of_kind.pairs, encoder)
        model = {**fit(x, of_kind.grades), "names": np.asarray([names_digest(names)], np.int64)}
        arrays |= {f"{kind}/{part}": array for part, array in model.items()}
    name = "calibrated.npz" if encoder is None else "calibrated_embeddings.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    artifacts.write_bytes(Path(folder) / name, buffer.getvalue())
    return Path(folder) / name


# ------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a problem that the user can fix."""
    parser = Parser("python -m tools.fit_graders", __doc__)
    parser.add_argument("--results", required=True, help="folder of graded answers")
    parser.add_argument("--embeddings", action="store_true", help="also with sentence embeddings")
    parser.add_argument("--model", default=None, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--seeds", type=int, default=1, help="cross-validations to average")
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="measure the graders as they come, which were fitted to the published grades: for others",
    )
    parser.add_argument("--output", default=None, help="also write the numbers as JSON")
    parser.add_argument("--save", default=None, help="fit to everything, write assets there")
    return status_of(lambda: _run(parser.parse_args(argv)))


def _run(flags: argparse.Namespace) -> None:
    if flags.seeds < 1:
        raise DitError(f"--seeds {flags.seeds}: give 1 or more")
    if flags.model is not None and not flags.embeddings:
        raise DitError("--model is that of the embeddings: add --embeddings")
    if flags.save is not None and (flags.shipped or flags.output is not None):
        raise DitError("--save fits and measures nothing: leave out --shipped and --output")
    encoder = None
    model = None
    if flags.embeddings:
        model = flags.model or minilm()
        encoder = load_minilm(model)
    graded = read_graded(flags.results)
    if flags.save is not None:
        for use in (None, encoder) if encoder is not None else (None,):
            path = save(graded, use, flags.save)
            print(f"{path}: {path.stat().st_size} bytes")
        return
    result: dict[str, Any] = {}
    for kind, of_kind in graded.items():
        labels = len({label for label, _ in of_kind.pairs})
        result[kind] = {
            "pairs": len(of_kind.pairs),
            "labels": labels,
            "rows": of_kind.rows,
            "left_out": of_kind.left_out,
            "graders": measure_shipped(of_kind, kind, model)
            if flags.shipped
            else measure(of_kind, encoder, flags.seeds),
        }
        rows = f"{of_kind.rows} rows, {of_kind.left_out} without a grade left out"
        print(f"{kind}: {len(of_kind.pairs)} unique pairs of {labels} labels ({rows})")
        print(f"  {'grader':24}{'kappa':>8}{'spearman':>10}")
        for row in result[kind]["graders"]:
            spread = f"  {row['kappa_min']:.3f}–{row['kappa_max']:.3f}" if flags.seeds > 1 else ""
            rho = "–" if row["spearman"] is None else f"{row['spearman']:.3f}"
            print(f"  {row['grader']:24}{row['kappa']:8.3f}{rho:>10}{spread}")
        sys.stdout.flush()
    if flags.output is not None:
        artifacts.write_json(flags.output, result)


if __name__ == "__main__":
    raise SystemExit(main())
