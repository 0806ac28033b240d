"""Writes docs/benchmarks/gpu.md from predictions and measurements."""

from __future__ import annotations

from typing import Any

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

HEAD = """# Effect of each optimisation on one GPU

Written by `make bench-gpu` (`tools/bench/gpu.py`); `--predict` writes it without a GPU. The
expected values are `keel plan`'s for the same run (`layout/times.py`) on one {gpu}, with rates
estimated by rules of thumb (`layout/devices.py`): {assumptions}.
{state}
"""
SHAPE = """## {sub_layers} sub-layers in {blocks} blocks

The paper's shape (`yaml/paper/keel_128.yaml`): hidden 1024, FFN 3072, 16 heads, 8 key/value heads,
sequence 4096, vocabulary 128,000, bf16; 8 sequences a step in micro-batches of 1 on one GPU, random
tokens, no recomputation. The ratio is the step time divided by the base's; below 1 is faster.
"""


def page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    parts = result["parts"]
    state = (
        "\n**Nothing here is measured on a GPU yet.**"
        if not any(map(_measured, parts.values()))
        else ""
    )
    lines = [HEAD.format(gpu=result["gpu"], assumptions=result["assumptions"], state=state)]
    for part in ("levers-64", "levers-32"):
        lines += _levers(part, parts[part])
    lines += [*_where(parts["levers-64"]), *_kernels(parts), *_deep(parts["deep"])]
    lines += _kernel(parts["kernel"])
    lines += _checks(result.get("checks", {}))
    return "\n".join(lines) + "\n"


def _measured(part: dict[str, Any]) -> bool:
    rows = [part, *part.get("rows", {}).values()]
    return any("failed" not in row["measured"] for row in rows if "measured" in row)


def _levers(name: str, part: dict[str, Any]) -> list[str]:
    blocks = part["blocks"]
    lines = [SHAPE.format(blocks=blocks, sub_layers=2 * blocks)]
    lines += [f"`python3 tools/bench/gpu.py --part {name}`{_on(part)}", ""]
    lines += [
        "| | settings | expected ratio | because | measured ratio | step, ms | TFLOP/s | peak GB |",
        "|---|---|-:|---|-:|-:|-:|-:|",
    ]
    for title, row in part["rows"].items():
        settings = "<br>".join(f"`{one}`" if "=" in one else one for one in row["settings"])
        cells = [title, settings, f"{row['predicted']['ratio']:.3f}", row["why"]]
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
    """The expected step of the base, by what bounds it."""
    base = part["rows"]["base: Keel"]
    step = base["predicted"]
    found = base.get("measured", {})
    lines = ["## Where a step goes", ""]
    lines += [f"The base of {part['blocks']} blocks, expected:", ""]
    lines += ["| part | ms | share |", "|---|-:|-:|"]
    for name, seconds in step["parts"].items():
        share = seconds / step["step_seconds"]
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {share:.1%} |")
    lines.append(f"| step | {step['step_seconds'] * 1e3:.1f} | MFU {step['mfu']:.1%} |")
    low, high = step["step_seconds_range"]
    flops = step["mfu"] * step["step_seconds"]
    lines += [
        "",
        f"It may be {low * 1e3:.0f} to {high * 1e3:.0f} ms (MFU {flops / high:.0%} to "
        f"{flops / low:.0%}): `layout/times.py` says why.",
    ]
    if "parts" in found:
        shown = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in found["parts"].items())
        lines += ["", f"Measured: {shown}."]
    return [*lines, ""]


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
        each = (deep - shallow) / 32 / 8
        lines += ["", f"Counted in traces: {each:.1f} a block and micro-batch, both ways."]
    return [*lines, ""]


PARTS_COUNTED = ("levers-64", "levers-32")


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
