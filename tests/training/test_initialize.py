"""A new run has its origin's weights to the last bit, at every layout and with either engine."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import yaml
from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.listing import describe
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.huggingface.configuration import to_json
from keel_megatron.huggingface.folder import write_weights
from keel_megatron.huggingface.naming import parameters
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.training.initialize import check_same, fingerprint
from tests.checkpoint.state_ranks import path_of, save_all
from tests.checkpoint.test_resharding import FP32, PP2, TP2, sections
from tests.datasets import tokenizer_model
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import zero
from tests.settings import settings
from tests.training.initialize_ranks import started, trained

SEED = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2-fp32": {**TP2, **FP32},
    "pp2": PP2,
}
if importlib.util.find_spec("deepspeed"):
    LAYOUTS |= {"zero2": zero(2), "zero3": zero(3)}


def export(checkpoint: Path, config: RunConfig, out: Path) -> None:
    """A Hugging Face folder of a checkpoint."""
    out.mkdir()
    rows = list(parameters(config.model, config.data.vocab_size))
    write_weights(out, rows, Weights(checkpoint).read, torch.float32)
    (out / "config.json").write_text(json.dumps(to_json(config, "float32", 0)))
    (out / "tokenizer.model").write_bytes(tokenizer_model())


def test_weights_and_moments_are_the_origins_to_the_last_bit(tmp_path: Path) -> None:
    origin = sections(tmp_path, "origin", **TP2)
    of_muon = sections(tmp_path, "of-muon", optimizer__name="muon", **TP2)
    run_ranks(2, save_all, [origin, of_muon], [SEED, SEED])
    config = RunConfig.model_validate(origin)
    export(path_of(origin), config, tmp_path / "exported")
    runs = []
    for name, layout in LAYOUTS.items():
        for source, place, keep in (
            ("fresh", "origin", False),
            ("kept", "origin@1", True),
            ("exported", "exported", False),
        ):
            if source == "fresh" and name != "pp2":
                continue  # the same as from the exported folder, but for the reader
            given = {
                "training__initialize_from": str(tmp_path / place),
                "training__keep_optimizer": keep,
            }
            runs.append(sections(tmp_path, f"{name}-{source}", **layout, **given))
    muon = {"optimizer__name": "muon", "training__initialize_from": str(tmp_path / "origin")}
    runs.append(sections(tmp_path, "muon-fresh", **muon))
    muon |= {"training__initialize_from": str(tmp_path / "of-muon@1")}
    runs.append(sections(tmp_path, "muon-kept", training__keep_optimizer=True, **muon))
    for rank in run_ranks(2, started, runs, SEED):
        assert len(rank) == 2 * len(LAYOUTS) + 3
        assert {name: wrong for name, wrong in rank.items() if wrong} == {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two runs."""
    home = tmp_path_factory.mktemp("home")
    (home / "old.txt").write_text(Path(argparse.__file__).read_text())
    (home / "new.txt").write_text(Path(ast.__file__).read_text())
    return home


def write(home: Path, name: str, **overrides: Any) -> Path:
    """A run's YAML; with checkpoints of step 0, for a rollback, and of its end."""
    path = home / f"{name}.yaml"
    given = {
        "training__name": name,
        "training__steps": 30,
        "training__validation_sequences": 4,
        "model__blocks": 2,
        "model__hidden_size": 32,
        "model__ffn_hidden_size": 64,
        "guard__action": "rollback",
        "data__text": "old.txt",
        **overrides,
    }
    path.write_text(yaml.safe_dump(settings(**given)))
    return path


def tensors(home: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder.step_folder(home / "runs" / name, step) / "rank_00000.safetensors")


def state_of(home: Path, name: str, step: int) -> Any:
    place = folder.step_folder(home / "runs" / name, step)
    return json.loads((place / "state.json").read_text())


def losses(home: Path, name: str) -> list[float]:
    return [m["loss"] for m in read_metrics(home / "runs" / name / "metrics.jsonl") if "loss" in m]


def test_a_run_continues_from_another_on_new_data_and_then_without_it(home: Path) -> None:
    new = {"data__text": "new.txt", "training__initialize_from": "runs/first", "training__steps": 4}
    tokenizer = {"data__tokenizer": "runs/first/tokenizer.model"}
    kept = {**new, **tokenizer, "training__keep_optimizer": True}
    paths = [
        write(home, "first"),
        write(home, "other-tokenizer", **new),
        write(home, "second", **new, **tokenizer),
        write(home, "random", **tokenizer, data__text="new.txt", training__steps=4),
        write(home, "kept", **kept),
    ]
    (first, refused, *others) = run_ranks(1, trained, paths)[0]
    assert [first, *others] == [None] * 4
    assert "training.initialize_from: its tokenizer" in refused
    assert "data.tokenizer=" in refused
    assert not (home / "runs" / "other-tokenizer" / "config.yaml").exists()

    end = tensors(home, "first", 30)
    for name, states in (("second", ["param"]), ("kept", ["param", "exp_avg", "exp_avg_sq"])):
        begun = tensors(home, name, 0)
        assert begun.keys() == end.keys()
        for key, value in begun.items():
            is_kept = key.split(".")[2] in states
            assert torch.equal(value, end[key] if is_kept else torch.zeros_like(value)), key
    assert losses(home, "second")[0] == losses(home, "kept")[0] < losses(home, "random")[0] - 0.3
    assert losses(home, "second")[1:] != losses(home, "kept")[1:]

    record = state_of(home, "second", 4)["extras"]["initialized_from"]
    assert record["path"] == str(folder.step_folder(home / "runs" / "first", 30))
    assert record["run_id"] == state_of(home, "first", 30)["extras"]["run"]["id"]
    assert (record["step"], record["optimizer"], len(record["fingerprint"])) == (30, False, 64)
    shown = describe(home / "runs" / "second", None)
    assert f"started     from the weights of {record['path']}" in shown
    saved = yaml.safe_load((home / "runs" / "second" / "config.yaml").read_text())
    assert saved["training"]["initialize_from"] == "runs/first"

    shutil.rmtree(home / "runs" / "first" / "checkpoints")
    further = {**new, **tokenizer, "training__steps": 6, "schedule__decay": "constant"}
    assert run_ranks(1, trained, [write(home, "second", **further)])[0] == [None]
    assert state_of(home, "second", 6)["extras"]["initialized_from"] == record


def test_an_origin_that_goes_or_changes_while_it_is_read_is_reported(tmp_path: Path) -> None:
    origin = path_of(sections(tmp_path, "origin", **FP32))
    origin.mkdir(parents=True)
    (origin / "manifest.json").write_text("first")
    record = {"path": str(origin), "fingerprint": fingerprint(origin)}
    check_same(origin, record)
    (origin / "manifest.json").write_text("second")
    with pytest.raises(UserError, match=r"step_\d+ was replaced while it was read; start again"):
        check_same(origin, record)
    shutil.rmtree(origin)
    with pytest.raises(UserError, match=r"initialize_from: .* cannot be read: No such file"):
        check_same(origin, record)
