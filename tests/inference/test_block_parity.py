"""The comparison block by block: that of whole models, in the memory of a block."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keel_megatron.checkpoint.folder import step_folder
from keel_megatron.errors import UserError
from keel_megatron.inference import block_parity, parity
from keel_megatron.inference.export import export_run
from keel_megatron.inference.source import config_of
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.huggingface.models import write_run
from tests.memory import Watch
from tests.settings import small_config

parity.require_transformers()  # before anything imports it: sets its variables

MODELS: dict[str, dict[str, Any]] = {
    "keel": {},
    "llama, tied": {"model__residual": "pre_ln", "model__tie_embeddings": True},
    "hybrid_norm": {"model__residual": "hybrid_norm"},
    "hyper_connections": {"model__residual": "hyper_connections"},
}


def exported(run: Path, out: Path, **options: Any) -> tuple[bool, list[str]]:
    """Whether the logits agree, and what the command says."""
    said: list[str] = []
    wanted = {"step": None, "dtype": "fp32", "check": False, **options}
    return export_run(run, out, say=said.append, **wanted), said


def let_free(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    """Let this machine have so many bytes free, and the logits take none."""
    monkeypatch.setattr(
        parity.psutil, "virtual_memory", lambda: SimpleNamespace(available=available)
    )
    monkeypatch.setattr(parity, "_LOGITS_BYTES", 4 * 512 * 128)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_whole_models(
    name: str, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    config = write_run(run, sentencepiece_model, **MODELS[name])
    exported(run, out)
    rows = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(3))
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        arguments = (step_folder(run, 0), config, runtime, rows, torch.float32)
        own = parity.own_logits(*arguments)
        streamed, streams = block_parity.own_logits(*arguments)
        assert parity.compare(own, streamed, 1e-6).holds
        other = parity.exported_logits(out, runtime.device, rows, torch.float32)
        streamed, others = block_parity.exported_logits(out, runtime.device, rows)
        assert parity.compare(other, streamed, 1e-6).holds
    assert len(streams) == len(others) == config.model.blocks
    assert streams[0].shape == others[0].shape == (16, config.model.hidden_size)
    assert "after every block the streams differ by at most" in block_parity.first_different(
        streams, others, 1e-5
    )


def test_the_command_compares_by_block_and_finds_a_wrong_weight(
    sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_run(run, sentencepiece_model, model__blocks=12, model__hidden_size=64)
    let_free(monkeypatch, 2e6)  # the model has 2.2 MB
    holds, said = exported(run, tmp_path / "a", check=True, dtype="bf16")
    assert holds
    assert "(one block at a time), " in said[0]
    assert "within the bound 1e-05" in said[-2]
    assert said[-1].startswith("after every block the streams differ by at most")

    def damaged(*arguments: Any) -> Any:
        path = tmp_path / "b" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.4.mlp.down_proj.weight"][5, 5] += 0.5
        save_file(tensors, path)
        return plain(*arguments)

    plain = block_parity.exported_logits
    monkeypatch.setattr(block_parity, "exported_logits", damaged)
    holds, said = exported(run, tmp_path / "b", check=True)
    assert not holds
    assert "NOT within the bound" in said[-2]
    assert said[-1].startswith("the streams differ first after block 4, by")


def test_what_does_not_fit_even_so_is_refused(
    sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", sentencepiece_model)
    let_free(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"\(one block at a time\), and 1e-06 GB are free"):
        exported(tmp_path / "run", tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_a_block_is_in_memory_at_a_time(sentencepiece_model: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, sentencepiece_model, model__blocks=40, model__hidden_size=64)
    exported(run, tmp_path / "out")
    config = config_of(run)
    rows = torch.arange(8)[None]
    whole = 4 * sum(math.prod(row.shape) for row in block_parity.parameters(config.model, 512))
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        for compute in (
            lambda: block_parity.own_logits(
                step_folder(run, 0), config, runtime, rows, torch.float32
            ),
            lambda: block_parity.exported_logits(tmp_path / "out", runtime.device, rows),
        ):
            with Watch() as watch:
                compute()
            held = block_parity.bytes_held(config, rows.numel())
            assert watch.peak < 2 * held < whole / 2


def test_held_bytes_do_not_grow_with_matrices_of_further_blocks() -> None:
    few, many = small_config(model__blocks=2), small_config(model__blocks=200)
    grown = block_parity.bytes_held(many, 1) - block_parity.bytes_held(few, 1)
    vectors = 4 * 198 * 4 * few.model.hidden_size
    assert 0 < grown <= vectors
