"""The paper's recipes traced beside their plans: docs/benchmarks/plan_trace.md.

python tools/trace_table.py            # trace what is missing, and write the table
python tools/trace_table.py --again    # trace everything

Of every recipe and number of GPUs the stage that needs the most memory is traced. What was traced
is kept in docs/benchmarks/plan_trace.json; a trace takes 10 s to 2 minutes of a core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import device_named
from keel_megatron.planner.plan import make_plan
from keel_megatron.planner.report import layout_words
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.machines import cpu_name

RECIPES = ("keel_64", "keel_128", "keel_512", "keel_1024")
GPUS = (1, 8, 64, 1024)
OUT = ROOT / "docs" / "benchmarks" / "plan_trace"
ALONE = ("parallel.pipeline=1", "parallel.virtual_pipeline=1")
"""One GPU takes one stage."""


def configured(recipe: str, gpus: int) -> RunConfig:
    overrides = ALONE if gpus == 1 else ()
    return load_config(ROOT / "yaml" / "paper" / f"{recipe}.yaml", overrides, world_size=gpus)


def traced(recipe: str, gpus: int, depth: bool) -> dict[str, Any]:
    from keel_megatron.planner.trace.rank import Request, trace_rank

    config, device = configured(recipe, gpus), device_named("h200")
    plan = make_plan(config, gpus, device)
    stage = plan.partition.worst_memory.number
    found = trace_rank(Request(config, gpus, device, stage, depth=depth)).as_object()
    return {"layout": layout_words(plan), "depth": depth, **found}


def rows(results: dict[str, Any]) -> list[str]:
    header = ("sub-layers", "GPUs", "layout", "stage", "plan", "step", "plan is")
    header += ("reserved", "expandable", "save", "TFLOP", "launches")
    lines = ["| " + " | ".join((*header, "waits", "peak at")) + " |"]
    lines.append("|-:|-:|---|" + "-:|" * (len(header) - 2) + "---|")
    for recipe in RECIPES:
        for gpus in GPUS:
            one = results.get(f"{recipe}/{gpus}")
            if one is not None:
                lines.append("| " + " | ".join(_cells(recipe, gpus, one)) + " |")
    return lines


def _cells(recipe: str, gpus: int, one: dict[str, Any]) -> list[str]:
    parts = one["parts"]
    plan = make_plan(configured(recipe, gpus), gpus, device_named("h200"))
    memory = plan.partition.stages[one["stage"]].memory  # by the plan of today
    steps = {name: part for name, part in parts.items() if name != "save"}
    fullest = max(steps, key=lambda name: steps[name]["peak_bytes"])
    before_save = list(steps.values())[-1]
    step = steps[fullest]["peak_bytes"]

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f}"

    return [
        recipe.removeprefix("keel_"),
        f"{gpus:,}",
        one["layout"].partition(",")[0] + ("" if plan.fits else " (does not fit)"),
        str(one["stage"]),
        gb(memory.total),
        gb(step),
        f"{memory.total / step - 1:+.2%}",
        gb(before_save["reserved_bytes"]),
        gb(before_save["reserved_expandable_bytes"]),
        gb(parts["save"]["peak_bytes"]),
        f"{one['step_flops'] / 1e12:,.0f}",
        f"{one['step_launches']:,.0f}",
        str(sum(one["host_waits"]["step"].values())),
        f"{steps[fullest]['peak_operator']} ({steps[fullest]['peak_where']})",
    ]


def page(results: dict[str, Any]) -> str:
    day = datetime.date.today().isoformat()
    lines = [
        "# Plans compared with traces",
        "",
        "`python tools/trace_table.py` traces the stage that needs the most memory according to "
        "the plan, for an H200, without a GPU ([Tracing](../tracing.md)). Memory is in GB (1e9 "
        "bytes). `step` is the peak of allocated memory during a step, a step with a depth profile "
        "(up to 128 sub-layers) and a validation. `reserved` and `expandable` are the memory that "
        "torch's allocator would then hold, without and with expandable segments. `save` is the "
        "peak during a save. TFLOP, kernel launches and host waits are those of a whole step. "
        f"Nothing here ran on a GPU. Traced on a core of {cpu_name()}, {day}.",
        "",
        *rows(results),
        "",
    ]
    if len(results) < len(RECIPES) * len(GPUS):
        lines += ["Recipes that are not listed have not been traced yet; the tool adds them.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", action="store_true", help="trace what was traced before too")
    parser.add_argument("--processes", type=int, default=available_cores())
    parser.add_argument("--only", nargs="*", metavar="RECIPE/GPUS", help="keel_64/8 and the like")
    options = parser.parse_args()
    store = OUT.with_suffix(".json")
    results = json.loads(store.read_text()) if store.exists() else {}
    names = options.only or [f"{recipe}/{gpus}" for recipe in RECIPES for gpus in GPUS]
    if options.again:
        results = {name: found for name, found in results.items() if name not in names}
    missing = [name for name in names if name not in results]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, max_tasks_per_child=1) as pool:
        jobs = {}
        for name in missing:
            recipe, _slash, gpus = name.partition("/")
            depth = int(recipe.removeprefix("keel_")) <= 128
            jobs[pool.submit(traced, recipe, int(gpus), depth)] = name
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            print(f"{jobs[job]}: {results[jobs[job]]['seconds']:.0f} s", flush=True)
            store.write_text(json.dumps(results, indent=1) + "\n")
            OUT.with_suffix(".md").write_text(page(results))
    OUT.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
