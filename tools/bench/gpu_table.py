"""Writes docs/benchmarks/gpu.md from predictions and measurements."""

from __future__ import annotations

from typing import Any

from gpu_predict import REASONS

from keel_megatron.config.model import ModelConfig
from keel_megatron.layout import kernel_counts
from keel_megatron.layout.block_costs import typical_rows

MODEL: dict[str, int] = {
    "blocks": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 1,
}
"""Any of Keel's: a block's kernels depend on the rule alone."""

BASE, BEST = "base: Keel", "best safe combination"
COMPILED = """## Why a compiled block is slower on the device

The Triton kernels sum a norm weight's gradient in the pass that computes the input's. Inductor
reduces rows and columns in one kernel only from 5 M elements on (`mix_order_reduction` of torch
2.13; at this shape from micro-batch 2 on). The model always counts a separate pass that reads the
operands again, so it may overestimate compiled blocks of larger micro-batches. A compiled block
also returns its weights' gradients, which DDP adds to the fp32 sums; otherwise the products
themselves add to them. In exchange it takes the host less time, and is faster where the host is the
limit.
"""

HEAD = """# Effect of each option on one GPU

Written by `make bench-gpu` (`tools/bench/gpu.py`); `--predict` writes it without a GPU. The
expected values are `keel plan`'s for the same run (`layout/times.py`) on one {gpu}.
{state}

{goal}

## Assumptions

The device's rates (`layout/devices.py`), each with its source:

{assumptions}
"""
SHAPE = """## {sub_layers} sub-layers in {blocks} blocks

The paper's shape (`yaml/paper/keel_128.yaml`): hidden 1024, FFN 3072, 16 heads, 8 key/value heads,
sequence 4096, vocabulary 128,000, bf16; 8 sequences a step in micro-batches of 4 on one GPU, random
tokens, no recomputation unless the settings say so. The ratio is the step time divided by the
base's; below 1 is faster. Device and host are the passes' times without the update; the longer one,
in bold, counts.
"""


def page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    parts = result["parts"]
    state = (
        "\n**Nothing here is measured on a GPU yet.**"
        if not any(map(_measured, parts.values()))
        else ""
    )
    assumptions = "\n".join(f"- {line}" for line in result["assumptions"])
    head = HEAD.format(gpu=result["gpu"], assumptions=assumptions, state=state, goal=_goal(parts))
    lines = [head]
    for part in ("options-64", "options-32"):
        lines += _options(part, parts[part])
    lines += [COMPILED, *_where(parts["options-64"]), *_kernels(parts), *_deep(parts["deep"])]
    lines += _kernel(parts["kernel"])
    lines += _checks(result.get("checks", {}))
    return "\n".join(lines) + "\n"


def _goal(parts: dict[str, Any]) -> str:
    """Whether the predictions meet the aims."""
    lines = [
        "Aims: half of the measured product rate, and Keel at most 1.02 of Pre-LN. Expected, with "
        "the range:",
        "",
        "| | of the data sheet's peak | of the measured product rate |",
        "|---|-:|-:|",
    ]
    for part in ("options-64", "options-32"):
        blocks, rows = parts[part]["blocks"], parts[part]["rows"]
        for name in (BASE, BEST):
            found = rows[name]["predicted"]
            settings = ", ".join(f"`{one}`" for one in rows[name]["settings"])
            title = f"{2 * blocks} sub-layers, {name}{f' ({settings})' if settings else ''}"
            cells = [_share(found, key) for key in ("mfu", "share_of_measured_products")]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    ratios = [1.0 / parts[part]["rows"]["Pre-LN"]["predicted"]["ratio"] for part in PARTS_COUNTED]
    told = " and ".join(f"{ratio:.3f}" for ratio in ratios)
    slow = [
        "The range's lower end at micro-batch 1 is a slow host: it launches as many kernels as for",
        "a larger micro-batch.",
    ]
    return "\n".join([*lines, "", f"Keel / Pre-LN: {told}.", *slow])


def _share(found: dict[str, Any], key: str) -> str:
    """A rate's share, expected and from the range of the step."""
    low, high = (found[key] * found["step_seconds"] / t for t in found["step_seconds_range"][::-1])
    return f"{found[key]:.1%} ({low:.0%} to {high:.0%})"


def _measured(part: dict[str, Any]) -> bool:
    rows = [part, *part.get("rows", {}).values()]
    return any("failed" not in row["measured"] for row in rows if "measured" in row)


def _options(name: str, part: dict[str, Any]) -> list[str]:
    blocks = part["blocks"]
    lines = [SHAPE.format(blocks=blocks, sub_layers=2 * blocks)]
    lines += [f"`python3 tools/bench/gpu.py --part {name}`{_on(part)}", ""]
    lines += [
        "| | settings | expected ratio | device, host: ms a step | because | measured ratio | "
        "step, ms | TFLOP/s | peak GB |",
        "|---|---|-:|-:|---|-:|-:|-:|-:|",
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
    found = row.get("measured")
    if found is None:
        return ["", "", "", ""]
    if "failed" in found:
        return [found["failed"].replace("|", "/"), "", "", ""]
    return [
        f"{found['ratio']:.3f}" if "ratio" in found else "",
        _step(found),
        f"{found['tflops']:.0f}",
        f"{found['peak_memory_gb']:.1f}" if "peak_memory_gb" in found else "",
    ]


def _step(found: dict[str, Any]) -> str:
    """Milliseconds of a step, and those in which the host launched its passes."""
    host = f" (host {found['host_seconds'] * 1e3:.1f})" if "host_seconds" in found else ""
    return f"{found['step_seconds'] * 1e3:.1f}{host}"


def _on(part: dict[str, Any]) -> str:
    """Where and when the part was measured."""
    rows = [
        row for row in part["rows"].values() if "failed" not in row.get("measured", {"failed": 1})
    ]
    if not rows:
        return ""
    found = rows[0]["measured"]
    return f", {found['device']}, torch {found['torch']}, {rows[0]['measured_on']}"


def _where(part: dict[str, Any]) -> list[str]:
    """The expected steps of the base and the best, by what they go to."""
    lines = ["## Where a step goes", ""]
    lines += [f"Expected, {part['blocks']} blocks; ms, and the share of the step:", ""]
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
        f"The base may be {low * 1e3:.0f} to {high * 1e3:.0f} ms: `layout/times.py` says why."
    )
    found = part["rows"][BASE].get("measured", {})
    if "parts" in found:
        shown = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in found["parts"].items())
        lines += ["", f"Measured: {shown}."]
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
        lines += ["", f"Counted in traces: {each:.1f} a block and micro-batch, both ways."]
    return [*lines, ""]


PARTS_COUNTED = ("options-64", "options-32")


def _deep(part: dict[str, Any]) -> list[str]:
    lines = [
        "## 1024 sub-layers, 6.4 B parameters without embeddings, on one GPU",
        "",
        "`python3 tools/bench/gpu.py --part deep` (`yaml/paper/keel_1024.yaml`, 4 sequences a",
        "step). Aim: `keel plan`'s memory within 10 % of the measured peak.",
        "",
        "| | expected GB | fits | blocks recomputed | expected step, s | measured GB | step, s |",
        "|---|-:|---|-:|-:|-:|-:|",
    ]
    for title, row in part["rows"].items():
        step, found = row["predicted"], row.get("measured", {})
        seconds = "" if step["step_seconds"] is None else f"{step['step_seconds']:.2f}"
        cells = [title, f"{step['memory_gb']:.1f}", "yes" if step["fits"] else "no"]
        cells += [str(step["recomputed"]), seconds]
        if "failed" in found:
            cells += [found["failed"].replace("|", "/"), ""]
        else:
            peak, took = found.get("peak_memory_gb"), found.get("step_seconds")
            cells += ["" if peak is None else f"{peak:.1f}", "" if took is None else f"{took:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _kernel(part: dict[str, Any]) -> list[str]:
    lines = ["## The fused kernel", ""]
    lines += [f"Aim: {part['aim']:.0%} of a copy's bandwidth at hidden 1024.", ""]
    found = part.get("measured")
    if found is None:
        return [*lines, "`python3 tools/bench/gpu.py --part kernel`: not run yet."]
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
    lines += [f"`python3 tools/bench/gpu.py --part checks`, {part['measured_on']}", ""]
    if "failed" in found:
        return [*lines, f"They failed: {found['failed']}."]
    lines += ["| | passed | |", "|---|---|---|"]
    for name, one in found["checks"].items():
        text = one["text"].replace("|", "/")
        lines.append(f"| {name} | {'yes' if one['passed'] else '**no**'} | {text} |")
    return lines
