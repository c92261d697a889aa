#!/usr/bin/env bash
# Runs dit_jax on a Cloud TPU VM slice, all its workers.
#
#   launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [-- ARGUMENTS OF dit_jax.main]
#
# Commands, in their usual order:
#   create    ask for the slice (a queued resource) and wait until it is there
#   install   copy the committed state of this checkout to every worker and install it
#   run       start `python -m dit_jax.main --distributed ARGUMENTS` on every worker; returns at once
#   logs      follow the log of worker 0 until the run ends; exits with the run's status
#   stop      SIGTERM on every worker: the run saves a checkpoint and ends
#   delete    delete the slice
#   all       create, install, run, logs (the slice stays: delete it yourself)
#
# Options:
#   --name NAME              name of the queued resource and of its node
#   --zone ZONE              us-central1-a, …
#   --project PROJECT        default: the one of the gcloud configuration
#   --accelerator-type TYPE  for create: v5litepod-16, v6e-16, v5p-8, …
#   --runtime-version NAME   for create: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, …
#   --spot                   for create: preemptible capacity
#   --mount SOURCE           for install: mounted on every worker as /mnt/dit_jax; gs://BUCKET or HOST:/EXPORT (NFS)
#   --hf-token-file FILE     for install: a file of mode 600 with a Hugging Face token
#   --worker N               for logs: another worker's log
#   --poll SECONDS           for create: default 30
#   --dry-run                print every command and run none
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' zone='' project='' accelerator='' runtime='' spot=0 mount='' token='' worker=0 poll=30
arguments=()
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "${BASH_SOURCE[0]}"; exit 0; }
command=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --name) need_value "$@"; name=$2; shift ;;
    --zone) need_value "$@"; zone=$2; shift ;;
    --project) need_value "$@"; project=$2; shift ;;
    --accelerator-type) need_value "$@"; accelerator=$2; shift ;;
    --runtime-version) need_value "$@"; runtime=$2; shift ;;
    --mount) need_value "$@"; mount=$2; shift ;;
    --hf-token-file) need_value "$@"; token=$2; shift ;;
    --worker) need_value "$@"; worker=$2; shift ;;
    --poll) need_value "$@"; poll=$2; shift ;;
    --spot) spot=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) show_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *) fail "unknown option '$1': see --help" ;;
  esac
  shift
done
check --name "$name" "$NAME_PATTERN"
check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+'
check --worker "$worker" '0|[1-9][0-9]{0,3}'
check --poll "$poll" "0|$NUMBER_PATTERN"
where=("--zone=$zone")
if [[ -n $project ]]; then
  check --project "$project" '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]'
  where+=("--project=$project")
fi
archive="${TMPDIR:-/tmp}/dit_jax-$name.tar.gz"
worker_script=dit_jax-src/launch/worker.sh

# on WORKER WORDS...: a command on a worker, or on 'all' of them.
on() {
  local target=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$target" \
    "--command=$(command_line "$@")"
}

copy() {
  run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all
}

create() {
  check --accelerator-type "$accelerator" '[a-z0-9]+-[1-9][0-9]*'
  check --runtime-version "$runtime" '[a-z0-9][-a-z0-9.]*'
  local options=("--node-id=$name" "--accelerator-type=$accelerator" "--runtime-version=$runtime")
  ((!spot)) || options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
  local state=''
  until [[ $state == ACTIVE ]]; do
    state=$(run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)')
    if ((DRY_RUN)); then
      printf '%s\n' "$state"
      return
    fi
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        fail "the queued resource '$name' is $state: delete it and create it again"
        ;;
      *)
        printf '%s is %s\n' "$name" "${state:-unknown}" >&2
        sleep "$poll"
        ;;
    esac
  done
}

install() {
  [[ -z $mount || $mount =~ ^gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]$ \
    || $mount =~ ^[a-zA-Z0-9][-.a-zA-Z0-9]*:/[-_./a-zA-Z0-9]*$ ]] \
    || fail "--mount is '$(printf '%q' "$mount")': use gs://BUCKET or HOST:/EXPORT"
  [[ -z $token ]] || check_secret_file "$token"
  run git -C "$ROOT" archive --format=tar.gz --prefix=dit_jax-src/ "--output=$archive" HEAD
  copy "$archive" dit_jax-src.tar.gz
  on all tar --extract --gzip --file dit_jax-src.tar.gz
  on all bash "$worker_script" install
  [[ -z $mount ]] || on all bash "$worker_script" mount "$mount"
  if [[ -n $token ]]; then
    on all bash "$worker_script" prepare-token
    copy "$token" .cache/huggingface/token
    on all bash "$worker_script" protect-token
  fi
}

start() {
  check_run ${arguments[@]+"${arguments[@]}"}
  on all bash "$worker_script" start "${arguments[@]}"
}

case $command in
  create) create ;;
  install) install ;;
  run) start ;;
  logs) on "$worker" bash "$worker_script" logs ;;
  stop) on all bash "$worker_script" stop ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  all)
    check_run ${arguments[@]+"${arguments[@]}"}
    create
    install
    start
    on "$worker" bash "$worker_script" logs
    ;;
  *) fail "unknown command '$command': see --help" ;;
esac
