#!/usr/bin/env bash
# launch/local_multiprocess.sh [--settings FILE] [--dry-run] [PROCESSES]
#
# Trains in several processes on this machine, as several hosts would, to try multi-host training on CPUs. When one
# process fails the others are ended, after GRACE_SECONDS by SIGKILL. Ctrl-C and SIGTERM let all save a checkpoint. Stopped
# training is not a failure: all processes then exit with status 143, and so does this script.
# Settings: launch/settings.env (TRAIN, VENV, PROCESSES, PORT, GRACE_SECONDS).

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
((${#WORDS[@]} <= 1)) || die "${WORDS[1]}: unknown argument; give the number of processes only"
PROCESSES=${WORDS[0]:-$PROCESSES}
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || die "PROCESSES=$PROCESSES: must be an integer of at least 1"
cd -- "$ROOT"
[[ ! -d $VENV/bin ]] || PATH=$(cd -- "$VENV/bin" && pwd):$PATH

PIDS=()

# Ends the processes that still run: SIGTERM first, SIGKILL after GRACE_SECONDS.
end_all() {
  local pid deadline=$((SECONDS + GRACE_SECONDS))
  for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${PIDS[@]}"; do
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true # with its children
  done
}

main() {
  local rank status result=0
  set -m # a process group each: Ctrl-C reaches this script alone, which signals each process once
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
  for ((rank = 0; rank < ${#PIDS[@]}; rank++)); do # once for each process, in the order in which they end
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
  ((result == 0)) || note "training was stopped; the same command resumes from its newest checkpoint"
  return "$result"
}

main
