"""A run from configuration to end: prepare, claim the folder, resume, train, report."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.checkpoint.saver import Saver
from keel_megatron.cluster.watchdog import Watchdog
from keel_megatron.config.load import load_config, require_valid
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import DivergedError
from keel_megatron.mlflow_delivery.reporting import open_progress, open_tracker
from keel_megatron.mlflow_delivery.system import measured_machine
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.ownership import Ownership
from keel_megatron.runtime.parent import end_with_launcher
from keel_megatron.runtime.versions import package_versions
from keel_megatron.tracking.progress import Progress
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.conclude import conclude
from keel_megatron.training.dataset import dataset_of_rank, tell_shares
from keel_megatron.training.describe import describe_run, version_changes
from keel_megatron.training.guard import Guard
from keel_megatron.training.initialize import Start
from keel_megatron.training.lineage import Lineage
from keel_megatron.training.loop import BeforeStep, Loop
from keel_megatron.training.process_group import process_group
from keel_megatron.training.ready import Ready, get_ready
from keel_megatron.training.run_folder import claim_folder, find_resume_point, owned_folder
from keel_megatron.training.run_state import RunState
from keel_megatron.training.startup import complete_text
from keel_megatron.training.stop import StopRequest, deadline, stop_requests


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
    """Train the run that a YAML file and overrides describe; see `train`."""
    world_size = Launch.from_environment().world_size
    config = load_config(config_path, overrides, world_size=world_size)
    return train(config, before_step, owned, stop)


def train(
    config: RunConfig,
    before_step: BeforeStep | None = None,
    owned: Ownership | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train a run in this process, alone or as one of a torchrun group.

    A run resumes from the newest checkpoint in its folder; a complete run is not changed. A start
    that is refused, or aborted by a signal before its first step, changes neither the run's folder
    nor its MLflow run.

    Args:
        config: the run.
        before_step: called before every step; tests inject faults there.
        owned: ownership of the run's folder; None: rank 0 takes it, or its launcher has it.
        stop: requests to stop received so far; None: listen from now on.

    Raises:
        ConfigError: the configuration does not fit the number of processes.
        UserError: the text, the run's folder or the device does not match the configuration,
            another process trains the run, this process holds a model, or the nodes differ.
        DivergedError: training has diverged.
        SystemExit: a signal requested a stop before the run began.
    """
    end_with_launcher()
    launch = Launch.from_environment()
    require_valid(config, f"run {config.training.name}", launch.world_size)
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(stop_requests(starting=True))
        stop.deadline = deadline(config.training.exit_after)
        said: list[str] = []
        dataset = dataset_of_rank(config, launch, said)
        runtime, remarks = stack.enter_context(process_group(config, launch, stop))
        if owned is None:
            stack.enter_context(owned_folder(config.training.folder, runtime, stop))
        resume = find_resume_point(config, runtime)
        if resume.path is not None and (resume.step or 0) >= config.training.steps:
            return _complete(config, runtime, resume.path)
        progress = open_progress(config) if runtime.is_main else None

        def say(text: str) -> None:
            if progress is not None:
                progress.say(text)

        if progress is not None:
            for line in said:
                progress.note(line)
        for remark in [*remarks, *resume.remarks]:
            say(remark)
        ready = get_ready(config, runtime, resume, dataset, say)
        code = _accepted(ready, progress, stop, before_step)
        folder, uri = config.training.folder, config.tracking.uri
        return Outcome(folder, code, runtime.is_main, trained=True, uri=uri)


def _complete(config: RunConfig, runtime: Runtime, newest: Path) -> Outcome:
    """The outcome of a run that was complete before."""
    folder, uri = config.training.folder, config.tracking.uri
    if runtime.is_main:
        print(complete_text(config, newest), flush=True)
        exit_codes.write(folder, exit_codes.DONE)
    return Outcome(folder, exit_codes.DONE, runtime.is_main, trained=False, uri=uri)


def _accepted(
    ready: Ready, progress: Progress | None, stop: StopRequest, before_step: BeforeStep | None
) -> int:
    """Claim the folder, open the tracker and train; the exit code. Collective.

    Nothing is written before this function, and nothing is refused after it starts.
    """
    config, runtime, resume = ready.config, ready.runtime, ready.resume
    runtime.barrier()  # no rank can be aborted by a signal any more
    stop.starting = False
    lineage = runtime.from_main(lambda: claim_folder(config, resume, ready.data, ready.start))
    with open_tracker(config, runtime.rank, resume.step, progress) as tracker:
        stop.last_word = lambda: tracker.last_word("KILLED")
        try:
            with measured_machine(config, runtime.launch.local_rank):
                code = _train(ready, lineage, tracker, stop, before_step)
        except DivergedError:
            if runtime.is_main:
                exit_codes.write(config.training.folder, exit_codes.DIVERGED)
            raise
        if code != exit_codes.DONE:
            tracker.close("KILLED")
    # All ranks exit together: a launcher ends the others when the first one exits.
    runtime.barrier()
    if runtime.is_main:
        exit_codes.write(config.training.folder, code)
    return code


def _train(
    ready: Ready,
    lineage: Lineage,
    tracker: Tracker,
    stop: StopRequest,
    before_step: BeforeStep | None,
) -> int:
    """Describe, resume, train, conclude; the exit code."""
    config, runtime = ready.config, ready.runtime
    describe_run(tracker, runtime, ready.partition, resumes=ready.resume.path is not None)
    lineage.report(tracker)
    guard = Guard(config.guard, reported=not runtime.is_main)
    with Watchdog(runtime, config.training.folder, config.hang_timeout) as watchdog:
        stateful = {"guard": guard, **lineage.stateful(config.training.folder)}
        state = RunState(ready.engine, _saver(ready, tracker, guard, watchdog), stateful)
        loop = Loop(
            engine=ready.engine,
            batches=ready.batches,
            state=state,
            guard=guard,
            tracker=tracker,
            evaluation=ready.evaluation,
            mark=watchdog.mark,
            before_step=before_step,
        )
        if ready.resume.path is not None:
            state.restore(ready.resume.path)
            tracker.say(f"resuming from {ready.resume.path}")
            for line in version_changes(ready.resume.state["packages"], package_versions()):
                tracker.say(line)
        elif ready.start is not None:
            _begin(ready.start, state, ready)
            tracker.say(ready.start.line())
        if runtime.any(stop.signal is not None):  # since the run was accepted
            tracker.say(f"stopped before step {state.position.step + 1}: nothing new to save")
            return runtime.max(stop.exit_code)
        tell_shares(ready.batches, tracker, state.position.consumed_samples)
        code = loop.run(stop)
        tell_shares(ready.batches, tracker, state.position.consumed_samples)
    if runtime.is_main:
        step, entropy = state.position.step, ready.data.manifest.unigram_entropy
        conclude(config, tracker, step, loop.validation_loss, entropy)
    return code


def _begin(start: Start, state: RunState, ready: Ready) -> None:
    """Take over what a new run starts from another; collective."""
    if start.continues is None:
        start.load(ready.engine.state, ready.runtime)
        return
    assert start.continues.path is not None
    state.continue_from(start.continues.path)
    ready.runtime.from_main(start.check_same)


def _saver(ready: Ready, tracker: Tracker, guard: Guard, watchdog: Watchdog) -> Saver:
    return Saver(
        ready.config,
        ready.runtime,
        tracker,
        data=ready.data.identity(),
        damaged=ready.resume.damaged,
        progress=watchdog.mark,
        copied=ready.data.kept_files if ready.runtime.is_main else (),
        anomaly_step=lambda: guard.anomaly_step,
    )
