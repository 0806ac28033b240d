"""How far the logits of an exported model differ from the run's own, as a table for docs/use.md.

    python tools/export_table.py [--blocks 8 64] [--context 128 1024] [--rules keel pre_ln]

Models of random weights; norm weights are drawn from [0.5, 1.5].
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import torch

from keel_megatron import compat
from keel_megatron.architecture.residual import RULES
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.naming import is_llama
from keel_megatron.inference.parity import Parity, bound, compare
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.huggingface.models import disturb, exported_model
from tests.settings import settings


@torch.inference_mode()
def parity(sections: dict[str, dict[str, Any]]) -> Parity:
    """Of a model of random weights in its training.precision."""
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (master,) = build_model(config, runtime, compute_dtype=torch.float32)
        disturb(master)
        weights = {name: parameter.clone() for name, parameter in master.named_parameters()}
        (own,) = build_model(config, runtime)
        for name, parameter in own.named_parameters():
            parameter.copy_(weights[name])
        s = config.data.seq_length
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, config.data.vocab_size, (1, s), generator=generator)
        mine = own.eval()(tokens, torch.arange(s)[None], None)[0].float()
        model = exported_model(weights, config)
        if config.training.precision == "bf16":
            for parameter in model.parameters():  # as from_pretrained with dtype="auto" does
                if parameter.dim() > 1 or is_llama(config.model):
                    parameter.data = parameter.data.bfloat16()
        other = model(tokens, use_cache=False).logits[0].float()
        return compare(mine, other, bound(config, s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--init-std", type=float, default=0.02)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    options = parser.parse_args()
    compat.install()
    import transformers

    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}"
    )
    print("| rule | sub-layers | context | fp32 | bf16 |")
    print("|---|---|---|---|---|")
    for rule in options.rules:
        for blocks in options.blocks:
            for context in options.context:
                cells = []
                for precision in ("fp32", "bf16"):
                    found = parity(
                        settings(
                            model__residual=rule,
                            model__blocks=blocks,
                            model__num_query_groups=2,
                            model__init_std=options.init_std,
                            data__seq_length=context,
                            training__precision=precision,
                        )
                    )
                    cells.append(f"{found.difference:.1e}")
                print(
                    f"| `{rule}` | {2 * blocks} | {context:,} | {' | '.join(cells)} |", flush=True
                )


if __name__ == "__main__":
    main()
