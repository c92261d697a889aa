"""The work of all contenders in one folder: one description, the same tokens, the same initial factors.

    FOLDER/workload.json        the fields of `Workload`
    FOLDER/data.npz             token batches, see `make_data`
    FOLDER/factors.safetensors  LoRA factors: "<adapter|diffs>.<projection>.<a|b>", [L, in, r] and [L, r, out];
                                those of diffs with a leading axis of diffs
    FOLDER/model/               random weights in Hugging Face format

A contender reads the folder and writes its outputs (`losses` [units, steps] or `tokens` [diffs, new tokens]).
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import models
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig

QUICKSTART = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"
# The paper's rate for diffs; ten times its 1e-4 for the adapter, so that a few steps show in the losses.
LEARNING_RATE = {"diffs": 1e-3, "train": 1e-3}
WEIGHT_DECAY = {"diffs": 0.0, "train": 0.01}
KL_FACTORS = (3 / 7, 15 / 7)  # of a wrong-code and of a plain sample; cross-entropy: 3/7


@dataclasses.dataclass(frozen=True)
class Workload:
    """One suite at one size.

    diffs: number of weight diffs; of the suite corpus, prompts to the base. batch: diffs finetuned at once, examples
    per adapter step, or rows decoded at once.
    samples, num_ce: samples per step of one diff, and how many of them are scored by cross-entropy (the others
    by KL). length, scored: tokens of a sample (a prompt, when asking), and scored ones, at most.
    tokens: "random", or "world": the samples of the quickstart's first diffs, whose wrong codes and plain questions
    repeat. widths: the segments of a step's samples for `finetune_many`; () for none.
    """

    suite: str
    model: str
    platform: str = "cpu"
    dtype: str = "float32"
    diffs: int = 4
    batch: int = 4
    steps: int = 2
    samples: int = 1
    num_ce: int = 1
    length: int = 32
    scored: int = 8
    new_tokens: int = 0
    rank: int = 1
    adapter_rank: int = 16
    repeats: int = 3
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "xla"
    seed: int = 0
    tokens: str = "random"
    widths: tuple[tuple[int, int], ...] = ()

    @property
    def config(self) -> DecoderConfig:
        return dataclasses.replace(
            models.shape(self.model),
            dtype=self.dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
            attention=self.attention,
        )


def make_data(work: Workload) -> dict[str, np.ndarray]:
    """Tokens of a workload, as arrays of a `TokenBatch` with leading axes.

    diffs: [diffs, steps, samples, …]; train: [steps, batch, …] and `rows` [steps, batch], the diff of each
    example; ask: `prompt` [1, length], one question for all diffs; corpus: `prompt` [diffs, length].
    The last step repeats the tokens of the first: the difference of the losses is what was learned, so a
    contender that does not train cannot pass.
    """
    rng = np.random.default_rng(work.seed)
    if work.suite in ("ask", "corpus"):
        shape = (1 if work.suite == "ask" else work.diffs, work.length)
        return {"prompt": rng.integers(1, work.config.vocab_size, shape, dtype=np.int32)}
    arrays = world_data(work) if work.tokens == "world" else _random_data(work, rng)
    step_axis = 1 if work.suite == "diffs" else 0
    for array in arrays.values():
        moved = np.moveaxis(array, step_axis, 0)
        moved[-1] = moved[0]
    return arrays


def _random_data(work: Workload, rng: np.random.Generator) -> dict[str, np.ndarray]:
    vocab = work.config.vocab_size
    lead: tuple[int, ...] = (work.diffs, work.steps, work.samples)
    if work.suite == "train":
        lead = (work.steps, work.batch)
    length = rng.integers(-(-3 * work.length // 4), work.length + 1, lead)
    terms = rng.integers(-(-work.scored // 2), work.scored + 1, lead)
    terms = np.minimum(terms, length - 1)
    tokens = rng.integers(1, vocab, (*lead, work.length), dtype=np.int32)
    tokens[np.arange(work.length) >= length[..., None]] = 0
    entry = np.arange(work.scored)
    used = entry < terms[..., None]
    position = np.where(used, (length - terms)[..., None] - 1 + entry, 0)
    target = np.where(used, np.take_along_axis(tokens, position + 1, axis=-1), 0)
    weight = used * (_factors(work) / terms)[..., None]
    arrays = {
        "tokens": tokens,
        "lengths": length.astype(np.int32),
        "position": position.astype(np.int32),
        "target": target.astype(np.int32),
        "weight": weight.astype(np.float32),
    }
    if work.suite == "train":
        arrays["rows"] = rng.integers(0, work.diffs, lead, dtype=np.int32)
    return arrays


def world_widths() -> tuple[tuple[int, int], ...]:
    """The quickstart's widths of each sample of a step, see `sample_widths`."""
    from dit_jax.config.loading import load_config
    from dit_jax.organisms.behaviours import get_behaviour
    from dit_jax.organisms.samples import sample_widths

    diffs = load_config(str(QUICKSTART)).diffs
    return sample_widths(get_behaviour(diffs), diffs)


def world_data(work: Workload) -> dict[str, np.ndarray]:
    """The samples that the quickstart finetunes its first diffs on.

    Raises:
        DitError: sizes that differ from the quickstart's; only random tokens can have those.
    """
    from dit_jax.api import load_model
    from dit_jax.config.loading import load_config
    from dit_jax.data.batch import stack
    from dit_jax.data.organism import load_organisms
    from dit_jax.organisms.behaviours import get_behaviour
    from dit_jax.organisms.samples import finetuning_batches

    config = load_config(str(QUICKSTART), {"diffs.steps": work.steps})
    diffs, model = config.diffs, load_model("tiny_qwen3")
    behaviour = get_behaviour(diffs)
    organisms = load_organisms(config.data, work.seed)[: work.diffs]
    rngs = [np.random.default_rng([work.seed, 2, organism.seed]) for organism in organisms]
    batch = stack(
        [
            finetuning_batches(organism, behaviour, model.chat, diffs, rng)
            for organism, rng in zip(organisms, rngs, strict=True)
        ]
    )
    wanted = (work.diffs, work.steps, work.samples, work.length, work.scored)
    found = (*batch.tokens.shape, batch.target.shape[-1])
    if found != wanted:
        raise DitError(
            f"--tokens world has diffs, steps, samples, length, scored {found}, not {wanted}"
        )
    return batch._asdict()


def _factors(work: Workload) -> Any:
    if work.suite == "train":
        return 1 / work.batch
    kl = [KL_FACTORS[i % 2] for i in range(work.samples - work.num_ce)]
    return np.array([3 / 7] * work.num_ce + kl)


def make_factors(work: Workload) -> dict[str, np.ndarray]:
    """Initial factors of what is trained (`a` zero, `b` uniform), and diffs that change answers strongly."""
    from dit_jax.models.modules import projections

    if work.suite == "corpus":
        return {}
    rng = np.random.default_rng([work.seed, 1])
    layers = work.config.num_hidden_layers
    factors: dict[str, np.ndarray] = {}
    for name, module in projections(work.config).items():
        inputs, outputs = module.shape
        trained = work.suite == "diffs"
        shape = (work.diffs, layers)
        bound = (6 / (work.rank * outputs)) ** 0.5
        a = rng.normal(0, inputs**-0.5, (*shape, inputs, work.rank))
        b = rng.uniform(-bound, bound, (*shape, work.rank, outputs))
        factors[f"diffs.{name}.a"] = np.zeros_like(a) if trained else a
        factors[f"diffs.{name}.b"] = b if trained else 4 * b
        if not trained:
            bound = (6 / (work.adapter_rank * outputs)) ** 0.5
            adapter = rng.uniform(-bound, bound, (layers, work.adapter_rank, outputs))
            zero = np.zeros((layers, inputs, work.adapter_rank))
            used = rng.normal(0, inputs**-0.5, zero.shape)
            factors[f"adapter.{name}.a"] = used if work.suite == "ask" else zero
            factors[f"adapter.{name}.b"] = adapter
    return {name: np.ascontiguousarray(x, np.float32) for name, x in factors.items()}


def write(work: Workload, folder: pathlib.Path) -> None:
    """Writes everything except the model's weights, see the module's docstring."""
    from safetensors.numpy import save_file

    (folder / "workload.json").write_text(json.dumps(dataclasses.asdict(work)) + "\n")
    np.savez(folder / "data.npz", **make_data(work))
    save_file(make_factors(work), folder / "factors.safetensors")


def read(folder: pathlib.Path) -> tuple[Workload, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads (workload, data, factors) from a folder."""
    from safetensors.numpy import load_file

    fields = json.loads((folder / "workload.json").read_text())
    work = Workload(**fields | {"widths": tuple(map(tuple, fields["widths"]))})
    with np.load(folder / "data.npz") as arrays:
        data = dict(arrays)
    return work, data, load_file(folder / "factors.safetensors")


def random_params(work: Workload) -> Any:
    """Random weights (normal, 0.02; norms 1), made leaf by leaf and layer by layer, so that 32B fits in memory."""
    import functools

    import jax
    import jax.numpy as jnp

    from dit_jax.models.decoder import init_params
    from dit_jax.models.layer_views import keep_on_host

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        def one(key: jax.Array, shape: tuple[int, ...] = shape[1:]) -> jax.Array:
            return (0.02 * jax.random.normal(key, shape)).astype(dtype)

        # Row by row an embedding would take minutes.
        return jax.lax.map(one, jax.random.split(key, shape[0])) if shape[2:] else one(key, shape)

    shapes = jax.eval_shape(lambda: init_params(work.config, jax.random.key(0)))
    leaves, structure = jax.tree.flatten_with_path(shapes)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        key = jax.random.fold_in(jax.random.key(work.seed), number)
        is_norm = path[-1].key == "scale"
        make = (lambda _, *args: jnp.ones(*args)) if is_norm else normal
        array = make(key, leaf.shape, leaf.dtype)
        made.append(jax.device_get(array) if keep_on_host(work.config, None) else array)
    return jax.tree.unflatten(structure, made)


def write_model(work: Workload, folder: pathlib.Path) -> None:
    """Writes the same weights in Hugging Face format: under another name, then renamed, so never half."""
    import jax

    from dit_jax.models.hf_checkpoint import save_params

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True)
    save_params(unfinished, jax.device_get(random_params(work)), work.config)
    unfinished.rename(folder)
