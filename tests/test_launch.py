"""The launch scripts against stand-ins that record the calls of their tools: nothing is launched or asked."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT
from jobset_schema import JOBSET

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TOOLS = ("gcloud", "kubectl", "sbatch", "scancel", "docker", "git", "python3", "tail", "mkdir")
# Records its command line as a shell reads it, and its standard input if it reads it; answers and fails on demand.
STAND_IN = r"""#!/usr/bin/env bash
set -euo pipefail
printf -v line '%q ' "${0##*/}" "$@"
case " $* " in
  *" --filename=- "* | *" --requeue "*) printf '%s\n' "${line% } <<'EOF'" "$(cat)" EOF >> "$RECORD" ;;
  *) printf '%s\n' "${line% }" >> "$RECORD" ;;
esac
if [[ -n ${FAIL_ON:-} && $line == *"$FAIL_ON"* ]]; then exit 7; fi
if [[ $line == *" describe "* || $line == *" get pods "* ]]; then
  state=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; printf '%s\n' "$state"
fi
"""
ODD = '--config.note=it\'s "$HOME" `id` $(id) & ; \\ *'
RUN = ("--", "--config", "configs/quickstart.py", "--workdir", "/mnt/dit_jax/a b", ODD)
TPU = ("--name", "dit", "--zone", "us-west4-a", "--project", "my-project")
SLICE = ("--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite", "--spot")
JOB = (
    "--name", "dit", "--image", "us-docker.pkg.dev/p/r/dit_jax:1", "--accelerator", "tpu-v5-lite-podslice",
    "--topology", "4x4", "--volume", "gs://my-runs",
)  # fmt: skip
IN_CONTAINER = ("--", "--config", "c.py", "--workdir", "/runs/a", ODD)


class Launcher:
    """Calls a script of a checkout whose path has a space, with the stand-ins first on the PATH."""

    def __init__(self, folder: Path):
        self.checkout = folder / "check out"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        self.bin, self.record, self.states = folder / "bin", folder / "record", folder / "states"
        self.bin.mkdir()
        for tool in TOOLS:
            self.install(self.bin / tool)
        self.states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
        self.token = folder / "token"
        self.token.write_text("hf_secret")
        self.token.chmod(0o600)

    def install(self, path: Path, text: str = STAND_IN) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, script: str, *arguments: str, fail_on: str = "", **env: str):
        self.record.write_text("")
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / script), *arguments],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": "/nowhere", "RECORD": str(self.record),
                "STATES": str(self.states), "FAIL_ON": fail_on, "TMPDIR": "/tmp", **env,
            },
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def recorded(self) -> str:
        return self.record.read_text()


@pytest.fixture
def launch(tmp_path):
    return Launcher(tmp_path)


def words(line: str) -> list[str]:
    """The words that a shell reads in a line."""
    script = f"for word in {line.strip()}; do printf '%s\\0' \"$word\"; done"
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return out.split("\0")[:-1]


# ------------------------------------------------------------------ the scripts as such


def test_shellcheck():
    binary = Path(sys.executable).with_name("shellcheck")
    if not binary.exists():
        pytest.skip("no shellcheck: pip install --requirement requirements-dev.txt")
    files = [str(file.relative_to(ROOT)) for file in SCRIPTS]
    result = subprocess.run(
        [binary, "--external-sources", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_every_script_stops_at_errors_and_helps(launch):
    for file in SCRIPTS:
        text = file.read_text()
        if file.name != "lib.sh":
            assert "\nset -euo pipefail\n" in text, file.name
            assert os.access(file, os.X_OK), file.name
        if file.name not in ("lib.sh", "worker.sh"):
            shown = launch(file.name, "--help")
            assert shown.returncode == 0 and "--dry-run" in shown.stdout
            assert "set -euo" not in shown.stdout
    assert launch("tpu_vm.sh").returncode == 2


# ------------------------------------------------------------------ dry runs are the truth

CASES = {
    "tpu all": ("tpu_vm.sh", "all", *TPU, *SLICE, "--mount", "gs://my-runs", "--poll", "0", *RUN),
    "tpu nfs": ("tpu_vm.sh", "install", *TPU, "--mount", "10.0.0.2:/share"),
    "tpu run": ("tpu_vm.sh", "run", *TPU, *RUN),
    "tpu logs": ("tpu_vm.sh", "logs", *TPU, "--worker", "3"),
    "tpu stop": ("tpu_vm.sh", "stop", *TPU),
    "tpu delete": ("tpu_vm.sh", "delete", *TPU),
    "gke image": ("gke.sh", "image", *JOB),
    "gke run": ("gke.sh", "run", *JOB, "--context", "gke_p_us-west4_c", *RUN),
    "gke logs": ("gke.sh", "logs", *JOB, "--poll", "0"),
    "gke delete": ("gke.sh", "delete", *JOB),
    "slurm run": ("slurm.sh", "run", "--name", "dit", "--nodes", "2", "--partition", "a100", *RUN),
    "slurm logs": ("slurm.sh", "logs", "--name", "dit", "--job", "12"),
    "slurm delete": ("slurm.sh", "delete", "--name", "dit"),
    "gpu install": ("gpu.sh", "install"),
    "gpu run": ("gpu.sh", "run", "--runs", "/data/my runs", *IN_CONTAINER),
}


def dry(arguments):
    """The same call with --dry-run, before the run's own arguments."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return (*arguments[:at], "--dry-run", *arguments[at:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(launch, case):
    script, *arguments = CASES[case]
    if case == "gke logs":
        launch.states.write_text("\nPending\nRunning\n")
    planned = launch(script, *dry(arguments))
    assert planned.returncode == 0, planned.stderr
    assert launch.recorded() == ""
    done = launch(script, *arguments)
    assert done.returncode == 0, done.stderr
    lines = launch.recorded().splitlines()
    once = [
        line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]
    ]  # polled until ACTIVE or Running
    assert once == planned.stdout.splitlines()
    assert len(lines) - len(once) == (2 if case in ("tpu all", "gke logs") else 0)


def test_plain_gpu_runs_python_in_the_checkout(launch):
    launch.install(launch.checkout / ".venv" / "bin" / "python")
    assert launch("gpu.sh", "install", "--plain").returncode == 0
    venv, pip = map(words, launch.recorded().splitlines())
    assert venv == ["python3", "-m", "venv", str(launch.checkout / ".venv")]
    assert pip[:4] == ["python", "-m", "pip", "install"] and "jax[cuda13]" in pip
    assert launch("gpu.sh", "run", "--plain", *RUN).returncode == 0
    assert words(launch.recorded())[1:] == ["-m", "dit_jax.main", *RUN[1:]]


# ------------------------------------------------------------------ what is launched


def test_a_tpu_run_starts_the_same_command_on_every_worker(launch):
    assert launch("tpu_vm.sh", "run", *TPU, *RUN).returncode == 0
    call = words(launch.recorded())
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "dit"]
    assert call[6:9] == ["--zone=us-west4-a", "--project=my-project", "--worker=all"]
    remote = words(call[9].removeprefix("--command="))  # the remote shell reads it once more
    assert remote == ["bash", "dit_jax-src/launch/worker.sh", "start", *RUN[1:]]


def test_a_failed_queued_resource_ends_the_wait(launch):
    launch.states.write_text("WAITING_FOR_RESOURCES\nFAILED\nACTIVE\n")
    result = launch("tpu_vm.sh", "all", *TPU, *SLICE, "--poll", "0", *RUN)
    assert result.returncode == 2
    assert (
        "error: the queued resource 'dit' is FAILED: delete it and create it again" in result.stderr
    )
    assert " scp " not in launch.recorded()


def test_the_job_set_is_valid_and_holds_the_command(launch):
    def load(*extra, volume="gs://my-runs"):
        done = launch("gke.sh", "run", *JOB, "--volume", volume, *extra, *RUN)
        assert done.returncode == 0, done.stderr
        text = launch.recorded().split("<<'EOF'\n")[1].removesuffix("EOF\n")
        job_set = yaml.safe_load(text)
        jsonschema.validate(job_set, JOBSET)
        return job_set, job_set["spec"]["replicatedJobs"][0]["template"]["spec"]

    job_set, job = load()
    assert job_set["metadata"]["name"] == "dit"
    assert job["parallelism"] == job["completions"] == 4  # 16 chips, 4 per host
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    escaped = ODD.replace("$(", "$$(")  # Kubernetes puts variables in for $(NAME)
    assert container["args"] == ["dit_jax.main", "--distributed", *RUN[1:-1], escaped]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-runs"
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"

    _, job = load("--topology", "2x2x4", "--chips-per-host", "8", "--name", "null", volume="true")
    assert job["parallelism"] == 2
    assert job["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "true"}
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "false"


def test_logs_are_those_of_process_0(launch):
    launch.states.write_text("Succeeded\n")  # of a job that is over, too
    assert launch("gke.sh", "logs", *JOB).returncode == 0
    found, shown = map(words, launch.recorded().splitlines())
    (pod,) = (word for word in shown if word.startswith("--selector="))
    assert pod in found and "--tail=-1" in shown  # with a selector kubectl shows ten lines
    assert pod.split(",") == [
        "--selector=jobset.sigs.k8s.io/jobset-name=dit",
        "batch.kubernetes.io/job-completion-index=0",
    ]


def test_the_schema_refuses_what_is_misspelt(launch):
    job_set = yaml.safe_load(launch("gke.sh", "manifest", *JOB, *RUN).stdout)
    jsonschema.validate(job_set, JOBSET)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["paralelism"] = job.pop("parallelism")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job_set, JOBSET)


def test_slurm_starts_one_process_per_gpu(launch):
    options = ("--nodes", "2", "--gpus-per-node", "4", "--python", "/env dir/bin/python")
    assert launch("slurm.sh", "run", "--name", "dit", *options, *RUN).returncode == 0
    first, *script, end = launch.recorded().splitlines()
    call = words(first.removesuffix(" <<'EOF'"))
    assert call[0] == "sbatch" and end == "EOF"
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(call)
    assert script[0] == "#!/usr/bin/env bash"
    assert words(script[2].removesuffix(" || exit 2")) == ["cd", str(launch.checkout)]
    command = words(script[4])
    start = command.index("/env dir/bin/python")
    assert command[:2] == ["srun", "--cpus-per-task=8"] and "--cpus-per-task=8" in call
    assert command[start + 1 :] == ["-m", "dit_jax.main", "--distributed", *RUN[1:]]


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (2, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_slurm_puts_a_preempted_run_back_into_the_queue(launch, status, state, requeued):
    """A run that its user cancelled also ends with 75 but is not running, and is not requeued."""
    text = launch("slurm.sh", "script", "--name", "dit", *RUN).stdout
    launch.install(launch.bin / "srun", f"#!/bin/sh\nexit {status}\n")
    launch.install(launch.bin / "squeue", f"#!/bin/sh\necho {state}\n")
    launch.install(launch.bin / "scontrol")
    launch.install(launch.checkout / "launch" / "job.sh", text)
    assert launch("job.sh", SLURM_JOB_ID="12").returncode == status
    assert launch.recorded() == ("scontrol requeue 12\n" if requeued else "")


# ------------------------------------------------------------------ failures and bad input


@pytest.mark.parametrize(
    ("case", "fail_on"),
    [
        ("tpu all", "queued-resources create"),
        ("tpu all", "archive"),
        ("tpu all", " scp "),
        ("tpu all", "worker.sh\\\\ install"),
        ("tpu all", "worker.sh\\\\ start"),
        ("tpu all", "worker.sh\\\\ logs"),
        ("tpu all", " describe "),
        ("gke image", "push"),
        ("gke run", "apply"),
        ("slurm run", "sbatch"),
        ("gpu run", "docker run"),
    ],
)
def test_a_failed_command_ends_the_script(launch, case, fail_on):
    fail_on = fail_on.replace("\\\\", "\\")
    script, *arguments = CASES[case]
    result = launch(script, *arguments, fail_on=fail_on)
    assert result.returncode == 7
    assert fail_on in launch.recorded().splitlines()[-1] or "EOF" in launch.recorded()


@pytest.mark.parametrize(
    "name", ["", "Dit", "-dit", "dit-", "a b", "a;id", "$(id)", "a\nb", "dit\n", "a" * 41]
)
def test_odd_names_are_refused(launch, name):
    for script, command, options in (
        ("tpu_vm.sh", "delete", ("--zone", "us-west4-a")),
        ("gke.sh", "delete", ()),
        ("slurm.sh", "delete", ()),
    ):
        result = launch(script, command, "--name", name, *options)
        assert result.returncode == 2 and result.stderr.startswith("error: --name is")
        assert launch.recorded() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tpu_vm.sh", "delete", "--name", "a", "--zone", "us-west4-a --quiet"), "--zone is"),
        (("tpu_vm.sh", "delete", *TPU, "--project", "p;id"), "--project is"),
        (("tpu_vm.sh", "create", *TPU, *SLICE, "--runtime-version", "$(id)"), "--runtime-version is"),
        (("tpu_vm.sh", "create", *TPU), "--accelerator-type is missing"),
        (("tpu_vm.sh", "install", *TPU, "--mount", "gs://a b"), "--mount is"),
        (("tpu_vm.sh", "run", *TPU), "give the run's arguments"),
        (("tpu_vm.sh", "run", *TPU, "--", "--config", "c.py"), "the run has no --workdir"),
        (("tpu_vm.sh", "run", *TPU, "--", "--config", "c.py", "--workdir", "gs://b/x"), "absolute path"),
        (("tpu_vm.sh", "run", *TPU, *RUN, "--distributed"), "leave out --distributed"),
        (("tpu_vm.sh", "run", *TPU, *RUN, "--config.hf_token=hf_x"), "HF_TOKEN"),
        (("tpu_vm.sh", "run", *TPU, *RUN, "a\nb"), "control character"),
        (("tpu_vm.sh", "run", *TPU, "--nmae", "x"), "unknown option '--nmae'"),
        (("tpu_vm.sh", "fly", *TPU), "unknown command 'fly'"),
        (("gke.sh", "run", *JOB, "--topology", "4x", *RUN), "--topology is"),
        (("gke.sh", "run", *JOB, "--topology", "3x3", *RUN), "no multiple of 4"),
        (("gke.sh", "run", *JOB, "--image", "a b", *RUN), "--image is"),
        (("gke.sh", "run", *JOB, "--", "--config", "c.py", "--workdir", "/tmp/a"), "on the volume"),
        (("gke.sh", "run", *JOB, "--", "--config", "c.py", "--workdir", "/mnt/dit_jax/../a"), "'..'"),
        (("slurm.sh", "run", "--name", "a", "--time", "1h", *RUN), "--time is"),
        (("slurm.sh", "run", "--name", "a", "--nodes", "0", *RUN), "--nodes is"),
        (("gpu.sh", "run", *RUN), "use /runs/NAME"),
        (("gpu.sh", "run", "--runs", "a:b", *IN_CONTAINER), "--runs is"),
        (("gpu.sh", "install", "--device"), "--device needs a value"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_calls_nothing(launch, arguments, said):
    result = launch(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert result.stderr.count("\n") == 1
    assert launch.recorded() == ""


# ------------------------------------------------------------------ secrets


def test_a_token_travels_as_a_file(launch):
    token = str(launch.token)
    result = launch("tpu_vm.sh", "install", *TPU, "--hf-token-file", token)
    assert result.returncode == 0, result.stderr
    steps = [words(line) for line in launch.recorded().splitlines()]
    copied = next(i for i, call in enumerate(steps) if token in call)
    assert "dit:.cache/huggingface/token" in steps[copied]
    assert steps[copied - 1][-1].endswith(
        "prepare-token"
    )  # the folder is closed before the file comes
    assert steps[copied + 1][-1].endswith("protect-token")
    assert launch("gke.sh", "secret", "--hf-token-file", token).returncode == 0
    assert f"--from-file=token={token}" in words(launch.recorded())
    assert launch("gpu.sh", "run", *IN_CONTAINER, HF_TOKEN="hf_secret").returncode == 0
    for text in (result.stderr, result.stdout, launch.recorded()):
        assert "hf_secret" not in text


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_a_token_that_others_can_read_is_refused(launch, mode):
    launch.token.chmod(mode)
    for script, *arguments in (("tpu_vm.sh", "install", *TPU), ("gke.sh", "secret")):
        result = launch(script, *arguments, "--hf-token-file", str(launch.token))
        assert result.returncode == 2 and "chmod 600" in result.stderr
        assert launch.recorded() == ""


# ------------------------------------------------------------------ on the worker

WORKER_PYTHON = r"""#!/usr/bin/env bash
printf -v line '%q ' "$@"; echo "args ${line% }"
trap 'echo saved a checkpoint; exit 75' TERM
case "$*" in
  *sleep*) while :; do sleep 0.05; done ;;
  *bad*) exit 3 ;;
esac
"""


@pytest.fixture
def worker(launch, tmp_path):
    """Calls worker.sh in its own home folder, with a Python that only prints its arguments."""
    home = tmp_path / "home"
    launch.install(home / "dit_jax-venv" / "bin" / "python", WORKER_PYTHON)
    (home / "dit_jax-src").mkdir(parents=True)
    for tool in ("mkdir", "tail"):
        (launch.bin / tool).unlink()  # the real ones
    for tool in ("mountpoint", "sudo", "gcsfuse", "mount.nfs"):
        text = "#!/bin/sh\nexit 1\n" if tool == "mountpoint" else STAND_IN
        launch.install(launch.bin / tool, text)
    return lambda *arguments: launch("worker.sh", *arguments, HOME=str(home))


def test_a_run_on_a_worker_outlives_the_connection_and_keeps_its_status(worker):
    assert worker("logs").returncode == 2
    started = worker("start", "--workdir", "/a b", ODD)
    assert started.returncode == 0 and "started" in started.stdout
    shown = worker("logs")
    assert shown.returncode == 0
    assert words(shown.stdout.splitlines()[0])[1:] == [
        "-m", "dit_jax.main", "--distributed", "--workdir", "/a b", ODD,
    ]  # fmt: skip
    assert worker("start", "bad").returncode == 0
    assert worker("logs").returncode == 3


def test_stopping_a_worker_lets_the_run_save(worker):
    assert worker("start", "sleep").returncode == 0
    try:
        again = worker("start", "sleep")
        assert again.returncode == 2 and "a run is under way" in again.stderr
        time.sleep(0.3)  # the stand-in sets its trap
    finally:
        assert worker("stop").returncode == 0
    shown = worker("logs")
    assert "saved a checkpoint" in shown.stdout and shown.returncode == 75
    assert "no run" in worker("stop").stdout


def test_a_worker_installs_and_mounts(worker, launch):
    assert worker("install").returncode == 0
    calls = [words(line) for line in launch.recorded().splitlines()]
    assert [call[:3] for call in calls] == [
        ["python3", "-m", "pip"], ["python3", "-m", "uv"], ["python3", "-m", "uv"],
    ]  # fmt: skip
    assert "jax[tpu]" in calls[2] and "--constraint" in calls[2]
    assert worker("mount", "gs://my-runs").returncode == 0
    assert words(launch.recorded().splitlines()[-1])[-2:] == ["my-runs", "/mnt/dit_jax"]
    assert worker("mount", "10.0.0.2:/share").returncode == 0
    assert words(launch.recorded().splitlines()[-1])[:4] == ["sudo", "mount", "-t", "nfs"]
    assert worker("mount", "10.0.0.2:/share").returncode == 0


# ------------------------------------------------------------------ the documentation


def test_the_commands_of_the_documentation_work_and_call_nothing(launch):
    lines = [line.strip() for line in (ROOT / "docs" / "launch.md").read_text().splitlines()]
    calls = [words(line) for line in lines if line.startswith("launch/")]
    assert len(calls) >= 10
    for call in calls:
        assert "--dry-run" in call
        shown = launch(call[0].removeprefix("launch/"), *call[1:])
        assert shown.returncode == 0 and shown.stdout, shown.stderr
        assert launch.recorded() == ""
        if "create" in call:  # the page shows what it prints
            assert all(line in lines for line in shown.stdout.splitlines())
