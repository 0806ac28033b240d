"""lm-eval's own `hf` model, on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def hf_model(folder: Path) -> Any:
    """A Hugging Face folder as lm-eval's `hf` model, fp32.

    Without its cache of logits, which takes the wrong ones where a text repeats itself: two windows
    of a text that have the same tokens and split them differently share an entry.
    """
    with _accelerate():
        from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return HFLM(model, tokenizer=tokenizer, batch_size=4, logits_cache=False)


@contextmanager
def _accelerate() -> Iterator[None]:
    """Let `accelerate`, if it is not installed, be what one process uses of it: next to nothing."""
    if "accelerate" in sys.modules or importlib.util.find_spec("accelerate") is not None:
        yield
        return

    class Accelerator:
        num_processes = 1
        device = torch.device("cpu")

        def __init__(self, **_settings: Any) -> None: ...

    whole: Any = ModuleType("accelerate")
    whole.Accelerator = Accelerator
    whole.InitProcessGroupKwargs = SimpleNamespace
    whole.find_executable_batch_size = None  # for batch_size=auto
    part: Any = ModuleType("accelerate.utils")
    part.get_max_memory = None  # for parallelize=True
    modules = {"accelerate": whole, "accelerate.utils": part}
    sys.modules |= modules
    try:
        yield
    finally:  # nothing else may take it for installed
        for name in modules:
            del sys.modules[name]
