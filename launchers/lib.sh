# shellcheck shell=bash disable=SC2034
# What the launchers share: arguments, checks, and how a command is shown and run. Sourced.
#
# Every launcher takes   [options] CONFIG [section.key=value ...]
#   --dry-run         show the command and the checks; run nothing
#   --doctor          compare and test the nodes (keel doctor) instead of training
#   --max-restarts N  restart the process group up to N times after a failure (default 3)
#   --help

DRY_RUN=0 VERB=train MAX_RESTARTS=3 CONFIG="" OVERRIDES=()
export EXIT_USER=2 EXIT_SAVED=75 # keel_megatron/runtime/exit_codes.py

say() { echo "$(basename "$0"): $*" >&2; }

die() {
    echo "error: $(basename "$0"): $*" >&2
    exit "$EXIT_USER"
}

# The comment at the head of the launcher is its manual.
usage() {
    sed -n '2,/^[^#]/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$0"
    exit 0
}

parse_arguments() {
    while (($#)); do
        case $1 in
        --dry-run) DRY_RUN=1 ;;
        --doctor) VERB=doctor ;;
        --max-restarts)
            MAX_RESTARTS=${2:-}
            is_number "$MAX_RESTARTS" || die "--max-restarts needs a whole number"
            shift
            ;;
        -h | --help) usage ;;
        -*) die "unknown option $1; --help lists them" ;;
        *) break ;;
        esac
        shift
    done
    (($#)) || die "CONFIG is missing: $(basename "$0") [options] CONFIG [section.key=value ...]"
    CONFIG=$1
    shift
    OVERRIDES=("$@")
    [[ -f $CONFIG && -r $CONFIG ]] || die "CONFIG: no file $CONFIG here ($(hostname), in $PWD)"
    local setting
    for setting in "${OVERRIDES[@]}"; do
        [[ $setting =~ ^[a-z_]+\.[a-z_0-9]+= ]] ||
            {
                without_secrets "$setting"
                die "$REPLY: a setting is written section.key=value"
            }
    done
}

is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; } # bash takes 08 for octal
is_positive() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }
is_port() { is_positive "$1" && ((${#1} < 6 && $1 < 65536)); }

# split_endpoint NAME HOST[:PORT]: sets HOST and PORT (29500); brackets of an IPv6 address go.
split_endpoint() {
    [[ $2 =~ ^\[(.+)\](:([^:]*))?$ || $2 =~ ^([^:]+)(:([^:]*))?$ || $2 =~ ^(.+)()()$ ]] ||
        die "$1=$2 must be HOST or HOST:PORT"
    HOST=${BASH_REMATCH[1]} PORT=${BASH_REMATCH[3]:-29500}
    is_port "$PORT" || die "$1=$2: $PORT must be a port, from 1 to 65535"
}

# need NAME WHY: the variable must be set.
need() { [[ -n ${!1:-} ]] || die "$1 is not set: $2"; }

# The interpreter: KEEL_PYTHON, else the repository's environment, else python3.
find_python() {
    local own="$ROOT/.venv/bin/python"
    PYTHON=${KEEL_PYTHON:-}
    if [[ -z $PYTHON ]]; then
        if [[ -x $own ]]; then PYTHON=$own; else PYTHON=python3; fi
    fi
    command -v "$PYTHON" >/dev/null || die "no interpreter $PYTHON on $(hostname); set KEEL_PYTHON"
    ((DRY_RUN)) && return
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("keel_megatron"))' ||
        die "keel_megatron is not installed for $PYTHON on $(hostname) (make setup)"
}

# GPUs of this node, as the driver or CUDA_VISIBLE_DEVICES has them; 0 if there is no driver.
count_gpus() {
    local listed=0
    if command -v nvidia-smi >/dev/null; then
        listed=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    if ((listed)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # set but empty: none
        listed=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
    fi
    echo "$listed"
}

# check_devices WANTED: so many processes have a device each (CPUs can be shared).
check_devices() {
    is_positive "$1" || die "processes on this node: $1 must be a positive number"
    local gpus
    gpus=$(count_gpus)
    [[ " ${OVERRIDES[*]:-} " == *" training.device=cpu "* ]] && return
    if ((gpus && $1 > gpus)); then
        die "$(hostname) has $gpus GPU(s), fewer than the $1 requested processes"
    fi
    if ((!gpus)) && [[ " ${OVERRIDES[*]:-} " == *" training.device=cuda "* ]]; then
        die "training.device=cuda, but $(hostname) has no GPU that nvidia-smi lists"
    fi
}

# without_secrets ARGUMENT: REPLY is the argument without what may be a secret: the user part, the query
# and the fragment of a URL, and the value of a setting that is called like one.
without_secrets() {
    REPLY=$1
    if [[ $1 =~ ^[a-z_]+\.[a-z_0-9]*(passw(or)?d|secret|token|(api|access)_key)= ]]; then
        REPLY="${BASH_REMATCH[0]}***"
    elif [[ $1 == *://* ]]; then
        local rest=${1#*://}
        [[ $rest != *@* ]] || rest="***@${rest##*@}"
        [[ ! $rest =~ ^[^?#]*[?#] ]] || rest="${BASH_REMATCH[0]}***"
        REPLY="${1%%://*}://$rest"
    fi
}

# The exact command but for secrets, to be copied into a shell.
show() {
    local part
    printf '+'
    for part in "$@"; do
        without_secrets "$part"
        printf ' %q' "$REPLY"
    done
    printf '\n'
}

# run_command COMMAND...: show it and become it; under --dry-run only show it.
run_command() {
    show "$@"
    ((DRY_RUN)) && exit 0
    exec "$@"
}

# The run's folder; a wrong configuration ends here with its message, before any node waits.
find_run_folder() {
    RUN_FOLDER=$("$PYTHON" -m keel_megatron config folder "$CONFIG" "${OVERRIDES[@]}") || exit $?
}

# The exit code that the run has left in its folder; a failure if what stands there is none.
saved_code() {
    local text=""
    IFS= read -r -n 8 text <"$RUN_FOLDER/exit_code" || true
    if is_number "$text" && ((text <= 255)); then echo "$text"; else echo 1; fi
}

# Whether this start has left its code there. An earlier start's is not removed: this one may be
# refused.
mark_exit_code() { MARK=$(stat -c '%i %y' "$RUN_FOLDER/exit_code" 2>/dev/null || true); }
has_exit_code() {
    local before=$MARK && mark_exit_code && [[ $VERB == train && $MARK != "$before" && -n $MARK ]]
}

# An unpredictable name.
random_id() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

# wait_for HOST PORT SECONDS: until something listens there, or say that nothing does.
wait_for() {
    local end=$((SECONDS + $3))
    # shellcheck disable=SC2016  # they are that bash's arguments, not a part of its program
    until timeout 2 bash -c ': <>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null; do
        ((SECONDS < end)) ||
            die "no answer from $1 port $2 in $3 s, seen from $(hostname): is the first node" \
                "started, is the name right, does a firewall block the port?"
        sleep 1
    done
}
