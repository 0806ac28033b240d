"""Which file system holds a path, from a mountinfo text."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.mlflow_delivery.filesystem import filesystem_type, is_network

MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/local\040disk rw - xfs /dev/sdb rw
32 22 0:42 / /scratch rw - lustre mds@tcp:/scratch rw
33 22 0:43 / /data rw - ext4 /dev/sdc rw
34 22 0:44 / /data rw - fuse.s3fs s3fs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/work/runs", "ext4", False),
        ("/home/me/runs", "nfs4", True),
        ("/homely/runs", "ext4", False),
        ("/home/me/local disk/runs", "xfs", False),
        ("/scratch", "lustre", True),
        ("/data/runs", "fuse.s3fs", True),
    ],
)
def test_the_deepest_and_last_mount_counts(path: str, kind: str, network: bool) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind
    assert is_network(kind) == network


def test_local_types_are_not_network_ones() -> None:
    for kind in ("overlay", "tmpfs", "btrfs", "zfs", "fuseblk", "fuse.fuse-overlayfs"):
        assert not is_network(kind), kind
    for kind in ("cifs", "gpfs", "beegfs", "ceph", "fuse.sshfs", "fuse.juicefs"):
        assert is_network(kind), kind
    assert filesystem_type(Path("/x"), "") is None
