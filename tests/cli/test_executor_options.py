"""Options of an executor: words of --sbatch, and those that have no effect."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from keel_megatron.cli.main import app

BUILD, STUDY = "data build demo", "study alpha studies/quick"


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (BUILD, ["--executor=slurm", "--sbatch='x"], "--sbatch: 'x: No closing quotation"),
        (STUDY, ["--executor=slurm", "--sbatch='x"], "--sbatch: 'x: No closing quotation"),
        (BUILD, ["--sbatch=-p cpu"], "--sbatch: no effect with --executor local"),
        (STUDY, ["--sbatch=-p cpu"], "--sbatch: no effect with --executor local"),
        (BUILD, ["--tasks=2", "--sbatch=-p"], "--sbatch, --tasks: no effect with --executor local"),
        (BUILD, ["--executor=ray", "--sbatch=-p"], "--sbatch: no effect with --executor ray"),
    ],
)
def test_a_mistake_is_named_before_any_work(
    command: str, options: list[str], expected: str
) -> None:
    done = CliRunner().invoke(app, [*command.split(), *options])
    assert str(done.exception).startswith(expected)
