"""Weights are read from a checkpoint of any layout, and written without an optimizer's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.weights import Weight, Weights, write_weights
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.huggingface.naming import parameters
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from keel_megatron.training.run_folder import find_resume_point
from keel_megatron.training.startup import check
from tests.checkpoint.state_ranks import made_up, path_of, save_all
from tests.checkpoint.test_resharding import PP2, TIED, TP2, sections
from tests.distributed import run_ranks
from tests.settings import small_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"training__global_batch_size": 12},
    "tp2": {**TP2, **TIED},
    "pp2": PP2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Checkpoints of made-up masters, by the layout that wrote them."""
    home = tmp_path_factory.mktemp("runs")
    found = {name: sections(home, name, **overrides) for name, overrides in LAYOUTS.items()}
    run_ranks(2, save_all, list(found.values()), [1, 2, 3])
    return found


@pytest.mark.parametrize(("name", "seed"), [("dp2", 1), ("tp2", 2), ("pp2", 3)])
def test_every_weight_is_read_whole(runs: dict[str, dict[str, Any]], name: str, seed: int) -> None:
    config = RunConfig.model_validate(runs[name])
    weights = Weights(path_of(runs[name]))
    rows = list(parameters(config.model, config.data.vocab_size))
    assert len(rows) > 4 * 6
    for row in rows:
        wanted = made_up(f"param {row.name}", row.shape, seed)
        assert torch.equal(weights.read(row.name, row.shape), wanted), row.name
    with pytest.raises(UserError, match=r"pp2|dp2|tp2.* cannot be loaded: it has no tensor"):
        weights.read("decoder.layers.99.mlp.linear_fc1.weight", (2, 2))


def test_weights_alone_are_a_checkpoint_that_training_refuses(tmp_path: Path) -> None:
    config = small_config(training__name="run", training__runs_dir=str(tmp_path))
    values = torch.randn(3, 4)
    weights = [Weight("one", (3, 4), lambda: values), Weight("two", (3,), lambda: values[:, 0])]
    path = write_weights(tmp_path / "run", config, weights, {"tokenizer.model": b"model"}, {"a": 1})
    assert path == folder.step_folder(tmp_path / "run", 0)
    manifest.check(path)
    read = Weights(path)
    assert torch.equal(read.read("one", (3, 4)), values)
    assert torch.equal(read.read("two", (3,)), values[:, 0])
    with pytest.raises(UserError, match=rf"initialize_from={tmp_path}/run$"):
        check(config)
    with (
        start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime,
        pytest.raises(UserError, match="no optimizer state"),
    ):
        find_resume_point(config, runtime)  # as every rank does


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = small_config(training__name="run", training__runs_dir=str(tmp_path))
    bad = Weight("some.weight", (2,), lambda: torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match=r"some\.weight is not finite"):
        write_weights(tmp_path / "run", config, [bad], {"tokenizer.model": b""}, {})
    assert folder.steps(tmp_path / "run") == []
