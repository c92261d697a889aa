#!/usr/bin/env bash
# Runs dit_jax on a TPU slice of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io must be installed there).
#
#   launch/gke.sh COMMAND --name NAME [options] [-- ARGUMENTS OF dit_jax.main]
#
# Commands:
#   image     build the image and push it
#   secret    make the cluster's secret from --hf-token-file
#   run       start the job
#   manifest  print what `run` applies
#   logs      wait for the pod of process 0, and follow its log
#   delete    delete the job
#
# Options:
#   --name NAME            name of the job
#   --image IMAGE          REGION-docker.pkg.dev/PROJECT/REPOSITORY/dit_jax:TAG
#   --accelerator TYPE     the node label: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, …
#   --topology SIZES       sizes of the slice: 4x4, 2x2x1, …
#   --chips-per-host N     default 4
#   --volume SOURCE        seen as /mnt/dit_jax by every pod: gs://BUCKET (Cloud Storage FUSE), or the name of a
#                          PersistentVolumeClaim that many nodes may write
#   --service-account NAME default: default; a bucket needs one that may write it
#   --namespace NAME       default: default
#   --context NAME         context of the kubectl configuration; default: the current one
#   --restarts N           restarts of the whole job, for preemptions; default 10
#   --poll SECONDS         for logs: default 10
#   --hf-token-file FILE   for secret: a file of mode 600 with a Hugging Face token
#   --dry-run              print every command and run none
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' image='' accelerator='' topology='' chips=4 volume='' account=default
namespace=default context='' restarts=10 poll=10 token=''
arguments=()
[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "${BASH_SOURCE[0]}"; exit 0; }
command=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --name) need_value "$@"; name=$2; shift ;;
    --image) need_value "$@"; image=$2; shift ;;
    --accelerator) need_value "$@"; accelerator=$2; shift ;;
    --topology) need_value "$@"; topology=$2; shift ;;
    --chips-per-host) need_value "$@"; chips=$2; shift ;;
    --volume) need_value "$@"; volume=$2; shift ;;
    --service-account) need_value "$@"; account=$2; shift ;;
    --namespace) need_value "$@"; namespace=$2; shift ;;
    --context) need_value "$@"; context=$2; shift ;;
    --restarts) need_value "$@"; restarts=$2; shift ;;
    --poll) need_value "$@"; poll=$2; shift ;;
    --hf-token-file) need_value "$@"; token=$2; shift ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) show_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *) fail "unknown option '$1': see --help" ;;
  esac
  shift
done
image_pattern='[a-z0-9][-a-z0-9._/]*(:[A-Za-z0-9_][-A-Za-z0-9._]*)?(@sha256:[0-9a-f]{64})?'
check --namespace "$namespace" "$NAME_PATTERN"
kubectl=(kubectl "--namespace=$namespace")
if [[ -n $context ]]; then
  check --context "$context" '[A-Za-z0-9][-A-Za-z0-9._:@/]*'
  kubectl+=("--context=$context")
fi

# A word as a YAML scalar in single quotes, in which only the quote itself is special.
yaml_quote() {
  printf "'%s'" "${1//"'"/"''"}"
}

manifest() {
  check --name "$name" "$NAME_PATTERN"
  check --image "$image" "$image_pattern"
  check --accelerator "$accelerator" 'tpu[-a-z0-9]*[a-z0-9]'
  check --topology "$topology" '[1-9][0-9]*(x[1-9][0-9]*){1,2}'
  check --chips-per-host "$chips" '1|4|8'
  check --service-account "$account" "$NAME_PATTERN"
  check --restarts "$restarts" "0|$NUMBER_PATTERN"
  check_run ${arguments[@]+"${arguments[@]}"}
  [[ $RUN_WORKDIR == /mnt/dit_jax/* ]] || fail "--workdir is '$RUN_WORKDIR': use /mnt/dit_jax/NAME, on the volume"
  local all_chips=$((${topology//x/*}))
  ((all_chips % chips == 0)) || fail "--topology $topology has $all_chips chips, no multiple of $chips"
  local volume_yaml mounts=false
  case $volume in
    gs://*)
      check --volume "$volume" 'gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]'
      mounts=true
      volume_yaml="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: '${volume#gs://}', "
      volume_yaml+="mountOptions: 'implicit-dirs,metadata-cache:ttl-secs:0,rename-dir-limit=100000'}}"
      ;;
    *)
      check --volume "$volume" "$NAME_PATTERN"
      volume_yaml="persistentVolumeClaim: {claimName: '$volume'}"
      ;;
  esac
  local word dollar=$'\x24' list="['dit_jax.main', '--distributed'"
  for word in "${arguments[@]}"; do
    # Kubernetes would put a variable's value for $(NAME); $$ is a dollar sign.
    list+=", $(yaml_quote "${word//"$dollar("/"$dollar$dollar("}")"
  done
  local text line
  text=$(sed '/^#/d' "$ROOT/launch/jobset.yaml")
  while IFS= read -r line; do
    line=${line/@NAME@/"$name"}
    line=${line/@NAMESPACE@/"$namespace"}
    line=${line/@RESTARTS@/"$restarts"}
    line=${line/@HOSTS@/"$((all_chips / chips))"}
    line=${line/@BUCKET_MOUNTS@/"$mounts"}
    line=${line/@SERVICE_ACCOUNT@/"$account"}
    line=${line/@ACCELERATOR@/"$accelerator"}
    line=${line/@TOPOLOGY@/"$topology"}
    line=${line/@IMAGE@/"$image"}
    line=${line/@CHIPS@/"$chips"}
    line=${line/@VOLUME@/"$volume_yaml"}
    case $line in
      *@ARGUMENTS@) line="${line%@ARGUMENTS@}$list]" ;; # last: the arguments may hold anything
    esac
    printf '%s\n' "$line"
  done <<< "$text"
}

# Follows the pod of process 0, the only one that prints: `kubectl logs job/…` takes any pod.
logs() {
  check --poll "$poll" "0|$NUMBER_PATTERN"
  local first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" phase
  while true; do
    phase=$(run "${kubectl[@]}" get pods "--selector=$first" '--output=jsonpath={.items[*].status.phase}')
    if ((DRY_RUN)); then
      printf '%s\n' "$phase"
      break
    fi
    case $phase in
      Running | Succeeded | Failed) break ;;
    esac
    printf '%s is %s\n' "$name" "${phase:-not there}" >&2
    sleep "$poll"
  done
  run "${kubectl[@]}" logs --follow --tail=-1 "--selector=$first" --container=dit-jax
}

case $command in
  image)
    check --image "$image" "$image_pattern"
    # The hosts of TPUs are x86, whatever this machine is.
    run docker build --platform=linux/amd64 "--file=$ROOT/launch/Dockerfile" --build-arg=DEVICE=tpu \
      "--tag=$image" "$ROOT"
    run docker push "$image"
    ;;
  secret)
    [[ -n $token ]] || fail "--hf-token-file is missing: see --help"
    check_secret_file "$token"
    run "${kubectl[@]}" create secret generic dit-jax-hf-token "--from-file=token=$token"
    ;;
  manifest) manifest ;;
  run)
    text=$(manifest)
    run_with_input "$text" "${kubectl[@]}" apply --filename=-
    ;;
  logs)
    check --name "$name" "$NAME_PATTERN"
    logs
    ;;
  delete)
    check --name "$name" "$NAME_PATTERN"
    run "${kubectl[@]}" delete jobset "$name"
    ;;
  *) fail "unknown command '$command': see --help" ;;
esac
