"""Put an adapter on the hub with a model card: dit-jax push ADAPTER OWNER/NAME --license apache-2.0

    dit-jax push runs/quickstart/adapter owner/name --license apache-2.0 --dry-run card.md

ADAPTER is the folder that the stage `train` leaves. The card says what the run's own files say: base, behaviour, data,
numbers with their intervals, how to load it. Then `dit_jax.load_adapter("owner/name", model)` reads it anywhere.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from dit_jax.cli import flags as given
from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import check_tree
from dit_jax.runtime import artifacts
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.os_errors import explain_os_errors
from dit_jax.runtime.outgoing import show

CARD = "README.md"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: run(parse_flags(argv)))


# fmt: off
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax push", __doc__)
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", type=given.FILE, help="folder of an adapter")
    add("repo", metavar="OWNER/NAME", type=given.TEXT, help="repository of the hub; made when it is not there")
    add("--license", required=True, type=given.TEXT, help="of the adapter, as the hub names it: apache-2.0")
    add("--base", type=given.TEXT, help="hub id of the base (default: what the run's config names)")
    add("--private", action="store_true", help="make the repository private")
    add("--dry-run", metavar="FILE", type=given.FILE, help="write the card to this file, and send nothing")
    return parser.parse_args(argv)
# fmt: on


def run(flags: argparse.Namespace) -> None:
    """Writes or sends the card. Raises DitError: there is no adapter, or the hub refuses."""
    from dit_jax.auditing import calibration_file
    from dit_jax.formats.hub import parse_hub_id

    named = parse_hub_id(flags.repo)
    if named is None or named.repo != flags.repo:
        raise DitError(f"'{flags.repo}' is no repository: give OWNER/NAME")
    folder = flags.adapter
    text, known = card(folder, flags.repo, flags.base, flags.license)
    if flags.dry_run is not None:
        artifacts.write_text(flags.dry_run, text)
        show(f"card: {flags.dry_run}")
        return
    with artifacts.TemporaryFolder("dit_jax-push-") as temporary:
        sent = Path(temporary, "adapter")
        with explain_os_errors("copy", folder):
            shutil.copytree(folder, sent)
        artifacts.write_text(sent / CARD, text)
        if known is not None:
            calibration_file.write(sent / calibration_file.INSIDE, known)
        show(f"pushed: {_send(sent, flags.repo, flags.private)}")


def card(
    folder: Path, repo: str, base_id: str | None, license: str
) -> tuple[str, dict[str, Any] | None]:
    """The model card of an adapter from its files and those of the run that they lie in, and its calibration if any.

    Raises:
        DitError: the folder holds no adapter of this program, or a file is damaged.
    """
    from dit_jax.auditing import calibration_file
    from dit_jax.deltas.adapter_file import ADAPTER_FORMAT
    from dit_jax.formats.hub import parse_hub_id
    from dit_jax.report.adapter_card import adapter_card

    if folder.is_dir():
        check_tree(folder)  # all of it is sent, and what links lead to
    manifest = artifacts.read_manifest(folder, ADAPTER_FORMAT, remedy="give the adapter of a run")
    summary = _beside(folder, "report/summary.json")
    config = (summary or {}).get("config") or _beside(folder, "config.json") or {}
    model = config.get("model") if isinstance(config, dict) else None
    base = base_id or str(model.get("path") or "" if isinstance(model, dict) else "")
    if not base:
        raise DitError(f"nothing beside '{folder}' names the base: give its hub id with --base")
    found = parse_hub_id(base)
    is_id = found is not None and not Path(base).exists()
    known = calibration_file.of_adapter(str(folder), folder, str(manifest.get("digest")))
    try:
        text = adapter_card(
            manifest,
            summary,
            known,
            repo=repo,
            base=base,
            base_id=found.repo if found and is_id else None,
            license=license,
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise DitError(
            f"'{folder / artifacts.MANIFEST}' or the report beside it does not say what an adapter's do: push it from "
            "the workdir of its run"
        ) from None
    return text, known


def _beside(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of the run that the adapter lies in; None if there is none."""
    file = folder.resolve().parent / name
    found = artifacts.read_json(file, "run the stage 'report' again") if file.exists() else None
    return found if isinstance(found, dict) else None


def _send(folder: Path, repo: str, private: bool) -> str:
    """Sends a folder in place of what the repository holds, and returns the address of the commit."""
    import huggingface_hub

    from dit_jax.formats.hub import do_not_wait_forever

    try:
        do_not_wait_forever()
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, delete_patterns="*", commit_message="Adapter and card"
        )
    except Exception as error:  # network, authorisation, spelling: the library raises many kinds
        raise DitError(
            f"the hub does not take '{repo}' ({first_line(error)}): check the name and the connection, and log in with "
            "a token that may write ('hf auth login')"
        ) from None
    return str(done.commit_url)
