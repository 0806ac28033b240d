"""The text sample of a finished run, generated from its checkpoint."""

from __future__ import annotations

import gc
import shlex
from pathlib import Path

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.identity import saved_config
from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.sync import add_file
from keel_megatron.runtime.files import write_whole

SAMPLE_TOKENS = 64
_HEADROOM = 1.3
"""Memory beside the weights, bytes: activations of one sequence, file buffers."""


def sample_run(run: Path, uri: str | None, *, again: bool) -> None:
    """Generate from `tracking.sample_prompt`, print the text, and save it in samples.txt.

    The run is complete: a problem with its sample is only a remark.

    Args:
        run: the run's folder.
        uri: the current tracking.uri of the run.
        again: generate a new sample; otherwise show an existing one.
    """
    try:
        _sample(run, uri, again)
    except KeyboardInterrupt:
        _remark(run, "it was interrupted")
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        _remark(run, said.splitlines()[0])


def _sample(run: Path, uri: str | None, again: bool) -> None:
    config = saved_config(run)
    prompt = config.tracking.sample_prompt
    if prompt is None:
        return
    kept = run / "samples.txt"
    if again or not kept.is_file():
        # Imported late: an existing sample is shown without torch.
        from keel_megatron.inference.generate import generate_from_run
        from keel_megatron.inference.sampling import Sampling

        lack = _lack_of_memory(config)
        if lack is not None:
            _remark(run, lack)
            return
        sampling = Sampling(min(SAMPLE_TOKENS, config.data.seq_length // 2), slide=True)
        text = generate_from_run(run, prompt, sampling)
        write_whole(kept, text + "\n")
        add_file(run, kept, uri)
    print(f"\nsample ({kept}):\n{kept.read_text(encoding='utf-8')}")


def _remark(run: Path, why: str) -> None:
    command = f"keel generate {shlex.quote(str(run))} --prompt TEXT"
    print(f"no sample: {why} (the run is complete; {command})")


def _lack_of_memory(config: RunConfig) -> str | None:
    """Why the whole model does not fit on one device, or None."""
    import psutil
    import torch

    gc.collect()  # what training left behind
    count = parameter_count(config.model, config.data.vocab_size)
    needed = _HEADROOM * count * (4 if config.training.precision == "fp32" else 2)
    if torch.cuda.is_available() and config.training.device != "cpu":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"the whole model needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
