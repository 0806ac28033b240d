"""System metrics of every node: CPU, memory, disk, network and GPUs."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.outbox import MeasurementLog


@contextmanager
def measured_machine(config: RunConfig, local_rank: int) -> Iterator[None]:
    """Measure this node within the block, every `tracking.system_metrics_every` seconds.

    Local rank 0 of each node appends to a stream of its own in the run's outbox; rank 0's MLflow
    worker delivers all of them, so that no other node needs a connection to MLflow.

    Args:
        config: the run.
        local_rank: rank within the node.
    """
    every = config.tracking.system_metrics_every
    if local_rank != 0 or every == 0 or not config.tracking.mlflow:
        yield
        return
    ended = threading.Event()
    log = MeasurementLog(config.training.folder, node_name())
    thread = threading.Thread(
        target=_measure, args=(log, every, ended), name="system metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        log.close()


def node_name() -> str:
    """This node's name as a part of metrics' names."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname().partition(".")[0]) or "node"


def _measure(log: MeasurementLog, every: float, ended: threading.Event) -> None:
    machine = Machine()
    prefix = f"system/{node_name()}/"
    while not ended.wait(every):
        with suppress(OSError, psutil.Error):
            log.append({prefix + name: value for name, value in machine.measure().items()})


class Machine:
    """Reads the node's counters, under the names that MLflow gives its own system metrics.

    GPUs are read where the package nvidia-ml-py is installed.
    """

    def __init__(self) -> None:
        self._network = psutil.net_io_counters()
        self._nvml, self._gpus = _gpus()
        psutil.cpu_percent()  # the first call only begins the interval

    def measure(self) -> dict[str, float]:
        """The current values; CPU use since the last call, network bytes since the first."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network is not None and self._network is not None:
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            values["network_receive_megabytes"] = received / 1e6
            values["network_transmit_megabytes"] = sent / 1e6
        for number, gpu in enumerate(self._gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in self._gpu(gpu).items()}
        return values

    def _gpu(self, gpu: Any) -> dict[str, float]:
        nvml, values = self._nvml, {}
        with suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            values["memory_usage_megabytes"] = memory.used / 1e6
            values["memory_usage_percentage"] = memory.used / memory.total * 100
        with suppress(nvml.NVMLError):
            values["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        with suppress(nvml.NVMLError):
            values["power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return values


def _gpus() -> tuple[Any, list[Any]]:
    """NVML and the node's GPUs; none where there is no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(count)]
    except Exception:
        return None, []
