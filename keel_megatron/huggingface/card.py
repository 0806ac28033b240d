"""README.md of an exported folder: what the model is and how it was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.architecture.residual import RULES, alpha
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.naming import is_llama

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- keel-megatron
- {rule}
---

# {name}

A language model of {sub_layers} sub-layers ({blocks} blocks of attention and FFN), trained with
Keel-Megatron. {description}

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
_LLAMA = "It is a plain Llama: no code of its own is needed."
_KEEL = """\
Its residual rule is `{rule}`: `configuration_keel.py` is the table
of rules, `modeling_keel.py` the model. Under bf16 the residual stream and the norms stay fp32."""


def card(
    config: RunConfig,
    step: int,
    metrics: Iterable[Mapping[str, Any]],
    dtype: str,
    packages: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        config: the run.
        step: of the checkpoint.
        metrics: the records of the run's metrics.jsonl.
        dtype: of the exported weights.
        packages: versions that trained it.
    """
    model = config.model
    rows: dict[str, str] = {
        "run": config.training.name,
        "parameters": f"{parameter_count(model, config.data.vocab_size):,}",
        "residual rule": model.residual,
        "depth": f"{model.sub_layers} sub-layers, {model.blocks} blocks",
        "hidden size": f"{model.hidden_size:,}",
        "context": f"{config.data.seq_length:,} tokens",
        "vocabulary": f"{config.data.vocab_size:,}",
        "weights": dtype,
    }
    if "alpha" in RULES[model.residual].settings:
        rows["alpha"] = f"{alpha(model):g}"
    rows["steps"] = f"{step:,}" + (" (imported, not trained)" if step == 0 else "")
    rows |= _figures(step, metrics)
    rows["trained with"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return _TEXT.format(
        rule=model.residual,
        name=config.training.name,
        sub_layers=model.sub_layers,
        blocks=model.blocks,
        description=_LLAMA if is_llama(model) else _KEEL.format(rule=model.residual),
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        trust="" if is_llama(model) else ", trust_remote_code=True",
    )


def _figures(step: int, metrics: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tokens and losses, as they were at the step."""
    found: dict[str, str] = {}
    for record in metrics:
        if record["step"] > step:
            continue
        if isinstance(record.get("consumed_tokens"), int):
            found["training tokens"] = f"{record['consumed_tokens']:,}"
        for key, name in (("loss", "training loss"), ("validation_loss", "validation loss")):
            if isinstance(value := record.get(key), (int, float)):
                found[name] = f"{value:.4f} nats per token (step {record['step']:,})"
    return found
