"""`keel generate` as a whole, on a run of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keel_megatron.cli.main import app
from keel_megatron.errors import UserError
from keel_megatron.inference.generate import generate_prompts
from keel_megatron.inference.generation import Generation
from keel_megatron.inference.sampling import Sampling
from keel_megatron.inference.source import config_of
from tests.huggingface.models import write_run
from tests.integration.commands import keel

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    place = tmp_path_factory.mktemp("runs") / "keel"
    write_run(place, sentencepiece_model, model__init_std=0.1)
    return place


def test_a_file_of_prompts_in_batches(run: Path, tmp_path: Path) -> None:
    prompts = ["def f", "class Parser:", "", "x"]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    arguments = ["generate", str(run), "--prompts", str(tmp_path / "p.jsonl"), *GREEDY]
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, [*arguments, "--out", str(out), "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "ended: 4 x maximum of new tokens" in done.stderr
    assert "20 decoded in " in done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        (alone,), _speed = generate_prompts(run, [row["prompt"]], Sampling(6, 0.0))
        assert (alone.text, alone.tokens, alone.ended) == (row["text"], 6, row["ended"])
    printed = CliRunner().invoke(app, arguments)
    assert printed.stdout.isascii()
    assert [json.loads(line) for line in printed.stdout.splitlines()] == rows


def test_processes_share_the_model(run: Path, tmp_path: Path) -> None:
    arguments = ("generate", str(run), "--prompt", "def f", *GREEDY)
    one, two = keel(tmp_path, *arguments), keel(tmp_path, *arguments, "--processes", "2")
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("def f")
    assert two.stderr.count("ended: maximum of new tokens") == 1
    for wrong, message in (
        (("--step", "3"), f"--step: there is no {run}/checkpoints/step_00000003; there are: 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens: 0 must be at least 1"),
    ):
        done = keel(tmp_path, *arguments, "--processes", "2", *wrong)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_contexts_end_is_told(run: Path) -> None:
    arguments = ["generate", str(run), "--prompt", "def f", "--max-new-tokens", "60"]
    stopped = CliRunner().invoke(app, [*arguments, "--temperature", "0"])
    assert "ended: end of context (data.seq_length; --slide continues)" in stopped.stderr
    slid = CliRunner().invoke(app, [*arguments, "--temperature", "0", "--slide"])
    assert slid.stdout.startswith(stopped.stdout.rstrip("\n"))
    assert "ended: maximum of new tokens" in slid.stderr


def test_what_is_done_is_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = Generation.run, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Generation, "run", interrupted)
    (tmp_path / "p.txt").write_text("a\ndef parse(text):\nb\n")
    out = tmp_path / "out.jsonl"
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--out", str(out), "--batch-size", "1"]
    done = CliRunner().invoke(app, ["generate", str(run), *arguments, *GREEDY])
    assert done.exit_code != 0
    assert "stopped: 1 of 3 prompts are continued" in done.stderr
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == [
        "def parse(text):"
    ]


def test_out_is_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    arguments = ["generate", str(tmp_path / "none"), "--prompt", "a", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert str(done.exception) == f"--out: {tmp_path} cannot be written: it is a folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--cuda-graphs: needs a CUDA device, and the model runs on the CPU"),
        (["--processes", "2"], "--cuda-graphs: only one process can use them; leave out"),
    ],
)
def test_graphs_need_a_gpu_and_one_process(run: Path, arguments: list[str], message: str) -> None:
    command = ["generate", str(run), "--prompt", "a", "--cuda-graphs", *arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(message)


def test_a_layout_of_the_processes(run: Path) -> None:
    assert config_of(run, 3).parallel.pipeline == 3
    with pytest.raises(UserError, match=r"--processes: 4 would be 4 pipeline stages, .* 3 blocks"):
        config_of(run, 4)


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--prompts", "b"]])
def test_one_kind_of_prompt_is_needed(run: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["generate", str(run), *arguments])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("--prompt: give either")
