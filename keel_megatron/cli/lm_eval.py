"""`keel lm-eval`."""

from __future__ import annotations

from typing import Final

import typer

SETTINGS: Final = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # lm-eval shows its own help
}


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line with --model keel."""
    from keel_megatron.evaluation.tasks import require_harness

    require_harness()
    from keel_megatron.evaluation.command import run_command

    run_command(context.args)
