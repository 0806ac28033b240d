"""Validate Kubernetes manifests against their schemas, offline.

python tools/check_manifests.py [FILE ...]   # default: launchers/kubernetes/*.yaml; - = stdin

Kubernetes' own kinds are validated with its OpenAPI schemas (kubernetes-validate, strict: no
unknown fields), a PyTorchJob with the training operator's models (kubeflow-training), and its pods
with Kubernetes' schemas. Both packages are in a separate environment, .venv/validators (`make
validators`), because they install clients that training does not need.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate

import yaml

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("1.31", "1.37")
"""The oldest version that the manifests support, and the newest that the package supports."""
KINDS = {"str": str, "int": int, "bool": bool, "float": (int, float)}
DESCRIBED = {
    "nprocPerNode": r"auto|cpu|gpu|\d+",
    "restartPolicy": "Always|OnFailure|Never|ExitCode",
}


def problems(entry: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one object."""
    if entry.get("apiVersion") != "kubeflow.org/v1":
        yield from _by_kubernetes(entry)
        return
    if entry.get("kind") != "PyTorchJob":
        yield f"kind {entry.get('kind')} is unknown"
        return
    yield from _by_model(entry, "KubeflowOrgV1PyTorchJob", "")
    for role, replica in entry["spec"].get("pytorchReplicaSpecs", {}).items():
        template = replica.get("template", {})
        metadata = {"name": "pod"} | template.get("metadata", {})
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, **template}
        pod["metadata"] = metadata
        yield from (f"{role}: {problem}" for problem in _by_kubernetes(pod))
        names = [container["name"] for container in template["spec"]["containers"]]
        if "pytorch" not in names:
            yield f"{role}: no container is called pytorch"


def _by_kubernetes(entry: dict[str, Any]) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(entry, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"


def _by_model(value: Any, kind: str, path: str) -> Iterator[str]:
    """Compare with a class of kubeflow.training.models, which lists fields and their types."""
    if (inner := re.fullmatch(r"(list\[|dict\(str, )(.+)[\])]", kind)) is not None:
        wanted = list if inner[1] == "list[" else dict
        if not isinstance(value, wanted):
            yield f"{path}: {value!r} is no {wanted.__name__}"
            return
        parts = enumerate(value) if wanted is list else value.items()
        for key, part in parts:
            yield from _by_model(part, inner[2], f"{path}.{key}")
        return
    if kind in KINDS:
        if not isinstance(value, KINDS[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{path}: {value!r} is no {kind}"
        return
    if not kind.startswith("KubeflowOrg"):  # a kind of Kubernetes', looked at as a whole
        return
    model = getattr(importlib.import_module("kubeflow.training.models"), kind)
    types = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is no {kind}"
        return
    for key, part in value.items():
        if key not in types:
            yield f"{path}.{key} is unknown; known are {', '.join(types)}"
        elif key in DESCRIBED and not re.fullmatch(DESCRIBED[key], str(part)):
            yield f"{path}.{key}: {part!r} must be {DESCRIBED[key]}"
        else:
            yield from _by_model(part, types[key], f"{path}.{key}")


def main() -> None:
    """Check files; exit code 1 if anything is wrong."""
    names = sys.argv[1:] or sorted(map(str, (ROOT / "launchers" / "kubernetes").glob("*.yaml")))
    wrong = 0
    for name in names:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        entries = [entry for entry in yaml.safe_load_all(text) if entry is not None]
        for entry in entries:
            for problem in problems(entry):
                wrong += 1
                print(f"{name}: {entry.get('kind')}: {problem}")
        print(f"{name}: {', '.join(str(entry.get('kind')) for entry in entries)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
