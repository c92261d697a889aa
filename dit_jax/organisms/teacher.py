"""The base's side of the KL losses, computed once for all diffs of a batch that share samples."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.data.batch import TokenBatch
from dit_jax.errors import DitError
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.optimize.batch_loss import scored_hidden
from dit_jax.runtime.parallel import batch_sharding, put, replicate, use_mesh
from dit_jax.runtime.sizes import next_multiple, next_power

CHUNK = 256  # the most samples in a forward pass of the base
MAX_BYTES = 2**31  # the largest table, which every device holds whole


class Teacher(NamedTuple):
    """What the base makes of the KL samples.

    Attributes:
        hidden: [U, M, D] in the compute dtype, hidden states at the scored positions of U distinct samples.
        rows: [steps, S] int32, which of the U each KL sample is; for many diffs with one more leading axis.
    """

    hidden: Any
    rows: Any


def make_teacher(
    params: Params,
    config: DecoderConfig,
    batches: TokenBatch,
    num_ce: int,
    mesh: Mesh | None = None,
    always: bool = False,
) -> Teacher | None:
    """Runs the base once on every distinct KL sample of `batches`, whose leaves are [N, steps, S, …].

    Args:
        num_ce: how many of the S samples, the leading ones, have no KL.
        batches: whole, on the host.
        always: the finetune has other prompts than these, and cannot do without the table.

    Returns:
        None if there are no KL samples; unless `always`, if the table would have more than half as many rows as there
        are samples (it pays when samples repeat), or if it would exceed `MAX_BYTES`.

    Raises:
        DitError: the table would exceed `MAX_BYTES`, and is needed.
    """
    samples = TokenBatch(*(np.asarray(x)[:, :, num_ce:] for x in batches))
    lead = samples.lengths.shape
    total = int(np.prod(lead))
    if not total:
        return None
    flat = TokenBatch(*(x.reshape(total, *x.shape[3:]) for x in samples))
    # A row of the table depends on these alone; targets and weights belong to the loss.
    key = np.concatenate([flat.tokens, flat.lengths[:, None], flat.position], axis=1)
    _, first, rows = np.unique(key, axis=0, return_index=True, return_inverse=True)
    chunks, chunk = _chunks(len(first), mesh)
    row_bytes = flat.position.shape[1] * config.hidden_size * jnp.dtype(config.dtype).itemsize
    too_large = chunks * chunk * row_bytes > MAX_BYTES
    if too_large and always:
        raise DitError(
            f"what the base answers to the prompts of {batches.lengths.shape[0]} finetunes does not fit into "
            f"{MAX_BYTES >> 30} GiB: lower diffs.diffs_per_batch"
        )
    if not always and (too_large or 2 * chunks * chunk >= total):
        return None
    filled = np.resize(first, chunks * chunk)
    distinct = TokenBatch(*(x[filled].reshape(chunks, chunk, *x.shape[1:]) for x in flat))
    placed: Any = rows.reshape(lead).astype(np.int32)
    if mesh is not None:
        distinct = jax.tree.map(lambda x: put(x, batch_sharding(mesh, 1)), distinct)
        placed = put(placed, batch_sharding(mesh))
    with use_mesh(mesh):
        return Teacher(_hidden_chunks(params, config, distinct), jnp.asarray(placed))


def _chunks(count: int, mesh: Mesh | None) -> tuple[int, int]:
    """(number of forward passes, samples of each) for `count` samples.

    It depends on the count alone, so that a shard that is made again is the same. There are few sizes (powers of two,
    then whole chunks), so that shards with similar numbers of distinct samples run one program.
    """
    step = 16 if mesh is None else next_multiple(16, mesh.size)
    power = step * next_power(-(-count // step))
    chunk = min(power, next_multiple(CHUNK, step))
    return -(-count // chunk), chunk


@functools.partial(jax.jit, static_argnames="config")
def _hidden_chunks(params: Params, config: DecoderConfig, batches: TokenBatch) -> jax.Array:
    hidden = jax.lax.map(lambda batch: scored_hidden(params, config, batch), batches)
    return replicate(hidden.reshape(-1, *hidden.shape[2:]))
