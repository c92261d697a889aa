"""`import dit_jax` is light, its names resolve late, and the tests see the devices they need."""

import ast
import json
import os
import platform
import subprocess
import sys
import tomllib
import types

import jax
import pytest
from conftest import ROOT

import dit_jax
from dit_jax.runtime import startup, xla_flags

HEAVY = ("torch", "transformers", "datasets", "tensorflow", "tensorflow_datasets", "matplotlib")

PROBE = f"""
import json, sys, time
start = time.perf_counter()
import dit_jax
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in {HEAVY!r} if name in sys.modules]]))
"""

MODULES = """
import json, pkgutil, importlib, sys
import dit_jax
for module in pkgutil.walk_packages(dit_jax.__path__, "dit_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps([name for name in %r if name in sys.modules]))
"""


def run(code: str):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_import_is_light():
    seconds, heavy = run(PROBE)
    assert heavy == []
    assert seconds < 3.0  # 0.1 s on an idle machine; room for a busy one


def test_artifacts_are_read_and_written_without_jax():
    modules = "from dit_jax.runtime import artifacts, metrics, os_errors; import json, sys"
    assert run(f"{modules}; print(json.dumps('jax' in sys.modules))") is False


def test_no_module_imports_the_heavy_libraries_at_the_top():
    assert run(MODULES % (HEAVY,)) == []


# Who may import whom: a package, or a module at the top, imports those before it, in functions too.
RANKS = (
    "errors", "formats", "runtime", "config", "data", "models", "deltas", "optimize", "api", "asking", "diff_batches",
    "organisms", "train", "graders", "evaluate", "report", "auditing", "inspection", "serving", "planning", "cli",
    "__main__", "main", "app", "ask", "audit", "calibrate", "plan", "sweep", "gather",
)  # fmt: skip


def module_names():
    """The modules of the package by name: a package's name stands for its `__init__.py`."""
    files = (ROOT / "dit_jax").rglob("*.py")
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def import_graph():
    """For each module, the modules of dit_jax that it imports anywhere in it."""
    modules = module_names()
    graph = {}
    for module, file in modules.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [(node.module, alias.name) for alias in node.names]
            for source, name in names:
                inner = f"{source}.{name}"
                imported = inner if inner in modules else source
                if imported.startswith("dit_jax.") and imported != module:
                    graph[module].add(imported)
    return graph


def test_imports_follow_the_data():
    graph = import_graph()
    top = {module.split(".")[1] for module in graph if module != "dit_jax"}
    assert top == set(RANKS)

    def rank(module):
        return RANKS.index(module.split(".")[1])

    wrong = [
        f"{module} imports {imported}"
        for module, inside in graph.items()
        for imported in inside
        if module != "dit_jax" and rank(imported) > rank(module)
    ]
    assert wrong == []


def test_no_files_import_each_other():
    graph = import_graph()
    reached = {module: set(inside) for module, inside in graph.items()}
    for middle in graph:  # Warshall's transitive closure
        for module in graph:
            if middle in reached[module]:
                reached[module] |= reached[middle]
    assert sorted(module for module in graph if module in reached[module]) == []


def test_the_package_needs_nothing_that_lies_beside_it():
    """What made assets is in tools/, which is not installed with the package."""
    beside = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"dit_jax"}
    for file in (ROOT / "dit_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not beside & {name.partition(".")[0] for name in names}, file


def test_formats_of_foreign_files_know_nothing_of_this_project():
    graph = import_graph()
    for module in graph:
        if module.startswith("dit_jax.formats."):
            others = {name for name in graph[module] if not name.startswith("dit_jax.formats.")}
            assert others <= {"dit_jax.errors"}, module


def test_no_two_modules_share_a_name():
    modules = [name.rpartition(".")[2] for name in module_names() if name != "dit_jax"]
    assert sorted(name for name in set(modules) if modules.count(name) > 1) == []


def test_the_interface_resolves():
    for name in dit_jax.__all__:
        assert callable(getattr(dit_jax, name))
        assert name in dir(dit_jax)
    with pytest.raises(AttributeError, match="load_modle"):
        _ = dit_jax.load_modle


def test_ask_stays_the_function():
    import dit_jax.ask

    assert isinstance(dit_jax.ask, types.FunctionType)


def test_an_installed_package_has_every_file():
    """Files that are not modules are installed only if pyproject.toml lists them."""
    package = ROOT / "dit_jax"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["dit_jax"]
    included = {file for pattern in patterns for file in package.glob(pattern) if file.is_file()}
    ours = {
        file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    }
    assert included == {file for file in ours if file.suffix != ".py"} and len(included) > 15
    modules = {file.parent for file in ours if file.suffix == ".py"}
    assert all((folder / "__init__.py").exists() for folder in modules)


def test_eight_devices():
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8


PAGE_FAULTS = """
import resource, sys
import numpy as np
from dit_jax.runtime import host_memory
if "keep" in sys.argv:
    host_memory.keep_freed()
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(48 << 18, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_MMAP_MAX_": "65536"}, False)])
def test_freed_arrays_are_kept_for_the_next_ones(environment, kept):
    def faults(*arguments):
        command = [sys.executable, "-c", PAGE_FAULTS, *arguments]
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        # Without numpy's huge pages, which make one fault of 512.
        env = {**ours, **environment, "NUMPY_MADVISE_HUGEPAGE": "0"}
        return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    assert faults() > 10_000
    assert (faults("keep") < 1_000) == kept


COMPILE = """
import jax
from dit_jax.runtime import host_memory
trims = []
host_memory._glibc = lambda name: trims.append
host_memory._LONG = 1000  # not even a busy machine takes that long
for _ in range(2):
    host_memory.trim_after_compiling()
jax.jit(lambda x: x + 1)(1.0)
assert not trims
host_memory._LONG = 0
jax.jit(lambda x: x + 2)(1.0)
assert len(trims) == 1, trims
"""


def test_memory_is_given_back_after_a_long_compilation():
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)


def test_programs_are_kept_where_the_users_caches_are(monkeypatch, tmp_path):
    settings = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: settings.append(setting))
    startup.prepare()  # the suite's own folder, see conftest.py
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    startup.prepare()  # no place for a folder
    assert settings == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    startup.prepare()
    assert settings == [("jax_compilation_cache_dir", str(tmp_path / "dit_jax" / "xla"))]
    # Such a variable counts as none, and nothing is written to the working directory.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "caches", "~nobody_of_that_name/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        startup.prepare()
        assert settings.pop()[1] == str(tmp_path / "home" / ".cache" / "dit_jax" / "xla")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit_jax", "file", "home"]
    monkeypatch.setenv("HOME", "~nobody_of_that_name")  # of a user without a home
    startup.prepare()
    assert len(settings) == 1


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", "--xla_gpu_dot_merger_threshold_mb=0"),
        ("--xla_a=1", "--xla_gpu_dot_merger_threshold_mb=0 --xla_a=1"),
        ("--xla_gpu_dot_merger_threshold_mb=32", "--xla_gpu_dot_merger_threshold_mb=32"),
    ],
)
def test_flags_for_a_gpu_leave_what_the_user_said(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(xla_flags, "has_cuda_plugin", lambda: False)
    xla_flags.set_defaults()
    assert os.environ["XLA_FLAGS"] == given
    monkeypatch.setattr(xla_flags, "has_cuda_plugin", lambda: True)
    xla_flags.set_defaults()
    assert os.environ["XLA_FLAGS"] == expected
