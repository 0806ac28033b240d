#!/usr/bin/env bash
# Train on the hosts of a DeepSpeed hostfile, started from here by ssh.
#
#   HOSTFILE=FILE launchers/deepspeed.sh [--dry-run] [--doctor] CONFIG [section.key=value ...]
#
#   HOSTFILE     lines of "HOST slots=N": N processes there (default ./hostfile)
#   MASTER_ADDR  address of the first host, where its name does not lead to it
#   MASTER_PORT  (default 29500)
#
# The repository and its environment must lie at the same path on all hosts. It starts nothing again:
# --max-restarts is torchrun's. Nor does it hand signals on: after Ctrl-C DeepSpeed gives the processes
# 30 s to save; SIGTERM to the launcher alone does not reach them. For the DeepSpeed engine itself see
# the README; this launcher starts either engine.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/lib.sh
source "$ROOT/launchers/lib.sh"

parse_arguments "$@"
find_python
hostfile=${HOSTFILE:-hostfile}
[[ -r $hostfile ]] || die "HOSTFILE: no file $hostfile here; its lines are: HOST slots=N"
hosts=()
slots=()
while read -r host rest || [[ -n ${host:-} ]]; do
    [[ -z $host || $host == \#* ]] && continue
    [[ $rest =~ ^slots=([1-9][0-9]*)[[:space:]]*(#.*)?$ ]] ||
        die "$hostfile: $host $rest: a line is HOST slots=N"
    slots+=("${BASH_REMATCH[1]}")
    hosts+=("$host")
done <"$hostfile"
((${#hosts[@]})) || die "$hostfile names no host"

where=(--hostfile "$hostfile")
# This machine alone: without the ssh to itself that a hostfile would ask for.
[[ ${hosts[*]} == localhost ]] && where=(--num_gpus "${slots[0]}")
command=("$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank
    --master_port "${MASTER_PORT:-29500}")
[[ -n ${MASTER_ADDR:-} ]] && command+=(--master_addr "$MASTER_ADDR")
command+=(--module keel_megatron "$VERB" "$CONFIG" "${OVERRIDES[@]}")
if ((DRY_RUN)); then
    show "${command[@]}"
    echo "on ${#hosts[@]} host(s): ${hosts[*]}"
    exit 0
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))' ||
    die "DeepSpeed is not installed for $PYTHON (README.md, extra deepspeed)"
# What ssh and pdsh would say only after a minute, or not at all.
if [[ ${hosts[*]} != localhost ]]; then
    command -v pdsh >/dev/null ||
        die "pdsh is missing on $(hostname): DeepSpeed starts the hosts with it"
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes -o ConnectTimeout=5 "$host" test -x "$(command -v "$PYTHON")" ||
            die "$host: no answer by ssh in 5 s without a password, or no $PYTHON there"
    done
else
    check_devices "${slots[0]}"
fi
find_run_folder
run_command "${command[@]}"
