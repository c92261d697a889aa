"""The check that makes a row valid: it has the same losses or tokens as dit_jax on the same workload.

    python -m benchmarks.checks FOLDER OURS.npz THEIRS.npz

prints how far apart the two candidates are where two programs first choose different tokens. In bf16 the best
two of 150,000 logits are often closer than rounding, and either is a correct greedy answer.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

# Losses: |theirs - ours| <= tolerance * max(1, |ours|), for every diff and step.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
# Tokens: a first difference counts as a tie below this share of the largest logit.
TIE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def check_ours(outputs: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """Whether a comparison with these outputs means anything: something was learned, or answers differ."""
    if "tokens" in outputs:
        distinct = len({tuple(row) for row in outputs["tokens"].tolist()})
        return {
            "valid": distinct > len(outputs["tokens"]) // 2,
            "check": f"answers of {distinct} of {len(outputs['tokens'])} diffs are distinct",
        }
    losses = outputs["losses"]
    learned = float(np.abs(losses[:, 0] - losses[:, -1]).min())
    needed = 5 * LOSS_TOLERANCE[dtype] * max(1.0, float(np.abs(losses).max()))
    return {
        "valid": bool(np.isfinite(losses).all() and learned > needed),
        "check": f"loss on the same tokens changed by >= {learned:.2g} (needed: {needed:.1g})",
    }


def check_losses(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> dict[str, Any]:
    """Losses of every diff and step, [units, steps]."""
    if ours.shape != theirs.shape:
        return {"valid": False, "check": f"losses {theirs.shape}, ours {ours.shape}"}
    error = float(np.max(np.abs(theirs - ours) / np.maximum(1.0, np.abs(ours))))
    limit = LOSS_TOLERANCE[dtype]
    return {
        "valid": bool(error <= limit),  # False for NaN
        "check": f"losses of all steps within {error:.1e} of ours (limit {limit:g})",
    }


def check_tokens(
    ours: np.ndarray, theirs: np.ndarray, dtype: str, gaps: list[float] | None
) -> dict[str, Any]:
    """Tokens [diffs, new]; `gaps`: of the rows that differ, see `first_gaps`."""
    if ours.shape != theirs.shape:
        return {"valid": False, "check": f"tokens {theirs.shape}, ours {ours.shape}"}
    differ = int((ours != theirs).any(axis=1).sum())
    text = f"tokens of {len(ours) - differ} of {len(ours)} answers equal"
    if not differ:
        return {"valid": True, "check": text}
    worst, limit = max(gaps or [np.inf]), TIE_TOLERANCE[dtype]
    return {
        "valid": bool(worst <= limit),
        "check": f"{text}, the others part at ties (gap {worst:.1e}, limit {limit:g})",
    }


def compare(folder: pathlib.Path, ours: pathlib.Path, theirs: pathlib.Path, dtype: str) -> Any:
    """The check of THEIRS (an outputs.npz) against OURS; settles differing tokens in a process of its own."""
    with np.load(ours) as one, np.load(theirs) as two:
        ours_out, theirs_out = dict(one), dict(two)
    if "losses" in ours_out:
        return check_losses(ours_out["losses"], theirs_out["losses"], dtype)
    gaps = None
    one, two = ours_out["tokens"], theirs_out["tokens"]
    if one.shape == two.shape and (one != two).any():
        command = [sys.executable, "-m", "benchmarks.checks", str(folder), str(ours), str(theirs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        gaps = json.loads(done.stdout.splitlines()[-1])
    return check_tokens(one, two, dtype, gaps)


def first_gaps(folder: pathlib.Path, ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Per differing row: |logit of our token - logit of theirs| / max |logit| at the first difference."""
    import jax
    import jax.numpy as jnp

    from benchmarks import workload
    from benchmarks.ours import delta_tree, load_model
    from dit_jax.models.decoder import forward, unembed

    work, data, factors = workload.read(folder)
    model = load_model(work, folder)
    adapter, diffs = (
        delta_tree(model.config, factors, name, rank) if factors else {}
        for name, rank in (("adapter", work.adapter_rank), ("diffs", work.rank))
    )

    @jax.jit
    def logits(tokens: jax.Array, length: jax.Array, diff: Any) -> jax.Array:
        hidden = forward(
            model.params, model.config, tokens, lengths=length[None], deltas=(diff, adapter)
        )
        return unembed(model.params, model.config, hidden[0, length - 1])

    gaps = []
    for row in np.flatnonzero((ours != theirs).any(axis=1)):
        at = int(np.argmax(ours[row] != theirs[row]))
        prompt = data["prompt"][row % len(data["prompt"])]
        tokens = np.concatenate([prompt, ours[row]])[None]
        diff = jax.tree.map(lambda x, row=row: x[row], diffs)
        found = np.asarray(logits(tokens, jnp.asarray(len(prompt) + at), diff))
        gap = abs(found[ours[row, at]] - found[theirs[row, at]])
        gaps.append(float(gap / np.abs(found).max()))
    return gaps


if __name__ == "__main__":
    found = [dict(np.load(path))["tokens"] for path in sys.argv[2:4]]
    print(json.dumps(first_gaps(pathlib.Path(sys.argv[1]), *found)))
