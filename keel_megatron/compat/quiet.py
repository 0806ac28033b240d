"""Silence what megatron-core and torch say about choices that are deliberate here."""

from __future__ import annotations

import logging
import warnings

from keel_megatron.compat.patch_table import patch


@patch(
    changes="filters Python warnings from `megatron.core`; sets its logger to ERROR",
    why="on import it warns, file by file, that the optional Apex and Transformer Engine are "
    "absent, and in each rank that deprecated functions of torch.distributed are used",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_quiet.py::test_importing_megatron_core_says_nothing",
)
def install() -> None:
    """Filter the warnings and the log of Megatron-core from now on."""
    warnings.filterwarnings("ignore", module=r"megatron\.core(\..*)?")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine).*not installed.*")
    warnings.filterwarnings("ignore", message=r".*torch.distributed.* is deprecated.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
