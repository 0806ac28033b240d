"""lm-eval's own `hf` model, on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def hf_model(folder: Path) -> Any:
    """A Hugging Face folder as lm-eval's `hf` model, fp32.

    Without its cache of logits, which takes the wrong ones where a text repeats itself: two windows
    of a text that have the same tokens and split them differently share an entry.
    """
    if importlib.util.find_spec("accelerate") is None:
        _stand_in_for_accelerate()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return HFLM(model, tokenizer=tokenizer, batch_size=4, logits_cache=False)


def _stand_in_for_accelerate() -> None:
    """What the model uses of `accelerate` in one process: next to nothing."""

    class Accelerator:
        num_processes = 1
        device = torch.device("cpu")

        def __init__(self, **_settings: Any) -> None: ...

    def unused(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    whole: Any = ModuleType("accelerate")
    whole.Accelerator = Accelerator
    whole.InitProcessGroupKwargs = SimpleNamespace
    whole.find_executable_batch_size = _as_it_is
    part: Any = ModuleType("accelerate.utils")
    part.get_max_memory = unused
    sys.modules |= {"accelerate": whole, "accelerate.utils": part}


def _as_it_is(**_settings: Any) -> Callable[[Any], Any]:
    return lambda function: function
