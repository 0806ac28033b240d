"""The sample that a finished run leaves: its prompt, continued from its own checkpoint."""

from __future__ import annotations

from pathlib import Path

from keel_megatron.checkpoint.identity import saved_config
from keel_megatron.inference.generate import generate_from_run
from keel_megatron.tracking.sync import add_file

SAMPLE_TOKENS = 64


def sample_run(run: Path, *, again: bool) -> None:
    """Print what the run's model makes of `tracking.sample_prompt`, and keep it in samples.txt.

    Args:
        run: the run's folder.
        again: generate it; otherwise the kept one is shown if there is one.
    """
    config = saved_config(run)
    prompt = config.tracking.sample_prompt
    if prompt is None:
        return
    kept = run / "samples.txt"
    if again or not kept.is_file():
        text = generate_from_run(
            run, prompt, max_new_tokens=min(SAMPLE_TOKENS, config.data.seq_length // 2)
        )
        kept.write_text(text + "\n", encoding="utf-8")
        add_file(run, kept)
    print(f"\nsample ({kept}):\n{kept.read_text(encoding='utf-8')}")
