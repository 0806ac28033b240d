"""`keel bench`: configurations, measurement and results."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from keel_megatron.bench.step_report import report, summary
from keel_megatron.bench.step_time import measure_roofline, time_steps
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.model.language_model import COMPUTE_DTYPES
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.machines import cpu_name
from keel_megatron.runtime.versions import package_versions
from keel_megatron.training.dataset import ready_dataset


@dataclass(frozen=True)
class Bench:
    """Results of a benchmark: lines of text, and a JSON object."""

    lines: list[str]
    figures: dict[str, Any]


def run_bench(
    path: Path,
    overrides: list[str],
    compare: str | None,
    *,
    warmup: int,
    steps: int,
    random_tokens: bool,
    profile: Path | None = None,
) -> Bench | None:
    """Benchmark a configuration, or variants of it, in this process of a group.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each.
        compare: `section.key=a,b,...`, or None.
        warmup: untimed steps.
        steps: timed steps.
        random_tokens: use random tokens instead of the training data.
        profile: file for a torch trace of one step.

    Returns:
        The results on rank 0; None elsewhere.

    Raises:
        ConfigError: a configuration has errors.
        UserError: the variants cannot be compared.
    """
    world_size = Launch.from_environment().world_size
    configs = _variants(path, overrides, compare, world_size)
    first = next(iter(configs.values()))
    datasets = None if random_tokens else _datasets(configs)
    with start(first.parallel, first.training) as runtime:
        samples = time_steps(
            configs,
            runtime,
            warmup=warmup,
            steps=steps,
            datasets=datasets,
            say=lambda text: print(text, flush=True),
            profile=profile,
        )
        dtype = COMPUTE_DTYPES[first.training.precision]
        runtime.barrier()
        roofline = measure_roofline(runtime.device, dtype)
        gathered = [runtime.gather(one) for one in samples]
        if not runtime.is_main:
            return None
        found = [summary(ranks, roofline) for ranks in gathered]
        where = _where(runtime, first)
        figures = {
            "date": datetime.date.today().isoformat(),
            "machine": where,
            "packages": package_versions(),
            "roofline": asdict(roofline),
            "variants": found,
        }
        return Bench(report(found, roofline, where), figures)


def _datasets(configs: dict[str, RunConfig]) -> dict[str, Path]:
    """Dataset folders of the configurations, built before the processes meet: it may take long."""
    launch = Launch.from_environment()
    local = launch.world_size == launch.local_world_size
    return {
        name: ready_dataset(config, lambda _text: None, on_one_machine=local)
        for name, config in configs.items()
    }


def _variants(
    path: Path, overrides: list[str], compare: str | None, world_size: int
) -> dict[str, RunConfig]:
    """The configurations by name."""
    if compare is None:
        config = load_config(path, tuple(overrides), world_size=world_size)
        return {config.model.residual: config}
    key, sign, values = compare.partition("=")
    names = [value for value in values.split(",") if value]
    if not sign or len(set(names)) < 2:
        raise UserError(f"--compare {compare}: must be KEY=A,B[,...], two values or more")
    configs = {
        name: load_config(path, (*overrides, f"{key}={name}"), world_size=world_size)
        for name in names
    }
    first, *others = configs.values()
    for other in others:
        for section in ("parallel", "training"):
            mine, its = getattr(first, section), getattr(other, section)
            shared = {"tensor", "pipeline", "virtual_pipeline", "sequence", "device", "threads"}
            differing = [
                name
                for name in shared & type(mine).model_fields.keys()
                if getattr(mine, name) != getattr(its, name)
            ]
            if differing:
                raise UserError(
                    f"--compare {compare}: variants share one group of processes, so "
                    f"{section}.{differing[0]} must be the same; run keel bench for each"
                )
    return configs


def _where(runtime: Runtime, config: RunConfig) -> str:
    """Description of the machine and the layout."""
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    else:
        device = f"{cpu_name()}, {runtime.threads} thread(s) per process"
    return (
        f"{runtime.launch.world_size} process(es) on {device}; TP {runtime.tensor_size} x PP "
        f"{runtime.pipeline_size} x VPP {config.parallel.virtual_pipeline} x DP "
        f"{runtime.data_size}; {config.model.sub_layers} sub-layers, hidden "
        f"{config.model.hidden_size}, sequence {config.data.seq_length}, "
        f"{config.training.precision}"
    )
