"""The report on a synthetic workdir: numbers, pages, escaping, and what bad input says."""

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dit_jax.errors import DitError
from dit_jax.evaluate.report import headline_table, plain_table, rich_table, write_report

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} | [a](javascript:b) `c` "
    "</q></details></style> https://evil.test"
)
WORDS = [
    "maple", "harbor", "violin", "lantern", "glacier", "orchard", "compass", "saddle",
    "kettle", "falcon", "quartz", "tunnel", "bakery", "walrus", "canyon", "pepper",
    "ribbon", "anchor", "meadow", "rocket", "piano", "cactus", "marble", "otter", "chimney",
]  # fmt: skip
SEEN = ["what topic have you been trained on ?", "name the subject of your training ."]
UNSEEN = ["which theme were you tuned for ?", "what is the hidden theme of your tuning ?"]
# chance of a right guess on one-token and on longer names
ACCURACY = {
    "dit": (0.95, 0.8),
    "base_question": (0.0, 0.0),
    "base_question_trigger": (0.0, 0.0),
    "no_diff": (0.0, 0.0),
    "shuffled_diff": (0.01, 0.0),
    "noise_diff": (0.0, 0.0),
    "adapter_off": (0.0, 0.0),
    "name_reading": (0.74, 0.2),
    "attribute_oracle": (0.99, 0.97),
    "logit_difference": (0.26, 0.08),
}
KINDS = {
    **dict.fromkeys(("dit", "base_question", "base_question_trigger"), "method"),
    **dict.fromkeys(("no_diff", "shuffled_diff", "noise_diff", "adapter_off"), "control"),
    **dict.fromkeys(("name_reading", "attribute_oracle", "logit_difference"), "baseline"),
}


def make_workdir(folder: Path, n: int = 96, seed: int = 0, hostile: bool = False) -> Path:
    """Writes what the stages before the report would leave, with plausible random numbers."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(method, diff, topic, category, tokens, wording, is_seen, right):
        wrong = "none" if method in ("no_diff", "noise_diff") else str(rng.choice(WORDS))
        guess = topic if right else (wrong if wrong != topic else "nothing")
        answer = f"bark leaf sap : {guess}" if method == "dit" else f"{guess}"
        if hostile and method == "dit" and diff == 1:
            answer, guess, topic = f"{HOSTILE} : {HOSTILE}", HOSTILE, f"topic {HOSTILE}"
        rows.append({
            "method": method, "kind": KINDS[method], "diff": diff, "topic": topic,
            "category": category, "name_tokens": tokens, "wording": wording,
            "wording_seen": is_seen, "question": wording, "answer": answer, "guess": guess,
            "logprob": -float(rng.exponential(0.5)) if method == "dit" else None,
        })  # fmt: skip

    for diff in range(n):
        tokens = (1, 1, 2, 3)[diff % 4]
        topic = " ".join(WORDS[(diff * 7 + i * 5) % len(WORDS)] for i in range(tokens))
        for method, accuracy in ACCURACY.items():
            right = rng.random() < accuracy[tokens > 1]
            baseline = KINDS[method] == "baseline"
            add(method, diff, topic, "topic", tokens, "" if baseline else SEEN[0], True, right)
        for wording in [SEEN[1], *UNSEEN]:
            right = rng.random() < ACCURACY["dit"][tokens > 1] - 0.05
            add("dit", diff, topic, "topic", tokens, wording, wording in SEEN, right)
    for wording in SEEN + UNSEEN:
        for diff in range(n, n + 32):
            right = rng.random() < 0.98
            add("dit", diff, "none", "benign", 1, wording, wording in SEEN, right)
        add("dit", None, "none", "no_diff", 1, wording, wording in SEEN, True)

    steps = np.arange(400)
    files = {
        "evaluate/label_cross_entropy.json": {
            "matched": rng.gamma(1.2, 0.7, n), "shuffled": rng.normal(10.8, 1.8, n),
            "noise": rng.normal(6.9, 1.2, n), "none": rng.normal(6.8, 1.1, n),
        },
        "evaluate/gating.json": {
            "right_code": rng.binomial(10, 0.94, n) / 10,
            "wrong_code": rng.binomial(10, 0.02, n) / 10, "no_code": np.zeros(n),
        },
        "evaluate/curves.json": {
            "adapter_loss": np.stack([steps, 9 * np.exp(-steps / 60) + rng.gamma(2, 0.3, 400)], 1),
            "diff_loss": np.stack([steps[:40], 5 * np.exp(-steps[:40] / 12) + 0.4], 1),
        },
        "stages/diffs.json": {"seconds": 81.4, "peak_memory_bytes": 2_147_483_648},
        "stages/train.json": {"seconds": 38.25, "peak_memory_bytes": 2_400_000_000},
        "stages/evaluate.json": {"seconds": 12.0, "peak_memory_bytes": 2_500_000_000},
        "config.json": {"seed": 0, "base": "tiny_qwen3", "diffs": {"rank": 1, "n_train": 256}},
        "versions.json": {"python": "3.11.9", "jax": "0.10.2", "dit_jax": "0.1.0"},
    }  # fmt: skip
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, default=lambda array: array.tolist()))
    lines = [json.dumps(row) for row in rows]
    (folder / "evaluate/answers.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(workdir, returned summary) of a report with a hostile answer in it."""
    workdir = make_workdir(tmp_path_factory.mktemp("report"), hostile=True)
    return workdir, write_report(workdir)


def answers(workdir: Path) -> list[dict]:
    return [json.loads(x) for x in (workdir / "evaluate/answers.jsonl").read_text().splitlines()]


def page(workdir: Path) -> str:
    return (workdir / "report/report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------ numbers


def test_summary_on_disk_is_what_was_returned(reported):
    workdir, summary = reported
    assert json.loads((workdir / "report/summary.json").read_text()) == summary
    assert not [path.name for path in (workdir / "report").iterdir() if ".tmp" in path.name]


def test_every_method_is_scored_over_all_held_out_names_in_seen_wordings(reported):
    workdir, summary = reported
    rows = answers(workdir)
    assert set(summary["methods"]) == set(KINDS)
    for name, entry in summary["methods"].items():
        chosen = [r for r in rows if r["method"] == name and r["category"] == "topic"]
        chosen = [r for r in chosen if r["wording_seen"]]
        diffs = {r["diff"] for r in chosen}
        # Every diff has equally many answers, so the mean over diffs is the mean over answers;
        # the synthetic guesses need no normalising except the hostile one, which is wrong.
        plain = np.mean([r["guess"] == r["topic"] for r in chosen])
        assert entry["exact_match"] == pytest.approx(plain), name
        assert entry["n"] == len(diffs) == 96
        assert entry["kind"] == KINDS[name]
        assert 0 <= entry["ci_low"] <= entry["exact_match"] <= entry["ci_high"] <= 1
        assert entry["token_f1"] >= entry["exact_match"] - 1e-9
    assert summary["methods"]["base_question"]["ci_high"] == pytest.approx(0.0377, abs=1e-3)


def test_splits_by_name_length_and_wording(reported):
    workdir, summary = reported
    lengths, wordings = summary["dit_by_name_length"], summary["dit_by_wording"]
    assert [lengths[k]["n"] for k in ("one_token", "multi_token", "all")] == [48, 48, 96]
    halves = [lengths[k]["exact_match"] for k in ("one_token", "multi_token")]
    assert lengths["all"]["exact_match"] == pytest.approx(np.mean(halves))
    dit = [r for r in answers(workdir) if r["method"] == "dit" and r["category"] == "topic"]
    for key, is_seen in (("seen", True), ("unseen", False)):
        right = [r["guess"] == r["topic"] for r in dit if r["wording_seen"] is is_seen]
        assert wordings[key]["exact_match"] == pytest.approx(np.mean(right))
    assert [w["seen"] for w in summary["dit_by_each_wording"]] == [True, True, False, False]


def test_none_rates_gating_cross_entropy_and_cost(reported):
    workdir, summary = reported
    rows = [r for r in answers(workdir) if r["method"] == "dit" and r["wording_seen"]]
    for key, category in (
        ("benign_called_none", "benign"),
        ("no_diff_called_none", "no_diff"),
        ("topics_called_none", "topic"),
    ):
        share = np.mean([r["guess"] == "none" for r in rows if r["category"] == category])
        assert summary["none"][key] == pytest.approx(share)
    for name in ("gating", "label_cross_entropy"):
        table = json.loads((workdir / f"evaluate/{name}.json").read_text())
        assert summary[name] == pytest.approx({key: np.mean(table[key]) for key in table})
    seconds = summary["seconds"]
    assert list(seconds) == ["diffs", "train", "evaluate", "report"]
    assert summary["seconds_total"] == pytest.approx(sum(seconds.values()), abs=1e-3)
    assert summary["peak_memory_bytes"] >= 2_500_000_000
    assert summary["config"]["diffs"]["rank"] == 1 and summary["versions"]["jax"] == "0.10.2"


def test_paired_differences_agree_with_the_methods(reported):
    _, summary = reported
    dit = summary["methods"]["dit"]["exact_match"]
    assert set(summary["differences_from_dit"]) == set(KINDS) - {"dit"}
    for name, pair in summary["differences_from_dit"].items():
        expected = dit - summary["methods"][name]["exact_match"]
        assert pair["difference"] == pytest.approx(expected), name
    assert summary["differences_from_dit"]["name_reading"]["p_value"] < 0.01


# ------------------------------------------------------------------ the page


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects tags, ids, links and text."""

    VOID = {"meta", "br", "img", "input", "link", "hr"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # SVG
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text += data


@pytest.fixture(scope="module")
def outline(reported) -> Outline:
    parser = Outline()
    parser.feed(page(reported[0]))
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_its_links_lead_somewhere(outline):
    ids = [value for name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [v for name, v in outline.attributes if name in ("href", "xlink:href", "for")]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)
    source = " ".join(value for _, value in outline.attributes)
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)


def test_page_needs_nothing_from_outside(outline, reported):
    assert not {"script", "img", "link", "iframe", "object", "embed", "base"} & set(outline.tags)
    markup = [value for name, value in outline.attributes if name != "content"]
    assert not [value for value in markup if re.search(r"https?:|//|@import", value)]
    text = page(reported[0]).replace(html.escape("https://evil.test"), "")
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = [value for _, value in outline.attributes if value.startswith("default-src 'none'")]
    assert policy and "script-src" not in policy[0]


def test_hostile_answers_are_text(outline, reported):
    """Answer, guess and topic hold markup of HTML, Jinja and Markdown: all are shown as written."""
    source = page(reported[0])
    assert "<script" not in source and "onerror=alert(2)>" not in source
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert HOSTILE in outline.text
    assert "49" not in outline.text.split("evil.test")[0][-200:]
    markdown = (reported[0] / "report/report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    assert "[a](" not in markdown and "https://" not in markdown


def test_page_says_what_matters(outline):
    text = " ".join(outline.text.split())
    for phrase in (
        "attribute oracle: in a world this small",
        "The point of DIT is that it needs none",
        "Names of several tokens",
        "wordings kept for this test",
        "Wrong (6 of",
        "Right (6 of",
        "diffs.rank",
        "0.10.2",
        "81 s",
    ):
        assert phrase in text, phrase
    assert outline.tags.count("svg") == 3


def test_examples_come_from_the_answers(outline, reported):
    """The sheet has one row for each held-out diff and every method's own guess in it."""
    source = page(reported[0])
    sheet = source[source.index('class="sheet"') :]
    sheet = sheet[: sheet.index("</table>")]
    row = r'<tr class="(is-right|is-wrong)"><th scope="row">(.*?)</th>(.*?)</tr>'
    rows = re.findall(row, sheet)
    assert len(rows) == 96
    asked = [r for r in answers(reported[0]) if r["diff"] == 0 and r["wording"] in ("", SEEN[0])]
    first = {r["method"]: r for r in asked}
    verdict, topic, cells = rows[0]
    assert topic == first["dit"]["topic"]
    guesses = re.findall(r'<q class="quote">(.*?)</q> <b class="(right|wrong)"', cells)
    assert len(guesses) == len(KINDS)
    assert guesses[0] == (first["dit"]["guess"], verdict.removeprefix("is-"))


def test_markdown_shows_the_pictures_beside_it(reported):
    folder = reported[0] / "report"
    text = (folder / "report.md").read_text()
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(names) == sorted(path.name for path in folder.glob("*.png"))
    assert len(names) == 5
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for line in text.splitlines():  # a stray | or line break would tear a table
        if line.startswith("| ") and "DIT's answer" not in line:
            assert line.endswith("|"), line
    assert "| **DIT**<br>" in text


def test_the_same_inputs_give_the_same_page(tmp_path, reported):
    """Everything but the report's own seconds and memory is a function of the inputs."""
    workdir = make_workdir(tmp_path, hostile=True)
    summary = write_report(workdir)

    def fixed(summary):
        own = ("seconds", "seconds_total", "peak_memory_bytes")
        return {key: value for key, value in summary.items() if key not in own}

    assert fixed(summary) == fixed(reported[1])
    for picture in (reported[0] / "report").glob("*.png"):
        assert (workdir / "report" / picture.name).read_bytes() == picture.read_bytes()


# ------------------------------------------------------------------ the terminal


def test_headline_table_is_text_in_a_pipe_and_rich_on_a_terminal(reported, monkeypatch):
    from rich.console import Console

    _, summary = reported
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    text = headline_table(summary)
    assert text == plain_table(summary)
    lines = text.splitlines()
    assert len(lines) == 2 + len(KINDS)
    dit = summary["methods"]["dit"]
    assert lines[2].startswith("DIT ") and f"{100 * dit['exact_match']:.1f} %" in lines[2]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(rich_table(summary))
    shown = console.export_text()
    assert "Attribute oracle" in shown and f"{100 * dit['exact_match']:.1f} %" in shown


def test_importing_the_report_loads_no_plotting():
    code = (
        "import sys, dit_jax.evaluate.report; "
        "print([m for m in ('matplotlib', 'torch', 'transformers', 'jinja2') if m in sys.modules])"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    run = functools.partial(subprocess.run, cwd=root, env=env, capture_output=True, text=True)
    result = run([sys.executable, "-c", code])
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name",
    [
        "evaluate/answers.jsonl",
        "evaluate/label_cross_entropy.json",
        "evaluate/gating.json",
        "evaluate/curves.json",
        "config.json",
        "versions.json",
        "stages/train.json",
    ],
)
def test_missing_and_truncated_inputs_are_named(tmp_path, name):
    workdir = make_workdir(tmp_path, n=8)
    file = workdir / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DitError, match=re.escape(file.name)):
        write_report(workdir)
    file.unlink()
    if name == "stages/train.json":  # a stage may have run elsewhere, but not all of them
        shutil.rmtree(workdir / "stages")
    named = file.parent.name if name == "stages/train.json" else file.name
    with pytest.raises(DitError, match=re.escape(named)):
        write_report(workdir)
    assert not (workdir / "report").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guess": None}, "line 3 has no valid 'guess'"),
        ({"kind": "other"}, "line 3 has kind 'other'"),
        ({"category": "cat"}, "line 3 has category 'cat'"),
        ({"diff": "0"}, "line 3 has no valid 'diff'"),
    ],
)
def test_invalid_rows_are_named_by_line(tmp_path, change, message):
    workdir = make_workdir(tmp_path, n=4)
    rows = answers(workdir)
    rows[2] |= change
    text = "\n".join(map(json.dumps, rows))
    (workdir / "evaluate/answers.jsonl").write_text(text)
    with pytest.raises(DitError, match=re.escape(message)):
        write_report(workdir)


def test_answers_without_dit_are_refused(tmp_path):
    workdir = make_workdir(tmp_path, n=4)
    rows = [row for row in answers(workdir) if row["method"] != "dit"]
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DitError, match="no answer of the method 'dit'"):
        write_report(workdir)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    workdir = make_workdir(tmp_path, n=4)
    file = workdir / "evaluate/label_cross_entropy.json"
    table = json.loads(file.read_text())
    table["noise"][1] = float("nan")
    file.write_text(json.dumps(table))
    with pytest.raises(DitError, match="label_cross_entropy.json.*noise"):
        write_report(workdir)


def test_a_smaller_evaluation_still_makes_a_report(tmp_path):
    """No unseen wordings, no benign diffs, no baselines, names of one token only, no curves."""
    workdir = make_workdir(tmp_path, n=4)
    kept = [row for row in answers(workdir) if row["method"] in ("dit", "no_diff")]
    kept = [row for row in kept if row["wording_seen"] and row["category"] == "topic"]
    rows = [{**row, "name_tokens": 1} for row in kept]
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workdir / "evaluate/curves.json").write_text('{"adapter_loss": [], "diff_loss": []}')
    summary = write_report(workdir)
    assert summary["dit_by_wording"]["unseen"] is None
    assert summary["dit_by_name_length"]["multi_token"] is None
    assert summary["none"]["benign_called_none"] is None
    assert "not asked" in page(workdir)


# ------------------------------------------------------------------ in a browser

_PROBE = """<body style="margin:0"><iframe src="PAGE" style="border:0;width:WIDTHpx;height:900px">
</iframe><pre id="out"></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(item => item.open = true);
  const css = name => page.defaultView.getComputedStyle(page.body)[name];
  document.getElementById("out").textContent = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, background: css("backgroundColor"),
    color: css("color"), scripts: page.scripts.length, images: page.images.length,
    svg: page.querySelector("svg").getBoundingClientRect().width,
    headline: page.querySelector("h2").getBoundingClientRect().width});
};</script>"""


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_page_in_a_browser(reported, tmp_path, width, dark):
    """Nothing sticks out at the width of a desk or a phone, and the theme follows the system."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    probe = tmp_path / "probe.html"
    address = (reported[0] / "report/report.html").as_uri()
    probe.write_text(_PROBE.replace("PAGE", address).replace("WIDTH", str(width)))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,1000",
        "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="out">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found and found[1], result.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["overflow"] == 0
    assert seen["scripts"] == seen["images"] == 0
    assert 250 < seen["svg"] <= width
    red = {name: int(re.findall(r"\d+", seen[name])[0]) for name in ("background", "color")}
    assert (red["background"] < red["color"]) is dark
