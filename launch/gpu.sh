#!/usr/bin/env bash
# Runs dit_jax on the GPUs of this machine, in a container (docker) or in an environment of its own (plain).
#
#   launch/gpu.sh COMMAND [options] [-- ARGUMENTS OF dit_jax.main]
#
# Commands:
#   install   build the image, or make the environment
#   run       run; in a container the folder --runs is /runs, so that a run is --workdir /runs/NAME
#
# Options:
#   --plain          an environment in .venv instead of a container
#   --device NAME    cuda13 (default) or cuda12, by the driver
#   --runs FOLDER    the folder of this machine that a container sees as /runs; default: runs in this checkout
#   --dry-run        print every command and run none
#
# A Hugging Face token is taken from the variable HF_TOKEN, and never becomes part of a command.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

plain=0 device=cuda13 runs="$ROOT/runs"
arguments=()
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "${BASH_SOURCE[0]}"; exit 0; }
command=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --plain) plain=1 ;;
    --device) need_value "$@"; device=$2; shift ;;
    --runs) need_value "$@"; runs=$2; shift ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) show_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *) fail "unknown option '$1': see --help" ;;
  esac
  shift
done
check --device "$device" 'cuda1[23]'
check --runs "$runs" '/[^:,[:cntrl:]]*'
image=dit_jax:$device

install_plain() {
  run python3 -m venv "$ROOT/.venv"
  run "$ROOT/.venv/bin/python" -m pip install --quiet "--constraint=$ROOT/constraints.txt" \
    "jax[$device]" --editable "$ROOT"
}

run_docker() {
  run mkdir -p "$runs"
  # --env with a name alone takes the value from the environment.
  run docker run --rm --gpus=all --shm-size=8g --user "$(id -u):$(id -g)" --env HF_TOKEN --env HOME=/tmp \
    --volume "$runs:/runs" "$image" dit_jax.main "$@"
}

case $command in
  install)
    if ((plain)); then
      install_plain
    else
      run docker build "--file=$ROOT/launch/Dockerfile" "--build-arg=DEVICE=$device" "--tag=$image" "$ROOT"
    fi
    ;;
  run)
    check_run ${arguments[@]+"${arguments[@]}"}
    if ((plain)); then
      run cd "$ROOT" # configs are named from there
      run "$ROOT/.venv/bin/python" -m dit_jax.main "${arguments[@]}"
    else
      [[ $RUN_WORKDIR == /runs/* ]] || fail "--workdir is '$RUN_WORKDIR': use /runs/NAME, what else is in a container is lost"
      run_docker "${arguments[@]}"
    fi
    ;;
  *) fail "unknown command '$command': see --help" ;;
esac
