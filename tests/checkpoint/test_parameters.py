"""Names and places of parameters, and the count of updates, in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.checkpoint import manifest
from keel_megatron.checkpoint.manifest import DamagedError
from keel_megatron.checkpoint.parameters import Placed, updates
from keel_megatron.checkpoint.places import Place
from keel_megatron.checkpoint.shard_file import blocks
from keel_megatron.checkpoint.sharding import NotFiniteError, Piece, Reader, ToSave, index, parts

GROUPS = [{"wd_mult": 1.0, "step": 4.0}, {"wd_mult": 0.0, "step": 4.0}]
COMMON_STEP = {"state": {"common_step": torch.tensor(4.0)}, "param_groups": [{"wd_mult": 1.0}]}
WHOLE = Place("norm", (4,), (0,), (4,), 0, 4)
MATRIX = Place("w", (2, 3), (0, 0), (2, 3), 0, 6)


@pytest.mark.parametrize(
    "saved",
    [
        {"updates": 4},
        {"optimizer": {"param_groups": GROUPS}, "param_state_sharding_type": "fully_reshardable"},
        {"optimizer": COMMON_STEP},
        COMMON_STEP,
        {"param_groups": GROUPS},
    ],
    ids=["now", "distributed", "replicated-bf16", "replicated-fp32", "other-adam"],
)
def test_the_count_of_updates_is_found(saved: dict[str, Any]) -> None:
    assert updates({"optimizer": saved}) == 4


@pytest.mark.parametrize("common", [{}, {"optimizer": None}, {"optimizer": {"param_groups": []}}])
def test_a_state_without_a_count_is_damaged(common: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match="no count"):
        updates(common)


def write(folder: Path, pieces: list[Piece]) -> dict[str, Any]:
    """A rank's file, and the index of it."""
    found = parts(ToSave(pieces, {}, 0))
    name = manifest.shards_name(0)
    (folder / name).write_bytes(b"".join(bytes(block) for block in blocks(found, {})))
    places = [(p.place, part.dtype) for p, part in zip(pieces, found, strict=True)]
    return index([(name, places)])


def placed(*places: Place) -> Placed:
    return Placed("x", torch.nn.Parameter(torch.empty(0)), places, is_main=True)


@pytest.mark.parametrize("name", ["optimizer.state.param.", "optimizer.state.fp32_param.", ""])
def test_a_master_is_found_under_every_name_it_had(name: str, tmp_path: Path) -> None:
    values = torch.arange(4.0)
    there = write(tmp_path, [Piece(Place(f"{name}norm", (4,), (0,), (4,), 0, 4), values)])
    target = torch.empty(3)
    placed(WHOLE).read(Reader(tmp_path, there), "param", target, 1)
    assert target.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(DamagedError, match=r"has no tensor optimizer\.state\.exp_avg\.norm"):
        placed(WHOLE).read(Reader(tmp_path, there), "exp_avg", target, 1)


def test_blocks_that_follow_each_other_are_written_and_read_in_ranges(tmp_path: Path) -> None:
    """Elements 2 to 8 of a parameter that consists of two tensors."""
    one, values = placed(MATRIX, WHOLE), torch.arange(2.0, 9.0)
    pieces = one.pieces("exp_avg", values, 2)
    assert [piece.place.name for piece in pieces] == [
        "optimizer.state.exp_avg.w[0,0][2:6]",
        "optimizer.state.exp_avg.norm[0][0:3]",
    ]
    there = write(tmp_path, pieces)
    target = torch.empty(4)
    one.read(Reader(tmp_path, there), "exp_avg", target, 4)
    assert target.tolist() == [4.0, 5.0, 6.0, 7.0]
    with pytest.raises(DamagedError, match=r"exp_avg\.w has 4 of 5 values there"):
        one.read(Reader(tmp_path, there), "exp_avg", torch.empty(5), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "BF16"}, "is BF16"),
        ({"shape": [5]}, r"is F32 \[5\] there"),
        ({"parts": [{"file": "rank_00000.safetensors"}]}, "index of .* is not valid"),
        ({"parts": [{"file": 3, "name": "x", "offset": [0], "block": [4]}]}, "is not valid"),
    ],
)
def test_an_index_that_does_not_fit_is_damage(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    there = write(tmp_path, placed(WHOLE).pieces("param", torch.ones(4)))
    there["optimizer.state.param.norm"] |= change
    with pytest.raises(DamagedError, match=message):
        placed(WHOLE).read(Reader(tmp_path, there), "param", torch.empty(4))


def test_a_piece_that_its_file_does_not_hold_is_damage(tmp_path: Path) -> None:
    there = write(tmp_path, placed(WHOLE).pieces("param", torch.ones(4)))
    (part,) = there["optimizer.state.param.norm"]["parts"]
    for change in ({"name": "other"}, {"range": [0, 3]}):
        changed = {"optimizer.state.param.norm": there["optimizer.state.param.norm"] | {}}
        changed["optimizer.state.param.norm"]["parts"] = [part | change]
        with pytest.raises(DamagedError, match=r"rank_00000\.safetensors has no"):
            placed(WHOLE).read(Reader(tmp_path, changed), "param", torch.empty(4))


def test_what_is_written_is_waited_for_and_must_be_finite() -> None:
    order: list[str] = []
    pieces = placed(WHOLE).pieces("param", torch.tensor([1.0, torch.nan, 2.0, 3.0]))
    (part,) = parts(ToSave(pieces, {}, 0, ready=lambda: order.append("ready")))
    with pytest.raises(NotFiniteError, match=r"optimizer\.state\.param\.norm\[0\]"):
        part.data()
    assert order == ["ready"]
