#!/usr/bin/env bash
# Train with several processes on this machine.
#
#   launchers/local.sh [--dry-run] [--doctor] [--max-restarts N] N CONFIG [section.key=value ...]
#
# N is the number of processes: a multiple of the layout's, and at most the number of GPUs if there are any.
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run. Exits with keel's own exit codes
# (docs/reference/exit-codes.md).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/lib.sh
source "$ROOT/launchers/lib.sh"

options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    if [[ $1 == --max-restarts ]]; then
        options+=("${2:-}")
        shift
    fi
    shift || true
done
processes=${1:-0}
(($# != 1)) || [[ ! -f $processes ]] || die "N is missing: local.sh N CONFIG [section.key=value ...]"
shift || true
parse_arguments "${options[@]}" "$@"
is_positive "$processes" ||
    die "N must be a positive number: local.sh N CONFIG [section.key=value ...]"
find_python
check_devices "$processes"
options=(--processes "$processes")
[[ $VERB == train ]] && options+=(--max-restarts "$MAX_RESTARTS")
run_command "$PYTHON" -m keel_megatron "$VERB" "$CONFIG" "${OVERRIDES[@]}" "${options[@]}"
