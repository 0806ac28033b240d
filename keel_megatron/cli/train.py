"""`keel train`."""

from __future__ import annotations

import sys

from keel_megatron.cli.arguments import ConfigPath, Overrides


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a run, or go on with it from its newest checkpoint.

    One process by itself; for more, start it with torchrun:
    torchrun --standalone --nproc-per-node N -m keel_megatron train CONFIG
    """
    from keel_megatron.training.run import run_training

    outcome = run_training(config, tuple(overrides or ()))
    if outcome.is_main and outcome.exit_code == 0:
        from keel_megatron.inference.sample import sample_run

        sample_run(outcome.folder, again=outcome.trained)
    sys.exit(outcome.exit_code)
