#!/usr/bin/env bash
# launch/local_multiprocess.sh [--settings FILE] [--dry-run] [PROCESSES]
#
# Trains in several processes on this machine, as several hosts would: to try multi-host training out on CPUs. When one
# process fails the others are ended, after GRACE_SECONDS by force. Ctrl-C and SIGTERM let all save a checkpoint.
# Training that was stopped is no failure: all processes leave with status 143 then, and so does this.
# Settings: launch/settings.env (TRAIN, VENV, PROCESSES, PORT, GRACE_SECONDS).

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
((${#WORDS[@]} <= 1)) || die "${WORDS[1]}: unknown; give the number of processes only"
PROCESSES=${WORDS[0]:-$PROCESSES}
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || die "PROCESSES=$PROCESSES: must be a number above 0"
cd -- "$ROOT"
[[ ! -d $VENV/bin ]] || PATH=$(cd -- "$VENV/bin" && pwd):$PATH

PIDS=()

# Ends what still runs: a request first, then force.
end_all() {
  local pid deadline=$((SECONDS + GRACE_SECONDS))
  for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${PIDS[@]}"; do
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true # with whatever it started
  done
}

main() {
  local rank status result=0
  set -m # a process group each: Ctrl-C reaches this script alone, which asks each process once
  for ((rank = 0; rank < PROCESSES; rank++)); do
    local words=("${TRAIN[@]}" --distributed.coordinator="localhost:$PORT" --distributed.processes="$PROCESSES"
      --distributed.process_id="$rank")
    if [[ $DRY_RUN == yes ]]; then
      run "${words[@]}"
    else
      note "+ $(quoted "${words[@]}")"
      "${words[@]}" > >(exec sed -u "s/^/$rank: /") 2>&1 &
      PIDS+=("$!")
    fi
  done
  trap 'end_all; exit 130' INT
  trap 'end_all; exit 143' TERM
  for ((rank = 0; rank < ${#PIDS[@]}; rank++)); do # as many times as there are processes, in the order that they end
    status=0
    wait -n || status=$?
    case $status in
      0) ;;
      143) result=143 ;;
      *)
        note "error: a process ended with status $status; ending the others"
        end_all
        return "$status"
        ;;
    esac
  done
  ((result == 0)) || note "training was stopped; the same command goes on from its newest checkpoint"
  return "$result"
}

main
