#!/usr/bin/env bash
# Train on several nodes; start it on every node.
#
#   [VARIABLES] launchers/torchrun.sh [options] CONFIG [section.key=value ...]
#
#   options: --dry-run, --doctor, --max-restarts N
#
#   NNODES          number of nodes (default 1: as launchers/local.sh, nothing listens beyond loopback)
#   NPROC_PER_NODE  processes on this node (default: its number of GPUs, or 1 without GPUs)
#   MASTER_ADDR     address of the first node: a static rendezvous, with NODE_RANK on every node
#   MASTER_PORT     its port (default 29500)
#   RDZV_ENDPOINT   HOST[:PORT] of the first node: a c10d rendezvous, which assigns the ranks;
#                   an IPv6 address with a port is written [ADDRESS]:PORT
#   RDZV_ID         the rendezvous' name: random, the same on every node (docs/cluster.md, 5)
#   NODE_RANK       this node's number, counted from 0; 0 is the first node
#   LOCAL_ADDR      this node's address, if its host name does not resolve to it
#   WAIT_SECONDS    how long to wait for the first node (default 300)
#
# SIGUSR1 (save, exit with 75) and SIGTERM (save, exit with 143) are forwarded to the ranks. Exits with
# keel's own exit codes (docs/reference/exit-codes.md), which torchrun hides.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/lib.sh
source "$ROOT/launchers/lib.sh"

parse_arguments "$@"
find_python
# The Kubeflow trainer announces nodes as PET_*, torchrun's own names.
nodes=${NNODES:-${PET_NNODES:-1}}
node_rank=${NODE_RANK:-${PET_NODE_RANK:-}}
address=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
endpoint=${RDZV_ENDPOINT:-}
gpus=$(count_gpus)
processes=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-$((gpus ? gpus : 1))}}
is_positive "$nodes" || die "NNODES=$nodes must be a positive number"
if [[ -n $node_rank ]]; then
    is_number "$node_rank" || die "NODE_RANK=$node_rank must be a number"
    ((node_rank < nodes)) || die "NODE_RANK=$node_rank must be below NNODES=$nodes"
fi
is_number "${WAIT_SECONDS:=300}" || die "WAIT_SECONDS=$WAIT_SECONDS must be a whole number"
check_devices "$processes"
if ((nodes == 1)); then
    options=(--max-restarts "$MAX_RESTARTS")
    ((DRY_RUN)) && options+=(--dry-run)
    [[ $VERB == doctor ]] && options+=(--doctor)
    exec "$BASH" "$ROOT/launchers/local.sh" "${options[@]}" "$processes" "$CONFIG" "${OVERRIDES[@]}"
fi

# A step, a save and the last report may take longer than torchrun's 30 s after SIGTERM.
command=("$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes"
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout 600)
first=() # HOST PORT of the first node, for all others
if [[ -n $endpoint ]]; then
    split_endpoint RDZV_ENDPOINT "$endpoint"
    first=("$HOST" "$PORT")
    [[ $HOST != *:* ]] || HOST="[$HOST]"
    [[ -n ${RDZV_ID:-} ]] || die "RDZV_ID is not set: a random text, the same on every node;" \
        "for example $(random_id)"
    export PET_RDZV_ID=$RDZV_ID # torchrun's --rdzv-id, out of the sight of \`ps\`
    command+=(--rdzv-backend c10d --rdzv-endpoint "$HOST:$PORT")
    # The first node by its number, where it has one: names and addresses can mislead torchrun.
    [[ -n $node_rank ]] && command+=(--rdzv-conf "is_host=$((node_rank == 0))")
else
    [[ -n $address ]] || die "NNODES=$nodes needs MASTER_ADDR=<first node> with" \
        "NODE_RANK=<this node's number>, or RDZV_ENDPOINT=<first node>:<port>"
    [[ -n $node_rank ]] ||
        die "NODE_RANK is not set: this node's number, 0 to $((nodes - 1)), 0 on $address"
    address=${address#[} address=${address%]}
    is_port "$port" || die "MASTER_PORT=$port must be a port, from 1 to 65535"
    command+=(--node-rank "$node_rank" --master-addr "$address" --master-port "$port")
    first=("$address" "$port")
fi
[[ -n ${LOCAL_ADDR:-} ]] && command+=(--local-addr "$LOCAL_ADDR")
# torchrun reads $$ as $, and $local_rank as the rank (torch.distributed.elastic, macros).
command+=(-m keel_megatron "$VERB" "${CONFIG//\$/\$\$}" "${OVERRIDES[@]//\$/\$\$}")

show "${command[@]}"
((DRY_RUN)) && exit 0
find_run_folder
if [[ -n $node_rank && $node_rank != 0 ]]; then
    wait_for "${first[@]}" "$WAIT_SECONDS"
fi

# torchrun (2.13) announces its shared store in the first round of a c10d rendezvous only: a node that
# is started again would wait for it in vain. So rank 0 opens a store of its own in every round.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# One thread a process until keel sets training.threads; torchrun would set and announce the same.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mark_exit_code
# File that records a usage error (runtime/exit_codes.py): torchrun would restart it and exit with 1.
# And the forwarded signal, for trainers that could not receive it yet (training/stop.py).
KEEL_MISTAKE_FILE=$(mktemp) KEEL_SIGNAL_FILE=$(mktemp)
export KEEL_MISTAKE_FILE KEEL_SIGNAL_FILE
trap 'rm -f "$KEEL_MISTAKE_FILE" "$KEEL_SIGNAL_FILE"' EXIT
# A job of its own, so that Ctrl-C reaches the trainers once, through here. Deaf to SIGUSR1, which
# would kill torchrun; the trainers listen all the same (training/stop.py).
set -m
(
    trap '' USR1
    exec "${command[@]}"
) &
torchrun=$!
set +m

asked="" # the exit code of the latest signal, for a run that it ended without one of its own
# hand_on SIGNAL CODE. Trainers are the children of torchrun, whatever thread started them.
# shellcheck disable=SC2317,SC2329  # the traps call it
hand_on() {
    local trainers
    asked=$2
    read -ra trainers < <(cat /proc/"$torchrun"/task/*/children 2>/dev/null) || true # no newline
    if ((${#trainers[@]})); then
        say "SIG$1: handing it to the trainers"
        echo "SIG$1" >"$KEEL_SIGNAL_FILE"
        kill -s "$1" "${trainers[@]}" || true
    else
        say "SIG$1: no trainer runs, torchrun waits for other nodes: ending it"
        kill -s TERM "$torchrun" || true
    fi
}
trap 'hand_on USR1 "$EXIT_SAVED"' USR1
trap 'hand_on TERM 143' TERM
trap 'hand_on INT 130' INT
trap 'hand_on HUP 129' HUP
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends `wait`, not torchrun
    code=0
    wait "$torchrun" || code=$?
done
if [[ -s $KEEL_MISTAKE_FILE ]]; then
    code=$EXIT_USER
elif has_exit_code; then
    code=$(saved_code)
elif [[ -n $asked ]]; then
    code=$asked
fi
exit "$code"
