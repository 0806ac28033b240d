"""On one machine nothing of a run listens beyond loopback."""

from __future__ import annotations

import argparse
import ipaddress
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.commands import start, write_config

pytestmark = pytest.mark.security


def listening(root: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process or one of its children listens."""
    found: set[tuple[str, int]] = set()
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:  # it has just ended
        return found
    for process in family:
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or is just ending
            continue
        found |= {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def test_a_run_of_one_machine(tmp_path: Path) -> None:
    write_config(tmp_path, Path(argparse.__file__), training__validation_sequences=4)
    settings = ("run.yaml", "parallel.pipeline=2", "training.steps=4", "--processes", "2")
    seen: set[tuple[str, int]] = set()
    with start(tmp_path, "train", *settings) as run:
        try:
            process, end = psutil.Process(run.pid), time.monotonic() + 180
            while run.poll() is None:
                assert time.monotonic() < end
                seen |= listening(process)
                time.sleep(0.05)
            _said, errors = run.communicate()
        finally:
            run.kill()
    assert run.returncode == 0, errors
    assert seen, "the processes meet on a port"
    beyond = sorted(pair for pair in seen if not is_loopback(pair[0]))
    assert beyond == []
