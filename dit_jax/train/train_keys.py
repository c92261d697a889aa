"""The section `train` of a config: how the DIT adapter is trained."""

import dataclasses
from typing import Any

from dit_jax.config.keys import TEXTS, Key, Section, check_profile
from dit_jax.deltas.store import LABEL_COLUMNS
from dit_jax.errors import DitError
from dit_jax.models.modules import check_projections
from dit_jax.optimize.optimizer import OPTIMIZER_KEYS

# A store of `train.stores`, under a name of its own.
STORE = Section(
    "train.stores.NAME",
    (
        Key("path", str, "the store, relative to the workdir: `diffs`, or that of another run"),
        Key("variant", str, "the one of its kinds of diffs (`diffs.kinds`) to train on; empty: all", ""),
        Key("share", float, "its part of the examples, relative to the other stores; 0: it is left out", 1.0),
        Key("questions", TEXTS, "its wordings of the question; None: `train.questions`", None, least=1),
        Key("label", str, "the column of its index that the adapter learns to say; None: `train.label`", None,
            choices=LABEL_COLUMNS),
        Key("list_evidence", bool, "whether answers about it list attributes before the name; None: "
            "`train.list_evidence`", None),
        Key("svd_rank", int, "train on the best LoRA of this rank in the place of each diff, which dense diffs need "
            "beside LoRAs; 0: on the diffs", 0),
    ),
)  # fmt: skip


def _check_stores(stores: Any, key: str) -> None:
    """Raises DitError for the first mistake in `train.stores`."""
    for name, options in stores.items():
        section = dataclasses.replace(STORE, name=f"train.stores.{name}")
        section.check({section.name: options})
        section.check_needed({section.name: options})
    if stores and not any(STORE.get(options, "share") for options in stores.values()):
        raise DitError(f"{key} gives no store a share: raise one")


def _check_share(share: float, key: str) -> None:
    if share >= 1:
        raise DitError(f"{key} is {share}: give a number below 1, or nothing is left of a diff")


TRAIN = Section(
    "train",
    (
        Key("questions", TEXTS, "wordings of the question, drawn at random", least=1),
        Key("list_evidence", bool, "whether answers list attributes before the name"),
        Key("answer_prefix", str, "text before each answer; many tokenizers have names as one token after a space", ""),
        Key("label", str, "the column of `diffs/index.csv` that the adapter learns to say", "label"),
        Key("exclude_failed", bool, "leave out diffs that failed the gate", False),
        Key("max_diffs", int, "training topics to use of each store; 0: all"),
        Key("stores", dict, "diff stores to train on, by names of your own, see below; empty: this run's", {},
            check=_check_stores),
        Key("rank", int, "rank of the adapter", least=1),
        Key("projections", TEXTS, "the linear layers that the adapter changes", check=check_projections),
        *OPTIMIZER_KEYS,
        Key("weight_decay", float, "AdamW's weight decay"),
        Key("steps", int, "optimizer steps", least=1),
        Key("batch_size", int, "examples of a step, each with its own diff", least=1),
        Key("no_diff_per_batch", int, "how many of them have no diff and the label `none`"),
        Key("benign_per_batch", int, "how many of them have a benign diff and the label `none`"),
        Key("vary_size", float, "standard deviation of the log of a random number that multiplies an example's diff",
            0.0, most=5),
        Key("vary_layers", float, "the same of each layer of it", 0.0, most=5),
        Key("drop_share", float, "share of its projections that are left out at random; the others grow, as in dropout",
            0.0, check=_check_share),
        Key("reference_labels", bool, "score padding too, as in the reference", False),
        Key("reference_init", bool, "initialise with the rank as fan-in, as in the reference"),
        Key("max_length", int, "most tokens of an example", least=1),
        Key("max_target", int, "most tokens of an answer", least=1),
        Key("max_scored", int, "scored tokens that one device computes; 0: all. Larger batches are computed whole", 0),
        Key("profile", tuple[int, int], "steps to trace, from 0: the first, and the one after the last", (0, 0),
            check=check_profile, free=True),
        Key("log_every", int, "steps between two lines of the log", least=1, free=True),
        Key("save_every", int, "steps between two checkpoints", least=1, free=True),
        Key("keep_checkpoints", int, "how many checkpoints are kept", least=1, free=True),
    ),
)  # fmt: skip
