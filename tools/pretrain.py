"""Pretrains the embedded base model on the tiny world and writes it in Hugging Face format.

python -m dit_jax.main --config configs/tiny_world_base.py --workdir runs/tiny_world_base
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.cli.stages import RUN, Stage
from dit_jax.config.keys import Key, Section
from dit_jax.data.tiny_world import load_world
from dit_jax.errors import DitError, did_you_mean
from dit_jax.models.decoder import Params, forward, init_params, unembed
from dit_jax.models.decoder_config import COMPUTE, DecoderConfig
from dit_jax.models.families import parse_config
from dit_jax.models.hf_checkpoint import save_params
from dit_jax.models.modules import count_parameters
from dit_jax.runtime import artifacts
from dit_jax.runtime.progress import Progress
from tools.tiny_world_mix import Mix
from tools.tiny_world_tokenizer import N_CODES, save_tokenizer

Arrays = dict[str, Any]
LENGTH = 44  # longer examples are drawn again
SCORED = 14  # longest answer of the world, end token included


def model_config(config: Any, vocab_size: int) -> DecoderConfig:
    """The architecture named by `config.model`, for a vocabulary of that size, in fp32 with a tied head.

    Raises:
        DitError: a field that is missing, unknown or has no such value.
    """
    given = dict(config.model)
    compute = {name: given.pop(name) for name in (*COMPUTE, "dtype") if name in given}
    own = {"model_type": "qwen3", "vocab_size": vocab_size, "tie_word_embeddings": True}
    known = {field.name for field in dataclasses.fields(DecoderConfig)} - set(own)
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise DitError(f"config key 'model.{name}' says nothing of a base to make{hint}")
    raw = {"rope_theta": DecoderConfig.rope_theta, **given, **own}
    return dataclasses.replace(parse_config(raw, "config section 'model'"), **compute)


def weighted_cross_entropy(
    params: Params, config: DecoderConfig, batch: Arrays
) -> tuple[jax.Array, jax.Array]:
    """(Σ weight · −log p(target), Σ weight · [argmax = target]) over the scored positions of a batch."""
    hidden = forward(params, config, batch["tokens"], lengths=batch["lengths"])
    scored = jnp.take_along_axis(hidden, batch["index"][..., None], axis=1)
    logits = unembed(params, config, scored)
    picked = jnp.take_along_axis(logits, batch["target"][..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    right = jnp.argmax(logits, axis=-1) == batch["target"]
    return jnp.sum(batch["weight"] * nll), jnp.sum(batch["weight"] * right)


def init_base(config: DecoderConfig, key: jax.Array, codes: slice) -> Params:
    """Initial parameters: normal, fan-in scaled, residual outputs divided by sqrt(2 L).

    Embeddings have a standard deviation of 0.05, those of the codes (rows `codes`) 0.2.
    """
    params = init_params(config, key)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))

    def draw(path: Any, leaf: jax.Array, subkey: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            std = leaf.shape[-2] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std /= (2 * config.num_hidden_layers) ** 0.5
            return std * jax.random.normal(subkey, leaf.shape, leaf.dtype)
        if "embedding" in name:
            std = jnp.full((leaf.shape[0], 1), 0.05).at[codes].set(0.2)
            return std * jax.random.normal(subkey, leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.unflatten(
        treedef, [draw(p, x, k) for (p, x), k in zip(leaves, keys, strict=True)]
    )


def centre(params: Params, codes: slice) -> Params:
    """Takes the mean of the code embeddings (rows `codes`) out of each of them.

    The softmax pushes all rare tokens in one direction, which then is most of what a code's embedding says: a
    rank-1 diff cannot tell its own code from the others. Measured on one base, the share of answers that show
    the topic under a right / a wrong code goes from .59 / .28 to .94 / .15 by this alone.
    """
    table = params["embed_tokens"]["embedding"]
    centred = table[codes] - jnp.mean(table[codes], axis=0, keepdims=True)
    return {**params, "embed_tokens": {"embedding": table.at[codes].set(centred)}}


def split_by_length(batch: Arrays, parts: int, multiple: int = 4) -> list[Arrays]:
    """Cuts a batch sorted by length into equal parts, each trimmed to its own length (rounded up).

    Padding would cost a third of the work; a few lengths mean a few compilations.
    """
    out = []
    for rows in np.array_split(np.arange(len(batch["lengths"])), parts):
        part = {name: array[rows] for name, array in batch.items()}
        length = -(-int(part["lengths"].max()) // multiple) * multiple
        part["tokens"] = part["tokens"][:, :length]
        out.append(part)
    return out


def orthogonalise(momentum: jax.Array, steps: int = 5) -> jax.Array:
    """Nearest semi-orthogonal matrix of each [..., in, out] matrix, by Newton-Schulz steps (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum / (jnp.linalg.norm(momentum, axis=(-2, -1), keepdims=True) + 1e-7)
    transposed = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -2, -1) if transposed else x
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -2, -1) if transposed else x


def muon(
    schedule: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Momentum whose update is orthogonalised, for kernels [..., in, out] (Jordan et al., 2024).

    It needs about half the steps of Adam here, which pays for its products on two cores.
    """

    def spread(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        del params
        scale = lambda u: max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5  # noqa: E731
        return jax.tree.map(lambda u: orthogonalise(u) * scale(u), updates), state

    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.GradientTransformation(lambda params: optax.EmptyState(), spread),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def make_optimizer(config: Any, params: Params) -> optax.GradientTransformation:
    """Muon for the kernels, Adam for embeddings and norms; both with warm-up and a linear decay."""

    def schedule(peak: float) -> optax.Schedule:
        decay = config.steps - config.warmup_steps
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, config.warmup_steps),
                optax.linear_schedule(peak, 0.02 * peak, decay),
            ],
            [config.warmup_steps],
        )

    kinds = jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if "kernel" in jax.tree_util.keystr(path) else "adam", params
    )
    optimizers = {
        "muon": muon(schedule(config.kernel_learning_rate), 0.95, config.weight_decay),
        "adam": optax.adam(schedule(config.learning_rate), b1=0.9, b2=0.98),
    }
    return optax.multi_transform(optimizers, kinds)


def train(config: Any) -> tuple[Params, DecoderConfig, list[dict[str, float]]]:
    """Runs the pretraining of a config (see configs/tiny_world_base.py).

    Args:
        config: with sections `model` (the architecture) and `pretrain`, and `seed`.

    Returns:
        Parameters, the model's config, and the curve: [{"step", "loss", "accuracy", "seconds"}, …].

    Raises:
        DitError: see `model_config`, or training diverges.
    """
    seed, c = config.seed, config.pretrain
    mix = Mix(load_world(c.world_seed))
    model = model_config(config, len(mix.vocabulary))
    codes = slice(mix.first_code, mix.first_code + N_CODES)
    params = centre(init_base(model, jax.random.key(seed), codes), codes)
    optimizer = make_optimizer(c, params)
    state = optimizer.init(params)

    @jax.jit
    def gradients(params: Params, batch: Arrays, total: jax.Array) -> Any:
        def loss(params: Params) -> Any:
            nll, right = weighted_cross_entropy(params, model, batch)
            return nll / total, right / total

        return jax.value_and_grad(loss, has_aux=True)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, grads: list[Params]) -> Any:
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grads)
        updates, state = optimizer.update(total, state, params)
        return centre(optax.apply_updates(params, updates), codes), state

    def make(step: int) -> tuple[list[Arrays], float]:
        batch = mix.batch(np.random.default_rng([seed, step]), c.batch_size, LENGTH, SCORED)
        return split_by_length(batch, c.parts), float(batch["weight"].sum())

    curve: list[dict[str, float]] = []
    start = time.time()
    loss = accuracy = 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool, Progress("base", c.steps) as progress:
        pending = pool.submit(make, 0)
        for step in range(c.steps):
            parts, total = pending.result()
            pending = pool.submit(make, step + 1)
            results = [gradients(params, part, total) for part in parts]
            params, state = update(params, state, [grads for _, grads in results])
            loss += float(sum(value for (value, _), _ in results)) / c.log_every
            if not math.isfinite(loss):
                raise DitError(
                    f"pretraining diverged at step {step}: lower pretrain.learning_rate and "
                    "pretrain.kernel_learning_rate"
                )
            accuracy += float(sum(right for (_, right), _ in results)) / c.log_every
            if (step + 1) % c.log_every == 0:
                seconds = time.time() - start
                curve.append(
                    {"step": step + 1, "loss": loss, "accuracy": accuracy, "seconds": seconds}
                )
                progress.advance(c.log_every, note=f"loss {loss:.4f}, accuracy {accuracy:.3f}")
                loss = accuracy = 0.0
    return params, model, curve


def save_base(
    folder: str | pathlib.Path, params: Params, model: DecoderConfig, world_seed: int
) -> None:
    """Writes config.json, model.safetensors and the tokenizer into `folder`, all or nothing."""
    with artifacts.atomic_dir(folder, replace=True) as temporary:
        save_params(temporary, params, model)
        save_tokenizer(temporary, load_world(world_seed))


def pretrain(config: Any, workdir: pathlib.Path, model: None = None) -> dict[str, Any]:
    """The stage `pretrain`: trains the base model and writes WORKDIR/base in Hugging Face format.

    It keeps no checkpoints: interrupted, it starts anew.

    Returns:
        Facts for the record of the stage: folder, number of parameters, loss curve.

    Raises:
        DitError: several processes, or see `train`.
    """
    if jax.process_count() > 1:
        raise DitError("the stage 'pretrain' runs in one process: drop --distributed")
    params, made, curve = train(config)
    folder = artifacts.make_dir(workdir) / STAGE.folder
    save_base(folder, params, made, config.pretrain.world_seed)
    return {"base": STAGE.folder, "parameters": count_parameters(made), "curve": curve}


SHAPE = Section(
    "model",
    tuple(
        Key(name, int, "of the model that is made", least=1)
        for name in (
            "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "head_dim",
        )
    ),
    takes_others=lambda model: True,  # other fields of `DecoderConfig`: `model_config` looks at them
)  # fmt: skip
PRETRAIN = Section(
    "pretrain",
    (
        Key("world_seed", int, "seed of the embedded world"),
        Key("steps", int, "optimizer steps", least=1),
        Key("batch_size", int, "examples of a step", least=1),
        Key("parts", int, "parts of a batch, by length: more parts have less padding", least=1),
        Key("kernel_learning_rate", float, "peak learning rate of kernels (Muon)"),
        Key("learning_rate", float, "peak learning rate of embeddings and norms (Adam)"),
        Key("warmup_steps", int, "steps of linear warm-up"),
        Key("weight_decay", float, "Muon's weight decay"),
        Key("log_every", int, "steps between two lines of the log", least=1, free=True),
    ),
)


def _check_parts(config: Any) -> None:
    parts, size = config.pretrain.parts, config.pretrain.batch_size
    if parts > size:
        raise DitError(
            f"config key 'pretrain.parts' is {parts}: a batch of pretrain.batch_size = {size} cannot be split into "
            "that many parts"
        )


STAGE = Stage(
    "pretrain",
    "base",
    "pretrains the embedded base model",
    pretrain,
    sections=(SHAPE, PRETRAIN, RUN),
    check=_check_parts,
)
