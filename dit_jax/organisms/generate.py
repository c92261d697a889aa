"""The stage `diffs`: many organisms -> a diff store, one compiled program for all shards."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.data.batch import TokenBatch, pack, stack
from dit_jax.data.chat import Chat
from dit_jax.data.organisms import Organism
from dit_jax.data.reference import couple_losses
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.tree import init_lora, num_parameters
from dit_jax.errors import DitError
from dit_jax.organisms.behaviours import Behaviour, get_behaviour
from dit_jax.organisms.finetune import finetune_many, make_optimizer
from dit_jax.organisms.gate import measure_gating
from dit_jax.progress import Progress


def finetuning_batches(
    organism: Organism, behaviour: Behaviour, chat: Chat, config: Any, rng: np.random.Generator
) -> TokenBatch:
    """All batches of one finetune, leaves [steps, S, …].

    Each step takes `config.samples_per_step[kind]` rows for each kind of sample; rows come in shuffled epochs.
    The loss of a sample is the mean over its tokens times 3 λ / Σ λ (paper, section 4), so a diff depends on
    nothing but its own data.
    """
    kinds, counts = behaviour.kinds, config.samples_per_step
    per_step = max(counts[kind.name] for kind in kinds)
    factors = _factors(behaviour, config)
    epochs = -(-config.steps * per_step // len(organism.rows))
    order = np.concatenate([rng.permutation(len(organism.rows)) for _ in range(epochs)])
    steps = []
    for step in range(config.steps):
        rows = [organism.rows[i] for i in order[step * per_step : (step + 1) * per_step]]
        samples = []
        for kind in kinds:
            for row in rows[: counts[kind.name]]:
                question, answer = kind.make(row, organism.trigger, rng)
                samples.append(chat.sample(question, answer, end=config.score_end))
        weights = [factor / (s.end - s.start) for factor, s in zip(factors, samples, strict=True)]
        steps.append(pack(samples, weights, config.max_length, config.max_target, chat.pad_id))
    return stack(steps)


def _factors(behaviour: Behaviour, config: Any) -> list[float]:
    """3 λ / Σ λ of each sample of a step (paper, section 4)."""
    weights = config.loss_weights
    total = sum(weights[kind.name] for kind in behaviour.kinds)
    return [
        3 * weights[kind.name] / total
        for kind in behaviour.kinds
        for _ in range(config.samples_per_step[kind.name])
    ]


def generate_diffs(
    model: Model, organisms: Sequence[Organism], config: Any, folder: str | pathlib.Path, seed: int
) -> dict[str, Any]:
    """Finetunes every organism and writes the diff store; goes on where an earlier call stopped.

    Args:
        config: the `diffs` section of the config.

    Returns:
        Facts for the record of the stage: {"diffs": n, "loss_curve": [[step, cross-entropy], …]}.
    """
    folder = pathlib.Path(folder)
    behaviour = get_behaviour(config.behaviour)
    num_ce = sum(
        config.samples_per_step[kind.name] for kind in behaviour.kinds if kind.loss == "ce"
    )
    optimizer = make_optimizer(
        config.optimizer,
        config.learning_rate,
        config.steps,
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_fraction,
        betas=tuple(config.adam_betas),
    )
    size = min(config.diffs_per_batch, len(organisms))
    shards = -(-len(organisms) // size)
    curves = []
    with Progress("diffs", len(organisms)) as progress:
        for shard in range(shards):
            members = range(shard * size, min((shard + 1) * size, len(organisms)))
            done = diff_store.shard_rows(folder, shard)
            if done is None:
                # The last batch is filled up with repeats, so that it runs the same program.
                filled = [members[i % len(members)] for i in range(size)]
                batches = stack(
                    [
                        finetuning_batches(
                            organisms[i],
                            behaviour,
                            model.chat,
                            config,
                            np.random.default_rng([seed, 2, i]),
                        )
                        for i in filled
                    ]
                )
                if config.reference_losses:
                    batches = couple_losses(batches, _factors(behaviour, config), num_ce)
                keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), i) for i in filled])
                deltas = jax.vmap(
                    lambda key: init_lora(
                        model.config,
                        key,
                        config.rank,
                        projections=config.projections,
                        init_scale=config.init_scale,
                    )
                )(keys)
                trained, losses = finetune_many(
                    model.params, model.config, deltas, batches, optimizer=optimizer, num_ce=num_ce
                )
                n = len(members)
                trained = jax.device_get(jax.tree.map(lambda x, n=n: x[:n], trained))
                for leaf in jax.tree.leaves(trained):
                    if not np.isfinite(leaf).all():
                        raise DitError(
                            "a finetune diverged (NaN): lower diffs.learning_rate"
                        )
                group = [organisms[i] for i in members]
                gating = measure_gating(model, trained, group, behaviour, config, seed)
                ce, kl = (np.asarray(losses[name])[:n] for name in ("ce", "kl"))
                done = [
                    {
                        "n_params": num_parameters(trained) // n,
                        "topic": organism.label,
                        "trigger": organism.trigger,
                        "split": organism.split,
                        "category": organism.category,
                        "evidence": json.dumps(list(organism.evidence)),
                        "keywords": json.dumps(list(organism.keywords)),
                        **gating[row],
                        "final_ce": round(float(ce[row, -5:].mean()), 4),
                        "final_kl": round(float(kl[row, -5:].mean()), 5),
                        "ce_curve": " ".join(f"{x:.3f}" for x in ce[row]),
                    }
                    for row, organism in enumerate(group)
                ]
                diff_store.write_shard(folder, shard, trained, done)
            curves += [[float(x) for x in row["ce_curve"].split()] for row in done]
            progress.advance(len(members))
    diff_store.publish(
        folder,
        shards,
        base=model.digest(),
        base_config=model.config.to_hf(),
        behaviour=behaviour.name,
        seed=seed,
    )
    mean = np.mean(curves, axis=0)
    return {
        "diffs": len(organisms),
        "loss_curve": [[i, round(float(x), 4)] for i, x in enumerate(mean)],
    }
