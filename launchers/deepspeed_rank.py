"""Become `keel` with arguments that no shell has read; what launchers/deepspeed.sh starts by ssh.

deepspeed_rank.py PACKED [SECRETS]

PACKED is base64 of arguments that end with a zero byte each. SECRETS is a file of NAME=VALUE, each
with a zero byte behind it, for rank 0 to put into its environment and to remove.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process."""
    packed, *secrets = sys.argv[1:]
    arguments = base64.b64decode(packed, validate=True).split(b"\0")[:-1]
    if secrets and os.environ["RANK"] == "0":
        path = Path(secrets[0])
        held = path.read_bytes()
        path.unlink()
        for name, _, value in (line.partition(b"=") for line in held.split(b"\0")[:-1]):
            os.environb[name] = value
    command = [sys.executable, "-u", "-m", "keel_megatron"]
    os.execv(sys.executable, [*map(os.fsencode, command), *arguments])


if __name__ == "__main__":
    main()
