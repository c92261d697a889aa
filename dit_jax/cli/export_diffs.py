"""Write diffs and adapters for other programs: python -m dit_jax export --base B --diff D --to peft --out DIR

    python -m dit_jax export --base tiny_qwen3 --diff runs/quickstart/diffs --index 301 --to peft --out my_diff
    python -m dit_jax export --base tiny_qwen3 --adapter runs/quickstart/adapter --to pt --out adapter.pt

With --diff and --adapter, `peft`, `mlx` and `model` hold the sum of both, for servers that load one adapter
(docs/formats.md). LoRAs keep the type that they are stored in, or are rounded by --dtype bfloat16.
"""

import argparse
import dataclasses
import os
import shlex

from dit_jax.cli import flags as given
from dit_jax.errors import DitError
from dit_jax.runtime.artifacts import check_place
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show

KINDS = {
    "peft": "a PEFT folder (LoRAs)",
    "mlx": "an adapter folder of mlx-lm (LoRAs)",
    "model": "the base with everything merged into it, in Hugging Face format",
    "pt": "a .pt file of the reference program: a diff, or an adapter",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: run(parse_flags(argv)))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax export", __doc__)
    add = parser.add_argument
    given.add_model_flags(parser)
    add("--diff", type=given.TEXT, help="a diff in any format")
    add("--index", type=int, help="which diff of --diff (default 0; -1: the last)")
    add(
        "--svd-rank",
        type=given.COUNT,
        help="reduce the diff to a LoRA of this rank",
    )
    kinds = "; ".join(f"{name}: {about}" for name, about in KINDS.items())
    add("--to", required=True, choices=KINDS, help=kinds)
    add(
        "--out",
        required=True,
        type=given.FILE,
        help="the folder or file to write, which must not exist",
    )
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> None:
    """Writes what --to says. Raises DitError: it cannot hold these deltas, or --out exists."""
    out = flags.out
    if os.path.lexists(out):
        raise DitError(f"'{out}' exists already: delete it or choose another --out")
    if not (flags.diff or flags.adapter):
        raise DitError("there is nothing to export: add --diff or --adapter")
    if not flags.diff and (flags.index, flags.svd_rank) != (None, None):
        raise DitError("--index and --svd-rank say something about a diff: add --diff")
    if flags.to == "pt" and flags.diff and flags.adapter:
        raise DitError("a .pt file holds a diff or an adapter: export them one by one")

    import jax.numpy as jnp

    from dit_jax.api import load_adapter, load_diff
    from dit_jax.auditing.targets import path_and_range
    from dit_jax.deltas import export
    from dit_jax.deltas.detect import look_for_adapter, look_for_diffs
    from dit_jax.deltas.factors import rounded
    from dit_jax.models.hf_checkpoint import find_folder
    from dit_jax.runtime.parallel import to_host

    path, picked = path_and_range(flags.diff or "")
    if picked is not None:
        raise DitError(
            f"'{flags.diff}': an export is of one diff: give --diff {shlex.quote(path)} --index N"
        )
    diffs = look_for_diffs(flags.diff) if flags.diff else None
    found = look_for_adapter(flags.adapter) if flags.adapter else None
    check_place(out)
    model = given.load_base(flags)
    diff = load_diff(diffs, model, flags.index or 0, flags.svd_rank) if diffs else None
    adapter = to_host(load_adapter(found, model)) if found else None
    deltas = [delta for delta in (diff.delta if diff else None, adapter) if delta is not None]
    params, config = model.params, model.config
    if flags.to == "model":
        folder = find_folder(flags.base)
        export.export_model(
            out, params, config, *deltas, base_folder=folder if folder.is_dir() else None
        )
        show(f"wrote {out}")
        return
    # Of one delta the writers keep the bits and the scale.
    delta = deltas[0] if len(deltas) == 1 else export.fuse(*deltas)
    if flags.dtype == "bfloat16":
        delta = rounded(delta, jnp.bfloat16)
    if flags.to == "peft":
        export.write_peft(out, delta, config, flags.base, one_rank=len(deltas) > 1)
    elif flags.to == "mlx":
        export.write_mlx(out, delta, config, flags.base)
    elif diff is not None:
        export.write_pt_diffs(out, [dataclasses.replace(diff, delta=delta)], config, params)
    else:
        export.write_pt_adapter(out, delta, config)
    show(f"wrote {out}")
