#!/usr/bin/env bash
# launch/tpu_vm.sh [--settings FILE] [--dry-run] COMMAND
#
# Trains on one Cloud TPU slice, created at once, without a queue. The commands are those of tpu_queued_resource.sh:
#   run      create, wait, install, start, follow; again after a preemption; delete when training has ended
#   create, wait, install, start, follow, stop, status, delete
# Settings: launch/settings.env. --dry-run prints the commands. If anything fails before training starts, the slice is deleted.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
# shellcheck source=launch/tpu.sh
source "$ROOT/launch/tpu.sh"

VM=(gcloud compute tpus tpu-vm)
SSH=("${VM[@]}" ssh "$NAME")
SCP=("${VM[@]}" scp)
EVERY=(--worker=all)
FIRST=(--worker=0)

resource_create() {
  local flags=(--accelerator-type="$ACCELERATOR" --version="$IMAGE")
  case $CAPACITY in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
    on-demand) ;;
    *) die "CAPACITY=$CAPACITY: must be spot, on-demand or reserved" ;;
  esac
  run "${VM[@]}" create "$NAME" "${WHERE[@]}" "${flags[@]}" "${CREATE_FLAGS[@]}"
}

resource_delete() {
  run "${VM[@]}" delete "$NAME" "${WHERE[@]}" --quiet
}

resource_state() {
  local state
  state=$(run "${VM[@]}" list "${WHERE[@]}" --filter="name~/$NAME\$" --format="value(state)") || return 1
  case $state in
    '') echo absent ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | HIDING | HIDDEN | UNHIDING) echo lost ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) echo waiting ;;
    *) [[ $DRY_RUN == yes ]] && echo "$state" || echo waiting ;;
  esac
}

((SLICES == 1)) || die "SLICES=$SLICES: a TPU VM is one slice; for several use launch/tpu_queued_resource.sh"
main
