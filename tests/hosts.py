"""Hosts on this machine: network namespaces with addresses, names and cables of their own.

Every host is a namespace behind a switch, which is one too; this machine's own network is neither
used nor changed. `10.77.0.N` is host N's address, from 1; the others know its name.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

NETNS = Path("/etc/netns")
ENTER = ("unshare", "--uts", "bash", "-c", 'hostname "$1"; shift; exec "$@"', "enter")


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "unshare", "hostname") if not shutil.which(tool)]:
        return f"network namespaces need {', '.join(missing)} (iproute2, util-linux, hostname)"
    try:
        with Hosts("host-a", "host-b") as hosts:
            if hosts.start("host-a", ["true"]).wait(20):
                return "network namespaces are not allowed here: no command can be run in one"
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces are not allowed here: {error}"
    return None


class Hosts:
    """Some hosts on one switch; a context manager that leaves nothing behind.

    Args:
        names: their host names.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._switch = f"keel{os.getpid()}-switch"
        self._files: list[IO[bytes]] = []
        self._started: list[subprocess.Popen[bytes]] = []

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def __enter__(self) -> Hosts:
        remove_left_over()
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")
        known = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        for name in self.names:
            space = self._space(name)
            ip("netns", "add", space)
            (NETNS / space).mkdir(parents=True)
            (NETNS / space / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            # A name server that refuses at once, in place of one that cannot be reached.
            (NETNS / space / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            cable = ("type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", self._switch, "link", "add", "name", name, *cable)
            ip("-n", self._switch, "link", "set", name, "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for name in self.names:
            remove(self._space(name))
        remove(self._switch)
        for process in self._started:
            process.wait(20)
        for file in self._files:
            file.close()

    def start(
        self,
        name: str,
        command: Sequence[str],
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; what it prints goes to the end of `log`."""
        out: int | IO[bytes] = subprocess.DEVNULL
        if log is not None:
            out = log.open("ab")
            self._files.append(out)
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._space(name), *ENTER, name, *command],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch; what is sent is lost without a word."""
        ip("-n", self._switch, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        ip("-n", self._switch, "link", "set", name, "up")

    def throttle(self, name: str, megabits: int) -> None:
        """Slow a host's cable down, both ways."""
        limit = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "100ms")
        run("tc", "-n", self._switch, "qdisc", "add", "dev", name, *limit)
        run("tc", "-n", self._space(name), "qdisc", "add", "dev", "eth0", *limit)

    def power_off(self, name: str) -> None:
        """End a host as a power cut does: its peers get no word of it."""
        self.cut(name)
        kill(self._space(name))

    def _space(self, name: str) -> str:
        return f"keel{os.getpid()}-{name}"


def remove_left_over() -> None:
    """Remove the hosts of test runs that were killed."""
    found = run("ip", "netns", "list").split() + [path.name for path in NETNS.glob("keel*-*")]
    for space in dict.fromkeys(found):
        owner = re.fullmatch(r"keel(\d+)-.+", space)
        if owner and not Path("/proc", owner[1]).exists():
            remove(space)


def remove(space: str) -> None:
    """End everything in a namespace, and the namespace."""
    if space in run("ip", "netns", "list").split():
        kill(space)
        ip("netns", "del", space)
    shutil.rmtree(NETNS / space, ignore_errors=True)


def kill(space: str) -> None:
    """SIGKILL for all processes of a namespace, until there are none."""
    end = time.monotonic() + 20
    while (pids := run("ip", "netns", "pids", space).split()) and time.monotonic() < end:
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def ip(*arguments: str) -> None:
    run("ip", *arguments)


def run(*command: str) -> str:
    """A command's output; CalledProcessError with what it complains of."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def await_that(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.02)
