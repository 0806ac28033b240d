"""One contender of tools/bench/peers.py: train a model of a given shape when told to.

Reads a shape as JSON from its argument, says `ready` on standard output, then for every number N on
standard input takes N optimizer steps and answers with one JSON line. Every contender trains on the
same random tokens, in fp32, with AdamW in one kernel and clipping at 1; what differs is the model
and whatever its makers put around it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Shape:
    """The model and the batch; sub-layers count attention and FFN separately."""

    blocks: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    threads: int

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.micro_batches * self.micro_batch_size * self.seq_length


FOR_LIFE = ExitStack()
"""What stays open until the end."""

Step = Callable[[list[Tensor]], float]
"""One optimizer step on micro-batches of tokens [b, s + 1]; the mean loss."""


def ours(shape: Shape, residual: str, *, compiled: bool = False) -> Step:
    sys.path.insert(0, str(ROOT))
    from keel_megatron.config.load import parse_config
    from keel_megatron.data.batches import Batch
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.device import Launch
    from keel_megatron.runtime.distributed import start

    names = ("blocks", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    settings = {
        "model": {name: getattr(shape, name) for name in names} | {"residual": residual},
        "data": {"text": "-", "seq_length": shape.seq_length, "vocab_size": shape.vocab_size},
        "optimizer": {"learning_rate": 1e-4, "clip_grad": 1.0},
        "kernels": {"compile": compiled},
        "training": {
            "name": "bench",
            "steps": 1,
            "global_batch_size": shape.micro_batches * shape.micro_batch_size,
            "micro_batch_size": shape.micro_batch_size,
            "precision": "fp32",
            "device": "cpu",
            "threads": shape.threads,
        },
    }
    config = parse_config(settings, "the shape", 1)
    runtime = FOR_LIFE.enter_context(start(config.parallel, config.training, Launch(0, 1, 0, 1)))
    engine = build_engine(config, runtime, build_model(config, runtime))
    positions = torch.arange(shape.seq_length).expand(shape.micro_batch_size, -1)

    def step(batches: list[Tensor]) -> float:
        micro = [Batch(t[:, :-1], t[:, 1:], torch.ones(t[:, 1:].shape), positions) for t in batches]
        return engine.train_step(micro, len(micro), 1e-4).loss

    return step


def plain_loop(model: Any, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Forward, backward, clip, step: what a person writes around a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batches: list[Tensor]) -> float:
        optimizer.zero_grad()
        total = 0.0
        for tokens in batches:
            loss = loss_of(tokens[:, :-1], tokens[:, 1:]) / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain(shape: Shape) -> Step:
    """The tests' model of Keel, written from the equations alone."""
    sys.path.insert(0, str(ROOT))
    from tests.reference_model import ReferenceModel
    from tests.reference_model import Shape as ReferenceShape

    model = ReferenceModel(
        ReferenceShape(
            shape.blocks,
            shape.hidden_size,
            shape.ffn_hidden_size,
            shape.num_attention_heads,
            shape.num_query_groups,
            shape.vocab_size,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return plain_loop(model, model)


def transformers(shape: Shape) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            max_position_embeddings=shape.seq_length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    return plain_loop(model, lambda x, y: cross_entropy(model(x).logits, y))


def litgpt(shape: Shape) -> Step:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=shape.seq_length,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.blocks,
            n_head=shape.num_attention_heads,
            n_query_groups=shape.num_query_groups,
            n_embd=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    return plain_loop(model, lambda x, y: cross_entropy(model(x), y))


CONTENDERS: dict[str, Callable[[Shape], Step]] = {
    "keel": lambda shape: ours(shape, "keel"),
    "pre_ln": lambda shape: ours(shape, "pre_ln"),
    "keel_compiled": lambda shape: ours(shape, "keel", compiled=True),
    "pre_ln_compiled": lambda shape: ours(shape, "pre_ln", compiled=True),
    "plain": plain,
    "transformers": transformers,
    "litgpt": litgpt,
}


def main() -> None:
    name, shape = sys.argv[1], Shape(**json.loads(sys.argv[2]))
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    step = CONTENDERS[name](shape)
    generator = torch.Generator().manual_seed(1)
    size = (shape.micro_batches, shape.micro_batch_size, shape.seq_length + 1)
    batches = list(torch.randint(0, shape.vocab_size, size, generator=generator).unbind(0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        seconds, loss = [], 0.0
        for _ in range(int(line)):
            begin = time.perf_counter()
            loss = step(batches)
            seconds.append(time.perf_counter() - begin)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": memory}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with FOR_LIFE:
        main()
