"""Several processes as one run: how they join, how they decide together, and what process 0 alone does.

Every process runs the same program on its own devices; process 0 writes the artifacts and shows progress.
"""

import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dit_jax.errors import DitError, first_line
from dit_jax.runtime.outgoing import show


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int | None = None,
) -> None:
    """Joins the other processes of a run. Call it before anything else uses JAX.

    Arguments that are None are read from DIT_JAX_COORDINATOR (host:port of process 0), DIT_JAX_NUM_PROCESSES,
    DIT_JAX_PROCESS_ID and DIT_JAX_TIMEOUT_SECONDS, or else detected (TPU slices, SLURM, Kubernetes, MPI).

    Args:
        timeout_seconds: a process that is silent for this long counts as dead, and the others end. Default 100.

    Raises:
        DitError: a value is not a number, no cluster is detected, or the other processes did not join in time.
    """
    coordinator = coordinator or os.environ.get("DIT_JAX_COORDINATOR")
    num_processes = _number("DIT_JAX_NUM_PROCESSES", num_processes)
    process_id = _number("DIT_JAX_PROCESS_ID", process_id)
    timeout = _number("DIT_JAX_TIMEOUT_SECONDS", timeout_seconds) or 100
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(timeout, 30),
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, TypeError, RuntimeError) as e:
        raise DitError(
            f"cannot join the other processes ({first_line(e)}): give --coordinator HOST:PORT, "
            "--num-processes and --process-id, or start it on a cluster that JAX knows"
        ) from None


def _number(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    if not (text.isdecimal() and len(text) < 10):
        raise DitError(f"the environment variable {name} must be a number, not {text!r}")
    return int(text)


def is_main() -> bool:
    """Whether this process writes artifacts and shows progress."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The value that process 0 passes (a number or a bool), on all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(int(value))))


def highest(value: int) -> int:
    """The highest value that a process passes, on all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(int(value))).max())


def say_the_same(text: str) -> bool:
    """Whether all processes pass the same text."""
    mine = zlib.crc32(text.encode()) >> 1  # `agree` carries 31 bits
    return not highest(mine != agree(mine))


def on_main(action: Callable[[], Any]) -> bool:
    """Runs `action` on process 0 while the others wait. Returns on all processes whether its result is true.

    Use it for what reads or writes the run's folder once, and for decisions that depend on that.

    Raises:
        DitError: the action raised it on process 0; the other processes then stop too.
    """
    if jax.process_count() == 1:
        return bool(action())
    result, error = False, None
    if is_main():
        try:
            result = bool(action())
        except DitError as e:
            error = e
    said = agree(2 if error else result)
    if error is not None:
        raise error
    if said == 2:
        raise DitError("process 0 stopped: read its message")
    return bool(said)


def say(text: str) -> None:
    """Prints a line on process 0."""
    if is_main():
        show(text)
