"""Lock of a run's folder: one process at a time trains in it or removes its checkpoints.

`owner.lock` in the folder names the owner, which holds an flock on it. The lock belongs to an open
file, not to a process: `keel train` opens it and passes it to rank 0. So the folder is free as soon
as both have ended, for any reason. A clean exit removes the file.

flock works between processes of one machine, and on most shared file systems between machines (NFS
4, GPFS, Lustre mounted with `flock`). Where it does not, a lease replaces it: the owner updates the
file's modification time every HEARTBEAT_SECONDS. A process that finds the file of an owner on
another machine watches it for LEASE_SECONDS, by its own clock, before it takes the folder. On such
a file system, two starts within this time may both succeed, and an owner that is suspended for
longer (SIGSTOP, a suspended virtual machine) may lose the folder. The same applies if owner.lock is
removed by hand.

Reading a run does not need the lock. Does not import torch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil

from keel_megatron.errors import UserError
from keel_megatron.runtime.locks import lock

FILE = "owner.lock"
PASSED_ON = "KEEL_OWNER_FD"
"""Variable with the number of the open, locked file that a launcher passes on to its rank 0."""
STUDIED = "studied"
"""Work of the owner of a study's folder, which holds its runs' folders."""
HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 30.0
LEFT_BEHIND_SECONDS = 600.0
"""A lease older than this, by this machine's clock, is expired without being watched."""
PATIENCE_SECONDS = 10.0
"""Time for the ranks of a dead owner to end, seconds."""
_POLL_SECONDS = 0.2
# In an untrusted folder the name may be a link to a file of ours, or a FIFO.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Owner:
    """Owner of a run's folder, from its lock file."""

    host: str
    pid: int
    since: str
    """UTC."""
    machine: str
    """Id of the machine's boot, within which flock works."""
    pids: str
    """PID namespace of `pid`: containers have their own."""
    work: str
    """What the owner does: "trained", "pruned", "studied"."""

    @classmethod
    def this_process(cls, work: str) -> Owner:
        """This process."""
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), since, _machine(), _pids(), work)

    @property
    def is_gone(self) -> bool:
        """Whether it is an ended process of this machine, whose ranks are still running."""
        here = (self.machine, self.pids) == (_machine(), _pids())
        return here and not psutil.pid_exists(self.pid)


class Ownership:
    """This process's lock on a run's folder; a context manager that releases it.

    Args:
        folder: the run's folder.
        descriptor: its open, locked file.
        made: the folders that were created for it, innermost first; removed again if empty.
        is_passed_on: another process created the file, and removes it.
    """

    def __init__(
        self, folder: Path, descriptor: int, made: tuple[Path, ...] = (), is_passed_on: bool = False
    ) -> None:
        self.folder = folder
        self.descriptor = descriptor
        self._made = made
        self._is_passed_on = is_passed_on
        self._ending = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._heart.join()
        if not self._is_passed_on:
            with suppress(OSError):
                _path(self.folder).unlink()  # locked, so it is not another process's
            _unmake(self._made)
        os.close(self.descriptor)

    def _beat(self) -> None:
        while not self._ending.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.descriptor)

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def take(folder: Path, work: str = "trained") -> Ownership:
    """Lock a run's folder, which is created if needed.

    Args:
        folder: the run's folder.
        work: what this process does, for the message to other processes.

    Raises:
        UserError: another process owns the folder, or it cannot be written.
    """
    made = tuple(path for path in (folder, *folder.parents) if not path.exists())
    try:
        descriptor = _locked(folder)
        try:
            _write(descriptor, Owner.this_process(work))
        except BaseException:
            with suppress(OSError):
                _path(folder).unlink()  # locked, so it is not another process's
            os.close(descriptor)
            raise
    except BaseException as error:
        _unmake(made)
        if isinstance(error, OSError):
            raise UserError(
                f"training.runs_dir: cannot write the run's folder {folder}: {error.strerror}"
            ) from error
        raise
    return Ownership(folder, descriptor, made)


def passed_on(folder: Path) -> Ownership | None:
    """The lock that the launcher has passed to this process, or None.

    The variable is not enough, because child processes of a rank inherit it; the open file is
    passed only to rank 0.
    """
    text = os.environ.pop(PASSED_ON, "")
    if not text.isdecimal():
        return None
    descriptor = int(text)
    try:
        if not os.path.samestat(os.fstat(descriptor), os.stat(_path(folder))):
            return None
    except OSError:
        return None
    os.set_inheritable(descriptor, False)
    return Ownership(folder, descriptor, is_passed_on=True)


def _path(folder: Path) -> Path:
    return folder / FILE


def _locked(folder: Path) -> int:
    """Open and lock the folder's file, when there is no other owner."""
    end: float | None = None
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # an owner may remove what it has made
        descriptor = os.open(_path(folder), _FLAGS, 0o644)
        try:
            has_locks = lock(descriptor)
            owner = _read(descriptor)
            if not has_locks or (owner is not None and owner.machine != _machine()):
                _watch(folder, owner)
            if _is_current(descriptor, folder):
                return descriptor
        except BlockingIOError:
            owner = _settled(descriptor)
            end = end or time.monotonic() + (PATIENCE_SECONDS if _may_end_soon(owner) else 0.0)
            if time.monotonic() >= end:
                os.close(descriptor)
                raise _refusal(folder, owner) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_POLL_SECONDS)


def _is_current(descriptor: int, folder: Path) -> bool:
    """Whether the locked file is still in the folder; the last owner removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(_path(folder)))
    except FileNotFoundError:
        return False


def _may_end_soon(owner: Owner | None) -> bool:
    """Whether the owner is a killed launcher's ranks, or an earlier start of this group."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    return restarted or (owner is not None and owner.is_gone)


def _watch(folder: Path, owner: Owner | None) -> None:
    """Check that the owner of a lease does not renew it.

    Raises:
        UserError: the owner renews it.
    """
    path = _path(folder)
    before = path.stat()
    if owner is None or time.time() - before.st_mtime > LEFT_BEHIND_SECONDS:
        return
    print(
        f"{folder} was last owned by process {owner.pid} on host {owner.host}; checking for "
        f"{LEASE_SECONDS:g} s whether it still is",
        file=sys.stderr,
        flush=True,
    )
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        with suppress(FileNotFoundError):
            with path.open("rb"):  # has NFS look again
                pass
            if path.stat().st_mtime_ns != before.st_mtime_ns:
                raise _refusal(folder, owner)


def _settled(descriptor: int) -> Owner | None:
    """The owner in a locked file; waits for one that has locked it but not yet written."""
    for _ in range(5):
        owner = _read(descriptor)
        if owner is not None:
            return owner
        time.sleep(_POLL_SECONDS)
    return None


def _read(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode() + b"\n", 0)
    os.fsync(descriptor)


def _refusal(folder: Path, owner: Owner | None) -> UserError:
    if owner is None:
        return UserError(f"{folder} is owned by another process; see {_path(folder)}")
    if owner.is_gone:
        return UserError(
            f"{folder} still has running ranks, started by process {owner.pid} on host "
            f"{owner.host} at {owner.since}. That process has ended, so they save and exit; try "
            "again when they have"
        )
    return UserError(
        f"{folder} is being {owner.work} by process {owner.pid} on host {owner.host} since "
        f"{owner.since}; stop it, or give this "
        + ("study another --out" if owner.work == STUDIED else "run another training.name")
    )


def _unmake(made: tuple[Path, ...]) -> None:
    """Remove folders, innermost first, if they are empty."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _machine() -> str:
    """Id of this machine's boot; its host name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _pids() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
