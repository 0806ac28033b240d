"""The folder that `keel export` writes; transformers has no part in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.errors import UserError
from keel_megatron.huggingface import export as export_module
from keel_megatron.huggingface.card import card
from keel_megatron.huggingface.folder import INDEX, write_weights
from keel_megatron.huggingface.naming import parameters
from keel_megatron.huggingface.new_folder import new_folder
from keel_megatron.inference.export import export_run
from tests.huggingface.models import write_run
from tests.memory import Watch
from tests.settings import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    place = tmp_path_factory.mktemp("runs") / "keel"
    write_run(place, sentencepiece_model, model__blocks=12)
    return place


def exported(run: Path, out: Path, **options: Any) -> list[str]:
    """What the command says."""
    said: list[str] = []
    wanted = {"step": None, "dtype": "fp32", "check": False, **options}
    assert export_run(run, out, say=said.append, **wanted)
    return said


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_bf16_weights_are_rounded_but_not_those_of_norms(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "a")
    exported(run, tmp_path / "b", dtype="bf16")
    whole, half = (tensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert whole.keys() == half.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float32
        kind = torch.float32 if "norm" in name else torch.bfloat16
        assert half[name].dtype == kind
        assert torch.equal(half[name], value.to(kind)), name
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_with_a_bf16_stream_is_refused(sentencepiece_model: bytes, tmp_path: Path) -> None:
    write_run(tmp_path / "run", sentencepiece_model, model__blocks=2, model__stream="bf16")
    with pytest.raises(UserError, match=r"model\.stream: the run has bf16, and exported models"):
        exported(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_split_over_files_and_stream_through_little_memory(
    run: Path, tmp_path: Path
) -> None:
    config = small_config(model__blocks=12, model__num_query_groups=2)
    rows = list(parameters(config.model, config.data.vocab_size))
    largest = max(4 * torch.Size(row.shape).numel() for row in rows)
    weights = Weights(folder.step_folder(run, 0))
    with Watch() as watch:
        total = write_weights(tmp_path, rows, weights.read, torch.float32, max_bytes=500_000)
    assert watch.peak <= 3 * largest
    assert total > 7 * watch.peak
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["metadata"]["total_size"] == total
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {name: file.name for file in files for name in tensors(file)}
    assert found == content["weight_map"]
    assert found.keys() == {name for row in rows for name in row.parts}
    assert all(file.stat().st_size < 520_000 for file in files)


def test_a_folder_in_use_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    exported(run, out)  # empty
    before = sorted(out.iterdir())
    with pytest.raises(UserError, match=r"--out: .*out exists and is not an empty folder"):
        exported(run, out)
    assert sorted(out.iterdir()) == before
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(UserError, match=r"other\.partial exists, left by a command"):
        exported(run, tmp_path / "other")


@pytest.mark.parametrize("ailment", ["disk", "interrupt", "space"])
def test_a_folder_that_is_not_complete_is_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ailment: str
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        if ailment == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, "No space left on device")

    if ailment == "space":
        monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": 10})())
    else:
        monkeypatch.setattr(export_module, "write_weights", fail)
    wanted = {"disk": "No space left", "space": "GB are free there", "interrupt": "^$"}[ailment]
    with pytest.raises(KeyboardInterrupt if ailment == "interrupt" else UserError, match=wanted):
        exported(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_run_is_written(run: Path, tmp_path: Path) -> None:
    """It may lie where only reading is possible, and two exports may read it at once."""

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}

    before = times()
    exported(run, tmp_path / "out")
    assert times() == before


def test_of_two_exports_to_one_folder_the_second_is_refused(run: Path, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        with pytest.raises(UserError, match=r"out\.partial exists, left .* or is still running"):
            exported(run, tmp_path / "out")
        (partial / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"


def copied(run: Path, place: Path, step: int) -> None:
    """Another checkpoint of the run, at a later step."""
    source, target = folder.step_folder(run, 0), folder.step_folder(place, step)
    target.mkdir(parents=True)
    files = manifest.read_manifest(source)
    for name in files:
        (target / name).write_bytes((source / name).read_bytes())
    state = json.loads((source / manifest.STATE).read_text()) | {"step": step}
    files[manifest.STATE] = manifest.write_json(target / manifest.STATE, state)
    manifest.write_manifest(target, step, files)


@pytest.fixture
def two_steps(run: Path, tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "two"
    copied(run, place, 5)
    copied(run, place, 7)
    (place / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    lines = [
        {"step": 5, "loss": 4.5, "consumed_tokens": 1000},
        {"step": 5, "validation_loss": 4.25, "consumed_tokens": 1000},
        {"step": 7, "loss": 3.5, "consumed_tokens": 2000},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def test_which_step_is_exported_and_what_the_card_says(two_steps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "exported step 7" in exported(two_steps, out / "a")[-1]
    assert "exported step 5" in exported(two_steps, out / "b", step=5)[-1]
    text = (out / "b" / "README.md").read_text()
    for row in (
        "| steps | 5 |",
        "| training tokens | 1,000 |",
        "| training loss | 4.5000 nats per token (step 5) |",
        "| validation loss | 4.2500 nats per token (step 5) |",
        "| residual rule | keel |",
        "| alpha | 24 |",
        "| depth | 24 sub-layers, 12 blocks |",
    ):
        assert row in text
    assert str(tmp_path) not in text
    assert exported(folder.step_folder(two_steps, 5), out / "c")
    assert (out / "c" / "README.md").read_text() == text
    with pytest.raises(UserError, match=r"--step: there is no .*there are: 5, 7"):
        exported(two_steps, out / "d", step=6)
    with pytest.raises(UserError, match=r"--step: .* is a checkpoint"):
        exported(folder.step_folder(two_steps, 5), out / "d", step=5)


def test_a_damaged_checkpoint_is_skipped_and_said(two_steps: Path, tmp_path: Path) -> None:
    victim = folder.step_folder(two_steps, 7) / manifest.shards_name(0)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    said = exported(two_steps, tmp_path / "out")
    assert "step_00000007 is damaged" in said[0]
    assert "exported step 5" in said[-1]
    with pytest.raises(UserError, match="is damaged"):
        exported(two_steps, tmp_path / "other", step=7)


def test_the_card_of_a_llama_asks_for_no_code() -> None:
    text = card(small_config(model__residual="pre_ln"), 3, [], "bfloat16", {"torch": "2.13"})
    assert "trust_remote_code" not in text
    assert "| alpha |" not in text
    assert "plain Llama" in text
