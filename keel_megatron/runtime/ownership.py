"""A run's folder has one owner at a time: whoever trains in it, or removes its checkpoints.

`owner.lock` in the folder names the owner and is locked with flock while the owner lives. The lock
belongs to an open file, not to a process: `keel train` opens it and passes it on to rank 0, so that
the folder is free only when both are gone, whatever ended them, and is free at once then. A clean
end removes the file.

flock is certain between processes of one machine, and on most shared file systems between machines
(NFS 4, GPFS, Lustre mounted with `flock`). Where it does not reach another machine, or is not
supported, a lease stands in: the owner renews the file's time of change every HEARTBEAT_SECONDS,
and who finds the file of an owner on another machine watches it for LEASE_SECONDS, on its own
clock, before it takes the folder over. On such a file system two starts within these seconds may
both be let in, and an owner that is stopped (SIGSTOP, a suspended virtual machine) for longer than
that may be taken for dead. The same holds if somebody removes owner.lock by hand.

Nothing that only reads a run needs the lock. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
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

from keel_megatron.config.errors import UserError

FILE = "owner.lock"
PASSED_ON = "KEEL_OWNER_FD"
"""Variable with the number of the open, locked file that a launcher passes on to its rank 0."""
HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 30.0
LEFT_BEHIND_SECONDS = 600.0
"""A lease that was not renewed for so long by this machine's clock is not watched any more."""
PATIENCE_SECONDS = 10.0
"""How long to wait for the ranks of an owner that is gone to end."""
_POLL_SECONDS = 0.2
# In somebody else's folder the name may be a link to a file of ours, or a FIFO.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Owner:
    """Who owns a run's folder, as its file says."""

    host: str
    pid: int
    since: str
    """UTC."""
    machine: str
    """The machine's boot: flock is certain within it."""
    pids: str
    """The namespace of `pid`: a container has its own."""
    work: str
    """What is done to the run: "trained", "pruned"."""

    @classmethod
    def this_process(cls, work: str) -> Owner:
        """This process."""
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), since, _machine(), _pids(), work)

    @property
    def is_gone(self) -> bool:
        """Whether it is a process of this machine that has ended; then its ranks still live."""
        here = (self.machine, self.pids) == (_machine(), _pids())
        return here and not psutil.pid_exists(self.pid)


class Ownership:
    """This process's hold on a run's folder; a context manager that gives it back.

    Args:
        folder: the run's folder.
        descriptor: its open, locked file.
        made: the folders that were made for it, innermost first; they are removed again if
            nothing else has come into them.
        is_passed_on: another process made the file, and removes it.
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
        """Give the folder back; a second call does nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._heart.join()
        if not self._is_passed_on:
            with suppress(OSError):
                _path(self.folder).unlink()  # while it is locked: nobody else's is removed
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
    """Own a run's folder, which is made if it is not there.

    Args:
        folder: the run's folder.
        work: what will be done to the run, for the message that another process gets.

    Raises:
        UserError: another process owns it, or it cannot be written.
    """
    made = tuple(path for path in (folder, *folder.parents) if not path.exists())
    try:
        descriptor = _locked(folder)
        try:
            _write(descriptor, Owner.this_process(work))
        except BaseException:
            with suppress(OSError):
                _path(folder).unlink()  # locked, so it is nobody else's
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
    """The hold on a run's folder that this process's launcher has passed on to it, if it has.

    The variable alone proves nothing, as a process started by a rank inherits it; the open file
    does, as it is passed on to rank 0 only.
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
    """The folder's file, open and locked, once no other owner is left."""
    end: float | None = None
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # an owner may remove what it has made
        descriptor = os.open(_path(folder), _FLAGS, 0o644)
        try:
            has_locks = _lock(descriptor)
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


def _lock(descriptor: int) -> bool:
    """Lock an open file; False if its file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_current(descriptor: int, folder: Path) -> bool:
    """Whether the locked file is still the folder's: its last owner removes it at its end."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(_path(folder)))
    except FileNotFoundError:
        return False


def _may_end_soon(owner: Owner | None) -> bool:
    """Whether the owner is a killed launcher's ranks, or torchrun's last start of this group."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    return restarted or (owner is not None and owner.is_gone)


def _watch(folder: Path, owner: Owner | None) -> None:
    """See that the owner of a lease does not renew it.

    Raises:
        UserError: it does.
    """
    path = _path(folder)
    before = path.stat()
    if owner is None or time.time() - before.st_mtime > LEFT_BEHIND_SECONDS:
        return
    print(
        f"{folder} was last owned by process {owner.pid} on host {owner.host}; watching for "
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
    """The owner that a locked file names; one that has just locked it is about to write it."""
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
            f"{folder} still has ranks at work that process {owner.pid} on host {owner.host} has "
            f"started at {owner.since}. It is gone, so they save and end: try again when they have"
        )
    return UserError(
        f"{folder} is being {owner.work} by process {owner.pid} on host {owner.host} since "
        f"{owner.since}; stop it, or give this run another training.name"
    )


def _unmake(made: tuple[Path, ...]) -> None:
    """Remove folders, innermost first, unless there is anything in them."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _machine() -> str:
    """This boot of this machine; its name where the system does not tell boots apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _pids() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
