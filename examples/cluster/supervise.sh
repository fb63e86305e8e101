#!/usr/bin/env bash
# Run a command again while its exit code says that this helps: supervise.sh TIMES COMMAND...
#   75 stopped on request after saving, 69 another rank died or hung, 128 and more killed by a signal: again
#   0 finished, 2 a setting or a file is wrong, 1 a bug: the end, with that code
set -uo pipefail

left=$1
shift
trap 'stop=1' INT TERM # a person, or the machine going down, means the whole job: the command has got it too
stop=0
while true; do
  "$@"
  code=$?
  if [[ $stop == 1 || ($code != 75 && $code != 69 && $code -lt 128) ]]; then
    exit "$code"
  fi
  if ((left-- <= 0)); then
    echo "supervise: still exit code $code after the last allowed restart" >&2
    exit "$code"
  fi
  echo "supervise: exit code $code; starting again ($left more times)" >&2
  sleep "${SUPERVISE_PAUSE_S:-10}"
done
