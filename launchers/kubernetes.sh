#!/usr/bin/env bash
# Submit a run to Kubernetes: an Indexed Job with a headless service, or a Kubeflow PyTorchJob.
#
#   [VARIABLES] launchers/kubernetes.sh [options] CONFIG [section.key=value ...]
#
#   options: --dry-run (show the manifest), --doctor, --max-restarts N
#
#   KIND           job (default) or pytorchjob: the manifests in launchers/kubernetes/
#   NAME           name of the job (default keel)
#   IMAGE          container image, from docker/ (default keel-megatron)
#   NNODES         number of pods (default 2)
#   GPUS_PER_NODE  GPUs per pod (default 8; 0: train on the CPU)
#   CLAIM          volume claim that all pods can write, for runs/ and data/ (default keel)
#   SECRET         optional Secret with MLFLOW_TRACKING_USERNAME and others (default keel-mlflow)
#   NAMESPACE      namespace (default: kubectl's current one)
#
# CONFIG is a local file, which is sent as a ConfigMap. To end the run, repeat the command with --dry-run
# and append `| grep -v '^+ ' | kubectl delete -f -`.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/lib.sh
source "$ROOT/launchers/lib.sh"

parse_arguments "$@"
find_python
kind=${KIND:-job} name=${NAME:-keel} nodes=${NNODES:-2} gpus=${GPUS_PER_NODE:-8} claim=${CLAIM:-keel}
[[ $kind == job || $kind == pytorchjob ]] || die "KIND=$kind must be job or pytorchjob"
is_positive "$nodes" || die "NNODES=$nodes must be a positive number"
is_number "$gpus" || die "GPUS_PER_NODE=$gpus must be a number"
# A service's name: it becomes part of the pods' host names.
[[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
    die "NAME=$name must be lower-case letters, digits and '-', 52 at most"

options=(--max-restarts "$MAX_RESTARTS")
[[ $VERB == doctor ]] && options+=(--doctor)
manifest=("$PYTHON" "$ROOT/launchers/kubernetes/render.py" "$kind" "$name" "${IMAGE:-keel-megatron}"
    "$nodes" "$gpus" "$claim" "${SECRET:-keel-mlflow}" "$CONFIG" "${options[@]}" "$CONFIG" "${OVERRIDES[@]}")
apply=(kubectl ${NAMESPACE:+--namespace "$NAMESPACE"} apply --filename -)
show "${manifest[@]}"
show "${apply[@]}"
if ((DRY_RUN)); then
    "${manifest[@]}"
    exit 0
fi
command -v kubectl >/dev/null || die "kubectl is missing on $(hostname)"
"$PYTHON" -m keel_megatron config folder "$CONFIG" "${OVERRIDES[@]}" >/dev/null || exit $?
"${apply[@]:0:${#apply[@]}-3}" get persistentvolumeclaim "$claim" --request-timeout 20s >/dev/null ||
    die "CLAIM=$claim: no answer from the cluster, or no such volume claim (docs/cluster.md)"
"${manifest[@]}" | "${apply[@]}"
label=batch.kubernetes.io/job-name
[[ $kind == pytorchjob ]] && label=training.kubeflow.org/job-name
say "kubectl ${NAMESPACE:+--namespace $NAMESPACE }logs --follow --prefix --selector $label=$name"
