"""The `keel` command and its error handling."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from keel_megatron import __version__, compat
from keel_megatron.cli import (
    bench,
    checkpoint,
    completion,
    config,
    dashboard,
    data,
    depth,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    lm_eval,
    plan,
    runs,
    study,
    track,
    train,
)
from keel_megatron.cli.console import report_output_errors, tolerate_consoles
from keel_megatron.cli.help import DATA, MACHINE, SAVED, STUDIES, TRAIN, USE, WATCH, App, Group
from keel_megatron.errors import ConfigError, DivergedError, UserError
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.parent import end_with_launcher


class _Root(Group):
    """The commands; Ctrl-C ends any of them with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Typer itself would exit silently on an interrupt."""
        try:
            _set_interrupt()
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # A terminal shows ^C, at the end of what was printed so far.
            start = "\n" if sys.stderr.isatty() else ""
            print(f"{start}interrupted", file=sys.stderr)
            raise typer.Exit(exit_codes.INTERRUPTED) from None


app = App(
    name="keel",
    cls=_Root,
    help="Train extremely deep (Keel) language models on Megatron-core.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, function, group in (
    ("train", train.train, TRAIN),
    ("plan", plan.plan, TRAIN),
    ("bench", bench.bench, TRAIN),
    ("runs", runs.runs, WATCH),
    ("depth", depth.depth, WATCH),
    ("dashboard", dashboard.dashboard, WATCH),
    ("generate", generate.generate, USE),
    ("evaluate", evaluate.evaluate, USE),
    ("export", export.export, USE),
    ("import", import_.import_, USE),
    ("doctor", doctor.doctor, MACHINE),
    ("completion", completion.completion, MACHINE),
):
    app.command(name, rich_help_panel=group)(function)
app.command("lm-eval", rich_help_panel=USE, context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
for name, commands, group in (
    ("track", track.app, WATCH),
    ("data", data.app, DATA),
    ("checkpoint", checkpoint.app, SAVED),
    ("config", config.app, SAVED),
    ("study", study.app, STUDIES),
):
    app.add_typer(commands, name=name, rich_help_panel=group)


def _set_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and end a rank other than 0 at once.

    Only rank 0 has anything to print or to write after it. The others may be in C++ code, such as
    the connection to the store, in which Python runs no handler; training has its own handlers
    (training/stop.py).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script
        return
    is_main = os.environ.get("RANK", "0") == "0"
    signal.signal(signal.SIGINT, signal.default_int_handler if is_main else signal.SIG_DFL)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"keel-megatron {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train extremely deep (Keel) language models on Megatron-core."""


def main() -> None:
    """Run the command line; a `UserError` prints one message, no traceback, and exits with 2.

    Training that has diverged exits the same way, with 65.
    """
    end_with_launcher()
    completion.answer(app)
    tolerate_consoles()
    compat.install()
    if exit_codes.is_mistake():  # torchrun restarts the process nevertheless
        sys.exit(exit_codes.USER_ERROR)
    try:
        with report_output_errors():
            app()
    except UserError as error:
        if not _reported_by_another_rank(error):
            print(f"error: {error}", file=sys.stderr)
        if isinstance(error, DivergedError):
            sys.exit(exit_codes.for_torchrun(exit_codes.DIVERGED))
        exit_codes.note_mistake()
        sys.exit(exit_codes.USER_ERROR)


def _reported_by_another_rank(error: UserError) -> bool:
    """Whether another rank prints the error; local rank 0 does for a shared configuration."""
    shared = isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"
    return shared or error.reported
