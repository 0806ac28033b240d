"""The rules of Kubernetes' Pod Security Standard "restricted" (which has those of "baseline").

https://kubernetes.io/docs/concepts/security/pod-security-standards/ of
Kubernetes 1.31, for Linux pods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = {"RuntimeDefault", "Localhost"}


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """What of a pod's spec the standard forbids."""
    context = pod.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield name
    for volume in pod.get("volumes", ()):
        if not volume.keys() & VOLUMES:
            yield f"volume {volume['name']}"
    for sysctl in context.get("sysctls", ()):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    if context.get("runAsUser") == 0:
        yield "runAsUser"
    yield from _common(context, "pod")
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (each for kind in kinds for each in pod.get(kind, ())):
        yield from (f"{container['name']}: {what}" for what in _container(container, context))


def _container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    yield from _common(context, "container")
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield "capabilities.drop"
    if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if context.get("runAsUser") == 0:
        yield "runAsUser"
    profile = context.get("seccompProfile", pod.get("seccompProfile", {}))
    if profile.get("type") not in PROFILES:
        yield "seccompProfile"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    if any("hostPort" in port and port["hostPort"] for port in container.get("ports", ())):
        yield "hostPort"


def _common(context: dict[str, Any], what: str) -> Iterator[str]:
    options = context.get("seLinuxOptions", {})
    if options.get("type", "") not in SELINUX or options.get("user") or options.get("role"):
        yield f"{what} seLinuxOptions"
    if context.get("appArmorProfile", {"type": "RuntimeDefault"})["type"] not in PROFILES:
        yield f"{what} appArmorProfile"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{what} hostProcess"
