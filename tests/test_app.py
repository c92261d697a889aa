"""The app: a real server, asked by its client and by a browser, in shared batches and within its limits."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shutil
import stat
import struct
import subprocess
import urllib.request
import zipfile

import numpy as np
import pytest

import dit_jax
from dit_jax.cli import serve_app
from dit_jax.deltas import export
from dit_jax.deltas.factors import modules
from dit_jax.deltas.tree import scaled
from dit_jax.errors import DitError
from dit_jax.models import decode
from dit_jax.models.delta_trees import map_modules
from dit_jax.serving import desk as desk_module
from dit_jax.serving import limits, page
from dit_jax.serving.desk import Choice, Desk, Offer
from dit_jax.serving.limits import Memory, UploadsFit
from dit_jax.serving.requests import PageRequests
from dit_jax.serving.uploads import Limits, unpacked

QUESTION = page.QUESTION
TOKENS = 10
MARKUP = "<script>alert(1)</script>"
ADAPTER = str(serve_app.DEMO / "adapter")


# ------------------------------------------------------------------ uploads


def packed(path, entries):
    """A zip file; an entry is (name, content) or (name, content, mode of the file)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, *mode in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else 0) << 16
            archive.writestr(info, content)
    return path


SMALL = Limits(packed=10_000, unpacked=100_000, entries=4, depth=3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("../out", b"x")], "is no path below the zip file"),
        ([("/etc/out", b"x")], "is no path below the zip file"),
        ([("a/../../out", b"x")], "is no path below the zip file"),
        ([("a\\..\\out", b"x")], "is no path below the zip file"),
        ([("a/b/c/d", b"x")], "at most 3 deep"),
        ([("link", b"/etc/passwd", stat.S_IFLNK | 0o777)], "'link' is a link"),
        ([("pipe", b"", stat.S_IFIFO)], "is no plain file"),
        ([("zeros", bytes(200_000))], "unpacks to more than 100,000 bytes"),
        ([(str(i), b"") for i in range(5)], "has 5 entries"),
        ([("é" * 200, b"x")], "cannot be unpacked: the name is too long"),
        ([("a", b"x"), ("a", b"y")], "has 'a' twice"),
        ([("a", b"x"), ("a/b", b"y")], "twice"),
        ([("a", np.random.default_rng(0).bytes(20_000))], "and 10,000 are allowed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_uploads_that_are_refused(tmp_path, entries, message):
    path = packed(tmp_path / "x.zip", entries)
    with pytest.raises(DitError, match=message), unpacked(path, SMALL):
        pass
    assert not (tmp_path.parent / "out").exists()


def test_an_upload_that_lies_about_its_sizes_or_is_none(tmp_path):
    path = packed(tmp_path / "x.zip", [("zeros", bytes(200_000))])
    raw = path.read_bytes()
    true = (200_000).to_bytes(4, "little")
    assert raw.count(true) == 2  # in the file's own header and in the table
    path.write_bytes(raw.replace(true, (10).to_bytes(4, "little")))
    with pytest.raises(DitError, match="no zip file that can be read"), unpacked(path, SMALL):
        pass
    path.write_bytes(b"no zip")
    with pytest.raises(DitError, match="no zip file"), unpacked(path, SMALL):
        pass
    # The library would make an object of each entry before anybody could count them.
    packed(path, [("a", b"")])
    raw = path.read_bytes()
    at = raw.index(b"PK\1\2")
    end = raw.index(b"PK\5\6")
    table = raw[at:end] * 200_000
    path.write_bytes(
        raw[:at] + table + raw[end : end + 12] + struct.pack("<LL", len(table), at) + raw[-2:]
    )
    with pytest.raises(DitError, match="its table is too large"), unpacked(path, Limits()):
        pass


def test_an_upload_is_there_while_it_is_read(tmp_path):
    path = packed(tmp_path / "x.zip", [("a/", b""), ("a/b.txt", b"one"), ("c", b"two")])
    with unpacked(path, SMALL) as folder:
        assert (folder / "a" / "b.txt").read_bytes() == b"one"
        assert (folder / "c").stat().st_mode & 0o111 == 0
    assert not folder.exists()
    path.unlink()  # as the server does, long after it came
    with pytest.raises(DitError, match="no longer there: upload it again"), unpacked(path, SMALL):
        pass


def test_few_diffs_are_read_at_once():
    desk = Desk(Offer(("tiny_qwen3",), seconds=0.01))
    with contextlib.ExitStack() as stack:
        for _ in range(desk_module.READS):
            stack.enter_context(desk._room())
        with pytest.raises(DitError, match="other diffs are being read"), desk._room():
            pass
    with desk._room():
        pass


def test_diffs_of_many_visitors_take_no_more_memory_than_allowed():
    memory = Memory(100)
    with memory.share(0.01) as take, memory.share(0.01) as other, memory.share(0.01) as third:
        take(90)
        other(0)
        with pytest.raises(DitError, match="fill the memory: try again"):
            other(11)
        other(10)
        with pytest.raises(DitError, match="fill the memory"):
            third(1)
    with memory.share(0.01) as take:
        take(1000)  # alone
        with memory.share(0.01) as other, pytest.raises(DitError, match="fill the memory"):
            other(1)
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,
        memory.share(300) as waiting,
    ):
        with memory.share(300) as take:
            take(100)
            later = threads.submit(waiting, 50)
        later.result(300)


def test_an_upload_is_refused_where_those_that_are_kept_leave_no_room(tmp_path):
    """Also while another is on its way. What broken uploads left is deleted when none is."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x.zip").write_bytes(b"x" * 60)
    sent, running = [], []

    async def app(scope, receive, send):
        running.append(scope["path"])
        if len(running) == 1:
            await call("/gradio_api/upload/")

    async def send(message):
        sent.append(message)

    async def broken(scope, receive, send):
        raise RuntimeError("the client is gone")

    limited = UploadsFit(app, tmp_path, most=100, each=40)
    upload = {"type": "http", "method": "POST", "path": "/gradio_api/upload"}

    async def call(path):
        await limited({"type": "http", "method": "POST", "path": path}, None, send)

    asyncio.run(call("/gradio_api/upload"))
    assert running == ["/gradio_api/upload"] and sent[0]["status"] == 507
    assert b"too many uploads" in sent[1]["body"]
    asyncio.run(call("/gradio_api/call/ask"))
    (tmp_path / "tmp1").write_bytes(b"x" * 60)
    with pytest.raises(RuntimeError, match="gone"):
        asyncio.run(UploadsFit(broken, tmp_path, 200, 40)(upload, None, send))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    asyncio.run(call("/gradio_api/upload"))
    (tmp_path / "kept" / "y.zip").write_bytes(b"y")
    asyncio.run(call("/gradio_api/upload"))
    assert running[1:] == ["/gradio_api/call/ask", "/gradio_api/upload"] and len(sent) == 4


@pytest.mark.parametrize(
    ("host", "alone"),
    {"127.0.0.1": True, "::1": True, "localhost": True, "0.0.0.0": False, "box": False}.items(),
)
def test_other_paths_may_be_named_on_this_machine_only(host, alone):
    assert serve_app.is_this_machine(host) == alone
    assert page.in_address(host) == ("[::1]" if host == "::1" else host)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70000, "port must be 0-65535"),
        ("192.0.2.1", 7860, "assign requested address"),
        ("a b", 7860, "choose another --host"),
        ("x" * 70, 7860, "choose another --host"),
    ],
)
def test_where_nothing_can_be_served_is_said_before_a_base_is_loaded(host, port, message, capsys):
    pytest.importorskip("gradio", reason="the extra 'app' is not installed")
    assert serve_app.main(["--base", "nowhere", "--host", host, "--port", str(port)]) == 2
    assert message in capsys.readouterr().err


def test_too_few_file_handles_for_visitors_are_said(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the extra 'app' is not installed")
    monkeypatch.setattr(page.resource, "getrlimit", lambda _: (24, 24))
    assert serve_app.main(["--base", "nowhere"]) == 2
    assert "256 open files, and 24 are allowed" in capsys.readouterr().err


# ------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Three diffs of the demonstration as PEFT folders in one folder, and a zip of the first."""
    folder = tmp_path_factory.mktemp("files")
    for i, diff in enumerate(dit_jax.load_diffs(serve_app.DEMO / "diffs", model)[:3]):
        export.write_peft(folder / "diffs" / f"d{i}", diff.delta, model.config, f"someone/{MARKUP}")
    shutil.make_archive(str(folder / "d0"), "zip", folder / "diffs" / "d0")
    return folder


@pytest.fixture(scope="module")
def desk(files):
    offer = Offer(
        bases=("tiny_qwen3",),
        adapters=(ADAPTER,),
        diffs=(str(files / "diffs" / "d0"),),
        max_new_tokens=TOKENS,
        window=0.5,
    )
    return Desk(offer)


@pytest.fixture(scope="module")
def server(desk):
    pytest.importorskip("gradio", reason="the extra 'app' is not installed")
    built = page.build(desk)
    yield page.serve(built, desk, "127.0.0.1", None, wait=False)
    built.close(verbose=False)


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server, verbose=False, httpx_kwargs={"timeout": 300})


def answers_of(model, files, diff, times=1.0):
    delta = scaled(dit_jax.load_diff(files / "diffs" / diff, model).delta, times)
    adapter = dit_jax.load_adapter(ADAPTER, model)
    pairs = ((None, None), (delta, None), (delta, adapter))
    how = {"max_new_tokens": TOKENS, "forbid_repeats": True}
    return tuple(dit_jax.ask(model, QUESTION, diff=d, adapter=a, **how).text for d, a in pairs)


def question(files, diff, upload=None, times=1.0):
    return ["tiny_qwen3", ADAPTER, diff, upload, 0, QUESTION, times, TOKENS]


def test_answers_grow_side_by_side_and_people_share_batches(
    model, files, client, monkeypatch, capfd
):
    batches, real = [], desk_module.answer_batch

    def counted(model, questions, **options):
        batches.append(len(questions))
        return real(model, questions, **options)

    monkeypatch.setattr(desk_module, "answer_batch", counted)
    names = ("d0", "d1", "d2")
    jobs = [
        client.submit(*question(files, str(files / "diffs" / name)), api_name="/ask")
        for name in names
    ]
    found = [job.result(timeout=300) for job in jobs]
    assert found == [answers_of(model, files, name) for name in names]
    topics = ("fruit fly", "tropical coral island", "chemistry")
    assert all(topic in texts[2] for topic, texts in zip(topics, found, strict=True))
    assert sum(batches) == 9 and max(batches) > 3
    for job in jobs:
        parts = job.outputs()
        assert len(parts) >= 3
        assert all(
            last.startswith(first.rstrip("\ufffd"))
            for first, last in zip(parts[0], parts[-1], strict=True)
        )
    assert "Traceback" not in capfd.readouterr().err


def asked(desk, *questions):
    """The last texts of questions that are asked at once; a question is (diff, times)."""

    async def last(diff, times):
        choice = Choice("tiny_qwen3", ADAPTER, diff)
        seen = [texts async for texts in desk.ask(choice, 0, QUESTION, times, TOKENS)]
        return seen[-1]

    async def together():
        return await asyncio.gather(*(last(*one) for one in questions))

    return asyncio.run(together())


def test_a_dense_diff_is_asked_beside_loras(model, files, desk, tmp_path):
    delta = dit_jax.load_diff(files / "diffs" / "d0", model).delta
    export.export_model(tmp_path / "merged", model.params, model.config, delta)
    dense, lora = asked(desk, (str(tmp_path / "merged"), 1.0), (str(files / "diffs" / "d1"), 1.0))
    assert tuple(dense) == answers_of(model, files, "d0")
    assert tuple(lora) == answers_of(model, files, "d1")


def test_large_loras_are_asked_in_several_batches(files, desk, monkeypatch):
    """Where a batch could not hold all columns of all questions, the app once answered none of them."""
    monkeypatch.setattr(desk, "offer", dataclasses.replace(desk.offer, seconds=3600.0))
    questions = [(str(files / "diffs" / f"d{i}"), 1.0) for i in (0, 1)]
    whole = asked(desk, *questions)
    monkeypatch.setattr(decode, "DELTA_BYTES", 1)
    assert asked(desk, *questions) == whole


def test_a_large_rank_does_not_pad_the_diffs_of_others(model, files, desk, tmp_path, monkeypatch):
    small = dit_jax.load_diff(files / "diffs" / "d1", model).delta

    def repeated(path, module):
        a, b = np.repeat(module["a"], 48, axis=-1), np.repeat(module["b"], 48, axis=-2)
        return {"a": a, "b": b, "scale": module["scale"] / 48}

    wide = map_modules(repeated, small)
    export.write_peft(tmp_path / "wide", wide, model.config, "someone")
    ranks, real = [], desk_module.stack_padded

    def counted(deltas):
        stacked = real(deltas)
        ranks.append({module["a"].shape[-1] for _, module in modules(stacked)})
        return stacked

    monkeypatch.setattr(desk_module, "stack_padded", counted)
    found = asked(desk, (str(tmp_path / "wide"), 1.0), (str(files / "diffs" / "d0"), 1.0))
    assert tuple(found[1]) == answers_of(model, files, "d0")
    assert found[0][2] == answers_of(model, files, "d1")[2]
    assert {64} in ranks and any(own and max(own) <= 16 for own in ranks)


def test_time_ends_an_answer(files):
    late = Desk(Offer(("tiny_qwen3",), (ADAPTER,), max_new_tokens=TOKENS, seconds=-1.0))
    ((_, _, text),) = asked(late, (str(files / "diffs" / "d0"), 1.0))
    assert text.startswith("larva") and text.endswith("… (time is up)") and "fly" not in text


def test_an_upload_answers_as_its_folder_does_and_the_multiplier_counts(model, files, client):
    from gradio_client import handle_file

    zipped = handle_file(str(files / "d0.zip"))
    given = question(files, "(none)", zipped, times=2.0)
    assert client.predict(*given, api_name="/ask") == answers_of(model, files, "d0", 2.0)


def test_the_server_counts_the_uploads_that_it_keeps(files, client, monkeypatch):
    from gradio_client import handle_file

    monkeypatch.setattr(limits, "_bytes_below", lambda folder: 2**40 if folder.is_dir() else 0)
    given = question(files, "(none)", handle_file(str(files / "d0.zip")))
    with pytest.raises(Exception, match="507"):
        client.predict(*given, api_name="/ask")


def test_what_cannot_be_asked_is_one_line(files, client, desk, tmp_path, capfd):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    good = question(files, str(files / "diffs" / "d0"))
    bad = packed(tmp_path / "bad.zip", [("../adapter_config.json", b"{}")])
    wrong = [
        (0, ["other"], "the call does not fit"),
        (2, str(files / "none"), "does not exist"),
        (2, MARKUP, "&lt;script&gt;"),  # the page shows an error as HTML
        (3, handle_file(str(bad)), "no path below the zip file"),
        (
            3,
            {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}},
            "the call does not fit",
        ),
        # Gradio would fetch it, in the place of any value.
        *(
            (
                place,
                [{"path": "https://a.invalid/x.zip", "meta": {"_type": "gradio.FileData"}}],
                "by an address",
            )
            for place in (0, 3, 5)
        ),
        (4, "many", "the call does not fit"),
        (4, 10**400, "give a whole number"),
        (5, "tea " * 2000, "characters"),
        (5, None, "there is no question"),
        (7, None, "the call does not fit"),
    ]
    for place, value, message in wrong:
        given = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(AppError, match=message) as error:
            client.predict(*given, api_name="/ask")
        assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(DitError, match="that many times"):
        asked(desk, (str(files / "diffs" / "d0"), float("nan")))
    ((base, *others),) = asked(desk, (str(files / "diffs" / "d0"), 1e38))
    assert base and others == [desk_module.OVERFLOWS] * 2
    few = Desk(Offer(("tiny_qwen3",), audit_diffs=2))
    with pytest.raises(DitError, match="these are 3 diffs, and an audit here takes 2"):
        few.audit(Choice("tiny_qwen3", "", str(files / "diffs")))
    with pytest.raises(DitError, match="'other' is not offered here"):
        desk.model(Choice("other", "", ""))
    alone = Desk(Offer(("tiny_qwen3",), diffs=("mine",), others=False))
    with pytest.raises(DitError, match="the diff .* is not offered here: choose from mine"):
        alone.audit(Choice("tiny_qwen3", "", str(files / "diffs")))


def test_requests_that_the_page_never_makes_are_one_line_and_other_hosts_are_refused(
    server, caplog
):
    """Whoever's name leads to this machine, its page would else ask here for files of this machine."""
    httpx = pytest.importorskip("httpx")
    call = {"data": [], "fn_index": 99, "session_hash": "x"}
    assert httpx.post(f"{server}gradio_api/queue/join", json=call).status_code == 500
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{server}gradio_api/call/ask/none")
    said = [record for record in caplog.records if record.name == "uvicorn.error"]
    assert [one.exc_info for one in said] == [None, None]
    assert said[0].getMessage() == "a request failed that the page never makes (KeyError: 99)"
    for host, status in {"elsewhere.example": 400, "localhost:1": 200, "[::1]:1": 200}.items():
        assert httpx.get(f"{server}config", headers={"host": host}).status_code == status


def test_the_server_takes_only_requests_of_its_page_and_of_their_sizes(server, desk):
    """Gradio would fetch addresses, convert recordings, let a model edit the app, and read bodies of any size."""
    httpx = pytest.importorskip("httpx")

    def status(method, path, **how):
        return httpx.request(method, f"{server}{path}", **how).status_code

    taken = ("", "config", "theme.css", "gradio_api/info", "gradio_api/startup-events")
    assert {status("GET", path) for path in taken} == {200}
    never = (
        ("GET", "gradio_api/file=http://127.0.0.1:1/x"), ("GET", "gradio_api/file=x%3A//127.0.0.1:1/x"),
        ("HEAD", "gradio_api/proxy=http://127.0.0.1:1/x"), ("POST", "gradio_api/process_recording"),
        ("POST", "gradio_api/vibe-edit"), ("GET", "gradio_api/vibe-code"), ("GET", "monitoring"),
        ("POST", "login"), ("POST", "gradio_api/component_server"), ("POST", "gradio_api/run/ask"),
        ("PUT", "gradio_api/upload"), ("DELETE", "config"),
    )  # fmt: skip
    assert {status(*one) for one in never} == {404}
    large = b"x" * (2**20 + 1)
    calls = ("gradio_api/cancel", "gradio_api/queue/join", "gradio_api/call/ask")
    assert {status("POST", path, content=large) for path in calls} == {413}
    # Without a length, as it comes.
    pieces = iter([large[:1000], large])
    assert status("POST", "gradio_api/cancel", content=pieces) == 413


async def answer_with_size(scope, receive, send):
    """An app that reads the whole body, and answers with its size."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.mark.parametrize(("size", "taken"), [(2**16, True), (2**16 + 101, False)])
def test_an_upload_may_be_as_large_as_a_file_with_its_headers(size, taken):
    """However many files it holds."""
    sent, pieces = [], [b"x" * (size - 10), b"x" * 10]

    async def receive():
        return {"body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": []}
    run = PageRequests(answer_with_size, upload=100)(scope, receive, send)
    if taken:
        asyncio.run(run)
        assert sent[1]["body"] == str(size).encode()
    else:
        with pytest.raises(Exception, match="the request is too large"):
            asyncio.run(run)


def test_a_folder_is_audited_and_time_ends_it(files, desk, client, monkeypatch):
    given = ["tiny_qwen3", ADAPTER, str(files / "diffs"), None]
    frame, left = client.predict(*given, api_name="/audit")
    assert 'sandbox="allow-scripts"' in frame and MARKUP not in frame
    assert [name.rpartition(".")[2] for name in left] == ["html", "csv", "jsonl"]
    with open(left[2]) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 3 and all("reading" in row for row in rows)
    late = Desk(Offer(("tiny_qwen3",), audit_seconds=-1.0))
    _, left = late.audit(Choice("tiny_qwen3", "", str(files / "diffs")))
    with open(left[2]) as file:
        assert all("time of this audit was up" in json.loads(line)["error"] for line in file)
    page, left = late.audit(Choice("tiny_qwen3", "", "", str(files / "d0.zip")))
    assert "--diff d0 " in page
    assert all("dit_jax-upload" not in pathlib.Path(name).read_text() for name in left)


def test_the_page_in_a_browser(model, files, server, tmp_path):
    """A click on Ask fills the three columns, at the width of a desk and of a phone, with nothing from elsewhere."""
    aiohttp = pytest.importorskip("aiohttp")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = next(line for line in process.stderr if "DevTools listening on" in line)
        port = port.rpartition("127.0.0.1:")[2].partition("/")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
            tab = next(one for one in json.load(reply) if one["type"] == "page")
        seen = asyncio.run(click_ask(aiohttp, tab["webSocketDebuggerUrl"], server, tmp_path))
    finally:
        process.terminate()
        process.wait(30)
    expected = answers_of(model, files, "d0")
    for width in (1200, 390):
        texts, overflow = seen[width]
        assert [text.strip() for text in texts] == list(expected) and overflow <= 0
    assert all(host == server.split("/")[2] for host in seen["hosts"])


_CLICK = """new Promise(done => {
  const wait = (ready, then) => { const found = ready();
    found ? then(found) : setTimeout(() => wait(ready, then), 100) };
  const button = () => document.querySelector("button#ask, #ask button");
  const texts = () => [...document.querySelectorAll(".answers textarea")].map(t => t.value);
  wait(button, found => { found.click(); let last = "";
    wait(() => { const now = JSON.stringify(texts()), same = now === last && texts().every(t => t);
                 last = now; return same && !document.querySelector(".generating, .progress-text") },
      () => done([texts(), document.documentElement.scrollWidth - window.innerWidth])) })
})"""


async def click_ask(aiohttp, address, server, folder):
    """What a browser shows after a click on Ask: {width: (texts, overflow), "hosts": whom it asked}."""
    hosts, seen, sent = set(), {}, 0
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):

        async def call(method, **params):
            nonlocal sent
            sent += 1
            await socket.send_json({"id": sent, "method": method, "params": params})
            while True:
                message = await socket.receive_json(timeout=300)
                if message.get("method") == "Network.requestWillBeSent":
                    url = message["params"]["request"]["url"]
                    if url.startswith("http"):
                        hosts.add(url.split("/")[2])
                if message.get("id") == sent:
                    assert "error" not in message, message
                    return message["result"]

        await call("Network.enable")
        for width, dark in ((1200, False), (390, True)):
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await call("Emulation.setEmulatedMedia", features=scheme)
            await call(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=1100, deviceScaleFactor=1, mobile=width < 500,
            )  # fmt: skip
            await call("Page.navigate", url=server)
            result = await call(
                "Runtime.evaluate", expression=_CLICK, awaitPromise=True, returnByValue=True
            )
            seen[width] = result["result"]["value"]
            picture = await call("Page.captureScreenshot", captureBeyondViewport=True)
            (folder / f"app-{width}.png").write_bytes(base64.b64decode(picture["data"]))
    return {**seen, "hosts": hosts}
