"""Fill in a manifest of this folder; launchers/kubernetes.sh calls it and says what is what.

render.py job|pytorchjob NAME IMAGE NNODES GPUS_PER_NODE CLAIM SECRET CONFIG [ARGUMENT ...]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import yaml

MOUNTED = "/etc/keel/run.yaml"


def render(
    kind: str,
    name: str,
    image: str,
    nodes: int,
    gpus: int,
    claim: str,
    secret: str,
    config: str,
    arguments: list[str],
) -> list[dict[str, Any]]:
    """The manifest's objects.

    Args:
        kind: job or pytorchjob.
        name: of the job, its service and its configuration.
        image: the container image.
        nodes: pods.
        gpus: of each pod; 0 = a CPU.
        claim: the volume claim that all pods share.
        secret: with the variables of MLflow's client; it may be absent.
        config: the YAML of the run.
        arguments: options and settings of torchrun.sh; CONFIG stands where MOUNTED does.
    """
    text = (Path(__file__).parent / f"{kind}.yaml").read_text(encoding="utf-8")
    found = {entry["kind"]: entry for entry in yaml.safe_load_all(text)}
    for entry in found.values():
        entry["metadata"]["name"] = name
    found["ConfigMap"]["data"] = {"run.yaml": config}
    policy = found["NetworkPolicy"]["spec"]
    own = dict.fromkeys(policy["podSelector"]["matchLabels"], name)
    policy["podSelector"] = policy["ingress"][0]["from"][0]["podSelector"] = {"matchLabels": own}
    if kind == "job":
        found["Service"]["spec"]["selector"] = own
        spec = found["Job"]["spec"]
        spec["completions"] = spec["parallelism"] = nodes
        template = spec["template"]
        template["spec"]["subdomain"] = name
        values = {"NNODES": str(nodes), "RDZV_ENDPOINT": f"{name}-0.{name}:29500"}
    else:
        spec = found["PyTorchJob"]["spec"]
        spec["nprocPerNode"] = str(gpus or 1)
        replicas = spec["pytorchReplicaSpecs"]
        template = replicas["Master"]["template"]
        replicas["Worker"].update(replicas=nodes - 1, template=template)
        if nodes == 1:
            del replicas["Worker"]
        values = {"KEEL_JOB_ID": name}
    _fill_pod(template["spec"], name, image, gpus, claim, secret, arguments)
    for variable in template["spec"]["containers"][0]["env"]:
        if variable["name"] in values:
            variable["value"] = values[variable["name"]]
    # Copies: YAML's own aliases are hard to read.
    return [copy.deepcopy(entry) for entry in found.values()]


def _fill_pod(
    pod: dict[str, Any],
    name: str,
    image: str,
    gpus: int,
    claim: str,
    secret: str,
    arguments: list[str],
) -> None:
    container = pod["containers"][0]
    # Kubernetes reads $(NAME) as a variable's value, and $$ as $.
    container |= {"image": image, "args": [text.replace("$", "$$") for text in arguments]}
    container["envFrom"][0]["secretRef"]["name"] = secret
    if gpus:  # whole nodes: what they have of cores and memory
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = claim
        if "configMap" in volume:
            volume["configMap"]["name"] = name


class _Dumper(yaml.SafeDumper):
    """Without aliases, and a file's text as a block of lines."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def main() -> None:
    """Render what the arguments say to standard output."""
    kind, name, image, nodes, gpus, claim, secret, config, *arguments = sys.argv[1:]
    text = Path(config).read_text(encoding="utf-8")
    given = [MOUNTED if argument == config else argument for argument in arguments]
    objects = render(kind, name, image, int(nodes), int(gpus), claim, secret, text, given)
    yaml.dump_all(objects, sys.stdout, Dumper=_Dumper, sort_keys=False)


if __name__ == "__main__":
    main()
