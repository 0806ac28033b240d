"""A process that renders conversations: a template may need endless time or memory.

`python -m keel_megatron.data.chat.renderer`. The first line of its input is the template and its
variables, every other one a conversation; each is answered by a line of JSON. It ends with its
input, so also when the process that started it dies.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from keel_megatron.data.chat.rendering import Messages, Part, Template, UnrenderableError
from keel_megatron.errors import UserError
from keel_megatron.runtime.interpreter import environment, python

SECONDS: Final = 10.0
"""Processor time for a conversation."""
MEMORY: Final = 1 << 30
"""Bytes of address space."""


class Renderer:
    """Renders conversations in a process of its own; a context manager that ends it.

    Args:
        template: a chat template.
        names: its variables, such as eos_token.
        origin: where it comes from, for messages.

    Raises:
        UserError: it is not a template, or exceeds a limit; also where it is used.
    """

    def __init__(self, template: str, names: Mapping[str, str], origin: str) -> None:
        self._origin = origin
        self._process = subprocess.Popen(
            [*python(), "-m", "keel_megatron.data.chat.renderer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        limits = {"seconds": SECONDS, "memory": MEMORY}
        answer = self._ask({"template": template, "names": dict(names), **limits})
        if "error" in answer:
            self.close()
            raise UserError(f"data.chat_template: {origin} is not a template: {answer['error']}")

    def parts(self, messages: Messages) -> list[Part]:
        """A whole conversation.

        Raises:
            UnrenderableError: the template does not render it.
        """
        return self._parts(messages, prompt=False)

    def prompt(self, messages: Messages) -> list[Part]:
        """A conversation up to the place where the assistant's answer begins.

        Raises:
            UnrenderableError: the template does not render it.
        """
        return self._parts(messages, prompt=True)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _parts(self, messages: Messages, *, prompt: bool) -> list[Part]:
        answer = self._ask({"messages": messages, "prompt": prompt})
        if "error" in answer:
            raise UnrenderableError(answer["error"])
        return [Part(*part) for part in answer["parts"]]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # it has died, which the end of its output shows
            stdin.write(json.dumps(question).encode() + b"\n")
            stdin.flush()
        line = stdout.readline()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        why = f"its process ended with exit code {code}"
        if code == -signal.SIGPROF:
            why = f"it takes more than {SECONDS:g} s of processor time for a conversation"
        elif code == _NO_MEMORY:
            why = f"it needs more than {MEMORY >> 20} MiB of memory for a conversation"
        raise UserError(f"data.chat_template: {self._origin} cannot be used: {why}")

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_NO_MEMORY: Final = 86


def main() -> None:
    """Run the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends it
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(BrokenPipeError):
        _serve()


def _serve() -> None:
    """Answer the lines of the input."""
    first = json.loads(sys.stdin.buffer.readline() or sys.exit())
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = first["memory"] if hard == resource.RLIM_INFINITY else min(first["memory"], hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    try:
        signal.setitimer(signal.ITIMER_PROF, first["seconds"])
        try:
            template = Template(first["template"], first["names"])
        except UnrenderableError as error:
            _send({"error": str(error)})
            return
        _send({})
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_PROF, first["seconds"])
            _send(_answer(json.loads(line), template))
    except MemoryError:
        sys.exit(_NO_MEMORY)


def _answer(question: dict[str, Any], template: Template) -> dict[str, Any]:
    """The parts of a conversation, or why there are none."""
    try:
        render = template.prompt if question["prompt"] else template.parts
        return {"parts": render(question["messages"])}
    except UnrenderableError as error:
        return {"error": str(error)}


def _send(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
