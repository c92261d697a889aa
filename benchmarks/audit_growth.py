"""How an audit's time and memory grow with the number of diffs.

    python -m benchmarks.audit_growth --sizes 50 100 200 400

Audits random LoRAs of rank 16 of the embedded model with the adapter that the package ships, each size in a process of
its own. One audit before fills the cache of compiled programs. Times are of the processor.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import growth
from benchmarks.open_store import write_store

ADAPTER = pathlib.Path(__file__).parent.parent / "dit_jax" / "assets" / "demo" / "adapter"


def audit(store: pathlib.Path, out: pathlib.Path) -> tuple[float, float]:
    """Processor seconds of an audit, and MiB that it held at most."""
    command = [sys.executable, "-m", "dit_jax.audit", "--base", "tiny_qwen3"]
    command += ["--adapter", str(ADAPTER), "--out", str(out), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the audit of '{store}' ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_growth", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 400])
    flags = parser.parse_args()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        for number, size in enumerate([flags.sizes[0], *flags.sizes]):
            write_store(folder / f"store{number}", size, rank=16)
            spent, held = audit(folder / f"store{number}", folder / f"out{number}")
            if number:
                seconds.append(spent)
                row = {"diffs": size, "cpu_s": round(spent, 1), "peak_mib": round(held)}
                print(json.dumps(row), flush=True)
    start, each = growth.fit(seconds, list(map(float, flags.sizes)))
    print(f"{start:.3g} s + {1e3 * each:.3g} ms per diff")
    return 0


if __name__ == "__main__":
    sys.exit(main())
