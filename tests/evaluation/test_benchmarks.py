"""`keel evaluate --tasks` and `keel lm-eval` as a whole, on runs of random weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import yaml
from keel_megatron.cli.main import app
from keel_megatron.errors import UserError
from keel_megatron.evaluation.results import figures
from keel_megatron.inference import parity
from tests.evaluation.local_tasks import NAMES
from tests.integration.commands import keel

parity.require_transformers()  # before anything imports it: no network

TASKS = ",".join(NAMES)


@pytest.fixture(scope="module")
def alone(runs: Path, local_tasks: Path) -> Any:
    """The results of one process, in this one."""
    arguments = [str(runs / "keel"), "--include-path", str(local_tasks), "--tasks", TASKS, "--json"]
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0, done.output
    assert "2 of 17 requests are longer than the model's context of 32 tokens" in done.stderr
    return json.loads(done.stdout)


def test_results_as_json(runs: Path, alone: Any) -> None:
    assert (alone["model"], alone["step"]) == (str(runs / "keel"), 0)
    assert alone["versions"]["lm-eval"] == "0.4.13"
    assert {
        one["task"]: (one["version"], one["shots"]) for one in alone["figures"]
    } == dict.fromkeys(NAMES, ("1.0", 0))
    (accuracy,) = (one for one in alone["figures"] if one["metric"] == "acc")
    assert accuracy["documents"] == 6
    assert accuracy["error"] == pytest.approx(
        (accuracy["value"] * (1 - accuracy["value"]) / 5) ** 0.5
    )
    assert alone["lm_eval"]["configs"]["local_answer"]["generation_kwargs"]["max_gen_toks"] == 6


@pytest.mark.parametrize("model_processes", [1, 2])
def test_processes_share_the_work_or_the_model(
    runs: Path, local_tasks: Path, tmp_path: Path, alone: Any, model_processes: int
) -> None:
    arguments = ["--include-path", str(local_tasks), "--tasks", TASKS]
    layout = ["--processes", "2", "--model-processes", str(model_processes)]
    done = keel(tmp_path, "evaluate", str(runs / "keel"), *arguments, *layout, "--out", "all.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("local_choice") == 2
    found = json.loads((tmp_path / "all.json").read_text())
    for mine, other in zip(found["figures"], alone["figures"], strict=True):
        for name in ("value", "error"):
            assert (mine.pop(name) or 0.0) == pytest.approx(other[name] or 0.0, rel=1e-5)
        assert mine == {name: other[name] for name in mine}
    wrong = keel(tmp_path, "evaluate", str(runs / "keel"), *arguments[:3], "local_chioce", *layout)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --tasks: there is no task, group or tag local_chioce;")


def test_metrics_go_to_the_run(
    runs: Path, local_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keel_megatron.mlflow_delivery import sync

    added: list[Any] = []
    monkeypatch.setattr(sync, "add_metrics", lambda *given: added.append(given) or "done")
    command = ["evaluate", "--include-path", str(local_tasks), "--tasks", " local_choice, "]
    done = CliRunner().invoke(app, [*command, str(runs / "pre_ln"), "--limit", "4"])
    assert done.exit_code == 0, done.output
    ((run, step, metrics),) = added
    assert (run, step) == (runs / "pre_ln", 0)
    assert sorted(metrics) == [
        *("lm_eval/local_choice.limit4/acc", "lm_eval/local_choice.limit4/acc_norm"),
        *("lm_eval/local_choice.limit4/acc_norm_stderr", "lm_eval/local_choice.limit4/acc_stderr"),
    ]
    assert "      4  acc" in done.stdout
    done = CliRunner().invoke(app, [*command, str(runs / "pre_ln/checkpoints/step_00000000")])
    assert len(added) == 1, "a checkpoint alone has no run"
    assert "step_00000000: not logged, because it is not a run's folder" in done.stderr


def test_one_of_tasks_and_texts_is_given(runs: Path) -> None:
    for more in ([], ["--tasks", "x", "--text", "y"], ["--tasks", ", "]):
        done = CliRunner().invoke(app, ["evaluate", str(runs / "keel"), *more])
        assert isinstance(done.exception, UserError)
        assert str(done.exception).startswith("give --tasks NAME,... or --text PATH")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--tasks", "x", "--stride", "3"], "--stride: it has no effect with --tasks"),
        (["--text", "x", "--limit", "3"], "--limit: it has no effect with --text"),
        (["--text", "x", "--num-fewshot", "0"], "--num-fewshot: it has no effect with --text"),
        (["--tasks", "x", "--limit", "0"], "--limit: 0 must be a whole number from 1, or a share"),
        (["--tasks", "x", "--limit", "1.5"], "--limit: 1.5 must be a whole number from 1"),
        (["--tasks", "x", "--limit", "inf"], "--limit: inf must be a whole number from 1"),
        (["--tasks", "x", "--out", "/no/such/file"], "--out: /no/such/file cannot be written"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(
    runs: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], problem: str
) -> None:
    from keel_megatron.inference import source

    monkeypatch.setattr(source, "load", lambda *_: pytest.fail("loads the model"))
    done = CliRunner().invoke(app, ["evaluate", str(runs / "keel"), *given])
    assert isinstance(done.exception, UserError), done.output
    assert str(done.exception).startswith(problem)


def test_a_request_that_does_not_fit(runs: Path, local_tasks: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((local_tasks / "local_choice.yaml").read_text())
    long = {**task, "task": "long", "doc_to_choice": "{{[question * 40, 'x']}}"}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    command = ["evaluate", str(runs / "keel"), "--include-path", str(tmp_path), "--tasks", "long"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert "tokens, more than the model's context of 32" in str(done.exception)


def test_lm_evals_own_command_line(
    runs: Path, local_tasks: Path, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own options; without its own tasks and its look at the machine, which take long."""
    import lm_eval.tasks
    import torch.utils.collect_env

    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr(torch.utils.collect_env, "get_pretty_env_info", str)
    where = ["--include_path", str(local_tasks)]
    listed = CliRunner().invoke(app, ["lm-eval", "ls", "groups", *where])
    assert "|local_group|" in listed.stdout
    model = ["--model", "keel", "--model_args", f"run={runs / 'keel'},batch_tokens=64"]
    command = ["lm-eval", *model, "--tasks", "local_choice", *where]
    done = CliRunner().invoke(app, [*command, "--output_path", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "|local_choice|" in done.stdout
    assert "Tasks" in done.stdout, "pytablewriter before 1.0 drops lm-eval's headings"
    (written,) = tmp_path.glob("**/results*.json")
    found = json.loads(written.read_text())["results"]["local_choice"]
    accuracy = alone["lm_eval"]["results"]["local_choice"]
    assert found["acc,none"] == accuracy["acc,none"]
    for wrong, message in (
        (["--model_args", "stop=3"], "--model_args: unknown: stop; there are run, step, "),
        (["--apply_chat_template"], "--apply_chat_template: the model is trained on text and has"),
        (["--tasks", "x"], "lm-eval: Tasks not found: x"),
    ):
        failed = CliRunner().invoke(app, [*command, *wrong])
        assert isinstance(failed.exception, UserError), failed.exception
        assert str(failed.exception).startswith(message)


def test_names_of_metrics() -> None:
    results = {
        "results": {
            "gsm8k": {
                "alias": "gsm8k",
                "sample_len": 9,
                "exact_match,strict-match": 0.5,
                "exact_match_stderr,strict-match": "N/A",
                "pass@1,create_test": 1,
            }
        },
        "n-shot": {"gsm8k": 5},
    }
    strict, passed = figures(results)
    assert (strict.name(), strict.error, strict.documents, strict.shots) == (
        *("lm_eval/gsm8k/exact_match.strict-match", None, 9, 5),
    )
    assert passed.name(".0shot") == "lm_eval/gsm8k.0shot/pass_1.create_test"
