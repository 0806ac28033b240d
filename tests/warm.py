"""`keel` commands in processes that are forked from one that has imported torch and Megatron-core.

An interpreter's start and those imports take 4 s of a core for each process, several times what a
small run then computes. `Warm` is the command all the same: a process of its own with its own
working directory, environment, arguments, standard streams, signals, exit code and exit handlers;
the ranks that its launcher starts are its children, forked in turn.

What it has of its ancestor: the interpreter's options, where it looks for modules (PYTHONPATH), the
modules, and what `ps` shows of its command. Tests of these start an interpreter (`fresh` in
tests/integration/commands.py), as the launchers, the documents' commands and torchrun do.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import IO, Any, NoReturn

import torch

from tests.distributed import CONTEXT, METHOD

AVAILABLE = METHOD == "forkserver" and sys.platform == "linux"
"""Elsewhere an interpreter is started."""
POLL_SECONDS = 0.01
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class _Descriptor:
    """A file descriptor that goes along to the process that is started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, copy: Any) -> None:
        self.number = copy.detach()


class Warm:
    """A `keel` command at work: what the tests need of `subprocess.Popen`.

    Args:
        arguments: of `keel`.
        folder: its working directory.
        environment: all of its environment.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.args = ["keel", *arguments]
        self.returncode: int | None = None
        outputs = [os.pipe(), os.pipe()]
        with open(os.devnull, "rb") as nothing:
            streams = [_Descriptor(n) for n in (nothing.fileno(), *(end for _, end in outputs))]
            self._process = CONTEXT.Process(
                target=_command, args=(list(arguments), str(folder), environment, streams)
            )
            self._process.start()
        for _, end in outputs:
            os.close(end)
        self.pid: int = self._process.pid
        self.stdout, self.stderr = (os.fdopen(end, encoding="utf-8") for end, _ in outputs)

    def poll(self) -> int | None:
        """Its exit code, -n for signal n; None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has still to say, once it has ended."""
        said = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            said[number] = stream.read()

        readers = [
            threading.Thread(target=read, args=pair, daemon=True)
            for pair in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)  # a process that it has left behind may still write
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for stream in (self.stdout, self.stderr):
            stream.close()
        self.wait()


def _command(
    arguments: list[str], folder: str, environment: dict[str, str], streams: list[_Descriptor]
) -> NoReturn:
    """Be `python -m keel_megatron ARGUMENTS`."""
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
        os.close(stream.number)
    os.chdir(folder)
    fork_from(
        "keel_megatron.runtime.local_launch",
        "keel_megatron.studies.runner",
        "keel_megatron.studies.cost",
    )
    _be(["-m", "keel_megatron", *arguments], environment)


def fork_from(*modules: str) -> None:
    """Let the interpreters that these modules start be forks of this process, from now on.

    It must have one thread.
    """
    if not AVAILABLE:
        return
    for name in modules:
        module: Any = importlib.import_module(name)
        module.subprocess = SimpleNamespace(**vars(subprocess))
        module.subprocess.Popen = Forked


class Forked:
    """An interpreter for a process that is forked itself: what it needs of `subprocess.Popen`."""

    def __init__(
        self,
        command: list[str],
        *,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: int | None = None,
        pass_fds: tuple[int, ...] = (),
        process_group: int | None = None,
    ) -> None:
        assert command[0] == sys.executable
        assert stderr in (None, subprocess.STDOUT)
        self.args, self.returncode = command, None
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            if process_group is not None:
                os.setpgid(0, process_group)
            for target in (1, 2) if stderr else (1,):
                if stdout is not None:
                    os.dup2(stdout.fileno(), target)
            _close_all_but(pass_fds)
            if cwd is not None:
                os.chdir(cwd)
            for number in _SIGNALS:  # as exec leaves them, and then Python
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _be(command[1:], dict(os.environ) if env is None else env)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _close_all_but(kept: Sequence[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with suppress(OSError):  # the listing's own
                os.close(int(name))


def _be(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Do as the interpreter does with a command (-P, -m, -c or a script), to the process's end."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        _show_launch(environment)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(
            2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
        )
        if number := environment.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(number))
        code = _run(command)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _show_launch(environment: dict[str, str]) -> None:
    """Let others see in this process's first environment (/proc) which rank it is."""
    with open("/proc/self/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    rank = environment.get("RANK")
    text = b"" if rank is None else f"RANK={rank}".encode()
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _run(command: list[str]) -> int:
    """The exit code of a program in this process."""
    options = list(command)
    if options[0] == "-P":
        options.pop(0)
    elif options[0] in ("-m", "-c"):
        sys.path.insert(0, os.getcwd())
    how, what = options[0], options[1] if len(options) > 1 else ""
    try:
        if how == "-m":
            sys.argv = options[1:]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.argv = ["-c", *options[2:]]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = options
            runpy.run_path(how, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0
