"""Every patch of megatron-core, torch and DeepSpeed; docs/compat.md lists them.

Importing the package patches nothing. A process that will import Megatron-core calls `install`
first; the patches that need a device, a model or an optimizer are applied where those are created.
"""

from __future__ import annotations

from keel_megatron.compat import late_compile, quiet


def install() -> None:
    """Install the patches that have to precede the import of Megatron-core.

    Calling it again changes nothing. It imports neither torch nor Megatron-core.
    """
    late_compile.install()
    quiet.install()
