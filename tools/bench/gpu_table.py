"""Writes docs/benchmarks/gpu.md from predictions and measurements."""

from __future__ import annotations

from typing import Any

from gpu_predict import REASONS

from keel_megatron.config.model import ModelConfig
from keel_megatron.layout import kernel_counts
from keel_megatron.layout.block_costs import typical_rows
from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.times import SLOW_HOST

MODEL: dict[str, int] = {
    "blocks": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 1,
}
"""Any of Keel's: a block's kernels depend on the rule alone."""

BASE, BEST = "base: Keel", "best safe combination"
AIMED = (BASE, "micro-batch 1", "micro-batch 1, CUDA graphs", "micro-batch 8", BEST)
"""Rows whose product rate the page shows."""
RATE, RATIO, MEMORY = 0.5, 1.02, 0.1
"""Aims: of the measured product rate; Keel's step relative to Pre-LN's; of planned memory."""
NOT_RUN = ("is not installed", "time was up")
"""How a reason ends for which a row was not even tried."""
PARTS_COUNTED = ("options-64", "options-32")
HOST = f"""
With micro-batches of 1 the host launches four times as many kernels as with micro-batches of 4, and
a slow host limits the step. The upper end of the range assumes a host {SLOW_HOST:g} times as slow
as expected, the slowest that was measured (`layout/times.py`). `kernels.cuda_graphs` or larger
micro-batches remove this limit."""
COMPILED = """## Why a compiled block is slower on the device

The Triton kernels compute a norm weight's gradient in the same pass as the input's gradient.
Inductor reduces rows and columns in one kernel only from 5 M elements on (`mix_order_reduction` of
torch 2.13; at this shape, with micro-batches of 2 or more). The plan always counts a separate pass
that reads the operands again, so it may overestimate the time of compiled blocks with larger
micro-batches. A compiled block also returns its weight gradients, and DDP adds them to the fp32
gradients; otherwise the matrix products add to the fp32 gradients directly. In return, a compiled
block takes less host time, so it is faster if the host limits the step.
"""

HEAD = """# Effect of each option on one GPU

`make bench-gpu` (`tools/bench/gpu.py`) writes this page; with `--predict`, it needs no GPU. The
expected values are those of `keel plan` for the same run on one {gpu} (`layout/times.py`).
{state}

{goal}

## Assumptions

The device's rates (`layout/devices.py`), each with its source:

{assumptions}
"""
SHAPE = """## {sub_layers} sub-layers in {blocks} blocks

The paper's shape (`yaml/paper/keel_128.yaml`): hidden 1024, FFN 3072, 16 heads, 8 key/value heads,
sequence 4096, vocabulary 128,000, bf16; 8 sequences per step in micro-batches of 4 on one GPU,
random tokens, no recomputation unless the settings enable it. A ratio is the step time divided by
that of the base; below 1 is faster. "Device, host" are the expected times of the forward and
backward passes without the optimizer; the longer one, in bold, determines the step. The measured
host time ends with the last kernel launch, and includes waiting while CUDA's launch queue is full.
"Of expected" is the measured step time divided by the expected one.
"""


def page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    parts = result["parts"]
    assumptions = "\n".join(f"- {line}" for line in result["assumptions"])
    goal = _goal(parts, result["gpu"])
    lines = [
        HEAD.format(gpu=result["gpu"], assumptions=assumptions, state=_state(parts), goal=goal)
    ]
    for part in PARTS_COUNTED:
        lines += _options(part, parts[part])
    lines += [COMPILED, *_where(parts["options-64"]), *_kernels(parts), *_deep(parts["deep"])]
    lines += _kernel(parts["kernel"])
    lines += _checks(result.get("checks", {}))
    return "\n".join(lines) + "\n"


def _state(parts: dict[str, Any]) -> str:
    """Which parts are measured."""
    missing = [name for name, part in parts.items() if not _measured(part)]
    if len(missing) == len(parts):
        return "\n**Nothing here is measured on a GPU yet.**"
    if not missing:
        return ""
    return f"\nNot run yet: {', '.join(f'`--part {name}`' for name in missing)}."


def _goal(parts: dict[str, Any], gpu: str) -> str:
    """Whether predictions and measurements meet the aims."""
    device = DEVICES[gpu]
    lines = [
        "Aims: at least half of the measured product rate, which is the highest published rate of "
        "matrix products",
        f"({device.measured_tflops:g} TFLOP/s); a step of Keel at most {RATIO} times as long as "
        "Pre-LN's; and planned memory within",
        f"{MEMORY:.0%} of the measured peak. Expected rates are given with their range:",
        "",
        "| | expected: of the data sheet's peak | expected: of the product rate | measured: of the "
        "data sheet's peak | measured: of the product rate | at least half |",
        "|---|-:|-:|-:|-:|---|",
    ]
    for part in PARTS_COUNTED:
        blocks, rows = parts[part]["blocks"], parts[part]["rows"]
        for name in (name for name in AIMED if name in rows):
            settings = ", ".join(f"`{one}`" for one in rows[name]["settings"])
            title = f"{2 * blocks} sub-layers, {name}{f' ({settings})' if settings else ''}"
            expected = [
                _share(rows[name]["predicted"], key)
                for key in ("mfu", "share_of_measured_products")
            ]
            cells = [title, *expected, *_rates(rows[name], device.tflops, device.measured_tflops)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(_against_pre_ln(parts[part]) for part in PARTS_COUNTED)]
    return "\n".join([*lines, *_agreement(parts), HOST])


def _rates(row: dict[str, Any], peak: float, products: float) -> list[str]:
    """Measured shares of both rates, and whether the aim is met."""
    if not _known(row):
        return ["not run", "not run", ""]
    rate = row["measured"]["tflops"]
    met = "met" if rate / products >= RATE else "**not met**"
    return [f"{rate / peak:.1%}", f"{rate / products:.1%}", met]


def _against_pre_ln(part: dict[str, Any]) -> str:
    """Keel's step relative to Pre-LN's at a depth."""
    base, other = part["rows"][BASE], part["rows"]["Pre-LN"]
    title = f"- Keel / Pre-LN, {2 * part['blocks']} sub-layers"
    expected = f"{title}: expected {1.0 / other['predicted']['ratio']:.3f}"
    if not (_known(base) and _known(other)):
        return f"{expected}, not run."
    ratio = base["measured"]["step_seconds"] / other["measured"]["step_seconds"]
    met = "met" if ratio <= RATIO else "**not met**"
    middle = " and ".join(_quartiles(row["measured"]) for row in (base, other))
    return f"{expected}, measured {ratio:.3f}: {met}. Quartiles of the steps: {middle}."


def _quartiles(found: dict[str, Any]) -> str:
    """The middle half of the measured steps."""
    low, high = found.get("quartiles", [found["step_seconds"]] * 2)
    return f"{low * 1e3:.0f} to {high * 1e3:.0f} ms"


def _agreement(parts: dict[str, Any]) -> list[str]:
    """How many measured steps and peaks are what the plan says."""
    rows = {
        (f"{2 * part['blocks']} sub-layers, {name}" if "blocks" in part else name): row
        for part in parts.values()
        for name, row in part.get("rows", {}).items()
        if _known(row)
    }
    lines = []
    ranged = {name: row for name, row in rows.items() if "step_seconds_range" in row["predicted"]}
    if ranged:
        out = [f"{name} ({_excess(row)})" for name, row in ranged.items() if _excess(row)]
        lines.append(
            f"- Range: {len(ranged) - len(out)} of {len(ranged)} measured steps are within the "
            f"expected range{'; outside: ' + ', '.join(out) if out else ''}."
        )
    errors = {
        name: row["measured"]["planned_memory_gb"] / row["measured"]["peak_memory_gb"] - 1.0
        for name, row in rows.items()
        if {"planned_memory_gb", "peak_memory_gb"} <= row["measured"].keys()
    }
    if errors:
        wide = [f"{name} {error:+.1%}" for name, error in errors.items() if abs(error) > 0.003]
        met = "met" if max(map(abs, errors.values())) <= MEMORY else "**not met**"
        lines.append(
            f"- Memory: the plan is within 0.3% of the measured peak in "
            f"{len(errors) - len(wide)} of {len(errors)} rows"
            f"{'; the others: ' + ', '.join(wide) if wide else ''}: {met}."
        )
    return lines


def _excess(row: dict[str, Any]) -> str:
    """By how much a measured step is outside of its range; "" within."""
    low, high = row["predicted"]["step_seconds_range"]
    took = row["measured"]["step_seconds"]
    return "" if low <= took <= high else f"{took / (high if took > high else low) - 1.0:+.1%}"


def _share(found: dict[str, Any], key: str) -> str:
    """A rate's share, expected and from the range of the step."""
    low, high = (found[key] * found["step_seconds"] / t for t in found["step_seconds_range"][::-1])
    return f"{found[key]:.1%} ({low:.0%} to {high:.0%})"


def _measured(part: dict[str, Any]) -> bool:
    return any(_known(row) for row in (part, *part.get("rows", {}).values()))


def _known(row: dict[str, Any]) -> bool:
    """Whether a row was measured."""
    return "failed" not in row.get("measured", {"failed": ""})


def _options(name: str, part: dict[str, Any]) -> list[str]:
    blocks = part["blocks"]
    lines = [SHAPE.format(blocks=blocks, sub_layers=2 * blocks)]
    lines += [f"`python3 tools/bench/gpu.py --part {name}`{_on(part)}", ""]
    lines += [
        "| | settings | expected ratio | device, host: ms per step | reason | measured ratio | "
        "step, ms | of expected | TFLOP/s | GB: planned, peak |",
        "|---|---|-:|-:|---|-:|-:|-:|-:|-:|",
    ]
    for title, row in part["rows"].items():
        settings = "<br>".join(f"`{one}`" if "=" in one else one for one in row["settings"])
        step = row["predicted"]
        both = ", ".join(
            f"**{text}**" if step["bound_by"] == way else text
            for way in ("device", "host")
            for text in [f"{step[f'{way}_seconds'] * 1e3:.0f}"]
        )
        cells = [title, settings, f"{step['ratio']:.3f}", both, row["why"]]
        lines.append("| " + " | ".join([*cells, *_found(row)]) + " |")
    return [*lines, ""]


def _found(row: dict[str, Any]) -> list[str]:
    """The measured cells of an option."""
    if not _known(row):
        return [_reason(row), "", "", "", ""]
    found = row["measured"]
    memory = [found[key] for key in ("planned_memory_gb", "peak_memory_gb") if key in found]
    return [
        f"{found['ratio']:.3f}" if "ratio" in found else "",
        _step(found),
        f"{found['step_seconds'] / row['predicted']['step_seconds']:.2f}",
        f"{found['tflops']:.0f}",
        ", ".join(f"{one:.1f}" for one in memory),
    ]


def _reason(row: dict[str, Any]) -> str:
    """Why there is no measurement."""
    reason = str(row.get("measured", {}).get("failed", "")).replace("|", "/")
    return f"not run{reason and ': '}{reason}" if not reason or reason.endswith(NOT_RUN) else reason


def _step(found: dict[str, Any]) -> str:
    """Milliseconds of a step, and those in which the host launched its passes."""
    host = f" (host {found['host_seconds'] * 1e3:.1f})" if "host_seconds" in found else ""
    return f"{found['step_seconds'] * 1e3:.1f}{host}"


def _on(part: dict[str, Any]) -> str:
    """Where and when the part was measured."""
    rows = [row for row in part["rows"].values() if _known(row)]
    if not rows:
        return ""
    found = rows[0]["measured"]
    return f", {found['device']}, torch {found['torch']}, {rows[0]['measured_on']}"


def _where(part: dict[str, Any]) -> list[str]:
    """The expected steps of the base and the best, by what they go to."""
    lines = ["## Where a step goes", ""]
    lines += [f"Expected, {part['blocks']} blocks; ms, and share of the step:", ""]
    steps = [part["rows"][name]["predicted"] for name in (BASE, BEST)]
    lines += [f"| part | {BASE} | {BEST} | reason |", "|---|-:|-:|---|"]
    names = dict.fromkeys(name for step in steps for name in step["parts"])
    for name in names:
        cells = [_cell(step, step["parts"].get(name, 0.0)) for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} | {REASONS.get(name, '')} |")
    cells = [
        f"{step['step_seconds'] * 1e3:.1f}, MFU {step['mfu']:.1%}, "
        f"{step['share_of_measured_products']:.1%} of the measured product rate"
        for step in steps
    ]
    lines += [f"| step | {' | '.join(cells)} | |", ""]
    low, high = steps[0]["step_seconds_range"]
    lines.append(
        f"The base may be {low * 1e3:.0f} to {high * 1e3:.0f} ms (`layout/times.py` explains the "
        "range)."
    )
    found = part["rows"][BASE].get("measured", {})
    if "parts" in found:
        shown = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in found["parts"].items())
        update, passes = steps[0]["parts"]["optimizer"], steps[0]["device_seconds"]
        taken = found["parts"]["optimizer"]
        lines += ["", f"Measured: {shown}."]
        lines.append(
            "Measured times of the base relative to the expected ones: passes "
            f"{found['passes_seconds'] / passes:.2f}, update {taken / update:.2f}."
        )
    return [*lines, ""]


def _cell(step: dict[str, Any], seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ({seconds / step['step_seconds']:.1%})"


def _kernels(parts: dict[str, Any]) -> list[str]:
    """What a block launches."""
    lines = ["## Kernels of a block", "", "| part | forward | backward | |", "|---|-:|-:|---|"]
    rows = typical_rows(ModelConfig(**MODEL))
    for part in kernel_counts.block(rows):
        lines.append(f"| {part.part} | {part.forward} | {part.backward} | {part.what} |")
    forward, backward = kernel_counts.total(kernel_counts.block(rows))
    lines.append(f"| all | {forward} | {backward} | |")
    forward, backward = kernel_counts.total(kernel_counts.block(rows, compiled=True))
    lines.append(f"| all, compiled | {forward} | {backward} | |")
    counted = [parts[name]["rows"]["base: Keel"].get("measured", {}) for name in PARTS_COUNTED]
    if all("kernels" in found for found in counted):
        deep, shallow = (found["kernels"] for found in counted)
        each = (deep - shallow) / 32 / 2
        lines += ["", f"Counted in traces: {each:.1f} per block and micro-batch, both passes."]
    return [*lines, ""]


def _deep(part: dict[str, Any]) -> list[str]:
    lines = [
        "## 1024 sub-layers, 6.4 B parameters without embeddings, on one GPU",
        "",
        "`python3 tools/bench/gpu.py --part deep` (`yaml/paper/keel_1024.yaml`, 4 sequences per",
        "step). Aim: the planned memory is within 10 % of the measured peak.",
        "",
        "| | expected GB | fits | blocks recomputed | expected step, s | measured GB | step, s |",
        "|---|-:|---|-:|-:|-:|-:|",
    ]
    for title, row in part["rows"].items():
        step, found = row["predicted"], row.get("measured", {})
        seconds = "" if step["step_seconds"] is None else f"{step['step_seconds']:.2f}"
        cells = [title, f"{step['memory_gb']:.1f}", "yes" if step["fits"] else "no"]
        cells += [str(step["recomputed"]), seconds]
        if _known(row):
            host = f" (host {found['host_seconds']:.2f})" if "host_seconds" in found else ""
            cells += [f"{found['peak_memory_gb']:.1f}", f"{found['step_seconds']:.2f}{host}"]
        else:
            cells += [_reason(row), ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _kernel(part: dict[str, Any]) -> list[str]:
    lines = ["## The fused kernel", ""]
    lines += [f"Aim: {part['aim']:.0%} of the bandwidth of a copy, at hidden 1024.", ""]
    found = part.get("measured")
    if found is None:
        return [*lines, "`python3 tools/bench/gpu.py --part kernel`: not run."]
    if "failed" in found:
        return [*lines, f"It failed: {found['failed']}."]
    lines += ["| rows | hidden | way | forward, of a copy | backward |", "|-:|-:|---|-:|-:|"]
    for one in found["measured"]:
        cells = [f"{one['rows']}", f"{one['hidden_size']}", one["way"]]
        cells += [
            f"{one[f'{w}_bandwidth'] / found['copy_bandwidth']:.1%}"
            for w in ("forward", "backward")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _checks(part: dict[str, Any]) -> list[str]:
    """What `tools/bench/gpu_checks.py` found, once it has run."""
    found = part.get("measured")
    if found is None:
        return []
    lines = ["", "## Checks of the device", ""]
    lines += [f"`python3 tools/bench/gpu.py --part checks`, {part['measured_on']}; `memory size`"]
    lines += ["names the GPU.", ""]
    if "failed" in found:
        return [*lines, f"They failed: {found['failed']}."]
    lines += ["| | passed | |", "|---|---|---|"]
    for name, one in found["checks"].items():
        text = one["text"].replace("|", "/")
        lines.append(f"| {name} | {'yes' if one['passed'] else '**no**'} | {text} |")
    return lines
