"""A worker process of a build: does the jobs that it reads from standard input.

`python -m keel_megatron.corpus.worker FOLDER`. Each line of the input is a job's name; each line of
the output a JSON object: work done (bytes, documents, tokens), a finished job (done), or an error.
It ends with its input, so also when the process that started it dies.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from keel_megatron.corpus.paths import failed
from keel_megatron.corpus.plan import read_plan
from keel_megatron.corpus.tokenize import Done, Tokenizing
from keel_megatron.errors import UserError


def main() -> None:
    """Run the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends it
    try:
        _run(Path(sys.argv[1]))
    except BrokenPipeError:  # the parent has died
        os._exit(1)
    except UserError as error:
        _send({"error": str(error)})
    except OSError as error:
        _send({"error": str(failed(error, Path(sys.argv[1])))})


def _run(folder: Path) -> None:
    plan = read_plan(folder)
    jobs = {job.name: job for job in plan.jobs}
    tokenizing = Tokenizing(folder, plan)
    for line in sys.stdin:
        name = line.strip()
        tokenizing.run(jobs[name], _report)
        _send({"done": name})


def _report(done: Done) -> None:
    _send({"bytes": done.bytes, "documents": done.documents, "tokens": done.tokens})


def _send(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
