"""The recipes of yaml/recipes from start to end, small, and runs that continue another."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import yaml
from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.listing import describe
from keel_megatron.config import load_config
from keel_megatron.corpus.find import list_files
from keel_megatron.tracking.metrics import read_metrics
from tests.distributed import run_ranks
from tests.settings import SMALL, settings
from tests.training.initialize_ranks import trained

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("continued-pretraining", "annealing")
BEGUN, STEPS = 4, 8
MODEL = {**SMALL["model"], "blocks": 2, "hidden_size": 32, "ffn_hidden_size": 64, "dropout": 0.1}
OWN_DATA = {
    "data__text": "old.txt",
    "checkpoint__every": BEGUN,
    "schedule__decay": "constant",
    "optimizer__name": "muon",
}
CONTINUES = {
    **OWN_DATA,
    "training__steps": STEPS,
    "training__initialize_from": f"runs/stable@{BEGUN}",
    "training__keep_optimizer": True,
    "training__keep_position": True,
}
RUNS: dict[str, dict[str, Any]] = {
    "stable": {**OWN_DATA, "training__steps": STEPS},
    "same": CONTINUES,
    "decayed": {
        **CONTINUES,
        "schedule__decay": "wsd",
        "schedule__decay_fraction": 0.5,
        "schedule__min_learning_rate": 0.0,
    },
    "ramped": {
        **CONTINUES,
        "schedule__rampup_batch_size": {"start": 8, "increment": 4, "samples": 96},
    },
    "ended": {**CONTINUES, "training__steps": BEGUN},
    "elsewhere": {
        **CONTINUES,
        "data__text": "new.txt",
        "data__tokenizer": "runs/stable/tokenizer.model",
    },
    "shuffled": {**CONTINUES, "training__seed": 7},
}
REFUSED = {
    "ended": "training.steps: 4 leaves nothing to train after step 4 of",
    "elsewhere": "training.keep_position: true continues on the data of training.initialize_from",
    "shuffled": r"training.keep_position: .*\n  training.seed: 1234 there, 7 here",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run at a stable rate, the recipes started from it, and its continuations."""
    home = tmp_path_factory.mktemp("home")
    (home / "old.txt").write_text(Path(argparse.__file__).read_text())
    (home / "new.txt").write_text(Path(ast.__file__).read_text())
    paths = []
    for name, overrides in RUNS.items():
        sections = settings(training__name=name, training__validation_sequences=4, **overrides)
        paths.append(written(home, name, {**sections, "model": MODEL}))
    paths += [written(home, name, small(name)) for name in RECIPES]
    found = dict(zip([*RUNS, *RECIPES], run_ranks(1, trained, paths)[0], strict=True))
    (home / "errors.json").write_text(json.dumps(found))
    return home


def written(home: Path, name: str, sections: dict[str, Any]) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def small(name: str) -> dict[str, Any]:
    """A recipe with a small model, small batches and other texts; what makes it a recipe stays."""
    sections = yaml.safe_load((ROOT / "yaml" / "recipes" / f"{name}.yaml").read_text())
    texts = {"replay": "old.txt", "old": "old.txt", "new": "new.txt", "selected": "new.txt"}
    for source in sections["data"]["sources"]:
        source["path"] = texts[source["name"]]
    sections["data"] |= {**SMALL["data"], "tokenizer": "runs/stable/tokenizer.model"}
    training = sections["training"]
    at = f"@{BEGUN}" if "@" in training["initialize_from"] else ""
    training |= {"initialize_from": f"runs/stable{at}", "steps": 12, "validate_every": 4}
    training |= {"global_batch_size": 16, "micro_batch_size": 2}
    training |= {"device": "cpu", "threads": 1, "validation_sequences": 4}
    return sections | {"model": MODEL, "parallel": {}, "tracking": SMALL["tracking"]}


def records(home: Path, name: str) -> list[dict[str, Any]]:
    return list(read_metrics(home / "runs" / name / "metrics.jsonl"))


def values(home: Path, name: str, field: str) -> list[float]:
    return [record[field] for record in records(home, name) if field in record]


def test_the_recipes_texts_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's folder has configurations too, among them JSON lines without a text."""
    monkeypatch.chdir(ROOT)
    for recipe in RECIPES:
        listing = list_files(load_config(ROOT / "yaml" / "recipes" / f"{recipe}.yaml").data, print)
        suffixes = {Path(entry.name).suffix for part in listing.parts for entry in part.entries}
        assert {".py", ".md"} <= suffixes
        assert ".jsonl" not in suffixes


def test_the_recipes_models_are_the_demos() -> None:
    """docs/recipes.md starts them from runs of the demo."""
    demo = load_config(ROOT / "yaml" / "demo.yaml")
    recipes = sorted((ROOT / "yaml" / "recipes").glob("*.yaml"))
    assert {*RECIPES} <= {path.stem for path in recipes}
    for path in recipes:
        config = load_config(path)
        assert config.model == demo.model
        assert config.data.vocab_size == demo.data.vocab_size
        if path.stem in RECIPES:
            assert config.data.seq_length == demo.data.seq_length
        else:  # conversations are longer, so its origin is trained with longer sequences
            page = (ROOT / "docs" / "fine-tuning.md").read_text()
            origin = f"training.name=pretrained data.seq_length={config.data.seq_length}"
            assert origin in page
        if config.training.keep_optimizer:
            assert config.optimizer.name == demo.optimizer.name
            assert config.optimizer.learning_rate == demo.optimizer.learning_rate


def test_only_what_a_resume_refuses_is_refused(home: Path) -> None:
    errors = json.loads((home / "errors.json").read_text())
    assert {name for name, error in errors.items() if error} == set(REFUSED)
    for name, why in REFUSED.items():
        with pytest.raises(ValueError, match=why):
            raise ValueError(errors[name])
        assert not (home / "runs" / name).exists()


def test_continued_pretraining_learns_the_new_text_and_starts_its_schedule(home: Path) -> None:
    name = "adapted"
    losses = values(home, name, "validation/new/loss")
    assert losses[-1] < losses[0]
    assert values(home, name, "validation/replay/loss")[-1] < values(home, "stable", "loss")[0]
    rates = values(home, name, "learning_rate")
    assert rates[:5] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2.5e-3])
    assert rates[-1] == pytest.approx(1e-5)
    assert values(home, name, "consumed_samples")[0] == 16


def test_annealing_decays_from_the_stable_rate_with_the_optimizers_moments(home: Path) -> None:
    rates = values(home, "annealed", "learning_rate")
    assert rates[0] == pytest.approx(1.2e-2 * (1 - 12**-0.5))
    assert rates[-1] == 0.0
    assert next(record["step"] for record in records(home, "annealed")) == 1
    state = json.loads((folder.step_folder(home / "runs/annealed", 12) / "state.json").read_text())
    assert state["common"]["optimizer"]["updates"] == BEGUN + 12


def test_a_run_that_continues_another_is_that_run(home: Path) -> None:
    """To the last bit; with dropout, so the generators continue too."""
    origin = [record for record in records(home, "stable") if "loss" in record]
    here = [record for record in records(home, "same") if "loss" in record]
    same = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples")
    assert [[record[name] for name in same] for record in here] == [
        [record[name] for name in same] for record in origin[BEGUN:]
    ]
    ends = [
        load_file(folder.step_folder(home / "runs" / name, STEPS) / "rank_00000.safetensors")
        for name in ("stable", "same")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    where = folder.step_folder(home / "runs" / "stable", BEGUN).resolve()
    assert f"started     as a continuation of {where}" in describe(home / "runs" / "same", None)


def test_a_ramp_up_counts_the_samples_of_the_origin(home: Path) -> None:
    """Batch sizes depend on the samples consumed alone; those of the origin are 4 x 16."""
    assert values(home, "stable", "consumed_samples")[BEGUN - 1] == 64
    assert sorted(set(values(home, "ramped", "consumed_samples"))) == [76, 88, 100, 116]
    log = (home / "runs" / "ramped" / "log.txt").read_text()
    assert "schedule.rampup_batch_size" in log


def test_a_stable_run_is_decayed_from_its_step_on(home: Path) -> None:
    rates = values(home, "decayed", "learning_rate")
    assert rates == pytest.approx([3e-3 * share for share in (0.75, 0.5, 0.25, 0.0)])
    assert values(home, "decayed", "loss")[0] == values(home, "stable", "loss")[BEGUN]
    log = (home / "runs" / "decayed" / "log.txt").read_text()
    assert "schedule.decay constant -> wsd" in log
    assert "learning rate: 0.003 at step 4, 0.00225 at step 5" in log
    assert "warning" not in log
    assert "training.name" not in log
