"""Models, diffs and adapters by hub id, through huggingface_hub and its cache, also offline.

    owner/name   owner/name@revision   owner/name/folder   owner/name@revision/folder/file.pt   hf://owner/name

A path that exists comes first. What arrives is as untrusted as any folder: only files that can be read as weights or
their description are fetched, and nothing of a repository is executed.
"""

import glob
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import is_plain_name, short, user_path
from dit_jax.formats.recognise import is_trainer_state, what_folder

_ADDRESSES = ("hf://", "https://huggingface.co/", "https://hf.co/")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION = r"(?:refs/(?:pr|convert)/)?[^/@\s]{1,200}"
_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    rf"(?:@(?P<revision>{_REVISION}))?(?P<inside>(?:/[^/@\0]{{1,255}}){{0,32}})(?:@(?P<last>{_REVISION}))?"
)
SILENCE = 60.0  # seconds
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")  # the best first
_SUFFIXES = (*_WEIGHTS, ".json", ".jinja", ".csv")
# What a folder has of its own: of a model or adapter its files alone count, and of others the folders in it, too.
_SINGLE, INDEX, MANIFEST = ("adapter_config.json", "config.json"), "index.csv", "manifest.json"


class HubId(NamedTuple):
    """What a hub id names: a repository of models, its revision (None: the main one), what of it ("": all)."""

    repo: str
    revision: str | None
    inside: str


def parse_hub_id(text: str) -> HubId | None:
    """The parts of a hub id; None: it is none."""
    address = next((start for start in _ADDRESSES if text.startswith(start)), "")
    text = text.removeprefix(address).rstrip("/")
    if address.startswith("https:"):  # of a page in a browser
        text = re.sub(r"^([^/]+/[^/]+)/(?:tree|blob|resolve)/", r"\1@", text)
    match = _ID.fullmatch(text)
    if match is None:
        return None
    revisions = [unquote(match[name]) for name in ("revision", "last") if match[name]]
    inside = match["inside"].strip("/")
    # The library makes paths of both.
    paths = [*revisions, inside] if inside else revisions
    if len(revisions) > 1 or not all(is_plain_name(x) for path in paths for x in path.split("/")):
        return None
    return HubId(match["repo"], revisions[0] if revisions else None, inside)


def find(text: str | Path, *, base: bool = False) -> Path:
    """The path that `text` names, or that of the snapshot of a hub id, which is fetched if the cache lacks it.

    Args:
        base: whether a base model is wanted. Then only the files of its own folder are fetched.

    Raises:
        DitError: there is neither, the hub does not give it, or it has nothing that can be read.
    """
    said = str(text)
    path = user_path(said)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # the path is too long, or holds a NUL
        raise DitError(f"'{said}' is not a usable path: check it") from None
    if any(char in said for char in "*?["):
        raise DitError(
            f"'{said}' does not exist, and patterns are not expanded here: give one path, or the folder that holds "
            "several diffs"
        )
    hub_id = parse_hub_id(said)
    # The first part of a hub id is its owner: a folder of that name says that a path was meant.
    if hub_id is None or (not said.startswith(_ADDRESSES) and Path(said.split("/")[0]).exists()):
        raise DitError(
            f"'{said}' does not exist: check the path (a hub id is OWNER/NAME, OWNER/NAME@REVISION or "
            "OWNER/NAME/FOLDER)"
        )
    return _fetch(hub_id, said, base)


def do_not_wait_forever() -> None:
    """From now on the library's calls end where the hub takes a request and says nothing for `SILENCE` seconds."""
    import huggingface_hub

    huggingface_hub.get_session().timeout = SILENCE


def _fetch(hub_id: HubId, said: str, base: bool) -> Path:
    import huggingface_hub

    repo, revision, inside = hub_id
    try:
        do_not_wait_forever()  # which reads the environment: proxies, certificates
        # Of the library's listings, this one does not wait half a minute for a hub that cannot be reached.
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=SILENCE)
    except Exception as error:  # network, authorisation, spelling: the library raises many kinds
        return _cached(hub_id, said, error)
    names = [file.rfilename for file in info.siblings or ()]
    patterns = [glob.escape(name) for name in _choose(names, hub_id, said, base)]
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise _hub_error(said, error) from None
    return Path(folder, inside)


def _cached(hub_id: HubId, said: str, error: Exception) -> Path:
    """The snapshot in the cache where the hub does not answer. Raises DitError: the cache has none."""
    import huggingface_hub

    try:
        # Without patterns the library would miss the files that were never wanted.
        folder = huggingface_hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:
        raise _hub_error(said, error) from None
    path = Path(folder, hub_id.inside)
    if not path.exists():
        raise DitError(
            f"'{said}': the hub does not answer ({first_line(error)}), and the cache has nothing of "
            f"{short(hub_id.inside)}: try again with the hub"
        )
    return path


def _hub_error(said: str, error: Exception) -> DitError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    remedy = "check the connection, or give a path"
    what = first_line(error)
    if "GatedRepoError" in kinds:
        what, remedy = "its owner must grant access", "ask for it on its page, then 'hf auth login'"
    elif "RepositoryNotFoundError" in kinds:
        what = "the hub has no such model, or it is private"
        remedy = "check the path or the id ('hf auth login' for a private one)"
    elif "RevisionNotFoundError" in kinds:
        what, remedy = "the hub has no such revision of it", "check what follows the @"
    elif "OfflineModeIsEnabled" in kinds:
        what = "the cache of the hub lacks it, and HF_HUB_OFFLINE forbids a download"
        remedy = "unset it, or give a path"
    return DitError(f"'{said}' does not exist here, and {what}: {remedy}")


def _choose(names: Collection[str], hub_id: HubId, said: str, base: bool) -> list[str]:
    """The files of a repository that are fetched. Raises DitError: it has nothing that can be read."""
    names = [name for name in names if all(map(is_plain_name, name.split("/")))]
    repo, _, inside = hub_id
    if inside in names:
        return [inside]
    start = f"{inside}/" if inside else ""
    below = [name.removeprefix(start) for name in names if name.startswith(start)]
    if not below:
        known = sorted({name.split("/")[0] for name in names})
        raise DitError(
            f"'{said}': {repo} holds no {short(inside)}, but {', '.join(map(short, known[:6])) or 'no files'}: "
            "check what follows the name"
        )
    top = [name for name in below if "/" not in name]
    if (
        not base and MANIFEST in top
    ):  # a store or adapter of this program, whose manifest lists all files
        return [start + name for name in below]
    single = base or (INDEX not in top and any(name in top for name in _SINGLE))
    wanted = [name for name in (top if single else below) if name.endswith(_SUFFIXES)]
    wanted = [name for name in wanted if not is_trainer_state(name.rpartition("/")[2])]
    if single:
        # Some repositories hold the same weights several times.
        kinds = [kind for kind in _WEIGHTS if any(name.endswith(kind) for name in wanted)]
        wanted = [n for n in wanted if not n.endswith(_WEIGHTS) or n.endswith(kinds[0])]
        several = [name for name in wanted if name.endswith(".gguf")]
        if len(several) > 1:
            raise DitError(
                f"'{said}' holds {len(several)} GGUF files ({', '.join(map(short, several[:4]))}): name one of them, "
                f"{repo}/{start}{several[0]}"
            )
    if not any(name.endswith(_WEIGHTS) for name in wanted):
        what = what_folder(top) or "holds no weights that are read: check the id"
        raise DitError(f"'{said}' {what}")
    return [start + name for name in wanted]
