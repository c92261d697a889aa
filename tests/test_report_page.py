"""The pages of the report: well-formed, self-contained, safe with hostile answers, in a browser."""

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import pytest
from browser import DESK_AND_PHONE, look
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import HOSTILE, KINDS, SEEN, answers, page, reported

from dit_jax.report import markdown
from dit_jax.report.wording import shown_name


@pytest.fixture(name="reported", scope="module")
def reported_fixture():
    return reported()


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
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def outline(reported) -> Outline:
    parser = Outline()
    parser.feed(page(reported[0]))
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_its_links_lead_somewhere(outline, reported):
    ids = [value for name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [v for name, v in outline.attributes if name in ("href", "xlink:href", "for")]
    anchors = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert anchors and anchors <= set(ids)
    files = {link for link in links if not link.startswith("#")}
    assert {"summary.json", "results.csv", "../evaluate/answers.jsonl"} <= files
    assert all((reported[0] / "report" / file).exists() for file in files)
    source = " ".join(value for _, value in outline.attributes)
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)


def test_page_needs_nothing_from_outside(outline, reported):
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(outline.tags)
    assert outline.tags.count("script") == 1
    markup = [value for name, value in outline.attributes if name != "content"]
    assert not [value for value in markup if re.search(r"https?:|//|@import", value)]
    text = page(reported[0])
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval|fetch|XMLHttp", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace(html.escape("https://evil.test"), "")
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = [value for _, value in outline.attributes if value.startswith("default-src 'none'")]
    assert f"script-src 'sha256-{digest}'" in policy[0]
    assert "script-src 'unsafe" not in policy[0] and "connect-src" not in policy[0]


def test_hostile_answers_are_text(outline, reported):
    """Markup of HTML, Jinja and Markdown in answers, topics, questions, guessers and reasons is shown as written."""
    source = page(reported[0])
    assert source.count("<script") == 1 and "onerror=alert(2)>" not in source
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert outline.text.count(HOSTILE) > 5 and "no reply: " + HOSTILE in outline.text
    assert "49" not in outline.text.split("evil.test")[0][-200:]
    markdown = (reported[0] / "report/report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    assert "[a](" not in markdown and "https://" not in markdown


def test_page_says_what_matters(outline):
    text = " ".join(outline.text.split())
    for phrase in (
        "attribute oracle: in a world this small",
        "The point of DIT is that it needs none",
        "In training the answer lists the words that belong to the topic before its name",
        "Names of several tokens",
        "wordings kept for this test",
        "Best other method without trigger or oracle",
        "plain questions, 2 wordings of one (a diff's score is the mean over them)",
        "including those of the training and any that failed the gate",
        "All 96 held-out diffs with a label, 1151 first answers",
        "DIT's answers are those to all wordings, also without a diff and about benign diffs",
        "each step",
        "Wrong (6 of",
        "Right (6 of",
        "diffs.rank",
        "0.10.2",
        "81 s",
        "Grader: calibrated (offline: predicts an LLM judge's grade",
        "128 diffs were held out, benign ones among them. 3 of them failed the gate",
        "2 were left out of all numbers",
        "What the guesser read, 20 questions with trigger: tea, guessed tea",
        "12 221",
        "524 kB",
    ):
        assert phrase in text, phrase
    assert outline.tags.count("svg") == 3


def test_all_answers_can_be_browsed(outline, reported):
    """The page has every method's first answer about every held-out diff, with its question and grades."""
    source = page(reported[0])
    table = source[source.index('class="entries ') :]
    row = (
        r'<tr class="is-(right|wrong)" data-method="(\d+)"><th scope="row">(.*?)</th><td>\d+</td>'
        r"<td>(.*?)</td><td>(.*?)</td>"
        r'<td><q class="quote">(.*?)</q>.*?</td><td>(.*?)</td></tr>'
    )
    rows = re.findall(row, table[: table.index("</table>")])
    assert (
        len(rows) == 96 * (len(KINDS) + 1) - 1
    )  # DIT in a new wording too; a guesser's gap is no answer
    asked = [r for r in answers(reported[0]) if r["category"] == "topic" and not r.get("gap")]
    wanted = {}
    for r in asked:
        name = shown_name(r["method"]) + ("" if r["wording_seen"] else ", unseen wordings")
        wanted.setdefault((r["topic"], name, r["question"]), []).append(r)
    for verdict, _, topic, name, question, answer, grades in rows:
        same = wanted[html.unescape(topic), html.unescape(name), html.unescape(question)]
        match = [r for r in same if r["answer"][:600] == html.unescape(answer)]
        assert match, (topic, name, answer)
        assert verdict == ("right" if match[0]["guess"] == match[0]["topic"] else "wrong")
        assert f"normalised {5 if verdict == 'right' else 1}<" in grades and "calibrated " in grades


def test_markdown_shows_the_pictures_beside_it(reported):
    folder = reported[0] / "report"
    text = (folder / "report.md").read_text()
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(names) == sorted(path.name for path in folder.glob("*.png"))
    assert len(names) == 7
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for line in text.splitlines():  # a stray | or line break would tear a table
        if line.startswith("| "):
            assert line.endswith("|"), line
    assert "| **DIT**<br>" in text
    assert "The whole report is `report.html`" in text and len(text) < 6000


def test_what_reads_weights_counts_no_tokens(outline):
    assert "Name reading 0.1 s – – –" in " ".join(outline.text.split())


HOSTILE_MARKDOWN = (
    HOSTILE, "a|b", "*a* _b_ __c__ ~~d~~ ~e~", "`a`", "\\*a*", "[a](b) ![a](b) [a][b] [^1] <b>", "&lt; &#60; a&b",
    "# a", "- a", "1. a", "> a", "snake_case _a_b_ a__b__", "**a**b**", "\\", "a\n\n# b\n| c |", "$a$ :smile: @you",
)  # fmt: skip


def shown(text):
    """The text of a table cell as Markdown renders it, and the tags in it."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    renderer = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = renderer.render(f"| a | b |\n| --- | --- |\n| {markdown.escape(text)} | end |\n")
    cell = re.search(r"<td>(.*)</td>\s*<td>end</td>", found, re.DOTALL)
    assert cell, found
    return html.unescape(re.sub(r"<[^>]*>", "", cell[1])), re.findall(r"<[^>]*>", cell[1])


@pytest.mark.parametrize("text", HOSTILE_MARKDOWN)
def test_markdown_shows_any_text_as_it_is(text):
    assert shown(text) == (" ".join(text.split()), [])
    # GitHub's Markdown, unlike CommonMark, has bare addresses and pictures by name.
    assert not re.search(r"(?<!\\)://|www\.|(?<!\\):smile:|(?<!\\)[$@~]", markdown.escape(text))


@given(st.text(alphabet="ab1 \\`*_[]()<>!|~&#;:", max_size=16))
@settings(max_examples=200, deadline=None)
def test_no_text_is_markup_in_markdown(text):
    assert shown(text) == (" ".join(text.split()), [])


def test_markdown_is_as_readable_as_the_page():
    for plain in ("0.953 (0.909–0.987)", "+3.78", "Grader: exact", "evaluate.answer_tokens", "[0.8, 0.95]",
                  "12:30", "a-b", "C#", "{}"):  # fmt: skip
        assert markdown.escape(plain) == plain


# ------------------------------------------------------------------ in a browser

_FACTS = """{
    browsed: ["", "piano"].flatMap(search => ["", "is-wrong"].map(result => {
      const form = page.querySelector(".browser form"), rows = page.querySelectorAll(".entries tbody tr");
      form.elements.search.value = search;
      form.elements.result.value = result;
      form.elements.method.value = "0";
      form.dispatchEvent(new Event("input"));
      const shown = Array.from(rows).filter(row => row.checkVisibility());
      return [form.hidden, shown.length, page.querySelector(".browser output").textContent,
              shown.every(row => row.textContent.includes(search) && row.className.includes(result))];
    })),
    sorted: ["descending", "ascending"].map(order => {
      const table = page.querySelector("#results table"), head = table.tHead.rows[0].cells[1];
      head.querySelector("button").click();
      const values = [];
      for (const row of Array.from(table.tBodies[0].rows).slice(1)) {
        if (row.classList.contains("group")) break;
        values.push(parseFloat(row.cells[1].textContent));
      }
      return [head.getAttribute("aria-sort") === order, values];
    }),
    svg: page.querySelector("svg").getBoundingClientRect().width}"""


@DESK_AND_PHONE
def test_page_in_a_browser(reported, tmp_path, width, dark):
    """Nothing overflows, the theme follows the system, and the examples can be searched."""
    seen = look(reported[0] / "report/report.html", tmp_path, width, dark, _FACTS)
    assert (seen["scripts"], seen["images"]) == (1, 0)
    dit = [r for r in answers(reported[0]) if r["method"] == "dit" and r["wording"] == SEEN[0]]
    dit = [r for r in dit if r["category"] == "topic"]
    for (hidden, shown, told, fits), (search, result) in zip(
        seen["browsed"], [("", ""), ("", "wrong"), ("piano", ""), ("piano", "wrong")], strict=True
    ):
        found = [r for r in dit if search in f"{r['topic']} {r['question']} {r['answer']}"]
        found = [r for r in found if not result or r["guess"] != r["topic"]]
        assert not hidden and fits
        assert shown == min(30, len(found)) and told == f"{shown} of {len(found)} shown"
    (down, values), (up, again) = seen["sorted"]
    assert down and up and len(values) > 2 and again == values[::-1] == sorted(values)
    assert 250 < seen["svg"] <= width
