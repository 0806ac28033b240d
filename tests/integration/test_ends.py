"""Real runs, ended in every way: the status that MLflow has then (tools/run_endings.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.warm import fork_from
from tools.run_endings import CASES, Case, Ending, run_case

QUICK = {"SIGTERM", "kill -9", "kill -9 before the first checkpoint, restarted"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def end(number: int, home: Path, data: Path) -> Ending:
    fork_from("tools.run_endings", "keel_megatron.runtime.local_launch")
    return run_case(CASES[number], home, data)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case.name}, {case.launcher.split()[0]}",
            marks=[] if case.name in QUICK else [pytest.mark.slow],
        )
        for case in CASES
    ],
)
def test_mlflow_has_the_truth(case: Case, tmp_path: Path, data: Path) -> None:
    # Those that keel starts are forked: torchrun's ranks are not.
    (ending,) = run_ranks(1, end, CASES.index(case), tmp_path / "home", data, timeout_seconds=1200)
    output = (tmp_path / "home" / "output.txt").read_text(errors="replace")
    assert ending.is_as_expected(case), f"{ending}\n{output[-3000:]}"
