"""Fitted trees of scikit-learn as the arrays of numbers that `dit_jax.graders.calibrated` evaluates and describes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Forest = dict[str, NDArray[Any]]


def _floor32(threshold: float) -> np.float32:
    """The largest float32 not above: float32 features compare with it as with the threshold."""
    rounded = np.float32(threshold)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > threshold else rounded


class _Builder:
    def __init__(self) -> None:
        self.feature: list[int] = []
        self.value: list[np.float32] = []
        self.skip: list[int] = []
        self.root: list[int] = []

    def add(self, nodes: Mapping[str, Any]) -> None:
        """Adds a tree given as arrays left, right (-1 at leaves), feature, threshold, value."""
        self.root.append(len(self.feature))
        stack: list[tuple[int, int | None]] = [(0, None)]
        while stack:  # depth first, so that the left child always follows its parent
            old, parent = stack.pop()
            if parent is not None:
                self.skip[parent] = len(self.feature) - parent
            while True:
                here, leaf = len(self.feature), nodes["left"][old] < 0
                self.feature.append(-1 if leaf else int(nodes["feature"][old]))
                number = nodes["value"][old] if leaf else _floor32(float(nodes["threshold"][old]))
                self.value.append(np.float32(number))
                self.skip.append(0)
                if leaf:
                    break
                stack.append((int(nodes["right"][old]), here))
                old = int(nodes["left"][old])

    def build(self, weight: Sequence[float], base: float) -> Forest:
        return {
            "root": np.asarray(self.root, np.int32),
            "weight": np.asarray(weight, np.float32),
            "base": np.asarray([base], np.float64),
            "feature": np.asarray(self.feature, np.int16),
            "value": np.asarray(self.value, np.float32),
            "skip": np.asarray(self.skip, np.uint16),
        }


def export(models: Sequence[Any]) -> Forest:
    """The mean of fitted scikit-learn regressors as one forest.

    Args:
        models: `HistGradientBoostingRegressor`s without categories or missing values, and forests of
            regression trees (`ExtraTreesRegressor`, `RandomForestRegressor`).

    Raises:
        TypeError: another kind of model.
    """
    builder, weight, base = _Builder(), [], 0.0
    for model in models:
        if hasattr(model, "_predictors"):
            base += float(np.ravel(model._baseline_prediction)[0]) / len(models)
            for (tree,) in model._predictors:
                nodes = tree.nodes
                left = np.where(nodes["is_leaf"], -1, nodes["left"].astype(np.int64))
                builder.add(
                    {
                        "left": left,
                        "right": nodes["right"],
                        "feature": nodes["feature_idx"],
                        "threshold": nodes["num_threshold"],
                        "value": nodes["value"],
                    }
                )
                weight.append(1 / len(models))
        elif hasattr(model, "estimators_"):
            for estimator in model.estimators_:
                tree = estimator.tree_
                builder.add(
                    {
                        "left": tree.children_left,
                        "right": tree.children_right,
                        "feature": tree.feature,
                        "threshold": tree.threshold,
                        "value": tree.value[:, 0, 0],
                    }
                )
                weight.append(1 / len(models) / len(model.estimators_))
        else:
            raise TypeError(f"{type(model).__name__} has no trees")
    return builder.build(weight, base)


def compact(model: Forest) -> Forest:
    """The same forest with numbers that compress well: 10 bits of thresholds, leaves in steps of 2^-8.

    Thresholds only become smaller by less than a thousandth, so features that are whole numbers
    below 1,024 are compared as before.
    """
    leaf = model["feature"] < 0
    cut = (model["value"].view(np.int32) & np.int32(-(2**13))).view(np.float32)
    return {**model, "value": np.where(leaf, np.rint(model["value"] * 256) / 256, cut)}
