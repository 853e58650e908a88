#!/usr/bin/env bash
# launch/tpu_queued_resource.sh [--settings FILE] [--dry-run] COMMAND
#
# Trains on a Cloud TPU slice, or several, requested as a queued resource.
#   run      create, wait, install, start, follow; again after a preemption; delete when training has ended
#   create   request it            wait    until it is ready      install  the checkout, on every worker
#   start    training              follow  it, and restart it after a preemption
#   stop     save a checkpoint and end   status  of the resource and of training   delete  the resource
# Settings: launch/settings.env. --dry-run prints the commands. If anything fails before training starts, the resource is deleted.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
# shellcheck source=launch/tpu.sh
source "$ROOT/launch/tpu.sh"

QUEUE=(gcloud compute tpus queued-resources)
SSH=("${QUEUE[@]}" ssh "$NAME")
SCP=("${QUEUE[@]}" scp)
EVERY=(--node=all --worker=all)
FIRST=(--node=0 --worker=0)

resource_create() {
  local flags=(--accelerator-type="$ACCELERATOR" --runtime-version="$IMAGE")
  if ((SLICES > 1)); then
    flags+=(--node-count="$SLICES" --node-prefix="$NAME")
  else
    flags+=(--node-id="$NAME")
  fi
  case $CAPACITY in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
    on-demand) ;;
    *) die "CAPACITY=$CAPACITY: must be spot, on-demand or reserved" ;;
  esac
  run "${QUEUE[@]}" create "$NAME" "${WHERE[@]}" "${flags[@]}" "${CREATE_FLAGS[@]}"
}

resource_delete() {
  # --force: the slices go first
  run "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
}

resource_state() {
  local state
  # A list is empty where a description is an error, which could have any reason.
  state=$(run "${QUEUE[@]}" list "${WHERE[@]}" --filter="name~/$NAME\$" --format="value(state.state)") || return 1
  case $state in
    '') echo absent ;;
    ACTIVE) echo ready ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING) echo lost ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) echo waiting ;;
    *) [[ $DRY_RUN == yes ]] && echo "$state" || echo waiting ;;
  esac
}

main
