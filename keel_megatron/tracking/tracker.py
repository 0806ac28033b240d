"""Everything that a run reports, behind one object; silent on every rank but 0."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.mlflow_sink import MlflowSink, Status, tracking_uri
from keel_megatron.tracking.progress import Display
from keel_megatron.tracking.records import Record, StepRecord


class Tracker:
    """A rank that does not report: takes everything, shows nothing."""

    def step(self, record: Record) -> None:
        """Report a step or a validation."""

    def say(self, text: str) -> None:
        """Say something to whoever watches."""

    def artifact(self, path: Path) -> None:
        """Keep a file with the run."""

    def close(self, status: Status) -> None:
        """End the report; later calls do nothing."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


class MainTracker(Tracker):
    """Rank 0's: the display, log.txt, metrics.jsonl and MLflow.

    Args:
        config: the run.
        resume_step: step of the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        folder = config.training.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._closed = False
        self._display = Display(
            config.training.steps, folder / "log.txt", config.tracking.log_every
        )
        self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step)
        self._mlflow = MlflowSink(config, self.say) if config.tracking.mlflow else None

    def step(self, record: Record) -> None:
        """Report a step or a validation everywhere."""
        self._metrics.write(record)
        if isinstance(record, StepRecord):
            self._display.step(record)
        else:
            self._display.validation(record)
        if self._mlflow is not None:
            self._mlflow.record(record)

    def say(self, text: str) -> None:
        """Show a line and keep it in log.txt."""
        self._display.say(text)

    def artifact(self, path: Path) -> None:
        """Hand a file of the run's folder to MLflow."""
        if self._mlflow is not None:
            self._mlflow.artifact(path)

    def close(self, status: Status) -> None:
        """Deliver what is on its way and end the MLflow run with this status."""
        if self._closed:
            return
        self._closed = True
        if self._mlflow is not None:
            self._mlflow.finish(status)
        self._metrics.close()
        self._display.close()


def open_tracker(config: RunConfig, rank: int, resume_step: int | None) -> Tracker:
    """The tracker of a rank."""
    return MainTracker(config, resume_step) if rank == 0 else Tracker()


def where(config: RunConfig) -> list[str]:
    """Lines that say where a run's files and its dashboard are."""
    folder = config.training.folder
    lines = [f"files      {folder}/ (metrics.jsonl, loss.png, log.txt, checkpoints/)"]
    if config.tracking.mlflow:
        if config.tracking.uri is None:
            show = f"mlflow ui --backend-store-uri {tracking_uri(config)}  (extra: dashboard)"
        else:
            show = config.tracking.uri
        lines.append(f"dashboard  {show}")
    return lines
