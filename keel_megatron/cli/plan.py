"""`keel plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import (
    ConfigPath,
    Json,
    Overrides,
    check_outputs,
    only_json,
    print_json,
)
from keel_megatron.cli.choices import one_of
from keel_megatron.cli.console import print_report
from keel_megatron.layout.devices import DEVICES
from keel_megatron.runtime.files import write_output

if TYPE_CHECKING:
    from keel_megatron.config.run import RunConfig
    from keel_megatron.layout.devices import Device
    from keel_megatron.planner.plan import Plan
    from keel_megatron.planner.trace.run import Trace


_Gpu = Annotated[
    str, typer.Option(help="Device type: h200, h100, a100, b200 or cpu.", **one_of(lambda: DEVICES))
]


@dataclass(frozen=True)
class _Traced:
    """What `--trace` and `--trace-plot` ask for."""

    wanted: bool
    out: Path | None


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Number of devices. Default: one replica of the layout."),
    ] = None,
    gpu: _Gpu = "h200",
    figure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER", help="Replace a property of --gpu, e.g. inter_node_gb=25."
        ),
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="File for a plot of the schedule and the memory."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure times on this machine instead of estimating.")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Run one rank of each stage on fake CUDA tensors."),
    ] = False,
    trace_plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Trace, and draw the memory over the trace."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the fastest layout for --gpus devices.")
    ] = False,
) -> None:
    """Predict a run's memory, speed and duration; needs no GPU.

    --search compares layouts, micro-batch sizes and recomputation; it prints the best as overrides.
    --trace counts memory, kernels, messages and host waits by running the program without a GPU.
    """
    from keel_megatron.config.load import load_config
    from keel_megatron.errors import UserError

    target = _device(gpu, figure or [])
    settings = tuple(overrides or ())
    traced = _Traced(trace or trace_plot is not None, trace_plot)
    if search:
        if gpus is None or measure or plot or traced.wanted:
            wrong = "needs --gpus N"
            if gpus is not None:
                wrong = "cannot be combined with --measure, --plot and --trace"
            raise UserError(f"--search {wrong}")
        _search(load_config(config, settings), config, settings, gpus, target, as_json)
        return
    check_outputs({"--plot": plot, "--trace-plot": trace_plot})
    run = load_config(config, settings)
    count = gpus or run.parallel.model_parallel_size
    run = load_config(config, settings, world_size=count)
    _plan(run, count, target, as_json, plot, measure, traced, more_gpus=gpus is None)


def _device(name: str, figures: list[str]) -> Device:
    """The named device with the user's properties.

    Raises:
        UserError: a name or number is invalid.
    """
    from keel_megatron.errors import UserError
    from keel_megatron.layout.devices import device_named

    properties = [key for key in vars(DEVICES[name]) if key not in ("name", "cudnn_first")]
    given: dict[str, float | int] = {}
    for text in figures:
        key, _equals, value = text.partition("=")
        if key not in properties:
            raise UserError(f"--figure: {key!r} must be one of {', '.join(properties)}")
        whole = isinstance(getattr(next(iter(DEVICES.values())), key, None), int)
        try:
            given[key] = int(value) if whole else float(value)
        except ValueError:
            given[key] = 0
        if not 0 < given[key] < float("inf"):
            kind = "an integer" if whole else "a number"
            raise UserError(f"--figure: {text!r} must be NAME=NUMBER with {kind} above 0")
    return device_named(name, **given)


def _plan(
    run: RunConfig,
    gpus: int,
    device: Device,
    as_json: bool,
    plot: Path | None,
    measure: bool,
    traced: _Traced,
    more_gpus: bool,
) -> None:
    from keel_megatron.planner.advice import smallest_change
    from keel_megatron.planner.plan import make_plan
    from keel_megatron.planner.trace.run import trace_plan

    measured = None
    if measure:
        from keel_megatron.planner.measure import measure_pieces

        say = "measuring a block, the embedding, the head and the update on this machine"
        print(say, file=sys.stderr, flush=True)
        with only_json(as_json):
            measured = measure_pieces(run)
    made = make_plan(run, gpus, device, measured)
    change = None if made.fits else smallest_change(made, more_gpus=more_gpus)
    found = trace_plan(made) if traced.wanted else None
    if as_json:
        advice = {"change": change[0] if change else None}
        more = {} if found is None else {"trace": found.as_object()}
        print_json({**made.as_object(), **advice, **more})
    else:
        _print(made, change, found)
    # Last: if a file cannot be written, nothing else is lost.
    if plot is not None:
        write_output("--plot", plot, _plot(made))
    if traced.out is not None and found is not None:
        write_output("--trace-plot", traced.out, _trace_plot(made, found))
    for drawn in (plot, traced.out):
        if drawn is not None and not as_json:
            print(f"plot: {drawn}")


def _print(made: Plan, change: tuple[list[str], Plan] | None, found: Trace | None) -> None:
    """Print a plan, the change with which it fits, and its trace."""
    from keel_megatron.planner.report import describe, describe_change

    print_report(describe(made))
    if not made.fits:
        print_report(describe_change(change))
    if found is not None:
        from keel_megatron.planner.trace.report import describe_trace

        print_report(describe_trace(found))


def _trace_plot(made: Plan, found: Trace) -> bytes:
    """The picture of a plan's trace, as PNG."""
    from keel_megatron.planner.report import layout_words
    from keel_megatron.planner.trace.plot import plot_trace

    title = f"{made.config.training.name} on {made.gpus:,} x {made.device.name}: "
    return plot_trace(found, title=title + layout_words(made), limit=made.partition.limit_bytes)


def _plot(made: Plan) -> bytes:
    """The picture of a plan's step, as PNG."""
    from keel_megatron.planner.plot import plot_schedule
    from keel_megatron.planner.report import layout_words, seconds

    model = made.config.model
    return plot_schedule(
        made.timeline,
        made.memory_traces(),
        title=f"{made.config.training.name}: {model.sub_layers:,} sub-layers on "
        f"{made.gpus:,} x {made.device.name}",
        facts=f"{layout_words(made)};  step {seconds(made.step_seconds)},  bubble "
        f"{made.bubble:.1%},  {made.mfu:.1%} MFU",
        memory_limit=made.partition.limit_bytes,
    )


def _search(
    run: RunConfig,
    path: Path,
    settings: tuple[str, ...],
    gpus: int,
    device: Device,
    as_json: bool,
) -> None:
    from keel_megatron.planner.report import describe_search, search_object
    from keel_megatron.planner.search import search

    found = search(run, gpus, device)
    if as_json:
        print_json(search_object(found))
        return
    print_report(describe_search(found, gpus))
    best = found.best[0]
    given = [setting for setting in settings if setting.partition("=")[0] not in best.settings]
    print(f"\n{shlex.join(['keel', 'train', str(path), *given, *best.overrides])}")
