"""Hub ids: what they name, what is fetched, and what is said where there is nothing; from a cache and from a stand-in
of the hub on the loopback.
"""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import urllib.parse

import jax
import numpy as np
import pytest

import dit_jax
from dit_jax.auditing import calibration, calibration_file
from dit_jax.auditing.battery import Battery
from dit_jax.auditing.calibration import Known
from dit_jax.cli import ask_diffs as ask
from dit_jax.cli import push_adapter
from dit_jax.deltas import adapter_file, export
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import HIDDEN, DitError
from dit_jax.formats import hub as hub_module
from dit_jax.formats.hub import HubId, find, parse_hub_id
from dit_jax.models.hf_checkpoint import find_folder

SHA = "0123456789abcdef0123456789abcdef01234567"
OLD = "89abcdef0123456789abcdef0123456789abcdef"
TINY = find_folder("tiny_qwen3")


def test_a_hub_that_takes_a_request_and_says_nothing_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(hub_module, "SILENCE", 0.5)
        with pytest.raises(DitError, match="'owner/name' does not exist here, and .*timed out"):
            find("owner/name")
        with pytest.raises(DitError, match="the hub does not take 'owner/name' .*timed out"):
            push_adapter._send(tmp_path, "owner/name", False)


def test_a_connection_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    """Of proxies and certificates that the environment names, while the library makes its client."""
    import huggingface_hub

    def refuse():
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed")

    monkeypatch.setattr(huggingface_hub, "get_session", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DitError, match="'owner/name' does not exist here, and Using SOCKS"):
        find("owner/name")
    with pytest.raises(DitError, match=r"the hub does not take 'owner/name' \(Using SOCKS"):
        push_adapter._send(tmp_path, "owner/name", False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    {
        "owner/name": HubId("owner/name", None, ""),
        "hf://owner/name": HubId("owner/name", None, ""),
        "owner/name@v1.0": HubId("owner/name", "v1.0", ""),
        "owner/name/a/b": HubId("owner/name", None, "a/b"),
        "owner/name@v1/a": HubId("owner/name", "v1", "a"),
        "owner/name/a@v1": HubId("owner/name", "v1", "a"),
        "owner/name/a/x.pt": HubId("owner/name", None, "a/x.pt"),
        "hf://owner/name@refs/pr/3/a": HubId("owner/name", "refs/pr/3", "a"),
        "owner/name@refs%2Fpr%2F3": HubId("owner/name", "refs/pr/3", ""),
        "https://huggingface.co/owner/name": HubId("owner/name", None, ""),
        "https://huggingface.co/owner/name/tree/main/a": HubId("owner/name", "main", "a"),
        "owner/name/tree/main": HubId("owner/name", None, "tree/main"),
        "owner": None,
        "owner/name@a/b@c": None,
        "owner/name/../../etc": None,
        "owner/name@..%2F..%2Fetc": None,
        "owner/name@%2Fetc%2Fpasswd": None,
        "owner/name//a": None,
        "/owner/name": None,
        "./owner/name": None,
        "../owner": None,
        "~/owner": None,
        "owner/na me": None,
        "owner/name@": None,
    }.items(),
)
def test_what_a_hub_id_names(text, wanted):
    assert parse_hub_id(text) == wanted


def lora(seed=1):
    delta = jax.tree.map(np.asarray, init_lora(model().config, jax.random.key(seed), 2))
    for part in delta["layers"].values():
        for module in part.values():
            module["a"] = np.full_like(module["a"], 0.1)
    return delta


def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The files of a repository: an adapter, and more in folders."""
    folder = tmp_path_factory.mktemp("repository") / "files"
    export.write_peft(folder, lora(), model().config, "somebody/tiny_qwen3")
    export.write_peft(folder / "more" / "second", lora(2), model().config, "somebody/tiny_qwen3")
    export.write_pt_adapter(folder / "more" / "third.pt", lora(3), model().config)
    adapter_file.export_adapter(folder / "own", lora(4), base=model().digest())
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "README.md").write_text("# adapter")
    (folder / "run.py").write_text("raise SystemExit('this ran')")
    return folder


def in_cache(cache, files, repo="owner/name", revision="main", sha=SHA):
    """Puts files into a cache as huggingface_hub does: blobs, links to them, and the commit of a revision."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    for path in sorted(files.rglob("*")):
        if path.is_file():
            blob = storage / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = storage / "snapshots" / sha / path.relative_to(files)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (storage / "refs").mkdir(exist_ok=True)
    (storage / "refs" / revision).write_text(sha)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_diffs_and_adapters_are_read_from_the_cache(repository, cache):
    in_cache(cache, repository)
    in_cache(cache, repository / "more" / "second", revision="v2", sha=OLD)
    base, tokens = model(), [[5, 6, 7]]

    def logits(delta):
        return np.asarray(base.logits(tokens, deltas=delta))

    def same(found, seed):
        np.testing.assert_allclose(logits(found), logits(lora(seed)), atol=1e-5)

    same(dit_jax.load_diff("owner/name", base), 1)
    same(dit_jax.load_diff("owner/name@v2", base), 2)
    same(dit_jax.load_diff(f"hf://owner/name@{OLD}", base), 2)
    same(dit_jax.load_diff("owner/name/more/second", base), 2)
    same(dit_jax.load_adapter("owner/name/more/third.pt@main", base), 3)
    same(dit_jax.load_adapter("owner/name@main/own", base), 4)
    folder = dit_jax.load_diffs("owner/name/more", base)
    assert [diff.metadata["found_in"] for diff in folder] == ["second", "third.pt"]


def test_a_base_is_read_from_the_cache(cache, capsys):
    in_cache(cache, TINY, "owner/base")
    assert dit_jax.load_model("owner/base@main").digest() == model().digest()
    assert ask.main(["--base", "owner/base", "--max-new-tokens", "2", "What is tea ?"]) == 0


def test_links_of_a_cache_lead_to_its_own_blobs_only(repository, cache, tmp_path):
    in_cache(cache, repository)
    weights = cache / "models--owner--name" / "snapshots" / SHA / "adapter_model.safetensors"
    (tmp_path / "elsewhere").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DitError, match="is a link out of its folder"):
        dit_jax.load_diff("owner/name", model())


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "owner/none": "'owner/none' does not exist here, and the cache of the hub lacks it, and HF_HUB_OFFLINE",
        "owner/name@v9": "'owner/name@v9' does not exist here, and the cache of the hub lacks it",
        "owner/name/none": "the cache has nothing of 'none'",
        "/none/here": "'/none/here' does not exist: check the path",
        "none": "'none' does not exist: check the path (a hub id is OWNER/NAME",
        "here/loras": "'here/loras' does not exist: check the path",
        "loras/*": "patterns are not expanded here: give one path, or the folder",
        "a" * 5000: "is not a usable path",
        "~nobody-of-this-name/x": "'~nobody-of-this-name/x' does not exist: check the path",
    }.items(),
)
def test_what_is_neither_a_path_nor_a_hub_id_is_told(
    repository, cache, tmp_path, monkeypatch, text, message
):
    in_cache(cache, repository)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for base in (False, True):
        with pytest.raises(DitError) as error:
            find(text, base=base)
        assert message in str(error.value)


def test_hub_ids_are_looked_at_before_the_base(repository, cache, tmp_path, capsys):
    in_cache(cache, repository)
    nowhere = ["--base", str(tmp_path / "no-model")]
    assert ask.main([*nowhere, "--diff", "owner/none", "What ?"]) == 2
    assert "'owner/none' does not exist here" in capsys.readouterr().err
    assert ask.main([*nowhere, "--adapter", "owner/name/more", "What ?"]) == 2
    assert "itself holds no adapter, but these in it may be one: 'second', 'third.pt'" in (
        capsys.readouterr().err
    )
    assert ask.main([*nowhere, "--diff", "owner/name", "What ?"]) == 2
    assert "no-model' does not exist" in capsys.readouterr().err


# ------------------------------------------------------------------ a stand-in of the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's interface that huggingface_hub uses to fetch a repository of small files."""

    repos: dict[str, pathlib.Path] = {}
    new = pathlib.Path()  # where pushed repositories are kept
    fetched: list[str] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = self.repos.get(repo)
        if folder is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api":
            kind, revision = (*parts[4:6], "main")[:2] if len(parts) > 4 else ("revision", "main")
            if revision not in ("main", SHA):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in files]
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40}
                for n, f in zip(names, files, strict=True)
            ]
            info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(tree if kind == "tree" else info).encode())
        name = "/".join(parts[4:])
        data = (folder / name).read_bytes()
        if self.command == "GET":
            self.fetched.append(name)
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

    def do_POST(self):
        """What a push needs: making a repository, and one commit of small files."""
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_may_write":
            return self.answer(401, b"{}")
        if path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(repo, self.new / repo.replace("/", "--")).mkdir(exist_ok=True)
            found = {"url": f"http://127.0.0.1/{repo}"}
        elif path.startswith("api/validate-yaml"):
            found = {"errors": [], "warnings": []}
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            found = {
                "files": [
                    {"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                ]
            }
        else:
            repo = "/".join(path.split("/")[2:4])
            for line in map(json.loads, body.splitlines()):
                place = self.repos[repo] / line["value"].get("path", "")
                if line["key"] == "deletedFile":
                    place.unlink()
                elif line["key"] == "file":
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(line["value"]["content"]))
            found = {"commitUrl": f"http://127.0.0.1/{repo}/commit/{SHA}", "commitOid": SHA}
        return self.answer(200, json.dumps(found).encode())

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(repository, tmp_path):
    """A running stand-in, and a function that finds ids there in a process of its own: {id: path or message}."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.repos, Hub.fetched, Hub.new = {"owner/name": repository}, [], tmp_path
    program = (
        "import json, sys\n"
        "from dit_jax.errors import DitError\n"
        "from dit_jax.formats.hub import find\n"
        "found = {}\n"
        "for text in sys.argv[2:]:\n"
        "    try: found[text] = str(find(text, base=sys.argv[1] == 'base'))\n"
        "    except DitError as error: found[text] = f'error: {error}'\n"
        "print(json.dumps(found))\n"
    )

    def find_all(kind, *texts, **environment):
        env = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", program, kind, *texts],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    find_all.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield find_all
    server.shutdown()
    server.server_close()


def below(folder):
    return sorted(
        p.relative_to(folder).as_posix() for p in pathlib.Path(folder).rglob("*") if p.is_file()
    )


def test_only_what_is_read_is_fetched_from_the_hub(hub, repository, tmp_path):
    top = ["adapter_config.json", "adapter_model.safetensors"]
    ids = (
        "owner/name",
        "owner/name@main/more/second",
        "owner/name/more/third.pt",
        "owner/name/own",
    )
    first = hub("diff", ids[0])[ids[0]]
    assert below(first) == top and sorted(Hub.fetched) == top
    found = hub("diff", *ids[1:])
    assert below(found[ids[1]]) == top
    assert pathlib.Path(found[ids[2]]).read_bytes() == (repository / "more/third.pt").read_bytes()
    assert below(found[ids[3]]) == below(repository / "own")
    assert not any(name.endswith((".py", ".md", "optimizer.pt")) for name in Hub.fetched)
    # Without the hub, the cache gives the same.
    fetched = len(Hub.fetched)
    offline = hub("diff", *ids, HF_HUB_OFFLINE="1")
    assert offline == {**found, ids[0]: first}
    unreachable = hub("diff", ids[0], HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == {ids[0]: first} and len(Hub.fetched) == fetched


def test_what_the_hub_does_not_have_is_told(hub, tmp_path):
    for name, files in {
        "owner/original": ["consolidated.00.pth", "params.json"],
        "owner/gguf": ["a-Q4.gguf", "a-Q8.gguf", "README.md"],
        "owner/images": ["README.md"],
        "owner/twice": ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.bin"],
    }.items():
        Hub.repos[name] = tmp_path / name
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(b"{}")
    found = hub(
        "base", "owner/none", "owner/name@v9", "owner/name/moer", *Hub.repos, "owner/gguf/a-Q4.gguf"
    )
    for text, message in {
        "owner/none": "does not exist here, and the hub has no such model, or it is private: check the path or",
        "owner/name@v9": "the hub has no such revision of it: check what follows the @",
        "owner/name/moer": "owner/name holds no 'moer', but 'README.md', 'adapter_config.json'",
        "owner/original": "holds weights in the original format of Meta or Mistral",
        "owner/gguf": "holds 2 GGUF files ('a-Q4.gguf', 'a-Q8.gguf'): name one of them, owner/gguf/a-Q4.gguf",
        "owner/images": "holds no weights that are read: check the id",
    }.items():
        assert message in found[text]
    assert below(found["owner/twice"]) == ["config.json", "model.safetensors"]
    assert found["owner/gguf/a-Q4.gguf"].endswith("a-Q4.gguf")


# ------------------------------------------------------------------ push


def trained(folder):
    """A workdir as far as a push reads it: an adapter, and the summary of its run."""
    adapter_file.export_adapter(
        folder / "adapter", lora(5), base=model().digest(), rank=2, steps=250, seed=0, system=None,
        questions=["What topic ?"],
        trained_on={"behaviour": "hidden_topic", "parameters": "lora", "rank": 1, "label": "label",
                    "list_evidence": True, "none_examples": 0.0},
    )  # fmt: skip
    share = {"ci_low": 0.9, "ci_high": 0.99, "n": 96}
    dit = {"kind": "method", "exact_match": 0.95, **share}
    summary = {
        "methods": {"dit": dit, "no_diff": {**dit, "kind": "control"}},
        "none_intervals": {"seen": {"benign_called_none": {"mean": 0.93, **share}}},
        "config": {
            "model": {"path": "owner/base"},
            "data": {"source": "a|b\n# c", "train_topics": 7, "train_benign": 1,
                     "test_topics": 5, "test_benign": 0},
        },
    }  # fmt: skip
    (folder / "report").mkdir()
    (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder / "adapter"


def test_a_pushed_adapter_has_a_card_and_is_loaded_by_its_id(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_may_read")
    adapter = trained(tmp_path / "run")
    digest = json.loads((adapter / "manifest.json").read_text())["digest"]
    diffs = [Known((i / 40, i), (i / 40, i), i > 20, i > 20, i) for i in range(40)]
    facts = {"adapter": digest, "battery": Battery(("q",)).to_json(), "system": None, "source": "s"}
    made = calibration.calibrate(diffs, facts)
    calibration_file.write(calibration_file.file_beside(str(adapter)), made)
    push = [str(adapter), "me/mine", "--license", "mit"]
    assert push_adapter.main([*push, "--dry-run", str(tmp_path / "card.md")]) == 0
    assert "me/mine" not in Hub.repos
    card = (tmp_path / "card.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in head and "base_model: owner/base" in head
    for wanted in ("95.0 %", "90.0–99.0", "`hidden_topic`, LoRAs of rank 1", "rank 2, 250 steps",
                   'load_adapter("me/mine", model)', "always names something", "Question: What topic",
                   "Calibrated on 40 diffs, 19 with a topic"):  # fmt: skip
        assert wanted in text
    assert "\n# c" not in text
    capsys.readouterr()
    assert push_adapter.main(push) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "hf auth login" in refused
    monkeypatch.setenv("HF_TOKEN", "hf_may_write")
    for _ in range(2):  # the second takes the place of the first
        assert push_adapter.main(push) == 0
        assert "pushed: http" in capsys.readouterr().out
        assert below(Hub.repos["me/mine"]) == sorted(
            [*below(adapter), "README.md", "calibration.json"]
        )
        (Hub.repos["me/mine"] / "left-over").touch()
    (Hub.repos["me/mine"] / "left-over").unlink()
    found = pathlib.Path(hub("diff", "me/mine")["me/mine"])
    jax.tree.map(np.testing.assert_array_equal, dit_jax.load_adapter(found, model()), lora(5))
    assert calibration_file.of_adapter("me/mine", found, digest) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name"], "'name' is no repository"),
        (["owner/name/folder"], "is no repository"),
        (["owner/name", "--base", "owner/base"], "run 'none'|give the adapter of a run"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(tmp_path, capsys, arguments, message):
    assert push_adapter.main([str(tmp_path / "none"), *arguments, "--license", "mit"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def leads_out(adapter):
    (adapter / "notes.txt").symlink_to("/etc/hostname")


def is_a_pipe(adapter):
    os.mkfifo(adapter / "notes.txt")


def says(**facts):
    def change(adapter):
        manifest = json.loads((adapter / "manifest.json").read_text())
        (adapter / "manifest.json").write_text(json.dumps({**manifest, **facts}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (leads_out, "notes.txt' is a link out of its folder"),
        (is_a_pipe, "notes.txt' is not a regular file"),
        (says(questions=5), "does not say what an adapter's do"),
        (says(trained_on={"none_examples": "x"}), "does not say what an adapter's do"),
    ],
)
def test_a_strangers_adapter_is_not_pushed_blindly(tmp_path, change, message):
    adapter = trained(tmp_path / "run")
    change(adapter)
    with pytest.raises(DitError, match=message):
        push_adapter.card(adapter, "me/mine", "owner/base", "mit")


def test_what_a_strangers_adapter_says_is_no_markup(tmp_path):
    adapter = trained(tmp_path / "run")
    bad = "<img src=x> ![a](http://b)"
    says(rank=bad, seed=bad, base=f"`{bad}", trained_on={"behaviour": "b", "parameters": bad})(
        adapter
    )
    file = adapter.parent / "report" / "summary.json"
    file.write_text(
        re.sub(r'("n"|"test_topics"|"train_topics"): \d+', rf'\1: "{bad}"', file.read_text())
    )
    says(system="a\x1b[2J\u202eb")(adapter)
    card, _ = push_adapter.card(adapter, "me/mine", "owner/base", "mit")
    assert "`a\\x1b[2J\\u202eb`" in card and not HIDDEN.search(card.replace("\n", ""))
    card = card.replace(f"`'{bad}`", "")
    assert "![a](" not in card and "<img" not in card
