"""What goes out is as untrusted as what came in: control and bidirectional characters, and encodings."""

import os
import subprocess
import sys

import pytest

from dit_jax.errors import DitError, printable
from dit_jax.report import markdown
from dit_jax.report.html import _visible

RAW = ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\u2066", "\x00", "\x7f"]


@pytest.mark.parametrize("raw", RAW, ids=ascii)
@pytest.mark.parametrize("show", [printable, markdown.escape, lambda text: str(DitError(text))])
def test_control_and_bidirectional_characters_are_escaped(show, raw):
    assert raw[0] not in show(f"tea {raw} milk") and show("grün 茶 🙂") == "grün 茶 🙂"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    code = "from dit_jax.runtime.exits import exit_on_error\nwith exit_on_error():\n    print('茶 \\ud800 tea')"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.endswith(b" tea\n")


@pytest.mark.parametrize("raw", RAW, ids=ascii)
def test_pages_show_control_and_bidirectional_characters_escaped(raw):
    assert raw[0] not in _visible(f"tea {raw} milk") and _visible("grün\n茶") == "grün\n茶"
