"""What a worker says of an error that ends it."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from keel_megatron.corpus import worker


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "cannot write {}: No space left"),
        (PermissionError(errno.EACCES, "Denied", "/text/a"), "data: /text/a: Denied"),
    ],
)
def test_the_file_of_an_error_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    said: str,
) -> None:
    def failing(_folder: Path) -> None:
        raise error

    monkeypatch.setattr(worker, "_run", failing)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["worker", os.fspath(tmp_path)])
    worker.main()
    assert json.loads(capsys.readouterr().out) == {"error": said.format(tmp_path)}
