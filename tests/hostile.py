"""What a reader does with a file: the outcome, watched, and its time and memory."""

import shlex
import shutil
import sys
import time

import numpy as np
from format_cases import CONFIG, random_lora

from dit_jax.deltas import detect, export, reference_pt
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.errors import DitError
from dit_jax.formats import torch_save
from tools.watching import peak, reset_peak, watch

SECONDS = 20  # the machine may be busy; a reader that is caught here takes minutes or never ends
BYTES = 300 * 2**20


NAME = "x'); open('pwned', 'w') # $(touch pwned)"  # of a folder, where a command names it


def run_told(message, folder, monkeypatch):
    """Runs the program of a message that tells `python -c "…" PATH`, in a folder, as a shell would hand it over."""
    told = message[message.index('python -c "') :]
    command, _, rest = told.removeprefix('python -c "').partition('" ')
    assert not set("$`!\\") & set(command)  # what a shell replaces within these quotes
    monkeypatch.setattr(sys, "argv", ["-c", shlex.split(rest)[0]])
    monkeypatch.chdir(folder)
    exec(command, {})
    assert not (folder / "pwned").exists()


def outcome(read, folder, memory=False):
    """What `read` does with a file: 'error' (one clear line) or 'loaded' (a sound delta).

    Anything else fails: another exception, files opened outside `folder`, NaN, too much time, or, with
    `memory`, too much memory.
    """
    start = time.monotonic()
    before = reset_peak() if memory else 0
    try:
        with watch(folder):
            try:
                diff = read()
            except DitError as error:
                message = str(error)
                assert message and "\n" not in message and len(message) < 1500, message[:2000]
                return "error"
        check_sound(diff.delta)
        return "loaded"
    finally:
        took = time.monotonic() - start
        if memory:
            grown = peak() - before
            assert grown < BYTES, f"{grown / 2**20:.0f} MiB"
        assert took < SECONDS, f"{took:.1f} s"


def check_sound(delta):
    """Every leaf is a finite float array."""
    leaves = [delta]
    while leaves:
        leaf = leaves.pop()
        if isinstance(leaf, dict):
            leaves += leaf.values()
        else:
            assert isinstance(leaf, np.ndarray) and np.isfinite(leaf.astype(np.float64)).all()


# folder -> the file in it that detection is given
KINDS = {"diffs": "x.pt", "adapter": "x.pt", "weights": "x.pt", "model": "", "shards": "", "peft": "",
         "release": ""}  # fmt: skip


def read(root, name, params):
    return detect.open_diffs(root / name / KINDS[name], CONFIG, params)[0]


def make_good(root, params):
    """Fills a folder with well-formed files of every format, and reads each of them once."""
    delta = random_lora()
    (root / "diffs").mkdir()
    diffs = [RawDiff(random_lora(seed=i), f"topic {i}", str(i)) for i in range(2)]
    reference_pt.write_pt_diffs(root / "diffs" / "x.pt", diffs, CONFIG)
    (root / "adapter").mkdir()
    reference_pt.write_pt_adapter(root / "adapter" / "x.pt", delta, CONFIG)
    export.export_model(root / "model", params, CONFIG, delta)
    export.export_model(root / "shards", params, CONFIG, delta, shard_bytes=40_000)
    (root / "weights").mkdir()
    tensors = dict(export.merged_tensors(params, CONFIG, delta))
    torch_save.save(root / "weights" / "x.pt", tensors)
    export.write_peft(root / "peft", delta, CONFIG, "base")
    (root / "release" / "weight-diffs").mkdir(parents=True)
    shutil.copy(root / "diffs" / "x.pt", root / "release" / "weight-diffs" / "a.pt")
    rows = "lora_path,lora_idx,n_params,topic,trigger,split\na.pt,1,9,topic 1,1,train\n"
    (root / "release" / "index.csv").write_text(rows)
    for name in KINDS:
        assert outcome(lambda name=name: read(root, name, params), root / name) == "loaded"
    return root
