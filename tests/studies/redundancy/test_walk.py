"""Losses with a unit removed are those of whole models without it, at the cost of what follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.studies.redundancy.measure import Options, measure
from keel_megatron.studies.redundancy.units import NOTHING, Removal, Unit, passes, sub_layers_of
from keel_megatron.studies.redundancy.walk import angular_distance
from tests.distributed import run_ranks
from tests.model.test_exactness import CASES, pair_up, shape_of
from tests.reference_model import ReferenceModel
from tests.studies.redundancy.models import (
    LENGTH,
    SEQUENCES,
    batch_of,
    found_by,
    model_of,
    run_config,
    split_walk,
    walk_of,
)

ALONE = Launch(0, 1, 0, 1)
WAYS: list[tuple[Unit, Removal]] = [
    ("sub-layer", "sub-layer"),
    ("sub-layer", "branch"),
    ("block", "sub-layer"),
    ("block", "branch"),
]


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def plain_twin(chunk: nn.Module, config: RunConfig) -> ReferenceModel:
    """The plain PyTorch model with the same weights."""
    reference = ReferenceModel(shape_of(config))
    with torch.no_grad():
        for _name, ours, theirs in pair_up(chunk, reference):
            theirs.copy_(ours)
    return reference


def remove(reference: ReferenceModel, l: int, removal: Removal) -> None:
    """Take sub-layer l out of a plain model, which then runs as a whole."""
    sub = reference.sub_layers[l]
    if removal == "branch":
        sub.F = Zero()
    elif reference.shape.residual != "hybrid_norm":
        reference.sub_layers[l] = nn.Identity()
    elif l % 2 == 0:  # N(Y), which its equation has in the FFN, goes with the attention
        reference.sub_layers[l] = nn.Identity()
        if hasattr(reference.sub_layers[l + 1], "N_out"):
            reference.sub_layers[l + 1].N_out = nn.Identity()
    else:
        sub.F = Zero()


@pytest.mark.parametrize(
    ("rule", "overrides"), [case for case in CASES if case[0] != "hyper_connections"]
)
def test_removals_are_those_of_a_plain_model(rule: str, overrides: dict[str, Any]) -> None:
    config = run_config(model__residual=rule, **overrides)
    batch = batch_of()
    with start(config.parallel, config.training, ALONE) as runtime:
        chunk = model_of(config, runtime)
        for unit, removal in WAYS:
            found = found_by(walk_of(chunk, config, runtime, unit, removal), batch)
            assert len(found) == config.model.sub_layers // (2 if unit == "block" else 1) + 1
            for number, one in found.items():
                reference = plain_twin(chunk, config)
                for l in () if number == NOTHING else sub_layers_of(number, unit):
                    remove(reference, l, removal)
                with torch.no_grad():
                    expected = reference(batch.tokens, batch.labels).item()
                loss = sum(one.losses) / (SEQUENCES * LENGTH)
                assert loss == pytest.approx(expected, abs=1e-5), (unit, removal, number)


def test_a_rule_of_several_streams_is_refused(tmp_path: Path) -> None:
    """Variants lie along the batch, where its streams are."""
    config = run_config(model__residual="hyper_connections")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match="streams = 4 in sub-layer 0, which the study of redundan"):
        measure(tmp_path, tmp_path / "out", Options())


@pytest.mark.parametrize(
    ("rule", "stream"), [("keel", "fp32"), ("hybrid_norm", "fp32"), ("keel", "bf16_add")]
)
def test_nothing_removed_is_the_engines_validation(rule: str, stream: str) -> None:
    from keel_megatron.engines.megatron.engine import MegatronEngine

    documents = (torch.arange(LENGTH) >= 5).int().expand(SEQUENCES, LENGTH).contiguous()
    mask = torch.ones(SEQUENCES, LENGTH)
    mask[:, 4] = 0
    mask[0, 7:] = 0
    config = run_config(
        model__residual=rule,
        model__stream=stream,
        training__micro_batch_size=SEQUENCES,
        data__document_masks=True,
    )
    batch = batch_of(documents=documents, loss_mask=mask)
    with start(config.parallel, config.training, ALONE) as runtime:
        chunk = model_of(config, runtime)
        engine = MegatronEngine(config, runtime, [chunk])
        found = found_by(walk_of(chunk, config, runtime), batch)[NOTHING]
        loss = sum(found.losses) / mask.sum().item()
        assert loss == pytest.approx(engine.validate([batch], 1), abs=1e-6)


def test_for_a_pre_norm_model_both_removals_are_the_same() -> None:
    config = run_config(model__residual="pre_ln")
    with start(config.parallel, config.training, ALONE) as runtime:
        chunk = model_of(config, runtime)
        ways = [
            found_by(walk_of(chunk, config, runtime, "block", removal), batch_of())
            for removal in ("sub-layer", "branch")
        ]
    for number, one in ways[0].items():
        assert one.losses == pytest.approx(ways[1][number].losses, abs=1e-4)
        assert one.angles == ways[1][number].angles


@pytest.fixture(scope="module")
def keel() -> Iterator[tuple[nn.Module, RunConfig, Runtime]]:
    config = run_config()
    with start(config.parallel, config.training, ALONE) as runtime:
        yield model_of(config, runtime), config, runtime


@pytest.mark.parametrize("unit", ["sub-layer", "block"])
def test_a_removal_costs_what_follows_it(keel: Any, unit: Unit) -> None:
    """Counted: L + w n (n - 1) / 2 passes a sequence, however removals are grouped."""
    chunk, config, runtime = keel
    L = config.model.sub_layers
    assert (
        passes(L, unit) == {"sub-layer": L * (L + 1) // 2, "block": L + L // 2 * (L // 2 - 1)}[unit]
    )
    results = []
    for batch_size in (1, 2 * SEQUENCES + 1, 100 * SEQUENCES):
        walk = walk_of(chunk, config, runtime, unit, batch_size=batch_size)
        results.append(found_by(walk, batch_of()))
        assert walk.stage.passes == SEQUENCES * passes(L, unit)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for number, one in results[0].items():
            assert other[number].losses == pytest.approx(one.losses, rel=1e-5)
            assert other[number].angles == pytest.approx(one.angles, rel=1e-4)


def test_what_is_left_costs_only_itself_and_the_trunk(keel: Any) -> None:
    chunk, config, runtime = keel
    everything = found_by(walk_of(chunk, config, runtime), batch_of())
    walk = walk_of(chunk, config, runtime, batch_size=100)
    found = found_by(walk, batch_of(), [1, 2, 6])
    assert set(found) == {1, 2, 6, NOTHING}
    assert walk.stage.passes == SEQUENCES * (8 + 6 + 5 + 1)
    for number, one in found.items():
        assert one.losses == pytest.approx(everything[number].losses, rel=1e-5)
        assert one.angles == pytest.approx(everything[number].angles, rel=1e-4)


def test_no_more_sequences_run_together_than_are_allowed(
    keel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, config, runtime = keel
    walk = walk_of(chunk, config, runtime, batch_size=3 * SEQUENCES)
    widths, apply = set(), walk.stage.apply
    monkeypatch.setattr(walk.stage, "apply", lambda l, x: widths.add(x.size(1)) or apply(l, x))
    found_by(walk, batch_of())
    assert widths == {SEQUENCES, 2 * SEQUENCES, 3 * SEQUENCES}


@pytest.mark.parametrize(("tensor", "pipeline", "unit"), [(1, 3, "sub-layer"), (2, 2, "block")])
def test_stages_hand_on_the_variants(tensor: int, pipeline: int, unit: Unit) -> None:
    ((expected, alone),) = run_ranks(1, split_walk, 1, 1, unit)
    ranks = run_ranks(tensor * pipeline, split_walk, tensor, pipeline, unit)
    assert sum(passed for _found, passed in ranks) == tensor * alone
    assert [bool(found) for found, _passed in ranks].count(True) == tensor  # the last stage
    found = ranks[-1][0]
    assert found.keys() == expected.keys()
    for number, one in expected.items():
        assert found[number].losses == pytest.approx(one.losses, rel=1e-5)
        assert found[number].angles == pytest.approx(one.angles, rel=1e-3)


def test_angular_distance() -> None:
    x = torch.tensor([1.0, 0.0])
    others = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    assert angular_distance(x.expand(4, 2), others).tolist() == pytest.approx([0, 0.25, 0.5, 1])
    # 1 - cos of such an angle is less than fp32 can tell from 0.
    small = torch.tensor([math.cos(1e-5), math.sin(1e-5)])
    assert angular_distance(x, small).item() == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_the_angle_is_that_of_the_whole_models_streams(keel: Any) -> None:
    chunk, config, runtime = keel
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in chunk.decoder.layers:
        layer.observer = lambda l, x, _branch, _alpha, new: seen.update({l: (x, new)})
    try:
        with torch.no_grad():
            chunk(batch_of().tokens, torch.arange(LENGTH)[None], None)
    finally:
        for layer in chunk.decoder.layers:
            layer.observer = None
    found = found_by(walk_of(chunk, config, runtime, "block"), batch_of())
    for number in range(4):
        x, new = seen[2 * number][0].double(), seen[2 * number + 1][1].double()
        cosine = nn.functional.cosine_similarity(x, new, dim=-1)
        expected = (cosine.clamp(-1, 1).acos() / math.pi).mean(0)
        assert found[number].angles == pytest.approx(expected.tolist(), rel=1e-4)
