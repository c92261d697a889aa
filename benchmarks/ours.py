"""dit_jax as a contender: the functions that the stages and `ask` call, on the benchmark's tokens."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.workload import LEARNING_RATE, WEIGHT_DECAY, Workload, random_params
from dit_jax import api, asking
from dit_jax.data.batch import TokenBatch, entry_limit, fits
from dit_jax.deltas.tree import per_example, trainable
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import projections, set_at
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.finetune import finetune_many
from dit_jax.organisms.teacher import make_teacher
from dit_jax.runtime import startup

_FIELDS = TokenBatch._fields


def load_model(work: Workload, folder: pathlib.Path) -> api.Model:
    """The folder's weights, or random ones made on the device if there is no folder."""
    if (folder / "model").is_dir():
        return api.load_model(
            folder / "model",
            work.dtype,
            scan_layers=work.scan_layers,
            remat=work.remat,
            attention=work.attention,
        )
    return api.Model(random_params(work), work.config, work.model)


def delta_tree(
    config: DecoderConfig, factors: dict[str, np.ndarray], which: str, rank: int
) -> dict[str, Any]:
    """The factors named `which` as a delta tree with scale 1 / rank; leading axes are kept."""
    delta: dict[str, Any] = {}
    for name, module in projections(config).items():
        a, b = factors[f"{which}.{name}.a"], factors[f"{which}.{name}.b"]
        scale = np.full(a.shape[:-2], 1 / rank, np.float32)
        set_at(delta, module.path, {"a": a, "b": b, "scale": scale})
    return delta


class _Ours:
    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path):
        self.work, self.data, self.factors = work, data, factors
        self.model = load_model(work, folder)
        jax.block_until_ready(self.model.program_params)
        self.facts = {
            "device": jax.devices()[0].device_kind,
            "remat": work.remat,
            "scan_layers": work.scan_layers,
            "attention": work.attention,
        }

    def warm_up(self) -> None:
        self.run()

    def run(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def device_peak(self) -> int | None:
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None

    def ceilings(self, dtype: str, platform: str) -> dict[str, float]:
        return measure.jax_ceilings(dtype, platform)


class Diffs(_Ours):
    """Runs many finetunes, `batch` at a time; trained factors and losses come back to the host."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path):
        super().__init__(work, data, factors, folder)
        # Made once: an optimizer is a static argument, and a new one compiles again.
        self.optimizer = make_optimizer("adam", LEARNING_RATE["diffs"], work.steps)
        first = TokenBatch(*(data[name][: work.batch] for name in _FIELDS))
        self.limit = entry_limit(first, work.num_ce, room=1.03)

    def run(self) -> dict[str, np.ndarray]:
        work = self.work
        start = delta_tree(self.model.config, self.factors, "diffs", work.rank)
        losses = []
        for first in range(0, work.diffs, work.batch):
            part = slice(first, first + work.batch)
            deltas = jax.tree.map(lambda x, part=part: jnp.asarray(x[part]), start)
            batches = TokenBatch(*(self.data[name][part] for name in _FIELDS))
            params, config = self.model.program_params, self.model.config
            teacher = make_teacher(params, config, batches, work.num_ce)
            trained, parts = finetune_many(
                params,
                config,
                deltas,
                batches,
                optimizer=self.optimizer,
                num_ce=work.num_ce,
                teacher=teacher,
                widths=work.widths or None,
                packed=self.limit if fits(batches, work.num_ce, self.limit) else None,
            )
            jax.device_get(trained)
            losses.append(np.asarray(parts["ce"] + parts["kl"]))
        return {"losses": np.concatenate(losses)}


class Train(_Ours):
    """Adapter steps; each batch's diffs come from the host, as in the stage `train`."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path):
        super().__init__(work, data, factors, folder)
        self.adapter = delta_tree(self.model.config, factors, "adapter", work.adapter_rank)
        self.diffs = delta_tree(self.model.config, factors, "diffs", work.rank)
        self.optimizer = make_optimizer(
            "adamw", LEARNING_RATE["train"], work.steps, weight_decay=WEIGHT_DECAY["train"]
        )
        batches = TokenBatch(*(data[name][None] for name in _FIELDS))
        self.limit = entry_limit(batches, work.batch, room=1.0)  # of all steps

    def run(self) -> dict[str, np.ndarray]:
        from dit_jax.train.dit import State, train_step  # with the packages of checkpoints and data

        leaves = jax.tree.map(jnp.array, trainable(self.adapter))
        state = State(leaves, self.optimizer.init(leaves))
        losses = []
        for step in range(self.work.steps):
            rows = self.data["rows"][step]
            own = jax.tree.map(lambda x, rows=rows: x[rows], self.diffs)
            state, metrics = train_step(
                self.model.program_params,
                self.model.config,
                state,
                self.adapter,
                per_example(own),
                TokenBatch(*(self.data[name][step] for name in _FIELDS)),
                optimizer=self.optimizer,
                packed=self.limit,
            )
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return {"losses": np.asarray(jax.device_get(losses))[None]}


class TokenChat:
    """Stands for a tokenizer: a question is the number of a row of token ids, and no token ends an answer."""

    eos_ids: tuple[int, ...] = ()
    pad_id = 0

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def prompts(
        self, questions: Sequence[str], system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.rows[list(map(int, questions))]
        return tokens, np.ones_like(tokens, bool)

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class Corpus(_Ours):
    """Many prompts to the base."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path):
        super().__init__(work, data, factors, folder)
        chat: Any = TokenChat(data["prompt"])
        self.model = api.Model(self.model.params, self.model.config, self.model.name, chat)

    def run(self) -> dict[str, np.ndarray]:
        answers = asking.answer_batch(
            self.model,
            list(map(str, range(self.work.diffs))),
            batch_size=self.work.batch,
            max_new_tokens=self.work.new_tokens,
        )
        return {"tokens": np.array([answer.tokens for answer in answers], np.int32)}


class Ask(Corpus):
    """One question to every diff, with the adapter on top, through the public interface."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path):
        super().__init__(work, data, factors, folder)
        stacked = delta_tree(self.model.config, factors, "diffs", work.rank)
        self.diffs = [
            api.Diff(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(work.diffs)
        ]
        adapter = delta_tree(self.model.config, factors, "adapter", work.adapter_rank)
        self.adapter = jax.tree.map(jnp.asarray, adapter)

    def run(self) -> dict[str, np.ndarray]:
        answers = asking.ask_many(
            self.model,
            ["0"],
            self.diffs,
            self.adapter,
            batch_size=min(self.work.batch, self.work.diffs),
            max_new_tokens=self.work.new_tokens,
        )
        return {"tokens": np.array([answer.tokens for ((answer,),) in answers], np.int32)}


def make(
    work: Workload, data: Any, factors: Any, folder: pathlib.Path, name: str, variant: str
) -> _Ours:
    """`variant` is unused: the workload says how to compute."""
    startup.prepare()  # as the command lines do
    kinds = {"diffs": Diffs, "train": Train, "ask": Ask, "corpus": Corpus}
    return kinds[work.suite](work, data, factors, folder)
