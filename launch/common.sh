# shellcheck shell=bash
# What all launchers share. Sourced, never run.

((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) || {
  echo "error: bash $BASH_VERSION is too old: 4.4 or newer is needed" >&2
  exit 1
}

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=no

note() { printf '%s\n' "$*" >&2; }

# Says what failed, for whoever called.
fail() {
  note "error: $*"
  return 1
}

die() {
  fail "$@" || exit 1
}

# The arguments as words that a shell reads back unchanged.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# As words that a shell reads back unchanged, without a backslash where there is no quote.
in_quotes() {
  local word words=()
  for word in "$@"; do
    [[ $(quoted "$word") == "$word" ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Shows a command and runs it; with --dry-run shows it only, as a line that can be pasted.
run() {
  if [[ $DRY_RUN == yes ]]; then
    quoted "$@"
    echo
  else
    note "+ $(quoted "$@")"
    "$@"
  fi
}

# Runs a function until it succeeds, TRIES times at most, with pauses that double.
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
  note "attempt $1 of $TRIES failed; again in $2 s"
  sleep "$2"
}

need() {
  [[ $DRY_RUN == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# The comment at the head of a launcher is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Reads --settings and --dry-run; everything else goes into WORDS.
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
  [[ -r $file ]] || die "$file: no such settings; copy launch/settings.env and give the copy with --settings"
  # shellcheck source=launch/settings.env
  source "$file"
  ((${#TRAIN[@]})) || die "$file: TRAIN is empty: name the training command"
}

# Shell code that runs its arguments as a command and leaves with its status, or with 143 after a SIGTERM. Training in
# one process answers a SIGTERM with a checkpoint and status 0: a preempted run would look like a finished one.
#   $1  what to do before leaving, ending in "; "; it finds the status in $status
# The command gets the signal from whoever signals the whole process group; a second one would cut its checkpoint short.
# The trap names $!, which is known as soon as the command is there; a variable would come too late for an early signal.
guard() {
  # shellcheck disable=SC2016  # for the shell that runs it
  printf 'status=0; trap '\''wait $!; status=143; %sexit 143'\'' TERM; "$@" & wait $! || status=$?; %sexit "$status"' \
    "${1:-}" "${1:-}"
}
