# shellcheck shell=bash
# Install, start, follow and restart training on the workers of a TPU slice, however it was created. Sourced by tpu_vm.sh
# and tpu_queued_resource.sh, which define
#   resource_create, resource_delete   create and delete it
#   resource_state                     prints waiting, ready, lost (preempted, suspended, failed) or absent; returns
#                                      non-zero if the cloud did not answer
#   SSH, SCP                           commands up to the name
#   EVERY, FIRST                       flags for all workers and for the first
#
# A worker keeps everything under ~/biomamba_jax: the checkout, its virtual environment .venv, train.log, train.pid,
# train.status (the exit status once training has ended, 143 if stopped) and train.asked (exists if `stop` stopped it).

[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "NAME=$NAME: must be lower case letters, digits and -"

FOLDER=biomamba_jax
WHERE=(--zone="$ZONE")
[[ -z $PROJECT ]] || WHERE+=(--project="$PROJECT")

MADE=no    # this invocation created the resource that exists now
STARTED=no # and training was started on it
RESTARTS=0

# Shell condition: training runs on this worker. After a reboot another program may have its pid; the brackets keep the
# pattern from matching this command itself.
# shellcheck disable=SC2016  # for the worker's shell
RUNNING='grep -qs ">[t]rain.status" "/proc/$(cat train.pid 2>/dev/null)/cmdline"'

runtime_version() {
  if [[ -n $RUNTIME ]]; then
    printf '%s' "$RUNTIME"
    return
  fi
  case $ACCELERATOR in # https://docs.cloud.google.com/tpu/docs/runtimes
    v2-* | v3-* | v4-*) printf tpu-ubuntu2204-base ;;
    v5litepod-*) printf v2-alpha-tpuv5-lite ;;
    v5p-*) printf v2-alpha-tpuv5 ;;
    v6e-*) printf v2-alpha-tpuv6e ;;
    *) die "ACCELERATOR=$ACCELERATOR: unknown; set RUNTIME to its image" ;;
  esac
}

# Deletes what was created if training never started: it would only cost money.
clean_up() {
  local status=$?
  trap - EXIT INT TERM
  if [[ $MADE == yes && $STARTED == no ]]; then
    note "training was not started; deleting $NAME"
    resource_delete || note "$NAME could not be deleted; delete it by hand, it costs money"
  elif [[ $STARTED == yes ]]; then
    note "$NAME keeps running and costs money: $0 follow shows it, $0 delete deletes it"
  fi
  exit "$status"
}

on_every() {
  run "${SSH[@]}" "${WHERE[@]}" "${EVERY[@]}" "${SSH_FLAGS[@]}" --command="$1"
}

on_first() {
  run "${SSH[@]}" "${WHERE[@]}" "${FIRST[@]}" "${SSH_FLAGS[@]}" --command="$1"
}

copy_to_every() {
  run "${SCP[@]}" "$1" "$NAME:$2" "${WHERE[@]}" "${EVERY[@]}" "${SSH_FLAGS[@]}"
}

create() {
  local state pause=$RETRY_SECONDS attempt
  # shellcheck disable=SC2034  # for resource_create
  IMAGE=$(runtime_version) || exit 1
  if [[ $DRY_RUN == yes ]]; then
    resource_create
    return
  fi
  state=$(resource_state) || die "$NAME: the cloud did not answer whether it exists; nothing was created"
  [[ $state == absent ]] || die "$NAME exists already ($state); choose another NAME, or $0 delete"
  for ((attempt = 1; ; attempt++)); do
    MADE=yes # from here on it may exist
    if resource_create; then return; fi
    # A request can succeed although its answer is lost.
    if state=$(resource_state) && [[ $state != absent ]]; then
      [[ $state != lost ]] || die "$NAME could not be created"
      return
    fi
    MADE=no
    ((attempt < TRIES)) || die "$NAME could not be created in $TRIES tries"
    pause_before "$attempt" "$pause"
    pause=$((pause * 2))
  done
}

await_ready() {
  local state misses=0 start=$SECONDS
  [[ $DRY_RUN == no ]] || {
    resource_state
    return
  }
  while :; do
    if state=$(resource_state); then
      misses=0
      case $state in
        ready) return ;;
        waiting) ;;
        *)
          fail "$NAME will not become ready: it is $state"
          return
          ;;
      esac
    else
      ((++misses < TRIES)) || die "$NAME: no answer $misses times in a row"
    fi
    ((WAIT_HOURS == 0 || SECONDS - start < WAIT_HOURS * 3600)) || die "$NAME: not ready after $WAIT_HOURS hours"
    sleep "$POLL_SECONDS"
  done
}

delete() {
  resource_delete || die "$NAME could not be deleted"
  MADE=no STARTED=no
}

install() {
  local scratch archive
  scratch=$(mktemp -d) || return
  archive=$scratch/$FOLDER.tar.gz
  [[ $DRY_RUN == no ]] || archive=$FOLDER.tar.gz
  git -C "$ROOT" diff --quiet HEAD 2>/dev/null || note "note: uncommitted changes are not copied"
  if ! { run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD &&
    retry copy_to_every "$archive" "$FOLDER.tar.gz" && retry on_every "$(install_command)"; }; then
    rm -rf -- "$scratch"
    fail "$NAME: the package could not be installed on every worker"
    return
  fi
  rm -rf -- "$scratch"
}

install_command() {
  local package
  package=$(quoted ".[$EXTRA]")
  printf '%s' "set -e; mkdir -p ~/$FOLDER; cd ~/$FOLDER; rm -rf biomamba_jax configs; " \
    "tar -xzf ~/$FOLDER.tar.gz; python3 -m pip install --quiet --user uv; uv=~/.local/bin/uv; " \
    "\"\$uv\" venv --quiet --allow-existing --python $(quoted "$PYTHON_VERSION") .venv; " \
    "\"\$uv\" pip install --quiet --python .venv/bin/python $package"
}

start() {
  if ! retry on_every "$(start_command)"; then
    fail "$NAME: training could not be started on every worker"
    return
  fi
  STARTED=yes
}

# Starting twice is harmless: workers on which training runs are skipped. SETUP is part of it, since mounts are gone after a
# reboot.
start_command() {
  local guarded
  # shellcheck disable=SC2016  # for the worker's shell
  guarded=$(guard 'echo "$status" >train.status; ')
  printf '%s' "cd ~/$FOLDER || exit 1; if $RUNNING; then exit 0; fi; rm -f train.status train.asked; " \
    "${SETUP:+"bash -ec $(quoted "$SETUP") || exit 1; "}" "export PATH=\"\$PWD/.venv/bin:\$PATH\"; " \
    "nohup setsid bash -c $(quoted "$guarded") train $(quoted "${TRAIN[@]}") >train.log 2>&1 </dev/null & " \
    "echo \"\$!\" >train.pid"
}

# The mark comes first: `follow` checks on the first worker whether training was stopped on purpose. The signal goes to the
# process group, training and its guard.
stop() {
  on_first "touch ~/$FOLDER/train.asked" &&
    on_every "cd ~/$FOLDER && $RUNNING && kill -TERM -- \"-\$(cat train.pid)\""
}

# Prints the first worker's log until training there, or the connection, ends.
follow_log() {
  local show="tail --lines=${1:-+1}"
  on_first "cd ~/$FOLDER && if $RUNNING; then $show --pid=\"\$(cat train.pid)\" -F train.log; else $show train.log; fi"
}

# Prints an exit status, stopped (by `stop`), interrupted (by another SIGTERM, for instance a host's maintenance),
# running, or gone (ended without a status, for instance by a reboot); returns non-zero if the worker does not answer.
training_status() {
  local command="cd ~/$FOLDER && status=\$(cat train.status 2>/dev/null); "
  command+="if [ \"\$status\" = 143 ]; then if [ -e train.asked ]; then echo stopped; else echo interrupted; fi; "
  command+="elif [ -n \"\$status\" ]; then echo \"\$status\"; elif $RUNNING; then echo running; else echo gone; fi"
  on_first "$command"
}

# Follows training until it has ended, and restarts it on new machines if it lost its own. Training resumes from its
# newest checkpoint.
supervise() {
  local lines=+1 status state misses=0
  if [[ $DRY_RUN == yes ]]; then
    follow_log
    training_status
    return
  fi
  while :; do
    follow_log "$lines" || note "the connection to $NAME ended"
    lines=20 # enough to see where the log continues
    status=$(training_status) || status=unknown
    case $status in
      0)
        note "training has finished"
        return 0
        ;;
      running)
        sleep "$POLL_SECONDS"
        continue
        ;;
    esac
    sleep "$SETTLE_SECONDS" # a preemption may end training before the resource says so
    state=$(resource_state) || state=unknown
    case $state:$status in
      ready:stopped)
        note "training was stopped after a checkpoint; $0 start resumes it"
        return 0
        ;;
      ready:[1-9]*)
        note "error: training ended with status $status; the log is above and in ~/$FOLDER/train.log of the first worker"
        return "$status"
        ;;
      ready:gone | ready:interrupted)
        count_restart "its processes are $status"
        start || exit 1
        ;;
      lost:* | absent:*)
        count_restart "its machines are $state"
        [[ $state == absent ]] || delete
        bring_up
        lines=+1
        ;;
      *)
        ((++misses < TRIES)) || die "$NAME: no answer $misses times in a row; training may still run"
        continue
        ;;
    esac
    misses=0
  done
}

count_restart() {
  ((++RESTARTS <= MAX_RESTARTS)) || die "$NAME: $1, and MAX_RESTARTS=$MAX_RESTARTS is reached"
  note "$NAME: $1; restart $RESTARTS of at most $MAX_RESTARTS"
}

# Creates the machines and starts training on them; replaces machines that are lost meanwhile.
bring_up() {
  local state
  while :; do
    create
    if await_ready && install && start; then return; fi
    sleep "$SETTLE_SECONDS" # machines may be gone before the resource's state says so
    state=$(resource_state) || state=unknown
    [[ $state == lost || $state == absent ]] || exit 1
    count_restart "its machines are $state"
    [[ $state == absent ]] || delete
  done
}

run_all() {
  local status=0
  bring_up
  supervise || status=$?
  if [[ $DELETE_WHEN_DONE == yes ]]; then
    delete
  fi
  return "$status"
}

main() {
  ((${#WORDS[@]} == 1)) || die "give one of: create, wait, install, start, follow, stop, status, delete, run (--help)"
  need gcloud "https://cloud.google.com/sdk/docs/install"
  if [[ $DRY_RUN == no ]]; then
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
  case ${WORDS[0]} in
    create)
      create
      MADE=no # keep it
      ;;
    wait) await_ready ;;
    install) install ;;
    start)
      start
      STARTED=no # no note at the end
      ;;
    follow) supervise ;;
    stop) stop ;;
    status)
      resource_state
      training_status
      ;;
    delete) delete ;;
    run) run_all ;;
    *) die "${WORDS[0]}: unknown command; give one of: create, wait, install, start, follow, stop, status, delete, run" ;;
  esac
}
