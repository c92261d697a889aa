"""Ask and audit in a browser: python -m dit_jax.app --base B --adapter A --diff D

    python -m dit_jax.app
    python -m dit_jax.app --base tiny_qwen3 --adapter runs/quickstart/adapter --diff 'runs/quickstart/diffs[256:286]'

Without --base it shows the embedded model with the diffs and the adapter that the package ships. The flags may stand
several times: the page offers all. Whoever opens the page may also name other paths and hub ids, if the server can be
reached from this machine alone (the default), and may upload a PEFT folder as a zip file.
"""

import argparse
import ipaddress
import os
from pathlib import Path

from dit_jax.cli import flags as given
from dit_jax.models.decoder_config import DTYPES
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show

PORT = 7860
DEMO = Path(__file__).parent.parent / "assets" / "demo"  # made by tools/demo_files.py


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: run(parse_flags(argv)))


# fmt: off
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax.app", __doc__)
    add = parser.add_argument
    add("--base", action="append", type=given.TEXT, help="model folder, hub id, or tiny_qwen3 (default: see above)")
    add("--adapter", default=[], action="append", type=given.TEXT, help="DIT adapter: a path or a hub id")
    add("--diff", default=[], action="append", type=given.TEXT, help="weight diff, or several, in any format")
    add("--dtype", default="float32", choices=DTYPES, help="of all bases (default %(default)s)")
    add("--host", default="127.0.0.1", type=given.TEXT, help="address to serve on (default %(default)s: this machine)")
    add("--port", type=given.COUNT, default=PORT, help="default %(default)s")
    add("--offered-only", action="store_true",
        help="take no other paths and hub ids than those of --diff (always so with another --host)")
    add("--max-new-tokens", type=given.COUNT, default=256, help="most tokens of an answer (default %(default)s)")
    add("--seconds", type=given.NUMBER, default=120.0, help="most seconds of a batch of answers (default %(default)g)")
    add("--audit-seconds", type=given.NUMBER, default=1800.0, help="most seconds of an audit (default %(default)g)")
    add("--audit-diffs", type=given.COUNT, default=64, help="most diffs of an audit (default %(default)s)")
    add("--upload-mb", type=given.COUNT, default=512, help="largest upload (default %(default)s)")
    add("--rows", type=given.COUNT, default=24, help="answers that are decoded together (default %(default)s)")
    flags = parser.parse_args(argv)
    if not flags.base:
        if flags.adapter or flags.diff:
            parser.error("--adapter and --diff belong to a base: add --base")
        flags.base, flags.adapter, flags.diff = ["tiny_qwen3"], [str(DEMO / "adapter")], [str(DEMO / "diffs")]
    return flags
# fmt: on


def run(flags: argparse.Namespace) -> None:
    """Serves until Ctrl-C. Raises DitError: Gradio is missing, a base cannot be loaded, or the port is taken."""
    from dit_jax.runtime import startup
    from dit_jax.runtime.artifacts import TemporaryFolder
    from dit_jax.serving.desk import Choice, Desk, Offer
    from dit_jax.serving.page import build, check_address, in_address, serve
    from dit_jax.serving.uploads import Limits

    check_address(flags.host, flags.port)
    startup.prepare()
    packed = flags.upload_mb * 2**20
    offer = Offer(
        bases=tuple(flags.base),
        adapters=tuple(flags.adapter),
        diffs=tuple(flags.diff),
        others=is_this_machine(flags.host) and not flags.offered_only,
        dtype=flags.dtype,
        max_new_tokens=flags.max_new_tokens,
        seconds=flags.seconds,
        audit_seconds=flags.audit_seconds,
        audit_diffs=flags.audit_diffs,
        rows=flags.rows,
        upload=Limits(packed=packed, unpacked=4 * packed),
    )
    desk = Desk(offer)
    with TemporaryFolder("dit_jax-app-") as uploads:
        os.environ.setdefault("GRADIO_TEMP_DIR", uploads)
        page = build(desk)
        desk.model(Choice(flags.base[0], "", ""))  # so that a wrong path shows now
        address = f"http://{in_address(flags.host)}:{flags.port}"
        show(f"serving on {address} (Ctrl-C ends it)", error=True)
        serve(page, desk, flags.host, flags.port)


def is_this_machine(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
