"""Measure greedy decoding: with the key/value cache, recomputing every token, and transformers.

python tools/bench/generate.py                     # writes docs/benchmarks/generate.md
python tools/bench/generate.py --blocks 8 --new 20 --rounds 1 --out /tmp/generate.md

One prompt, a model of random weights in fp32, the same weights in all three. Recomputing is what
`keel generate` did before it had a cache: the whole sequence for every token. CPU time of one
thread in alternating rounds, of which the fastest counts: other load only adds to it.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.run import RunConfig
from keel_megatron.inference.decoder import Decoder
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.huggingface.models import disturb, exported_model
from tests.settings import small_config

PAGE = ROOT / "docs" / "benchmarks" / "generate.md"
Way = Callable[[list[int], int], list[int]]
"""(prompt, new tokens) to the new tokens."""


def cached(decoder: Decoder) -> Way:
    """The program's way."""

    def run(prompt: list[int], new: int) -> list[int]:
        logits, found = decoder.prefill([prompt], new), []
        while True:
            assert logits is not None
            found.append(int(logits.argmax()))
            if len(found) == new:
                return found
            logits = decoder.step(found[-1:])

    return run


def recomputing(model: nn.Module) -> Way:
    """The whole sequence for every token."""

    def run(prompt: list[int], new: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(new):
            positions = torch.arange(len(tokens))[None]
            logits: Tensor = model(torch.tensor([tokens]), positions, None)[0, -1]
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    return run


def by_transformers(model: Any) -> Way:
    """`generate` of the exported model."""

    def run(prompt: list[int], new: int) -> list[int]:
        row = torch.tensor([prompt])
        output = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        found: list[int] = output[0, len(prompt) :].tolist()
        return found

    return run


def measure(ways: dict[str, Way], prompt: list[int], new: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each: new tokens after the first, over what they add to the first."""
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    tokens: dict[str, list[int]] = {}
    for number in range(rounds):
        for name, way in ways.items():
            if name == "recomputing" and number:
                continue  # minutes, and far away from the others
            seconds = []
            for count in (1, new):
                begin = time.process_time()
                tokens[name] = way(prompt, count)
                seconds.append(time.process_time() - begin)
            best[name] = (min(best[name][0], seconds[0]), min(best[name][1], seconds[1]))
    same = {name: found == tokens["cache"] for name, found in tokens.items()}
    if not all(same.values()):
        print(f"the tokens differ: {same}", file=sys.stderr)
    return {name: (new - 1) / (whole - first) for name, (first, whole) in best.items()}


@torch.inference_mode()
def row(config: RunConfig, new: int, rounds: int) -> str:
    """A row of the table."""
    from keel_megatron.model.language_model import build_model

    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (model,) = build_model(config, runtime)
        disturb(model)
        exported = exported_model(
            {name: value.clone() for name, value in model.named_parameters()}, config
        )
        decoder = Decoder(model, config.model, runtime)
        ways = {
            "cache": cached(decoder),
            "recomputing": recomputing(model),
            "transformers": by_transformers(exported),
        }
        generator = torch.Generator().manual_seed(1)
        length = config.data.seq_length - new
        prompt = torch.randint(1, config.data.vocab_size, (length,), generator=generator).tolist()
        for name in ("cache", "transformers"):
            ways[name](prompt[:8], 4)  # what is done once
        found = measure(ways, prompt, new, rounds)
    cells = [found[name] for name in ("cache", "recomputing", "transformers")]
    return (
        f"| `{config.model.residual}` | {2 * config.model.blocks} | {config.model.hidden_size} | "
        + " | ".join(f"{one:.1f}" for one in cells)
        + f" | {cells[0] / cells[1]:.1f} x | {cells[0] / cells[2]:.1f} x |"
    )


def main() -> None:
    """Print the table, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64])
    parser.add_argument("--rules", nargs="+", default=["keel", "pre_ln"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    lines = [
        "| rule | sub-layers | h | cache, tokens/s | recomputing | transformers | cache / "
        "recomputing | cache / transformers |",
        "|---|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for rule in options.rules:
        for hidden in options.hidden:
            config = small_config(
                model__residual=rule,
                model__blocks=options.blocks,
                model__hidden_size=hidden,
                model__ffn_hidden_size=2 * hidden,
                model__num_query_groups=2,
                data__seq_length=options.context,
            )
            lines.append(row(config, options.new, options.rounds))
            print(lines[-1], flush=True)
    options.out.write_text(_page("\n".join(lines), options, transformers.__version__))


def _page(table: str, options: argparse.Namespace, version: str) -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"""# Speed of generation

<!-- test: skip, takes minutes -->
```
python tools/bench/generate.py
```

Greedy decoding of one prompt: context {options.context}, {options.new} new tokens, fp32,
4 heads, 2 key/value heads, FFN 2 h, vocabulary 512, with the same random weights in all columns.
"Cache" is `keel generate`, which caches keys and values; "recomputing" computes the whole sequence
for every token; "transformers" is `generate` of the exported model. Tokens per second of CPU time,
without the first token, which includes reading the prompt. One thread of an {model},
torch {torch.__version__}, transformers {version}, {datetime.now(UTC).date()}.

{table}
"""


if __name__ == "__main__":
    main()
