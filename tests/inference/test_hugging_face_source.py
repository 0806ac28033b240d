"""A Hugging Face folder generates what the run does that it was exported from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from keel_megatron.cli.main import app
from keel_megatron.errors import UserError
from keel_megatron.inference.export import export_run
from keel_megatron.inference.source import config_of, opened
from tests.distributed import run_ranks
from tests.huggingface.models import write_run

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")
EXPORT: dict[str, Any] = {"step": None, "check": False, "say": lambda _text: None}


@pytest.fixture(scope="module", params=["keel", "pre_ln"])
def folders(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    sentencepiece_model: bytes,
) -> tuple[Path, Path]:
    """A run and its exported folder, which is a Llama's for pre_ln."""
    run = tmp_path_factory.mktemp("runs") / request.param
    tied = request.param == "pre_ln"
    write_run(
        run,
        sentencepiece_model,
        model__residual=request.param,
        model__tie_embeddings=tied,
        model__init_std=0.1,
    )
    export_run(run, run.parent / "exported", dtype="fp32", **EXPORT)
    return run, run.parent / "exported"


@torch.inference_mode()
def logits(path: Path) -> torch.Tensor:
    with opened(path) as (source, _runtime):
        tokens = torch.tensor([source.tokenizer.encode("def parse(self):")])
        found: torch.Tensor = source.model(tokens, torch.arange(tokens.shape[1])[None], None)
        return found.clone()


def test_logits_and_text_are_the_runs(folders: tuple[Path, Path]) -> None:
    run, folder = folders
    assert torch.equal(logits(folder), logits(run))
    texts = [
        CliRunner().invoke(app, ["generate", str(path), "--prompt", "def f", *GREEDY])
        for path in folders
    ]
    assert texts[1].exit_code == 0, texts[1].output
    assert texts[0].stdout == texts[1].stdout
    assert config_of(folder).data.seq_length == config_of(run).data.seq_length


def own_weights(path: str, processes: int) -> list[dict[str, torch.Tensor]]:
    """This rank's weights, of the run and of the folder."""
    found = []
    for name in (path, str(Path(path).parent / "exported")):
        with opened(Path(name), processes=processes, model_processes=processes) as (source, _):
            weights = source.model.named_parameters()
            found.append({key: value.detach().clone() for key, value in weights})
    return found


def test_processes_share_it(folders: tuple[Path, Path]) -> None:
    """Their weights are the run's to the last bit."""
    for own, others in run_ranks(3, own_weights, str(folders[0]), 3):
        assert own.keys() == others.keys()
        assert all(torch.equal(own[name], others[name]) for name in own)


def test_bf16_weights_compute_in_bf16(folders: tuple[Path, Path], tmp_path: Path) -> None:
    export_run(folders[0], tmp_path / "out", dtype="bf16", **EXPORT)
    assert config_of(tmp_path / "out").training.precision == "bf16"
    assert logits(tmp_path / "out").shape == logits(folders[0]).shape


def test_what_is_not_supported_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders[1], folder)
    with (
        pytest.raises(UserError, match=r"--step: .*folder is a Hugging Face folder, which has no"),
        opened(folder, step=3),
    ):
        pass
    with pytest.raises(UserError, match=r"not a run; create a run from it with `keel import`"):
        export_run(folder, tmp_path / "out", dtype="fp32", **EXPORT)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "attention_bias": True}))
    with pytest.raises(UserError, match=r"a model that is not supported:\n  attention_bias"):
        config_of(folder)
