"""Report of a run that ends without an error."""

from __future__ import annotations

import math

from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.reporting import where
from keel_megatron.tracking.loss_plot import plot_loss
from keel_megatron.tracking.tracker import Tracker


def conclude(
    config: RunConfig, tracker: Tracker, step: int, validation_loss: float, unigram_entropy: float
) -> None:
    """Report the result; draw the loss of a finished run. Rank 0 only.

    Args:
        config: the run.
        tracker: the run's tracker.
        step: the last completed step.
        validation_loss: nats per token after the last step; not used before it.
        unigram_entropy: nats per token: the loss of a model that only counts tokens.
    """
    if step < config.training.steps:
        tracker.say(
            f"stopped after step {step} of {config.training.steps}, checkpoint written; "
            "the same command resumes from there"
        )
        return
    below = unigram_entropy - validation_loss
    compared = f": {abs(below):.3f} nats {'below' if below >= 0 else 'ABOVE'} it"
    tracker.say(
        f"validation loss {validation_loss:.3f} nats per token; unigram entropy "
        f"{unigram_entropy:.3f}{compared if math.isfinite(below) else ''}"
    )
    picture = config.training.folder / "loss.png"
    try:
        plot_loss(config.training.folder, picture, unigram_entropy)
        tracker.artifact(picture)
    except Exception as error:  # a failed picture does not fail a complete run
        tracker.say(f"cannot draw {picture}: {type(error).__name__}: {error}")
    for line in where(config):
        tracker.say(line)
