"""The environment of all tests, and access to the golden files.

Tests run on the CPU with 8 virtual devices, so that sharded programs are always exercised.
"""

import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported: it reads these once.
# Compiling takes most of the time, and the programs run for milliseconds: the compiler's passes do not pay.
DEVICE_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
# Each core has a pytest process: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A second run can skip compilation, which is most of the tests' time.
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import pytest  # noqa: E402

from dit_jax.runtime import program_cache  # noqa: E402

program_cache.check_entries()  # as programs do, so that tests share their compiled programs

GOLDEN = Path(os.environ.get("DIT_JAX_GOLDEN", ROOT.parent / "shared" / "golden"))
NO_GOLDEN = f"no golden files at {GOLDEN}: set DIT_JAX_GOLDEN to their folder"


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Frees the compiled programs of a file after it: those of the whole suite take gigabytes.

    What was there before the file is no garbage: looking through it took a sixth of the suite's time.
    """
    gc.freeze()
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files; the test is skipped if there is none."""
    if not GOLDEN.is_dir():
        pytest.skip(NO_GOLDEN)
    return GOLDEN


@pytest.fixture
def interpreted_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the attention kernel for TPUs run here."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)


def golden_cases(prefix: str) -> list:
    """The golden folders whose name starts with `prefix`, for `pytest.mark.parametrize`.

    If there are none, it returns one parameter that is skipped and says why.
    """
    cases = sorted(path for path in GOLDEN.glob(f"{prefix}*") if path.is_dir())
    if cases:
        return [pytest.param(path, id=path.name) for path in cases]
    reason = f"no folder {prefix}* in {GOLDEN}" if GOLDEN.is_dir() else NO_GOLDEN
    return [pytest.param(None, id=f"no-{prefix}", marks=pytest.mark.skip(reason=reason))]
