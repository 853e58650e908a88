#!/usr/bin/env bash
# launch/gke_xpk.sh [--settings FILE] [--dry-run] COMMAND
#
# Trains on GKE with xpk (pip install xpk), on TPU slices or GPU nodes.
#   cluster  create the cluster; after a failure delete what there is of it
#   run      submit, then follow until training has ended
#   submit   the workload: xpk puts this checkout into an image; JobSet restarts it after preemptions and failures
#   follow   its first worker's log          status   of all workloads
#   delete   the workload                    delete-cluster   and everything in it
# Settings: launch/settings.env; ACCELERATOR may be a device that xpk knows, such as h100-80gb-8. --dry-run prints the
# commands.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"

WHERE=(--zone="$ZONE")
[[ -z $PROJECT ]] || WHERE+=(--project="$PROJECT")
case $ACCELERATOR in
  v[0-9]* | tpu*)
    DEVICE=(--tpu-type="$ACCELERATOR")
    COUNT=(--num-slices="$SLICES")
    ;;
  *)
    DEVICE=(--device-type="$ACCELERATOR")
    COUNT=(--num-nodes="$SLICES")
    ;;
esac
SELECTOR="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"

make_cluster() {
  local capacity existing
  case $CAPACITY in
    spot) capacity=--spot ;;
    on-demand) capacity=--on-demand ;;
    reserved)
      [[ -n $RESERVATION ]] || die "CAPACITY=reserved: set RESERVATION to its name"
      capacity=--reservation=$RESERVATION
      ;;
    *) die "CAPACITY=$CAPACITY: must be spot, on-demand or reserved" ;;
  esac
  existing=$(run gcloud container clusters list ${PROJECT:+--project="$PROJECT"} --filter="name=$CLUSTER" --format="value(name)") ||
    die "the cloud did not answer whether cluster $CLUSTER exists; nothing was created"
  if [[ $DRY_RUN == yes ]]; then
    echo "$existing"
    existing=''
  fi
  if ! run xpk cluster create --cluster="$CLUSTER" "${DEVICE[@]}" "${COUNT[@]}" "${WHERE[@]}" "$capacity" \
    "${CREATE_FLAGS[@]}"; then
    [[ -z $existing ]] || die "cluster $CLUSTER could not be changed; it existed before and has been kept"
    note "deleting what was created of cluster $CLUSTER"
    delete_cluster || note "cluster $CLUSTER could not be deleted; delete it by hand, it costs money"
    die "cluster $CLUSTER could not be created"
  fi
}

delete_cluster() {
  run xpk cluster delete --cluster="$CLUSTER" "${WHERE[@]}" --force
}

# Prints the container's command. One line, since xpk puts it into YAML, for GPUs even into double quotes. xpk sends
# SIGTERM to this shell alone, which forwards it; training saves a checkpoint, and the shell exits with 143, which xpk
# restarts.
training_command() {
  local image_setup
  image_setup="pip install --quiet $(in_quotes ".[$EXTRA]") && "
  [[ -z $DOCKER_IMAGE ]] || image_setup=''
  # shellcheck disable=SC2016  # for the container's shell
  printf '%s' "$image_setup" "${SETUP:+$SETUP && }" '{ trap '\''kill -TERM $!; wait $!; exit 143'\'' TERM; ' \
    "$(in_quotes "${TRAIN[@]}")" ' & wait $!; }'
}

submit() {
  # a process that lost another one exits with status 1
  local flags=(--max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1) name command
  if [[ -n $DOCKER_IMAGE ]]; then
    flags+=(--docker-image="$DOCKER_IMAGE")
  else
    flags+=(--base-docker-image="$BASE_IMAGE" --script-dir="$ROOT")
  fi
  for name in "${STORAGE[@]}"; do flags+=(--storage="$name"); done
  command=$(training_command)
  [[ $command != *$'\n'* ]] || die "TRAIN and SETUP: must not contain line breaks here"
  [[ ${DEVICE[0]} != --device-type=* || $command != *[\"\\]* ]] ||
    die "TRAIN and SETUP: must not contain \" or \\ for GPUs, where xpk quotes them; move the command into a script"
  # 300 seconds to write a last checkpoint
  run xpk workload create --workload="$NAME" --cluster="$CLUSTER" "${DEVICE[@]}" "${COUNT[@]}" "${WHERE[@]}" \
    "${flags[@]}" --termination-grace-period-seconds=300 --command="$command" ||
    die "workload $NAME could not be submitted"
}

# Returns 0 if finished, 125 if failed, 124 if running or queued, anything else if there was no answer. The time-out must
# be at least a second: with 0, kubectl reports no time-out and xpk does not return 124.
workload_state() {
  run xpk workload list --cluster="$CLUSTER" "${WHERE[@]}" --wait-for-job-completion="$NAME" --timeout=1
}

follow() {
  local state misses=0 seen=no
  while :; do
    state=0
    workload_state >&2 || state=$? # this also points kubectl at the cluster
    if [[ $state == 124 || $seen == no ]]; then
      # Ends with the pods; after a preemption there will be new ones.
      run kubectl logs --follow --prefix --all-containers --selector="$SELECTOR" --tail=-1 || true
      seen=yes
    fi
    [[ $DRY_RUN == no ]] || return 0
    case $state in
      0)
        note "training has finished"
        return 0
        ;;
      125) die "workload $NAME has failed; the log is above" ;;
      124) misses=0 ;;
      *) ((++misses < TRIES)) || die "workload $NAME: no answer $misses times in a row; it may still run" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

main() {
  ((${#WORDS[@]} == 1)) || die "give one of: cluster, run, submit, follow, status, delete, delete-cluster (--help)"
  need xpk "pip install xpk"
  need gcloud "https://cloud.google.com/sdk/docs/install"
  need kubectl "gcloud components install kubectl"
  case ${WORDS[0]} in
    cluster) make_cluster ;;
    run)
      submit
      follow
      ;;
    submit) submit ;;
    follow) follow ;;
    status) run xpk workload list --cluster="$CLUSTER" "${WHERE[@]}" ;;
    delete) run xpk workload delete --workload="$NAME" --cluster="$CLUSTER" "${WHERE[@]}" --force ;;
    delete-cluster) delete_cluster ;;
    *) die "${WORDS[0]}: unknown; give one of: cluster, run, submit, follow, status, delete, delete-cluster" ;;
  esac
}

main
