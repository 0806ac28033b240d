"""What Ctrl-C does in the process of a command."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from keel_megatron.cli import config
from keel_megatron.cli.main import app


@pytest.fixture(autouse=True)
def _same_after() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("rank", "before", "expected"),
    [
        (None, signal.SIG_DFL, signal.default_int_handler),
        ("0", signal.SIG_DFL, signal.default_int_handler),
        ("1", signal.default_int_handler, signal.SIG_DFL),
        ("0", signal.SIG_IGN, signal.SIG_IGN),
        ("1", signal.SIG_IGN, signal.SIG_IGN),
    ],
)
def test_only_rank_0_hears_an_interrupt(
    rank: str | None, before: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end at once; where interrupts are ignored, they stay so."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    found: list[Any] = []

    def names() -> list[str]:
        found.append(signal.getsignal(signal.SIGINT))
        return []

    monkeypatch.setattr(config, "bundled_names", names)
    signal.signal(signal.SIGINT, before)
    CliRunner().invoke(app, ["config", "list"], catch_exceptions=False)
    assert found == [expected]


@pytest.mark.parametrize(
    ("before", "expected"),
    [(signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)],
)
def test_an_interrupt_of_the_imports_has_no_traceback(
    before: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    stand_in = SimpleNamespace(main=lambda: found.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setitem(sys.modules, "keel_megatron.cli.main", stand_in)
    signal.signal(signal.SIGINT, before)
    runpy.run_module("keel_megatron", run_name="__main__")
    assert found == [expected]
