#!/usr/bin/env bash
# Runs dit_jax on GPU nodes of a SLURM cluster: one process per GPU, which find each other by themselves.
#
#   launch/slurm.sh COMMAND --name NAME [options] [-- ARGUMENTS OF dit_jax.main]
#
# Commands:
#   run       submit the job
#   script    print the batch script that `run` submits
#   logs      follow the job's log
#   delete    cancel the jobs of that name (SIGTERM first: the run saves a checkpoint)
#
# Options:
#   --name NAME           name of the job; the log is NAME-JOBID.log in the current folder
#   --nodes N             default 1
#   --gpus-per-node N     default 8
#   --cpus-per-gpu N      default 8
#   --time LIMIT          default 24:00:00
#   --partition NAME      default: the cluster's
#   --account NAME        default: yours
#   --python FILE         Python of an environment with dit_jax, in a folder that all nodes see; default: .venv/bin/python
#   --job ID              for logs
#   --dry-run             print every command and run none
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' nodes=1 gpus=8 cpus=8 time=24:00:00 partition='' account='' python="$ROOT/.venv/bin/python" job=''
arguments=()
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "${BASH_SOURCE[0]}"; exit 0; }
command=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --name) need_value "$@"; name=$2; shift ;;
    --nodes) need_value "$@"; nodes=$2; shift ;;
    --gpus-per-node) need_value "$@"; gpus=$2; shift ;;
    --cpus-per-gpu) need_value "$@"; cpus=$2; shift ;;
    --time) need_value "$@"; time=$2; shift ;;
    --partition) need_value "$@"; partition=$2; shift ;;
    --account) need_value "$@"; account=$2; shift ;;
    --python) need_value "$@"; python=$2; shift ;;
    --job) need_value "$@"; job=$2; shift ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) show_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *) fail "unknown option '$1': see --help" ;;
  esac
  shift
done
check --name "$name" "$NAME_PATTERN"

# All of a node's GPUs are visible to each of its processes, and JAX takes the one of the process's rank there:
# binding GPUs to tasks (--gpus-per-task) would hide the others' and break that.
script() {
  check --cpus-per-gpu "$cpus" "$NUMBER_PATTERN"
  check --python "$python" '/[^[:cntrl:]]+'
  check_run ${arguments[@]+"${arguments[@]}"}
  cat << EOF
#!/usr/bin/env bash
set -uo pipefail
cd $(command_line "$ROOT") || exit 2
# Not every version of srun takes over the job's --cpus-per-task.
srun --cpus-per-task=$cpus --kill-on-bad-exit=1 --wait=120 $(command_line "$python" -m dit_jax.main --distributed "${arguments[@]}")
status=\$?
# 75: a checkpoint was saved because the time is nearly up. A job that was cancelled is no longer RUNNING.
if [[ \$status == 75 && \$(squeue --noheader --jobs="\$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
EOF
}

submit() {
  check --nodes "$nodes" "$NUMBER_PATTERN"
  check --gpus-per-node "$gpus" "$NUMBER_PATTERN"
  check --time "$time" '([0-9]+-)?[0-9]{1,3}(:[0-9]{2}){0,2}'
  local text options
  text=$(script)
  options=(
    "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
    "--cpus-per-task=$cpus" "--time=$time" "--output=$name-%j.log" --open-mode=append
    --requeue --signal=TERM@120 # a checkpoint before the time is up
  )
  if [[ -n $partition ]]; then
    check --partition "$partition" '[A-Za-z0-9][-A-Za-z0-9_.,]*'
    options+=("--partition=$partition")
  fi
  if [[ -n $account ]]; then
    check --account "$account" '[A-Za-z0-9][-A-Za-z0-9_.]*'
    options+=("--account=$account")
  fi
  run_with_input "$text" sbatch "${options[@]}"
}

case $command in
  run) submit ;;
  script) script ;;
  logs)
    check --job "$job" '[1-9][0-9]*'
    run tail --lines=+1 --follow "$name-$job.log"
    ;;
  delete) run scancel "--name=$name" --me ;;
  *) fail "unknown command '$command': see --help" ;;
esac
