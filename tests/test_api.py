"""The Python interface: what importing it costs, and what its mistakes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import keel_megatron as keel
from keel_megatron import _MODULES
from tests.settings import settings

HEAVY = {"torch", "numpy", "pydantic", "yaml", "megatron", "mlflow", "lm_eval"}


def test_importing_it_imports_nothing_and_planning_or_help_no_torch() -> None:
    code = (
        "import sys, keel_megatron as keel\n"
        "before = set(sys.modules)\n"
        f"config = keel.load_config({settings()!r})\n"
        "keel.plan(config, gpu='h100'), keel.UserError, keel.train, keel.load_model\n"
        "import keel_megatron.cli.main\n"  # what `keel --help` imports
        "print(*before, '|', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, after = (set(part.split()) for part in done.stdout.split("|"))
    assert not HEAVY & first
    assert not {"torch", "numpy", "megatron", "mlflow", "lm_eval", "rich"} & after


def test_its_names() -> None:
    assert sorted(_MODULES) == sorted(set(keel.__all__) - {"__version__"})
    assert set(keel.__all__) <= set(dir(keel))
    for name in keel.__all__:
        assert getattr(keel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = keel.no_such_name  # type: ignore[attr-defined]


def test_sources_and_overrides_of_a_configuration_mean_the_same(tmp_path: Path) -> None:
    config = keel.load_config(settings(), {"model.blocks": 4, "training.precision": "bf16"})
    saved = tmp_path / "run.yaml"
    saved.write_text(keel.dump_config(config))
    assert keel.load_config(saved) == config
    assert keel.load_config(settings(), ["model.blocks=4", "training.precision=bf16"]) == config
    assert keel.load_config(keel.load_config(settings(model__blocks=4)), {}).model.blocks == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks": 3}, "blocks: a setting must be section.key; did you mean model.blocks?"),
        ({"model.a.b": 3}, "model.a.b: a setting must be section.key"),
        ({"model.block": 3}, "model.block: is unknown; did you mean model.blocks?"),
        ({"training.steps": "x"}, "training.steps: 'x' is not an integer"),
    ],
)
def test_wrong_overrides(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(keel.ConfigError) as found:
        keel.load_config(settings(), overrides)
    assert message in str(found.value)


def test_a_layout_needs_its_processes() -> None:
    config = keel.load_config(settings(parallel__pipeline=2))
    for call in (keel.train, lambda config: keel.plan(config, gpus=3)):
        with pytest.raises(keel.ConfigError, match=r"run test: 1 problem.*\n.* must divide the"):
            call(config)
    with pytest.raises(keel.UserError, match="unknown device 'h300'; must be one of h200"):
        keel.plan(config, gpu="h300")
    for gpus in (0, -1):
        with pytest.raises(keel.UserError, match=f"gpus: {gpus} must be at least 1"):
            keel.plan(config, gpus=gpus)


def test_what_is_no_run_has_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(keel.UserError, match=r"no metrics.jsonl; a run's folder is runs/NAME"):
        keel.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "a": 1}\n')
    assert keel.read_metrics(str(tmp_path), "loss") == [{"step": 1, "loss": 2.0}]
    assert len(keel.read_metrics(tmp_path)) == 2
