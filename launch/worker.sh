#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a slice: install, mount, start, logs, stop.
set -euo pipefail

venv=$HOME/dit_jax-venv
source_folder=$HOME/dit_jax-src
state=$HOME/dit_jax-run # pid, log and exit status of the run

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

is_running() {
  [[ -s $state/pid ]] && kill -0 "$(< "$state/pid")" 2> /dev/null
}

install() {
  # The image's own Python may be older than 3.11: uv brings another one along.
  python3 -m pip install --user --quiet uv
  python3 -m uv venv --quiet --clear --python 3.12 "$venv"
  cd "$source_folder"
  python3 -m uv pip install --quiet --python "$venv/bin/python" --constraint constraints.txt \
    'jax[tpu]' --editable .
  "$venv/bin/python" -c 'import dit_jax; print("installed dit_jax", dit_jax.__version__)'
}

mount_shared() {
  local target=/mnt/dit_jax
  ! mountpoint --quiet "$target" || return 0
  sudo mkdir -p "$target"
  sudo chown "$(id -u):$(id -g)" "$target"
  case $1 in
    gs://*)
      if ! command -v gcsfuse > /dev/null; then
        local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
        curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg \
          | sudo tee "$key" > /dev/null
        printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' \
          "$key" "$(lsb_release --codename --short)" | sudo tee "$list" > /dev/null
        sudo apt-get update --quiet=2
        sudo apt-get install --quiet=2 --yes gcsfuse
      fi
      # Workers must see at once what another one wrote, and finished folders are renamed into place.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 \
        "${1#gs://}" "$target"
      ;;
    *)
      command -v mount.nfs > /dev/null || sudo apt-get install --quiet=2 --yes nfs-common
      sudo mount -t nfs -o noac "$1" "$target"
      ;;
  esac
}

start() {
  ! is_running || fail "a run is under way (pid $(< "$state/pid")): stop it first"
  [[ -x $venv/bin/python ]] || fail "dit_jax is not installed: launch/tpu_vm.sh install"
  mkdir -p "$state"
  rm -f "$state/status" "$state/pid"
  cd "$source_folder"
  # A process group of its own, so that it outlives the connection.
  # shellcheck disable=SC2016  # expanded by the inner shell
  nohup setsid bash -c '
    state=$1; shift
    "$@" & child=$!
    trap "kill -TERM $child" TERM
    echo "$$" > "$state/pid"
    code=0; wait "$child" || code=$?
    while kill -0 "$child" 2> /dev/null; do code=0; wait "$child" || code=$?; done
    echo "$code" > "$state/status"
  ' dit_jax-run "$state" "$venv/bin/python" -m dit_jax.main --distributed "$@" \
    > "$state/log" 2>&1 < /dev/null &
  local tries=0
  until [[ -s $state/pid ]]; do
    ((tries++ < 100)) || fail "the run did not start: see $state/log"
    sleep 0.1
  done
  printf '%s: started, log in %s\n' "$(hostname)" "$state/log"
}

logs() {
  [[ -f $state/log ]] || fail "there is no run: launch/tpu_vm.sh run"
  tail --lines=+1 --follow --pid="$(< "$state/pid")" "$state/log"
  [[ -s $state/status ]] || fail "the run was killed: its status is not known"
  exit "$(< "$state/status")"
}

stop() {
  is_running || { printf '%s: no run\n' "$(hostname)"; return; }
  kill -TERM "$(< "$state/pid")"
}

command=${1:-}
(($# == 0)) || shift
case $command in
  install) install ;;
  mount) mount_shared "$1" ;;
  prepare-token) mkdir -p "$HOME/.cache/huggingface" && chmod 700 "$HOME/.cache/huggingface" ;;
  protect-token) chmod 600 "$HOME/.cache/huggingface/token" ;;
  start) start "$@" ;;
  logs) logs ;;
  stop) stop ;;
  *) fail "unknown command '$command'" ;;
esac
