"""Names of a run's metrics in MLflow; metrics.jsonl keeps the fields' names.

A run's page in MLflow has a section for each part of a name before its last `/`, sorted by
character, and one for all other names below them. So `evaluation`, `train` and `validation` come
first, then `workload`; the many charts of the depth profiles, whose names have no `/`, come last.
"""

from __future__ import annotations

NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "consumed_samples": "workload/consumed_samples",
    "consumed_tokens": "workload/consumed_tokens",
    "skipped_steps": "workload/skipped_steps",
    "memory_gb": "workload/memory_gb",
    "seconds": "workload/step_seconds",
    "data_seconds": "workload/data_seconds",
    "tflops_per_device": "workload/tflops_per_device",
    "tokens_per_second": "workload/tokens_per_second",
    "evaluation_seconds": "workload/evaluation_seconds",
    "checkpoint_bytes": "workload/checkpoint_bytes",
    "checkpoint_seconds": "workload/checkpoint_seconds",
    "checkpoint_stall_seconds": "workload/checkpoint_stall_seconds",
    "validation_loss": "validation/loss",
}
"""By the field's name, which is also the metric's name in MLflow runs of earlier versions."""
DEPTH, EARLIER_DEPTH = "depth.", "depth/"
"""Beginning of the depth profiles' names, and what it was in earlier versions."""

DESCRIPTION = """\
| metric | meaning |
|---|---|
| `train/loss` | cross entropy of the step's global batch, nats per token |
| `train/grad_norm` | L2 norm of the gradient before clipping |
| `train/learning_rate` | learning rate of the step |
| `validation/loss` | cross entropy of the validation sequences, nats per token |
| `validation/SOURCE/loss` | the same for each source of a blend |
| `evaluation/TASK/acc`, `.../acc_norm` | share of questions whose right answer is the most \
probable one, and the same with log probabilities per character |
| `evaluation/TASK/bits_per_byte` | cross entropy of the right answer, bits per byte of its text |
| `lm_eval/TASK/METRIC`, `..._stderr` | `keel evaluate --tasks`, at the checkpoint's step |
| `workload/consumed_tokens`, `workload/consumed_samples` | tokens and sequences seen so far |
| `workload/skipped_steps` | steps so far whose update was skipped |
| `workload/data_seconds` | part of `workload/step_seconds` that waits for data |
| `workload/...` | speed, memory (1e9 bytes) and checkpoints |
| `depth.QUANTITY.min`, `.median`, `.max` | over the sub-layers |
| `depth.QUANTITY.first_nonfinite` | the first sub-layer whose value is not finite |
| `system/HOST/...` | each node's machine; the step is seconds since the run's first start |

An infinite value is shown as NaN. `metrics.jsonl` in the run's folder has everything in full.
"""
"""The description of a new MLflow run."""


def mlflow_name(name: str) -> str:
    """MLflow's name for a field of a record, or for a metric of an earlier version."""
    if name.startswith(EARLIER_DEPTH):
        return name.replace("/", ".")
    return NAMES.get(name, name)
