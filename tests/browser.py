"""Pages in headless Chromium: what a script in the page's place sees there."""

import html
import json
import re
import shutil
import subprocess

import pytest

_FRAME = """<body style="margin:0"><iframe src="PAGE" style="border:0;width:WIDTHpx;height:900px">
</iframe><pre id="out"></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(item => item.open = true);
  const css = name => page.defaultView.getComputedStyle(page.body)[name];
  let facts;
  try { facts = FACTS; } catch (error) { facts = {error: String(error)}; }
  document.getElementById("out").textContent = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, background: css("backgroundColor"),
    color: css("color"), scripts: page.scripts.length, images: page.images.length,
    ...facts});
};</script>"""


def look(file, folder, width, dark, facts="{}"):
    """What a browser shows of a page, all its details opened; skips the test where there is no Chromium.

    The page must fit its width and follow the system's theme.

    Args:
        file: the page.
        folder: an empty folder for the browser's own files.
        width: of the page, in pixels.
        dark: the system's theme.
        facts: a JavaScript object; `page` is the document.

    Returns:
        The facts, and the number of its scripts and images.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    probe = folder / "probe.html"
    frame = _FRAME.replace("PAGE", file.as_uri()).replace("WIDTH", str(width))
    probe.write_text(frame.replace("FACTS", facts))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,1000",
        "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="out">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found and found[1], result.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen
    assert seen["overflow"] == 0
    red = {name: int(re.findall(r"\d+", seen[name])[0]) for name in ("background", "color")}
    assert (red["background"] < red["color"]) is dark
    return seen


DESK_AND_PHONE = pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
