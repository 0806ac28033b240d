#!/usr/bin/env bash
# Train on the hosts of a DeepSpeed hostfile, started from here by ssh.
#
#   HOSTFILE=FILE launchers/deepspeed.sh [--dry-run] [--doctor] CONFIG [section.key=value ...]
#
#   HOSTFILE     file with lines "HOST slots=N": N processes on HOST (default ./hostfile)
#   MASTER_ADDR  address of the first host, if its name does not resolve to it
#   MASTER_PORT  (default 29500)
#
# The repository and its environment must be at the same path on all hosts. The launcher does not
# restart processes: --max-restarts is torchrun's. It does not forward signals: after Ctrl-C DeepSpeed
# gives the processes 30 s to save; SIGTERM to the launcher alone does not reach them. This launcher
# starts either engine; the DeepSpeed engine is described in docs/deepspeed.md.
#
# MLFLOW_*, AWS_*, AZURE_*, GOOGLE_*, DATABRICKS_*, PGPASSWORD and MYSQL_PWD are passed to rank 0 only,
# which reports: through ssh's standard input into a private file on the first host, which rank 0
# removes. They appear in no log and no process list.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/lib.sh
source "$ROOT/launchers/lib.sh"

SSH=(ssh -o BatchMode=yes -o ConnectTimeout=5)
# No option of ssh's, and none of pdsh's lists.
HOST='^([A-Za-z_][A-Za-z0-9_.-]*@)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$'
# What MLflow's client reads, of which DeepSpeed would export and log MLFLOW*; no other secret is moved.
SECRET='^((MLFLOW|AWS_|AZURE_|GOOGLE_|DATABRICKS_).*|PGPASSWORD|MYSQL_PWD)$'

# plain WHAT VALUE: DeepSpeed writes it into the hosts' command line without quotes.
plain() {
    [[ $2 =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || die "$1 is $2: DeepSpeed passes it to the hosts' shells as it" \
        "is, so it may have letters, digits and _@+=:,./- only"
}

# Nothing that DeepSpeed passes on may be expanded by a host's shell.
check_route() {
    local name
    plain "the current folder" "$PWD"
    plain "the repository" "$ROOT"
    plain "the interpreter" "$("$PYTHON" -c 'import sys; print(sys.executable)')"
    for name in $(compgen -e); do # what it exports, in double quotes
        [[ $name =~ ^(PYTHON|MV2|UCX|NCCL) && ${!name} == *[\"\$\`\\%]* ]] &&
            die "$name: DeepSpeed passes it to the hosts' shells, and it contains one of \" \$ \` \\ %"
    done
    return 0
}

# Secrets leave the environment; SECRETS is the first host's file with them, empty without any.
move_secrets() {
    local name names=()
    for name in $(compgen -e); do [[ $name =~ $SECRET ]] && names+=("$name"); done
    ((${#names[@]})) || return 0
    # shellcheck disable=SC2016  # the host expands it
    SECRETS=$(
        for name in "${names[@]}"; do printf '%s=%s\0' "$name" "${!name}"; done |
            "${SSH[@]}" -- "${hosts[0]}" 'umask 077; f=$(mktemp) && cat >"$f" && echo "$f"'
    ) || die "${hosts[0]}: cannot create a file for passwords"
    SECRETS=${SECRETS##*$'\n'} # after what a login may say
    plain "mktemp of ${hosts[0]}" "$SECRETS"
    unset "${names[@]}"
}

parse_arguments "$@"
find_python
hostfile=${HOSTFILE:-hostfile}
[[ -r $hostfile ]] || die "HOSTFILE: no file $hostfile here; its lines are: HOST slots=N"
hosts=()
slots=()
while read -r host rest || [[ -n ${host:-} ]]; do
    [[ -z $host || $host == \#* ]] && continue
    [[ $host =~ $HOST && $rest =~ ^slots=([1-9][0-9]*)[[:space:]]*(#.*)?$ ]] ||
        die "$hostfile: $host $rest: a line is HOST slots=N"
    slots+=("${BASH_REMATCH[1]}")
    hosts+=("$host")
done <"$hostfile"
((${#hosts[@]})) || die "$hostfile names no host"
is_positive "${MASTER_PORT:=29500}" || die "MASTER_PORT=$MASTER_PORT must be a port number"
[[ -z ${MASTER_ADDR:-} || $MASTER_ADDR =~ ^[A-Za-z0-9:][A-Za-z0-9._:-]*$ ]] ||
    die "MASTER_ADDR=$MASTER_ADDR is not an address"

runner=("$PYTHON" -m deepspeed.launcher.runner)
options=(--no_local_rank --master_port "$MASTER_PORT")
[[ -n ${MASTER_ADDR:-} ]] && options+=(--master_addr "$MASTER_ADDR")
keel=("$VERB" "$CONFIG" "${OVERRIDES[@]}")
if [[ ${hosts[*]} == localhost ]]; then # without ssh: no shell reads the arguments
    command=("${runner[@]}" --num_gpus "${slots[0]}" "${options[@]}" --module keel_megatron "${keel[@]}")
    show "${command[@]}"
else
    # The hosts' shells would: packed, they have nothing for a shell to expand (and `ps` no settings).
    command=("${runner[@]}" --hostfile "$hostfile" --force_multi "${options[@]}"
        "$ROOT/launchers/deepspeed_rank.py")
    show "${command[@]}" PACKED
    printf 'PACKED '
    show keel "${keel[@]}"
    command+=("$(printf '%s\0' "${keel[@]}" | base64 | tr -d '\n')")
fi
if ((DRY_RUN)); then
    echo "on ${#hosts[@]} host(s): ${hosts[*]}"
    exit 0
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))' ||
    die "DeepSpeed is not installed for $PYTHON (docs/deepspeed.md)"
find_run_folder
if [[ ${hosts[*]} == localhost ]]; then
    check_devices "${slots[0]}"
else
    check_route
    # What ssh and pdsh would say only after a minute, or not at all.
    command -v pdsh >/dev/null ||
        die "pdsh is missing on $(hostname): DeepSpeed starts the hosts with it"
    for host in "${hosts[@]}"; do
        "${SSH[@]}" -- "$host" test -x "$(command -v "$PYTHON")" ||
            die "$host: no answer by ssh in 5 s without a password, or no $PYTHON there"
    done
    SECRETS=""
    move_secrets
    command+=(${SECRETS:+"$SECRETS"})
fi
exec "${command[@]}"
