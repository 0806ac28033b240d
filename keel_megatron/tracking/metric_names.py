"""The names under which MLflow has what a run reports; metrics.jsonl keeps the fields' names.

A run's page in MLflow has a section for each part of a name before its last `/`. It sorts the
sections by their names' characters, so these begin with `train` and `validation`, before the
sections of the depth profiles.
"""

from __future__ import annotations

NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "consumed_samples": "train/consumed_samples",
    "consumed_tokens": "train/consumed_tokens",
    "skipped_steps": "train/skipped_steps",
    "memory_gb": "train/speed/memory_gb",
    "seconds": "train/speed/step_seconds",
    "tflops_per_device": "train/speed/tflops_per_device",
    "tokens_per_second": "train/speed/tokens_per_second",
    "checkpoint_bytes": "train/speed/checkpoint_bytes",
    "checkpoint_seconds": "train/speed/checkpoint_seconds",
    "checkpoint_stall_seconds": "train/speed/checkpoint_stall_seconds",
    "validation_loss": "validation/loss",
}
"""By the field's name, which is also the metric's name in MLflow runs of earlier versions."""
DEPTH, EARLIER_DEPTH = "vs_depth/", "depth/"
"""Beginning of the depth profiles' names, and what it was in earlier versions."""

DESCRIPTION = """\
| metric | meaning |
|---|---|
| `train/loss` | cross entropy of the step's global batch, nats per token |
| `train/grad_norm` | L2 norm of the gradient before clipping |
| `train/learning_rate` | learning rate of the step |
| `train/consumed_tokens`, `train/consumed_samples` | tokens and sequences seen so far |
| `train/skipped_steps` | steps so far whose update was skipped |
| `train/speed/...` | speed, memory (1e9 bytes) and checkpoints |
| `validation/loss` | cross entropy of the validation sequences, nats per token |
| `vs_depth/QUANTITY/...` | minimum, median and maximum over the sub-layers, and the first that \
is not finite |
| `system/HOST/...` | each node's machine; the step is seconds since the run's first start |

An infinite value is shown as NaN. `metrics.jsonl` and `depth.jsonl` in the run's folder have \
everything in full.
"""
"""The description of a new MLflow run."""


def mlflow_name(name: str) -> str:
    """MLflow's name for a field of a record, or for a metric of an earlier version."""
    if name.startswith(EARLIER_DEPTH):
        return DEPTH + name.removeprefix(EARLIER_DEPTH)
    return NAMES.get(name, name)
