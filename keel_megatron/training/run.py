"""A run from its configuration to its end: prepare, build, resume, train, report."""

from __future__ import annotations

import math
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.identity import check_folder, check_identity, claim
from keel_megatron.checkpoint.manifest import CONFIG
from keel_megatron.checkpoint.resume import Found, newest_good
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.cluster import doctor, preflight
from keel_megatron.cluster.watchdog import Watchdog
from keel_megatron.config.errors import DivergedError, UserError
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import TOKENIZER, PreparedData, keep_tokenizer
from keel_megatron.layout.stage_table import write_stages
from keel_megatron.mlflow_delivery.system import measured_machine
from keel_megatron.mlflow_delivery.tags import code_tags, place_tags
from keel_megatron.mlflow_delivery.tracker import Tracker, open_progress, open_tracker, where
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.ownership import Ownership
from keel_megatron.runtime.parent import end_with_launcher
from keel_megatron.runtime.rendezvous import CollectiveTimeoutError
from keel_megatron.tracking.loss_plot import plot_loss
from keel_megatron.tracking.progress import Progress
from keel_megatron.training.guard import Guard
from keel_megatron.training.lineage import Lineage, accept
from keel_megatron.training.loop import BeforeStep, Loop
from keel_megatron.training.ready import Ready, get_ready
from keel_megatron.training.startup import complete_text
from keel_megatron.training.stop import StopRequest, deadline, stop_requests

_SIGNAL_SECONDS = 3.0
"""In which a signal that one rank has heard reaches the others."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    exit_code: int
    """0, or that of the request to stop (runtime/exit_codes.py)."""
    is_main: bool
    """Whether this process is global rank 0."""
    trained: bool
    """False if the run was complete before."""
    uri: str | None
    """`tracking.uri`."""


def run_training(
    config_path: Path,
    overrides: tuple[str, ...] = (),
    before_step: BeforeStep | None = None,
    owned: Ownership | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train the run that a YAML file and overrides describe, in this process of a torchrun group.

    A run folder with a checkpoint goes on from it; a complete one is left as it is. A start that
    is refused, or that a signal breaks off before its first step, changes neither the run's folder
    nor its MLflow run.

    Args:
        config_path: the YAML file.
        overrides: `section.key=value` each.
        before_step: called before every step; tests make faults there.
        owned: the hold on the run's folder; None = rank 0 takes it, or its launcher has it.
        stop: the requests to stop that were heard so far; None listens from now on.

    Raises:
        ConfigError: the configuration is wrong, or does not fit the number of processes.
        UserError: the text, the run's folder or the device is not as the configuration says,
            another process trains the run, or the nodes do not fit together.
        DivergedError: training has diverged.
        SystemExit: a signal has asked to stop before the run could begin.
    """
    end_with_launcher()
    launch = Launch.from_environment()
    config = load_config(config_path, overrides, world_size=launch.world_size)
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(stop_requests(starting=True))
        stop.deadline = deadline(config.training.exit_after)
        checked = preflight.wanted(config, launch)
        facts = doctor.facts(config) if checked else None
        stack.enter_context(_broken_off(stop))
        runtime = stack.enter_context(start(config.parallel, config.training, launch, facts))
        remarks = preflight.check(config, runtime) if checked else []
        if owned is None:
            stack.enter_context(_owned(config, runtime, stop))
        found = _look(config, runtime)
        if found.path is not None and folder.step_of(found.path) >= config.training.steps:
            if runtime.is_main:
                print(complete_text(config, found.path), flush=True)
                exit_codes.write(config.training.folder, exit_codes.DONE)
            done, uri = exit_codes.DONE, config.tracking.uri
            return Outcome(config.training.folder, done, runtime.is_main, trained=False, uri=uri)
        progress = open_progress(config) if runtime.is_main else None
        for remark in [*remarks, *found.remarks]:
            _say(progress, remark)
        ready = get_ready(config, runtime, found, lambda text: _say(progress, text))
        code = _accepted(config, runtime, found, ready, progress, stop, before_step)
        uri = config.tracking.uri
        return Outcome(config.training.folder, code, runtime.is_main, trained=True, uri=uri)


@contextmanager
def _broken_off(stop: StopRequest) -> Iterator[None]:
    """What a rank sees of another one that a signal has ended before this one heard it."""
    try:
        yield
    except CollectiveTimeoutError:
        end = time.monotonic() + _SIGNAL_SECONDS
        while stop.starting and stop.signal is None and time.monotonic() < end:
            time.sleep(0.05)
        if stop.signal is not None:
            stop.break_off(stop.signal)
        raise


@contextmanager
def _owned(config: RunConfig, runtime: Runtime, stop: StopRequest) -> Iterator[None]:
    """Have rank 0 own the run's folder, by itself or by its launcher; collective."""
    run_folder = config.training.folder
    held: list[Ownership] = []

    def take() -> None:
        held.append(ownership.passed_on(run_folder) or ownership.take(run_folder))

    runtime.from_main(take)
    try:
        stop.last_word = held[0].release if held else None
        yield
    finally:
        for hold in held:
            hold.release()


def _look(config: RunConfig, runtime: Runtime) -> Found:
    """See that the run's folder is this run's; the checkpoint to go on from. Collective."""
    runtime.from_main(lambda: check_folder(config))
    found = newest_good(config.training.folder, runtime)
    newest = found.path
    if newest is not None:
        runtime.from_main(lambda: check_identity(newest / CONFIG, config))
    return found


def _say(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress.say(text)


def _accepted(
    config: RunConfig,
    runtime: Runtime,
    found: Found,
    ready: Ready,
    progress: Progress | None,
    stop: StopRequest,
    before_step: BeforeStep | None,
) -> int:
    """Make the folder this run's, report its start, and train; the exit code. Collective.

    Nothing is written before, and nothing is refused after.
    """
    runtime.barrier()  # no rank is still to be broken off
    stop.starting = False
    resume_step = None if found.path is None else folder.step_of(found.path)
    lineage = runtime.from_main(lambda: _claim(config, found, ready.data))
    with open_tracker(config, runtime.rank, resume_step, progress) as tracker:
        stop.last_word = lambda: tracker.last_word("KILLED")
        try:
            with measured_machine(config, runtime.launch.local_rank):
                code = _train(config, runtime, tracker, found, ready, lineage, stop, before_step)
        except DivergedError:
            if runtime.is_main:
                exit_codes.write(config.training.folder, exit_codes.DIVERGED)
            raise
        if code != exit_codes.DONE:
            tracker.close("KILLED")
    # Together: a launcher takes the first that leaves for the sign to end the others.
    runtime.barrier()
    if runtime.is_main:
        exit_codes.write(config.training.folder, code)
    return code


def _claim(config: RunConfig, found: Found, data: PreparedData) -> Lineage:
    """Make the folder this run's, with its tokenizer; which run that is and what has changed.

    What is there already needs no room on the disk.

    Raises:
        UserError: the folder cannot be written.
    """
    run_folder = config.training.folder
    try:
        exit_codes.clear(run_folder)
        lineage = accept(config, found)
        claim(config)
        keep_tokenizer(data, run_folder)
    except OSError as error:
        raise UserError(
            f"training.runs_dir: cannot write {error.filename or run_folder}: {error.strerror}"
        ) from error
    return lineage


def _train(
    config: RunConfig,
    runtime: Runtime,
    tracker: Tracker,
    found: Found,
    ready: Ready,
    lineage: Lineage,
    stop: StopRequest,
    before_step: BeforeStep | None,
) -> int:
    """Describe, resume, train, conclude; the exit code."""
    _describe(runtime, tracker, config, ready)
    lineage.report(tracker)
    guard = Guard(config.guard, reported=not runtime.is_main)
    with Watchdog(runtime, config.training.folder, config.hang_timeout) as watchdog:
        saver = Saver(
            config,
            runtime,
            tracker,
            ready.data.identity(),
            found.damaged,
            watchdog.mark,
            ready.data.tokenizer_path.read_bytes() if runtime.is_main else b"",
        )
        loop = Loop(
            config,
            runtime,
            ready.engine,
            ready.batches,
            ready.validation,
            tracker,
            state.Position(),
            saver,
            guard,
            watchdog,
            before_step,
            parts={"guard": guard, **lineage.parts()},
        )
        if found.path is not None:
            loop.restore(found.path)
            tracker.say(f"going on from {found.path}")
            _note_versions(tracker, found)
        if runtime.any(stop.signal is not None):  # since the run was accepted
            tracker.say(f"stopped before step {loop.position.step + 1}: nothing new to save")
            return runtime.max(stop.exit_code)
        code = loop.run(stop)
    tracker.draw_depth(ending=True)
    _conclude(config, runtime, tracker, ready.data, loop)
    return code


def _describe(runtime: Runtime, tracker: Tracker, config: RunConfig, ready: Ready) -> None:
    """Let MLflow have the code, the place and what the run is made of."""
    hosts = runtime.gather(socket.gethostname())
    if not runtime.is_main:
        return
    layout = (
        f"TP {runtime.tensor_size} x PP {runtime.pipeline_size} x VPP "
        f"{config.parallel.virtual_pipeline} x DP {runtime.data_size}"
    )
    cuda = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name(runtime.device) if cuda else platform.machine() + " CPU"
    tracker.tags(code_tags() | place_tags(layout, device, hosts))
    stages = tracker.folder / "stages.json"
    try:
        write_stages(ready.partition, stages)
    except OSError as error:  # a full disk: the run goes on, `keel plan` tells the same
        tracker.say(f"cannot write {stages}: {error.strerror}")
    for path in (tracker.folder / CONFIG, tracker.folder / TOKENIZER, stages):
        if path.is_file():
            tracker.artifact(path)


def _note_versions(tracker: Tracker, found: Found) -> None:
    """Other versions may compute other last bits."""
    then, now = found.state["packages"], state.package_versions()
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            tracker.say(
                f"{name} was {then.get(name, 'absent')} when it was written, is "
                f"{now.get(name, 'absent')} now: the last bits may differ"
            )


def _conclude(
    config: RunConfig, runtime: Runtime, tracker: Tracker, data: PreparedData, loop: Loop
) -> None:
    """What the run reached, beside what counting tokens alone would."""
    step, steps = loop.position.step, config.training.steps
    if step < steps:
        tracker.say(
            f"stopped after step {step} of {steps}, checkpoint written; "
            "the same command goes on from there"
        )
        return
    below = data.unigram_entropy - loop.validation_loss
    compared = f": {abs(below):.3f} nats {'below' if below >= 0 else 'ABOVE'} it"
    tracker.say(
        f"validation loss {loop.validation_loss:.3f} nats per token; unigram entropy "
        f"{data.unigram_entropy:.3f}{compared if math.isfinite(below) else ''}"
    )
    if runtime.is_main:
        picture = config.training.folder / "loss.png"
        try:
            plot_loss(config.training.folder, picture, data.unigram_entropy)
            tracker.artifact(picture)
        except Exception as error:  # the run is complete and saved, whatever ails its picture
            tracker.say(f"cannot draw {picture}: {type(error).__name__}: {error}")
        for line in where(config):
            tracker.say(line)
