"""`--json`: one valid JSON value on stdout, whatever else a command says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import yaml
from keel_megatron.bench import step_bench
from keel_megatron.cli.main import app
from keel_megatron.runtime.json_text import json_text
from keel_megatron.studies import cost
from keel_megatron.tracking.metrics import MetricsFile
from tests.cli.test_help import COMMANDS
from tests.dashboard.test_runs import make_run
from tests.depth.test_profile import profile
from tests.docs.commands import ROOT
from tests.huggingface.models import write_run
from tests.settings import settings

WITHOUT_A_TABLE = {
    *("train", "dashboard", "track sync", "completion", "export", "import", "lm-eval"),
    *("generate", "checkpoint prune", "config show", "config folder", "config schema"),
    *("config copy", "config list"),
    *("data build", "data verify", "data sample", "data task"),
}
"""They print messages, texts, or JSON already."""


def printed(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_command_that_prints_a_table_has_it() -> None:
    has = {
        name
        for name, command in COMMANDS.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert has == set(COMMANDS) - WITHOUT_A_TABLE


def test_numbers_that_json_lacks() -> None:
    found = json.loads(json_text({"a": [math.nan, 1.5, -math.inf], "é": True}))
    assert found == {"a": [None, 1.5, None], "é": True}
    assert json_text("é\u202e\x85").isascii()


def test_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert printed("plan", "yaml/demo.yaml", "--gpu", "cpu")["fits"] is True
    shown = ("study", "alpha", "yaml/studies/quick.yaml", "--plan", "--out", str(tmp_path))
    monkeypatch.setattr(cost, "_ask", lambda runs, _gpu: ([cost.Times(1.0, 2.0)] * len(runs), ""))
    found = printed(*shown)
    assert found["study"] == "alpha"
    for run in found["runs"]:
        assert run["step_seconds"] == 2.0
        assert run["seconds"] > run["steps"] * 2.0
        assert run["has_result"] is False


def test_runs_and_depth(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    (found,) = printed("runs", str(tmp_path))
    assert (found["name"], found["step"], found["steps"]) == ("one", 10, 100)
    with MetricsFile(run / "metrics.jsonl") as log:
        log.write(profile(1))
        log.write(profile(10, stream_rms=[1, 2, 3, 4, math.nan, 6]))
    shown = printed("depth", str(run), "--quantity", "stream_rms", "--out", str(tmp_path / "out"))
    assert (shown["step"], shown["first_step"], shown["sub_layers"]) == (10, 1, 6)
    (values,) = shown["quantities"].values()
    assert (values["minimum"], values["maximum"], values["first_nonfinite"]) == (1.0, 6.0, 4)
    assert values["values"] == [1.0, 2.0, 3.0, 4.0, None, 6.0]
    assert [Path(picture).is_file() for picture in shown["pictures"]] == [True]


def test_checkpoints(tmp_path: Path, sentencepiece_model: bytes) -> None:
    run = tmp_path / "keel"
    write_run(run, sentencepiece_model)
    for command in ("list", "verify"):
        (entry,) = printed("checkpoint", command, str(run))
        assert (entry["step"], entry["problem"]) == (0, None)
        assert entry["bytes"] > 1000
    shown = printed("checkpoint", "show", str(run))
    assert (shown["step"], shown["layout"]["tensor"]) == (0, 1)
    assert shown["bytes"] == entry["bytes"]


def test_doctor() -> None:
    found = printed("doctor")
    assert found["machine"].startswith("keel-megatron ")
    assert "torch" in [component["name"] for component in found["found"]]
    assert {"name", "text", "warning"} == set(found["used"][0])


def test_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_bench(*_arguments: Any, **_options: Any) -> step_bench.Bench:
        print("a message")
        return step_bench.Bench(["a table"], {"variants": [], "mfu": math.nan})

    monkeypatch.setattr(step_bench, "run_bench", run_bench)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings()))
    out = tmp_path / "bench.json"
    found = printed("bench", str(tmp_path / "run.yaml"), "--processes", "1", "--out", str(out))
    assert found == {"variants": [], "mfu": None} == json.loads(out.read_text())


@pytest.mark.parametrize("exports", [True, False])
def test_a_trace_is_written_like_any_output_or_its_lack_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exports: bool
) -> None:
    def run_bench(*_arguments: Any, profile: Path, **_options: Any) -> step_bench.Bench:
        if exports:
            profile.write_text("trace")
        return step_bench.Bench(["a table"], {})

    monkeypatch.setattr(step_bench, "run_bench", run_bench)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings()))
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    command = ["bench", str(tmp_path / "run.yaml"), "--processes", "1", "--profile", str(link)]
    done = CliRunner().invoke(app, command)
    assert done.stdout == "a table\n"
    assert link.is_symlink()
    if exports:
        assert (tmp_path / "real.json").read_text() == "trace"
    else:
        assert (
            str(done.exception) == f"--profile: {link} is not written: torch has exported no trace"
        )


def test_a_study_of_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keel_megatron.studies import flow_report, gradient_flow

    def save_flows(_flows: Any, out: Path) -> list[str]:
        (out / "results.json").write_text('{"rows": []}')
        return ["a table"]

    monkeypatch.setattr(gradient_flow, "gradient_flow", lambda _rule, _depth: None)
    monkeypatch.setattr(flow_report, "save_flows", save_flows)
    assert printed("study", "gradient-flow", "--out", str(tmp_path)) == {"rows": []}
