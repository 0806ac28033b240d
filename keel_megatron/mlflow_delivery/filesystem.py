"""Detection of network file systems, which several machines may write at once."""

from __future__ import annotations

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    {
        *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "daos", "gfs", "gfs2"),
        *("glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs"),
        *("pvfs2", "quobyte", "smb3", "smbfs", "virtiofs", "vmhgfs", "wekafs"),
    }
)
# A fuse.* type names the program that serves it: nearly all of those that hold runs are remote.
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.portal", "fuse.gocryptfs"})
_ESCAPE = re.compile(r"\\([0-7]{3})")


def filesystem_type(path: Path, mountinfo: str) -> str | None:
    """The type of the file system that holds a path.

    Args:
        path: absolute, without links.
        mountinfo: text of /proc/self/mountinfo (proc(5)).

    Returns:
        For example `ext4`, `nfs4` or `fuse.sshfs`; None if no mount point is above the path.
    """
    longest, found = -1, None
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if not separator or len(fields) < 5 or not kind:
            continue
        place = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        depth = len(place.parts)
        # Of two mounts on one mount point the later one hides the earlier.
        if path.is_relative_to(place) and depth >= longest:
            longest, found = depth, kind
    return found


def is_network(kind: str) -> bool:
    """Whether a file system of this type is shared between machines."""
    return kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def network_filesystem(path: Path) -> str | None:
    """The type of a path's file system if it is a network one; None if it is not, or not known."""
    try:
        mountinfo = _MOUNTS.read_text(errors="surrogateescape")
    except OSError:  # no Linux
        return None
    kind = filesystem_type(path.resolve(), mountinfo)
    return kind if kind is not None and is_network(kind) else None
