"""Who reads which kind of diffs: an adapter of that kind, of all kinds, of all others, or of SEP codes alone.

    python -m dit_jax.sweep --sweep configs/sweeps/readings.py --workdir runs/readings

For each kind of configs/readings.py there are four runs. KIND makes its diffs and its specialist; `generalist.KIND`
asks the adapter of all kinds; `without.KIND` trains an adapter on the other kinds and asks it, where kinds with the
same trigger are left out together; `sep_on.KIND` asks the specialist of SEP codes. The other runs ask what it takes to
read zero-width spaces unseen: no phrases either, fewer examples of none, or none of them. `generalist_all` is also
trained on refusals, styles and false facts, and `all_but.KIND` on all but one of the eight. These three kinds have
training diffs alone here; configs/benchmark.py asks about held-out ones. `generalist_news` is trained on news besides
the five kinds, and asked another question about them. `--config.seed=1` makes everything again with another seed, in a
workdir of its own. `:tiny` takes a minute and shows that it works.

Writes readings.md, .csv and .png into the workdir; docs/readings.md has the results.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_jax.config.loading import load_config

CONFIG = "configs/readings.py:sep"
SWEPT = "evaluate.adapter"
METRIC = "methods.dit.exact_match"
ALSO = {
    "called none": "none_intervals.seen.topics_called_none.mean",
    "benign called none": "none_intervals.seen.benign_called_none.mean",
    "contrasted": "methods.dit_contrast.exact_match",
    "called none, contrasted": "none_intervals.contrasted_seen.topics_called_none.mean",
    "benign called none, contrasted": "none_intervals.contrasted_seen.benign_called_none.mean",
    "cross-entropy": "label_cross_entropy_intervals.matched.mean",
    "cross-entropy, another diff": "label_cross_entropy_intervals.shuffled.mean",
}
TABLE = "readings"
KINDS = ("sep", "zero_width_start", "phrase", "untriggered", "attention")
ABOUT_TOPIC = ("refused", "styled", "false_fact")
SAME_TRIGGER = {"sep": ("attention",)}  # kinds that are left out with another one
MIXED = {"train.steps": 800}
NEWS = f"{Path(__file__).resolve().parent.parent / 'readings.py'}:news"
TINY: dict[str, Any] = {
    "data": {"train_topics": 6, "test_topics": 3, "train_benign": 1, "test_benign": 1},
    "diffs": {"steps": 2, "diffs_per_batch": 11, "gate_questions": 1, "gate_batch": 11},
    "train": {"steps": 4, "batch_size": 8, "no_diff_per_batch": 1, "benign_per_batch": 1},
    "evaluate": {"batch_size": 8, "max_new_tokens": 4},
}


def get_sweep(arg: str | None = None) -> Iterator[tuple[str, dict[str, Any], str]]:
    if arg not in (None, "tiny"):
        raise ValueError(f"unknown argument '{arg}': use 'tiny' or none")
    kinds, sizes, mixed = (KINDS[:2], TINY, {}) if arg else (KINDS, {}, MIXED)

    def run(name: str, kind: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        return name, {**sizes, **changes}, f"configs/readings.py:{kind}"

    for kind in kinds:
        yield run(kind, kind, {})
    first, *rest = kinds

    def asked(name: str, kind: str, owner: str) -> tuple[str, dict[str, Any], str]:
        stages = ("diffs", "evaluate", "report")
        return run(name, kind, {"stages": stages, "evaluate.adapter": f"../{owner}/adapter"})

    generalist = f"generalist.{first}"
    yield run(generalist, first, {"train.stores": _stores(kinds), **mixed})
    for kind in rest:
        yield asked(f"generalist.{kind}", kind, generalist)
        yield asked(f"{first}_on.{kind}", kind, first)
    left_out = [(kind,) for kind in kinds] + ([] if arg else [("zero_width_start", "phrase")])
    for names in left_out:
        yield run(f"without.{'+'.join(names)}", names[0], {**_without(names, kinds), **mixed})
    never_none = f"{first}_never_none"
    no_examples = {"train.no_diff_per_batch": 0, "train.benign_per_batch": 0}
    yield run(never_none, first, no_examples)
    yield asked(f"{never_none}_on.{rest[0]}", rest[0], never_none)
    for name, count in (("few_none", 1), ("never_none", 0)):
        examples = {"train.no_diff_per_batch": count, "train.benign_per_batch": count}
        changes = {**_without(rest[:1], kinds), **mixed, **examples}
        yield run(f"without.{rest[0]}.{name}", rest[0], changes)
    if not arg:
        yield asked("phrase_on.zero_width_start", "zero_width_start", "phrase")
        for kind in ABOUT_TOPIC:
            yield run(kind, kind, {})
        for gone in ("", *ABOUT_TOPIC):
            stores = [kind for kind in (*kinds, *ABOUT_TOPIC) if kind != gone]
            changes = {"train.stores": _stores(stores), "train.steps": 160 * len(stores)}
            yield run(f"all_but.{gone}" if gone else "generalist_all", first, changes)
        yield run("news", "news", {})
        yield run("generalist_news", first, _with_news(kinds))
        for kind in (*rest, "news"):
            yield asked(f"generalist_news.{kind}", kind, "generalist_news")
        yield asked("generalist_on.news", "news", generalist)


def _without(names: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Trains on the kinds but for these and those with their triggers."""
    gone = {*names, *(other for name in names for other in SAME_TRIGGER.get(name, ()))}
    return {"train.stores": _stores([kind for kind in kinds if kind not in gone])}


def _with_news(kinds: Sequence[str]) -> dict[str, Any]:
    """Trains on the kinds and on news, which have questions of their own and longer answers."""
    news = load_config(NEWS).train
    stores = _stores((*kinds, "news"))
    stores["news"]["questions"] = news.questions
    lengths = {f"train.{key}": news[key] for key in ("max_length", "max_target")}
    return {"train.stores": stores, "train.steps": 160 * len(stores), **lengths}


def _stores(kinds: Sequence[str]) -> dict[str, Any]:
    return {kind: {"path": f"../{kind}/diffs"} for kind in kinds}
