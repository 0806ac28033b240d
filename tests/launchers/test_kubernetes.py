"""Manifests as kubernetes.sh makes them: what is in them, and that the schemas agree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import yaml
from tests.launchers.pod_security import violations
from tests.launchers.test_launchers import DEMO, ROOT, launch

VALIDATORS = ROOT / ".venv" / "validators" / "bin" / "python"


def rendered(kind: str, **variables: str) -> tuple[str, dict[str, Any]]:
    settings = ("training.steps=9", "data.text=a b")
    done = launch("kubernetes.sh", "--dry-run", DEMO, *settings, KIND=kind, **variables)
    assert done.returncode == 0, done.stderr
    text = "".join(line for line in done.stdout.splitlines(True) if not line.startswith("+ "))
    return text, {entry["kind"]: entry for entry in yaml.safe_load_all(text)}


def checked(text: str) -> subprocess.CompletedProcess[str]:
    if not VALIDATORS.exists():
        pytest.skip("no .venv/validators (make validators)")
    return subprocess.run(
        [str(VALIDATORS), str(ROOT / "tools" / "check_manifests.py"), "-"],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_indexed_job() -> None:
    variables = {"NNODES": "16", "GPUS_PER_NODE": "8", "NAME": "deep", "CLAIM": "lake"}
    _text, found = rendered("job", IMAGE="registry/keel:1", **variables)
    job = found["Job"]["spec"]
    assert (job["completions"], job["parallelism"]) == (16, 16)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    # The first pod's name, which the headless service of the job's name makes resolvable.
    assert env["RDZV_ENDPOINT"] == "deep-0.deep:29500"
    assert pod["subdomain"] == found["Service"]["metadata"]["name"] == "deep"
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": "deep"}
    assert env["NNODES"] == "16"
    assert container["image"] == "registry/keel:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    expected = ["--max-restarts", "3", "/etc/keel/run.yaml", "training.steps=9", "data.text=a b"]
    assert container["args"] == expected
    assert found["ConfigMap"]["data"]["run.yaml"] == Path(DEMO).read_text()
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    assert {"claimName": "lake"} in claims
    # Exit codes of keel_megatron/runtime/exit_codes.py: mistakes and divergence, what was saved.
    by_action = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert by_action == {"FailJob": [2, 65], "Ignore": [75, 143]}


def pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specs of a job."""
    if "Job" in found:
        return [found["Job"]["spec"]["template"]["spec"]]
    replicas = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    return [replica["template"]["spec"] for replica in replicas.values()]


@pytest.mark.security
@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@pytest.mark.parametrize("gpus", ["0", "8"])
def test_the_restricted_standard_accepts_the_pods(kind: str, gpus: str) -> None:
    _text, found = rendered(kind, GPUS_PER_NODE=gpus)
    for pod in pods(found):
        assert list(violations(pod)) == []
        assert pod["automountServiceAccountToken"] is False
        del pod["containers"][0]["securityContext"], pod["securityContext"]
        trainer = pod["containers"][0]["name"]
        rules = ("allowPrivilegeEscalation", "capabilities.drop", "runAsNonRoot", "seccompProfile")
        assert list(violations(pod)) == [f"{trainer}: {rule}" for rule in rules]


@pytest.mark.security
@pytest.mark.parametrize(
    ("kind", "label"),
    [("job", "batch.kubernetes.io/job-name"), ("pytorchjob", "training.kubeflow.org/job-name")],
)
def test_only_a_jobs_own_pods_reach_it(kind: str, label: str) -> None:
    _text, found = rendered(kind, NAME="deep")
    own = {"podSelector": {"matchLabels": {label: "deep"}}}
    policy = found["NetworkPolicy"]["spec"]
    assert policy == own | {"policyTypes": ["Ingress"], "ingress": [{"from": [own]}]}


@pytest.mark.security
@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
def test_credentials_come_from_a_secret(kind: str) -> None:
    _text, found = rendered(kind, SECRET="tracking")
    for pod in pods(found):
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "tracking", "optional": True}}]
        assert not any("MLFLOW" in variable["name"] for variable in container["env"])


@pytest.mark.security
def test_the_rendezvous_is_named_by_the_jobs_random_uid() -> None:
    _text, found = rendered("job")
    (pod,) = pods(found)
    (name,) = (v for v in pod["containers"][0]["env"] if v["name"] == "RDZV_ID")
    path = "metadata.labels['batch.kubernetes.io/controller-uid']"
    assert name["valueFrom"] == {"fieldRef": {"fieldPath": path}}


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@pytest.mark.parametrize("image", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_have_what_the_manifests_start(kind: str, image: str) -> None:
    manifest = (ROOT / "launchers" / "kubernetes" / f"{kind}.yaml").read_text()
    recipe = (ROOT / "docker" / image).read_text()
    assert "command: [/opt/keel/launchers/torchrun.sh]" in manifest
    assert "COPY launchers /opt/keel/launchers\n" in recipe
    assert "!launchers\n" in (ROOT / ".dockerignore").read_text()
    for field in ("fsGroup", "runAsUser", "runAsGroup"):
        assert f"{field}: {re.search('--uid ([0-9]+)', recipe)[1]}\n" in manifest
    assert "workingDir: /work " in manifest
    assert "WORKDIR /work\n" in recipe


def test_a_pytorchjob() -> None:
    _text, found = rendered("pytorchjob", NNODES="16", GPUS_PER_NODE="4")
    spec = found["PyTorchJob"]["spec"]
    assert spec["nprocPerNode"] == "4"
    replicas = spec["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 15)
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    _text, found = rendered("pytorchjob", NNODES="1", GPUS_PER_NODE="0")
    assert list(found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@pytest.mark.parametrize("gpus", ["0", "8"])
def test_the_schemas_agree(kind: str, gpus: str) -> None:
    text, _found = rendered(kind, NNODES="4", GPUS_PER_NODE=gpus)
    done = checked(text)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "complaint"),
    [
        ("job", "completions: 4", "completions: four", "spec.completions: 'four' is not of type"),
        ("job", "workingDir:", "workingdir:", "'workingdir' was unexpected"),
        ("pytorchjob", "cleanPodPolicy:", "cleanPods:", "runPolicy.cleanPods is unknown"),
        ("pytorchjob", "replicas: 3", "replicas: three", "'three' is no int"),
        ("pytorchjob", "OnFailure", "Sometimes", "'Sometimes' must be Always|OnFailure"),
        ("pytorchjob", "mountPath:", "mountpath:", "Worker: spec.containers.0"),
        ("pytorchjob", "name: pytorch\n", "name: trainer\n", "no container is called pytorch"),
    ],
)
def test_the_schemas_see_a_mistake(kind: str, right: str, wrong: str, complaint: str) -> None:
    text, _found = rendered(kind, NNODES="4")
    assert right in text
    done = checked(text.replace(right, wrong))
    assert done.returncode == 1
    assert complaint in done.stdout
