# shellcheck shell=bash
# Functions shared by all launchers. Sourced, never run.

((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) || {
  echo "error: bash $BASH_VERSION is too old; install 4.4 or newer" >&2
  exit 1
}

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=no

note() { printf '%s\n' "$*" >&2; }

# Prints an error and returns 1.
fail() {
  note "error: $*"
  return 1
}

die() {
  fail "$@" || exit 1
}

# Prints the arguments quoted for a shell.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# Prints the arguments quoted for a shell, with quotes instead of backslashes where possible.
in_quotes() {
  local word words=()
  for word in "$@"; do
    [[ $(quoted "$word") == "$word" ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Prints a command and runs it; with --dry-run only prints it, as a line that can be pasted.
run() {
  if [[ $DRY_RUN == yes ]]; then
    quoted "$@"
    echo
  else
    note "+ $(quoted "$@")"
    "$@"
  fi
}

# Runs a function until it succeeds, at most TRIES times, with pauses that double.
retry() {
  local pause=$RETRY_SECONDS attempt
  for ((attempt = 1; ; attempt++)); do
    if "$@"; then return 0; fi
    ((attempt < TRIES)) || return 1
    pause_before "$attempt" "$pause"
    pause=$((pause * 2))
  done
}

pause_before() {
  note "attempt $1 of $TRIES failed; trying again in $2 s"
  sleep "$2"
}

need() {
  [[ $DRY_RUN == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# Prints the comment at the head of the launcher.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Reads --settings and --dry-run; puts all other arguments into WORDS.
read_options() {
  local file=${BIOMAMBA_SETTINGS:-$ROOT/launch/settings.env}
  WORDS=()
  while (($#)); do
    case $1 in
      --settings)
        (($# > 1)) || die "--settings: name a file"
        file=$2
        shift
        ;;
      --settings=*) file=${1#*=} ;;
      --dry-run) DRY_RUN=yes ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
  [[ -r $file ]] || die "$file: no such settings; copy launch/settings.env and pass the copy with --settings"
  # shellcheck source=launch/settings.env
  source "$file"
  ((${#TRAIN[@]})) || die "$file: TRAIN is empty: name the training command"
}

# Prints shell code that runs its arguments as a command and exits with its status, or with 143 after a SIGTERM. Training
# in one process answers a SIGTERM with a checkpoint and status 0, so a preempted run would look like a finished one.
#   $1  code to run before exiting, ending in "; "; the status is in $status
# The signal goes to the whole process group, so the command has it already; a second one would interrupt its checkpoint.
# The trap uses $!, which is set as soon as the command is started; a variable would be set too late for an early signal.
guard() {
  # shellcheck disable=SC2016  # for the shell that runs it
  printf 'status=0; trap '\''wait $!; status=143; %sexit 143'\'' TERM; "$@" & wait $! || status=$?; %sexit "$status"' \
    "${1:-}" "${1:-}"
}
