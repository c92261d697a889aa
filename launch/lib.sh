# What the launch scripts share: running or showing commands, and checking what goes into them.
# shellcheck shell=bash disable=SC2034  # variables that the scripts use

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo 'error: bash 4.4 or newer is needed' >&2; exit 2; }

DRY_RUN=0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# A command as one line that a shell reads back as the same words.
command_line() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command, or with --dry-run prints it and touches nothing.
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "$(command_line "$@")"
  else
    printf '+ %s\n' "$(command_line "$@")" >&2
    "$@"
  fi
}

# The same for a command that reads the given text on its standard input.
run_with_input() {
  local text=$1
  shift
  if ((DRY_RUN)); then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(command_line "$@")" "$text"
  else
    printf '+ %s <<< (%d bytes)\n' "$(command_line "$@")" "${#text}" >&2
    "$@" <<< "$text"
  fi
}

# check WHAT VALUE PATTERN: refuses a value that is not wholly of the pattern (an extended regular expression).
check() {
  [[ -n $2 ]] || fail "$1 is missing: see --help"
  [[ $2 =~ ^($3)$ ]] || fail "$1 is '$(printf '%q' "$2")': expected $3"
}

NAME_PATTERN='[a-z]([-a-z0-9]{0,38}[a-z0-9])?'
NUMBER_PATTERN='[1-9][0-9]{0,4}'

# The value of an option: need_value "$@" inside a loop over the arguments.
need_value() {
  (($# > 1)) || fail "$1 needs a value: see --help"
}

# Prints the comment at the top of a script.
show_help() {
  sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$1"
}

# The arguments of dit_jax.main must name a config and a workdir that every worker sees as a folder; sets RUN_WORKDIR.
check_run() {
  local word workdir='' config=''
  while (($#)); do
    word=$1
    case $word in
      --workdir=*) workdir=${word#*=} ;;
      --config=*) config=${word#*=} ;;
      --workdir | --config)
        need_value "$@"
        printf -v "${word#--}" '%s' "$2"
        shift
        ;;
      --distributed) fail "leave out --distributed: the script adds it where it is needed" ;;
      *[Tt][Oo][Kk][Ee][Nn]=?*) fail "'${word%%=*}' on a command line is seen by every user of a machine: see HF_TOKEN in launch/README.md" ;;
    esac
    [[ $word != *[[:cntrl:]]* ]] || fail "an argument holds a control character: $(printf '%q' "$word")"
    shift
  done
  [[ -n $config ]] || fail "give the run's arguments after '--': -- --config configs/NAME.py --workdir FOLDER"
  [[ -n $workdir ]] || fail "the run has no --workdir: it must be a folder that all workers share"
  [[ $workdir == /* ]] || fail "--workdir is '$workdir': use an absolute path on the workers (a bucket is mounted as a folder)"
  [[ /$workdir/ != */../* ]] || fail "--workdir is '$workdir': write it without '..'"
  RUN_WORKDIR=$workdir
}

# A file with a secret may be read by its owner alone.
check_secret_file() {
  local mode
  [[ -s $1 ]] || fail "the token file '$1' is missing or empty"
  mode=$(stat -c %a -- "$1" 2> /dev/null || stat -f %Lp -- "$1")
  [[ $mode == 600 || $mode == 400 ]] || fail "the token file '$1' has mode $mode: chmod 600 it"
}
