"""The pages of exit codes, of a run's folder and of file formats."""

from __future__ import annotations

import fnmatch
import re

from keel_megatron.checkpoint import manifest
from keel_megatron.data import manifest as dataset
from keel_megatron.data.shards import _TYPES as TOKEN_TYPES
from keel_megatron.depth.profile import QUANTITIES
from keel_megatron.mlflow_delivery import run_file
from keel_megatron.runtime import exit_codes, machines, ownership
from keel_megatron.tracking import outbox
from keel_megatron.tracking.metric_names import NAMES
from keel_megatron.tracking.run_log import EARLIER_DEPTH_FILE, METRICS_FILE
from tools.reference import source

FORMATS = "file-formats.md"
HANGS = source.constant("cluster.watchdog", "FOLDER")
HEAT_MAPS = source.constant("depth.pictures", "HEAT_MAPS")
LATEST = source.constant("depth.pictures", "LATEST")
ARTIFACTS = source.constant("mlflow_delivery.database", "ARTIFACTS")
DATABASE = source.constant("mlflow_delivery.database", "NAME")
DELIVERED = source.constant("mlflow_delivery.outbox_reader", "_NOTE")
SPOOL = source.constant("mlflow_delivery.earlier_spool", "FOLDER")
RUN_ID_FILE = source.constant("mlflow_delivery.target", "RUN_ID_FILE")
CHECKPOINT = "checkpoints/step_NNNNNNNN"
RUN = {
    manifest.CONFIG: "The resolved configuration of the last start, a CONFIG for `keel train`.",
    METRICS_FILE: f"Steps, validations, evaluations, checkpoints and depth profiles: "
    f"[format]({FORMATS}#metricsjsonl).",
    "log.txt": "What the run printed, of all its starts.",
    CHECKPOINT + "/": f"Checkpoints: [format]({FORMATS}#checkpoints).",
    exit_codes.FILE: "Exit code of the last process: [Exit codes](exit-codes.md). Absent while the "
    "run trains and after an error.",
    run_file.FILE: f"Identity of the run: [format]({FORMATS}#runjson).",
    machines.FILE: f"Machines that trained the run: [format]({FORMATS}#machinesjson).",
    "stages.json": "The blocks, parameters, memory and time of every pipeline stage.",
    **dict.fromkeys(
        manifest.TOKENIZERS, "The tokenizer (one of the two), so that generation needs no dataset."
    ),
    manifest.TEMPLATE: "Template of conversations, of a run that was fine-tuned on them.",
    "loss.png": "Loss over tokens.",
    "samples.txt": "Text that the run generated at its end (`tracking.sample_prompt`).",
    HEAT_MAPS: "Depth profiles over depth and steps.",
    LATEST: "The newest depth profile beside the first. `keel depth` also writes "
    "`depth_step_N.png` and `depth_QUANTITY.png`.",
    f"{outbox.FOLDER}/{outbox.EVENTS_FILE}": f"Events that belong to no step: "
    f"[format]({FORMATS}#outbox).",
    f"{outbox.FOLDER}/{outbox.SYSTEM}HOST.TIME.jsonl": "A node's measurements of itself.",
    f"{outbox.FOLDER}/{DELIVERED}": "How much of the log MLflow has received.",
    f"{outbox.FOLDER}/lock": "Held by the process that delivers the log to MLflow.",
    f"{outbox.FOLDER}/alive": "Touched by that process while it runs.",
    RUN_ID_FILE: "Id of the run's MLflow run.",
    f"{ARTIFACTS}/": f"What MLflow shows as the run's artifacts, with the database "
    f"`runs/{DATABASE}`.",
    ownership.FILE: f"Process that trains the run now: [format]({FORMATS}#ownerlock).",
    f"{HANGS}/START/": "Reports of a hang, one of each rank, and `verdict.txt` "
    "([Exit codes](exit-codes.md): 70).",
    f"{run_file.ORIGIN_FOLDER}/ID/": "In a copied run: the original's reports; may be deleted.",
    EARLIER_DEPTH_FILE: "Depth profiles of a run of an earlier version.",
    f"{SPOOL}/": "Undelivered reports of a run of an earlier version.",
    f"{DATABASE}*": "MLflow database of a run of an earlier version.",
}
"""Files of a run's folder, and what is in them."""
CHECKPOINT_FILES = {
    manifest.MANIFEST: "Size and CRC-32 of every other file; written last.",
    manifest.CONFIG: "The resolved configuration.",
    manifest.STATE: "Step, samples consumed, state of the guard and of other parts, identity "
    "of the data, versions of packages.",
    manifest.INDEX: "Where every piece of a tensor is: its rank, block and range.",
    "rank_NNNNN.safetensors": "What one rank wrote: fp32 master weights and optimizer state, and "
    "in its metadata the states of the rank's random generators.",
    manifest.BACKEND: "Megatron-core's mark of a distributed checkpoint.",
    **dict.fromkeys(manifest.COPIED, "As in the run's folder."),
}


def exit_code_page() -> str:
    """The page docs/reference/exit-codes.md."""
    return (
        "# Exit codes\n\n`keel train` exits with these codes. Other commands exit with 0; with 1 "
        "if a check (`keel checkpoint verify`, `keel data verify`, `keel export`) or a run of "
        "`keel study` fails; with 2 for a configuration or usage error; and with 130 on Ctrl-C.\n\n"
        f"{source.text('runtime.exit_codes', skip_first=True)}\n"
    )


def run_folder_page() -> str:
    """The page docs/reference/run-folder.md."""
    rows = [(f"`{name}`", text) for name, text in RUN.items()]
    return (
        "# Run folder\n\nEverything of a run is in `runs/NAME`, that is `training.runs_dir` and "
        "`training.name`. The folder can be moved and copied "
        "([`run.json`](file-formats.md#runjson)). Not every run has every file.\n\n"
        f"{source.table(['file', 'content'], rows)}"
    )


def is_known(name: str) -> bool:
    """Whether the page of a run's folder speaks of a file.

    Args:
        name: its path within the folder.
    """
    known = [*RUN, *(f"{CHECKPOINT}/{inner}" for inner in CHECKPOINT_FILES)]
    patterns = [re.sub(r"N{3,}|HOST|TIME|START|ID\b", "*", one) for one in known]
    return any(
        fnmatch.fnmatch(name, pattern + "*" if pattern.endswith("/") else pattern)
        for pattern in patterns
    )


def formats_page() -> str:
    """The page docs/reference/file-formats.md."""
    return "\n".join(
        [
            "# File formats\n",
            "Formats of what runs and `keel data build` write. Nothing in them is code or a "
            "pickle. JSON objects may get further keys in later versions.\n",
            *_metrics(),
            *_small_files(),
            *_checkpoint(),
            *_dataset(),
        ]
    )


def _metrics() -> list[str]:
    records = []
    for name in ("StepRecord", "ValidationRecord", "EvaluationRecord", "CheckpointRecord"):
        title = name.removesuffix("Record").lower()
        records += [f"### Record of a {title}\n".replace("a eval", "an eval")]
        records += [source.field_table("tracking.records", name)]
        records += [source.method("tracking.records", "to_json", of=name) + "\n"]
    quantities = [
        (f"`{name}`", quantity.label, "some runs" if quantity.optional else "every run")
        for name, quantity in QUANTITIES.items()
    ]
    return [
        "## metrics.jsonl\n",
        source.text("tracking.metrics").replace("metrics.jsonl: one", "One") + "\n",
        *records,
        "### Record of a depth profile\n",
        "`step`, and `depth` with one list of numbers for each quantity, a number for each "
        "sub-layer; null where a quantity does not apply or is not finite. "
        "[`depth/profile.py`](../../keel_megatron/depth/profile.py) defines them.\n",
        source.table(["quantity", "", "recorded for"], quantities),
        "### Names in MLflow\n",
        source.text("tracking.metric_names").partition("\n\n")[2] + "\n",
        source.table(
            ["field", "metric"], [(f"`{field}`", f"`{name}`") for field, name in NAMES.items()]
        ),
    ]


def _small_files() -> list[str]:
    return [
        "## outbox/\n",
        source.text("tracking.outbox") + "\n",
        "## run.json\n",
        source.text("mlflow_delivery.run_file").replace("run.json: identity", "Identity") + "\n",
        source.field_table("mlflow_delivery.run_file", "RunFile"),
        "`origin`:\n",
        source.field_table("mlflow_delivery.run_file", "Origin"),
        "## machines.json\n",
        source.text("runtime.machines") + "\n",
        source.field_table("runtime.machines", "Machine"),
        "## owner.lock\n",
        source.text("runtime.ownership") + "\n",
    ]


def _checkpoint() -> list[str]:
    rows = [(f"`{name}`", text) for name, text in CHECKPOINT_FILES.items()]
    return [
        "## Checkpoints\n",
        f"A checkpoint is the folder `{CHECKPOINT}` of a run, of format {manifest.FORMAT}. It is "
        "written as `step_NNNNNNNN.partial` and renamed once every file is synced and read back. "
        "`step_NNNNNNNN.damaged` and `step_NNNNNNNN.replaced` were set aside when the step was "
        "saved again.\n",
        source.table(["file", "content"], rows),
        source.text("checkpoint.manifest", skip_first=True) + "\n",
        "### Tensors\n",
        source.text("checkpoint.shard_file") + "\n",
        source.text("checkpoint.places") + "\n",
        "### State\n",
        source.text("checkpoint.state") + "\n",
    ]


def _dataset() -> list[str]:
    types = [(code, f"`{kind.__name__}`") for code, kind in TOKEN_TYPES.items()]
    tables = []
    for name in ("Manifest", "TokenizerRecord", "SourceRecord", "Shard", "FileRecord", "Skipped"):
        tables += [f"### {name}\n", source.field_table("data.manifest", name)]
    return [
        "## Datasets\n",
        f"`keel data build` writes datasets of format {dataset.FORMAT}.\n",
        source.text("data.manifest", skip_first=True) + "\n",
        "Types in `data.json`:\n",
        *tables,
        "### Indexed tokens\n",
        source.text("data.shards") + " The header of an index is 9 bytes, `MMIDIDX` and two "
        "zeros, then little-endian the version (uint64, 1), the type of the tokens (uint8) and the "
        "numbers of sequences and of documents (uint64 each). After it: lengths of the sequences "
        "(int32), their byte offsets in the .bin file (int64) and where documents begin.\n",
        source.table(["code", "type of the tokens"], types),
    ]
