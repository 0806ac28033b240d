"""`keel study redundancy` as a whole, on runs that were really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from keel_megatron.cli.main import app
from keel_megatron.runtime.machines import this_machine
from keel_megatron.studies.redundancy import measure
from keel_megatron.studies.redundancy.units import passes
from keel_megatron.tracking.metrics import read_metrics
from tests.corpus.datasets import write_texts
from tests.integration.commands import keel, write_config

SIZES = {
    "model__blocks": 3,
    "model__hidden_size": 32,
    "model__ffn_hidden_size": 48,
    "model__num_attention_heads": 2,
    "model__num_query_groups": 1,
    "data__vocab_size": 384,
    "data__validation_fraction": 0.2,
    "training__validation_sequences": 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/keel and runs/pre_ln, of different seeds, and their text."""
    place = tmp_path_factory.mktemp("studied")
    config = write_config(place, write_texts(place / "text"), **SIZES)
    for seed, rule in ((5, "keel"), (6, "pre_ln")):
        settings = f"training.name={rule}", f"model.residual={rule}", f"training.seed={seed}"
        done = keel(place, "train", str(config), *settings)
        assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def study(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["study", "redundancy", *arguments])


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_runs_are_measured_on_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    done = study("runs/keel", "runs/pre_ln", "--batch-size", "24", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "keel, step 6: 6 sub-layers removed one by one, on 12 x 32 tokens of" in done.stderr
    assert "2 removals at a time: " in done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    assert done.stdout.startswith("| run | rule | L |")
    first, second = results(tmp_path)["rows"]
    assert (first["run"], second["run"]) == ("keel", "pre_ln")
    assert results(tmp_path)["machines"] == {str(this_machine()): 2}
    assert first["text_sha256"] == second["text_sha256"]  # in the order of the first one's seed
    assert (first["tokens"], len(first["added_loss"])) == (12 * 32, 6)
    metrics = read_metrics(Path("runs/keel/metrics.jsonl"))
    (validated,) = [one["validation_loss"] for one in metrics if "validation_loss" in one]
    assert first["loss"] == pytest.approx(validated, abs=1e-6)
    assert done.stdout.splitlines()[0] in (tmp_path / "table.md").read_text()


def test_an_interrupted_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study("runs/keel", "--out", str(tmp_path / "whole"), "--batch-size", "8").exit_code == 0
    expected = results(tmp_path / "whole")["rows"]
    (path,) = (tmp_path / "whole" / "measured").glob("*.jsonl")
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 2 * 7  # two batches, of 8 and of 4 sequences
    out = tmp_path / "again"
    (out / "measured").mkdir(parents=True)
    # Killed while it wrote the third result of the second batch.
    (out / "measured" / path.name).write_text("\n".join([*lines[:10], lines[10][:40]]))
    walks = []
    real = measure._walk
    monkeypatch.setattr(measure, "_walk", lambda *a: walks.append(real(*a)) or walks[-1])
    done = study("runs/keel", "--out", str(out), "--batch-size", "8")
    assert done.exit_code == 0, done.output
    assert "76% of it was measured before" in done.stderr
    # The trunk, and the sub-layers after the third to the last one.
    assert walks[0].stage.passes == 4 * (passes(6, "sub-layer") - (5 + 4))
    for one, other in zip(results(out)["rows"], expected, strict=True):
        for key in ("loss", "added_loss", "angular_distance"):
            assert one[key] == pytest.approx(other[key], abs=1e-6)
    # The start that was killed is from before machines were recorded.
    assert results(out)["machines"] == {f"not recorded and {this_machine()}": 1}
    walks.clear()
    assert study("runs/keel", "--out", str(out), "--batch-size", "3").exit_code == 0
    assert not walks, "what was finished is measured again"


def test_processes_share_the_model(folder: Path, tmp_path: Path) -> None:
    arguments = ("study", "redundancy", "runs/keel", "runs/pre_ln", "--unit", "block")
    one = keel(folder, *arguments, "--out", str(tmp_path / "one"))
    two = keel(folder, *arguments, "--out", str(tmp_path / "two"), "--processes", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stderr.count("3 blocks removed one by one") == 2
    for own, other in zip(
        *(results(tmp_path / name)["rows"] for name in ("one", "two")), strict=True
    ):
        assert own["added_loss"] == pytest.approx(other["added_loss"], abs=1e-5)
        assert own["angular_distance"] == pytest.approx(other["angular_distance"], rel=1e-3)


def test_a_text_is_given_where_the_dataset_is_gone(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "runs" / "keel", tmp_path / "keel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        missing = study(str(run))
        given = study(str(run), "--text", str(folder / "text" / "03.txt"), "--tokens", "96")
        short = study(str(run), "--text", str(folder / "text" / "03.txt"), "--tokens", "3")
    assert isinstance(missing.exception, Exception)
    assert f"--text: the dataset of {run} is not found" in str(missing.exception)
    assert given.exit_code == 0, given.output
    assert results(tmp_path / "runs/studies/redundancy")["rows"][0]["sequences"] == 3
    assert "--tokens: 3 must be at least 32, one sequence" in str(short.exception)


def test_a_batch_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**5))
    done = study("runs/keel", "--out", str(tmp_path))
    assert "--batch-size: the streams need 0.00" in str(done.exception)
