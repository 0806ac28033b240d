"""Locks on files, which the system frees when their holder ends for any reason.

Some file systems have none (Lustre mounted without `flock`, NFS without its lock service).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# Other users may write the folder: the name may be a link to another file, or a FIFO.
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file; False if its file system has no locks.

    Args:
        descriptor: the file's.
        wait: wait while another process has it locked.

    Raises:
        BlockingIOError: another process has locked it, and `wait` is false.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file within the block; yields whether its file system has locks.

    Where it has none, a file in the system's temporary folder is locked instead, which excludes the
    other processes of this user and machine.

    Args:
        path: the file, created if it does not exist.
        waiting: called before waiting for another process.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    with ExitStack() as stack:

        def hold(file: Path, mode: int) -> bool:
            stream = stack.enter_context(os.fdopen(os.open(file, _FLAGS, mode), "wb"))
            try:
                return lock(stream.fileno())
            except BlockingIOError:
                waiting()
                return lock(stream.fileno(), wait=True)

        has_locks = hold(path, 0o666)
        if not has_locks:
            with suppress(OSError):
                hold(_substitute(path), 0o600)
        yield has_locks


def _substitute(path: Path) -> Path:
    """The file of this machine that is locked instead."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"keel-megatron-{os.getuid()}-{digest}.lock"
