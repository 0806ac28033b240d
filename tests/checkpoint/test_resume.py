"""Going on from a checkpoint: to the last bit on its layout, closely on any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder
from tests.checkpoint.ranks import Ran, Sections, asked_to_stop, run_in_turn
from tests.settings import settings

STEPS, SAVED = 4, 2
MUON = {"optimizer__name": "muon", "optimizer__weight_decay": 1.0}
# Name -> (processes, overrides); all with dropout.
SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32-dp2": (2, {}),
    "bf16-dp2": (2, {"training__precision": "bf16"}),
    "bf16-dp2-replicated-optimizer": (
        2,
        {"training__precision": "bf16", "parallel__distributed_optimizer": False},
    ),
    "fp32-pp2-vpp2-waiting": (
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "checkpoint__async_save": False,
        },
    ),
    "bf16-tp2-sp": (
        2,
        {"training__precision": "bf16", "parallel__tensor": 2, "parallel__sequence": True},
    ),
    "muon-bf16-dp2": (2, {**MUON, "training__precision": "bf16"}),
    "muon-fp32-tp2-sp": (2, {**MUON, "parallel__tensor": 2, "parallel__sequence": True}),
}
# Name -> (processes, overrides) of the layouts that go on from one of two stages.
OTHER: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel__pipeline": 1}),
    "tp2-sp": (
        2,
        {"parallel__pipeline": 1, "parallel__tensor": 2, "parallel__sequence": True},
    ),
    "pp2-vpp2-uneven": (
        2,
        {"parallel__virtual_pipeline": 2, "parallel__layout": [1, 1, 2, 0]},
    ),
    "dp2": (2, {"parallel__pipeline": 1}),
    "tp2-pp2-vpp2": (4, {"parallel__tensor": 2, "parallel__virtual_pipeline": 2}),
    "muon-dp2": (2, {"parallel__pipeline": 1}),
    "muon-tp2-dp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 1}),
}
# Rules that a checkpoint of Keel says nothing about.
RULES: dict[str, dict[str, Any]] = {
    "layer_norm_scaling": {"model__residual": "layer_norm_scaling"},
    "peri_ln": {"model__residual": "peri_ln", "model__embedding_norm": True},
    "complete_p": {"model__residual": "complete_p", "optimizer__epsilon": 1e-4},
    "hyper_connections": {"model__residual": "hyper_connections", **MUON},
}


def sections(runs: Path, name: str, **overrides: Any) -> Sections:
    return settings(
        training__runs_dir=str(runs),
        training__name=name,
        training__steps=STEPS,
        training__global_batch_size=8,
        model__blocks=4,
        model__qk_norm=True,
        training__z_loss=1e-3,
        checkpoint__every=SAVED,
        **overrides,
    )


def forget_the_end(run: Path) -> None:
    shutil.rmtree(folder.step_folder(run, STEPS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def same(runs: Path) -> dict[str, tuple[list[Ran], list[Ran]]]:
    """Of each run both ranks undisturbed, and from the middle on in other processes."""
    configs = [sections(runs, n, model__dropout=0.1, **o) for n, (_size, o) in SAME.items()]
    whole = run_in_turn(2, configs)
    for name in SAME:
        forget_the_end(runs / name)
    again = run_in_turn(2, configs)
    return dict(zip(SAME, zip(whole, again, strict=True), strict=True))


@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_goes_on_to_the_last_bit(
    name: str, same: dict[str, tuple[list[Ran], list[Ran]]]
) -> None:
    """Losses and gradient norms; then weights, masters, moments and counts of both ranks."""
    for whole, again in zip(*same[name], strict=True):
        assert whole.error is None
        assert again.error is None
        assert again.resumed == f"step_{SAVED:08d}"
        assert [step for step, _loss, _norm in again.losses] == [3, 4]
        assert again.losses == whole.losses[SAVED:]
        assert again.digest == whole.digest


def test_dropout_was_on_and_the_generators_count(
    runs: Path, same: dict[str, tuple[list[Ran], list[Ran]]]
) -> None:
    """The runs above would agree without the generators if dropout drew nothing."""
    name = "fp32-dp2"
    forget_the_end(runs / name)
    state = folder.step_folder(runs / name, SAVED) / "state.json"
    from keel_megatron.checkpoint import manifest

    files = manifest.read_manifest(state.parent)
    text = state.read_text().replace('"data": 2', '"data": 3')
    files["state.json"] = manifest.write_checked(state, [text.encode()])
    manifest.write_manifest(state.parent, SAVED, files)
    ((again, _other),) = run_in_turn(2, [sections(runs, name, model__dropout=0.1)])
    assert again.error is None
    assert again.losses != same[name][0][0].losses[SAVED:]


def test_a_run_that_is_done_was_not_stopped(runs: Path) -> None:
    """A request during the last step has nothing left to stop: the code is that of the end."""
    config = sections(runs, "asked")
    config["training"]["steps"] = 2
    ran = [run_in_turn(1, [config], {"asked": asked_to_stop})[0][0] for _ in range(2)]
    assert [(run.code, len(run.losses)) for run in ran] == [(75, 1), (0, 1)]


def test_other_parts_come_back(same: dict[str, tuple[list[Ran], list[Ran]]]) -> None:
    for whole, again in zip(*same["fp32-dp2"], strict=True):
        assert whole.counted == again.counted == [1 / 3, 1 / 3 + 1]


def test_the_stall_is_measured(same: dict[str, tuple[list[Ran], list[Ran]]]) -> None:
    for name, (whole, _again) in same.items():
        saves = whole[0].saves
        assert [save.step for save in saves] == [SAVED, STEPS]
        for save in saves:
            assert 0 < save.checkpoint_stall_seconds <= save.checkpoint_seconds
            assert save.checkpoint_bytes > 1e6
            if name == "fp32-pp2-vpp2-waiting":
                assert save.checkpoint_stall_seconds == pytest.approx(save.checkpoint_seconds)


@pytest.fixture(scope="module")
def elsewhere(runs: Path) -> dict[str, Ran]:
    """Rank 0's runs of every other layout, each from its own copy of its optimizer's checkpoint."""
    origins = {"adamw": {}, "muon": MUON}
    configs = [sections(runs, n, parallel__pipeline=2, **o) for n, o in origins.items()]
    whole = run_in_turn(2, configs)
    found = {name: ranks[0] for name, ranks in zip(origins, whole, strict=True)}
    for name in origins:
        forget_the_end(runs / name)
    for size in sorted({size for size, _overrides in OTHER.values()}):
        again = {}
        for name, (wanted, overrides) in OTHER.items():
            if wanted == size:
                origin = "muon" if name.startswith("muon") else "adamw"
                shutil.copytree(runs / origin, runs / f"from-{name}")
                given = {**origins[origin], "parallel__pipeline": 2, **overrides}
                again[name] = sections(runs, f"from-{name}", **given)
        ran = run_in_turn(size, list(again.values()))
        found |= {name: ranks[0] for name, ranks in zip(again, ran, strict=True)}
    return found


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_goes_on(name: str, elsewhere: dict[str, Ran]) -> None:
    assert elsewhere[name].error is None
    assert elsewhere[name].resumed == f"step_{SAVED:08d}"
    whole = elsewhere["muon" if name.startswith("muon") else "adamw"]
    for here, there in zip(elsewhere[name].losses, whole.losses[SAVED:], strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.fixture(scope="module")
def of_rules(runs: Path) -> dict[str, list[Ran]]:
    """Rank 0's runs of each rule: whole on two stages, its end there, and on two tensor ranks."""
    stages = {"parallel__pipeline": 2}
    tensor = {"parallel__tensor": 2, "parallel__sequence": True}
    whole = [sections(runs, rule, **stages, **o) for rule, o in RULES.items()]
    found = run_in_turn(2, whole)
    for rule in RULES:
        forget_the_end(runs / rule)
        shutil.copytree(runs / rule, runs / f"{rule}-tp2")
    other = [sections(runs, f"{rule}-tp2", **tensor, **o) for rule, o in RULES.items()]
    found += run_in_turn(2, [*whole, *other])
    return {rule: [ranks[0] for ranks in found[i :: len(RULES)]] for i, rule in enumerate(RULES)}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_goes_on(rule: str, of_rules: dict[str, list[Ran]]) -> None:
    whole, same, other = of_rules[rule]
    assert [ran.error for ran in (whole, same, other)] == 3 * [None]
    assert same.resumed == other.resumed == f"step_{SAVED:08d}"
    assert same.losses == whole.losses[SAVED:]
    assert same.digest == whole.digest
    for here, there in zip(other.losses, whole.losses[SAVED:], strict=True):
        assert here == pytest.approx(there, rel=1e-5)
