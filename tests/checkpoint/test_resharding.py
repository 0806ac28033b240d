"""Every replica writes its own slices, and any layout puts them together, to the last bit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from keel_megatron.checkpoint import folder, manifest, state
from tests.checkpoint.ranks import Ran, Sections, run_in_turn
from tests.checkpoint.state_ranks import (
    Saving,
    engine_of,
    load_all,
    measure,
    path_of,
    save_all,
    staged_devices,
)
from tests.distributed import run_ranks
from tests.settings import settings

OLD = Path(__file__).parent / "format_1" / "bf16-tp2.tar.xz"
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
VPP2 = {**PP2, "parallel__virtual_pipeline": 2}
WHOLE = {"parallel__distributed_optimizer": False}
TIED = {"model__tie_embeddings": True}
FP32 = {"training__precision": "fp32"}
# Name -> (processes, overrides) of the layouts that save and load; all but "fp32" in bf16.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2-replicated-optimizer": (2, WHOLE),
    "dp2-fp32": (2, FP32),
    "dp3": (3, {}),
    "dp4": (4, {}),
    "tp2-dp2": (4, TP2),
    "tp2-dp2-replicated-optimizer": (4, {**TP2, **WHOLE}),
    "pp2-vpp2-dp2": (4, VPP2),
    "tp2-pp2": (4, {**TP2, **PP2}),
}
MUON = {"optimizer__name": "muon"}
MUON_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "muon-one": (1, MUON),
    "muon-dp3-fp32": (3, {**MUON, **FP32}),
    "muon-dp2-replicated-optimizer": (2, {**MUON, **WHOLE}),
    "muon-tp2-dp2": (4, {**MUON, **TP2}),
    "muon-pp2-vpp2-dp2": (4, {**MUON, **VPP2}),
}
TIED_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, TIED),
    "tp2": (2, {**TP2, **TIED}),
    "pp2-dp2": (4, {**PP2, **TIED}),
}
STREAMS = {"model__residual": "hyper_connections"}
STREAMS_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, STREAMS),
    "tp2-pp2": (4, {**TP2, **PP2, "parallel__sequence": True, **STREAMS}),
}
Differences = dict[tuple[str, str], list[str]]


def sections(runs: Path, name: str, **overrides: Any) -> Sections:
    """Rows of 40 and 72, so that ranges of replicas end within rows."""
    return settings(
        **{
            "training__runs_dir": str(runs),
            "training__name": name,
            "training__global_batch_size": 12,
            "training__micro_batch_size": 1,
            "training__precision": "bf16",
            "model__blocks": 4,
            "model__hidden_size": 40,
            "model__ffn_hidden_size": 72,
            **overrides,
        }
    )


def matrix(runs: Path, layouts: dict[str, tuple[int, dict[str, Any]]]) -> Differences:
    """What differs on any rank, by the layouts of one optimizer that saved and loaded."""
    configs = {name: sections(runs, name, **o) for name, (_size, o) in layouts.items()}
    seeds = {name: number for number, name in enumerate(layouts, start=1)}
    sizes = sorted({size for size, _overrides in layouts.values()})
    of = {size: [n for n, (wanted, _o) in layouts.items() if wanted == size] for size in sizes}
    for size, names in of.items():
        run_ranks(size, save_all, [configs[n] for n in names], [seeds[n] for n in names])
    saved = {str(path_of(configs[name])): seeds[name] for name in layouts}
    found: Differences = {}
    for size, names in of.items():
        for rank in run_ranks(size, load_all, [configs[n] for n in names], saved):
            for pair, differences in rank.items():
                found.setdefault(pair, []).extend(differences)
    muons = sum(name.startswith("muon") for name in layouts)
    assert len(found) == muons**2 + (len(layouts) - muons) ** 2
    return found


def test_every_layout_loads_what_every_other_saved(tmp_path: Path) -> None:
    """Masters, moments and weights of all ranks, all elements, to the last bit."""
    found = matrix(tmp_path, {**LAYOUTS, **MUON_LAYOUTS})
    assert {pair: wrong for pair, wrong in found.items() if wrong} == {}
    for name in (*LAYOUTS, *MUON_LAYOUTS):
        manifest.check(folder.step_folder(tmp_path / name, 1))


def test_mixes_of_streams_are_read_at_another_layout(tmp_path: Path) -> None:
    found = matrix(tmp_path, STREAMS_LAYOUTS)
    assert {pair: wrong for pair, wrong in found.items() if wrong} == {}


def test_tied_embeddings_are_written_once_and_read_twice(tmp_path: Path) -> None:
    found = matrix(tmp_path, TIED_LAYOUTS)
    assert {pair: wrong for pair, wrong in found.items() if wrong} == {}


@pytest.fixture(scope="module")
def savings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Saving]]:
    runs = tmp_path_factory.mktemp("runs")
    names = ["dp2", "dp2-replicated-optimizer", "dp4", "one"]
    return {
        name: run_ranks(size, measure, sections(runs, name, **overrides))
        for name, (size, overrides) in LAYOUTS.items()
        if name in names
    }


def test_a_save_gathers_nothing(savings: dict[str, list[Saving]]) -> None:
    """Neither does reading. What a whole save sends is text, counts and votes."""
    for ranks in savings.values():
        for rank in ranks:
            assert rank.to_save == rank.to_read == []
            assert rank.whole_save or len(ranks) == 1  # they are seen
            for _name, dtype, size in rank.whole_save:
                assert dtype != "torch.float32" or size <= 8


def test_a_save_that_training_waits_for_is_staged_too_where_it_is_on_a_device() -> None:
    """Not on the host, where it is written from the optimizer's own memory."""
    (found,) = run_ranks(1, staged_devices, settings(model__blocks=1))
    assert found == ([], ["meta"])


def test_each_replica_writes_its_share(savings: dict[str, list[Saving]]) -> None:
    """12 bytes a parameter, once; even but for the padding of Megatron-core's buffers."""
    for ranks in savings.values():
        written = [rank.written for rank in ranks]
        assert sum(written) == 12 * ranks[0].numel
        assert max(written) <= 1.05 * sum(written) / len(ranks)


OLD_MODEL: dict[str, Any] = {
    **TIED,
    "training__precision": "bf16",
    "training__global_batch_size": 4,
    "training__micro_batch_size": 2,
    "training__steps": 4,
    "model__blocks": 1,
    "model__hidden_size": 8,
    "model__ffn_hidden_size": 8,
    "model__num_attention_heads": 2,
    "model__num_query_groups": 2,
    "data__vocab_size": 320,
    "data__seq_length": 16,
}


OLD_LAYOUTS: dict[str, dict[str, Any]] = {"tp2": TP2, "dp2": {}, "pp2": {"parallel__pipeline": 2}}


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Rank 0's runs from what the version before has written: format 1, two tensor ranks."""
    runs = tmp_path_factory.mktemp("runs")
    for name in OLD_LAYOUTS:
        with tarfile.open(OLD) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4 on
            archive.extractall(runs)
        (runs / "bf16-tp2").rename(runs / name)
    configs = [sections(runs, name, **OLD_MODEL, **o) for name, o in OLD_LAYOUTS.items()]
    return {n: ranks[0] for n, ranks in zip(OLD_LAYOUTS, run_in_turn(2, configs), strict=True)}


@pytest.mark.parametrize("name", OLD_LAYOUTS)
def test_a_checkpoint_of_format_1_goes_on(name: str, continued: dict[str, Ran]) -> None:
    """With the losses and gradient norms with which the version before went on."""
    assert continued[name].error is None
    assert continued[name].resumed == "step_00000002"
    there = [
        (3, 5.764880180358887, 0.5074684738364209),
        (4, 5.7737462520599365, 0.4932562864582593),
    ]
    for here, earlier in zip(continued[name].losses, there, strict=True):
        assert here == pytest.approx(earlier, rel=1e-3 if name != "tp2" else 1e-5)


def loaded_old(config: Sections, path: Path) -> list[tuple[str, str, torch.Tensor]]:
    """State, name and values of what one process has after loading a checkpoint."""
    with engine_of(config) as (parsed, runtime, engine):
        state.load(path, parsed, runtime, engine.state)
        return [
            (name, key, values.clone().view(parameter.shape))
            for key, parameter in engine.chunks[0].named_parameters()
            for name, values in engine.state.shards.states(parameter).items()
        ]


def test_format_1_is_read_to_the_last_bit(tmp_path: Path) -> None:
    """Against its whole blocks, put together here by their offsets."""
    with tarfile.open(OLD) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4 on
        archive.extractall(tmp_path)
    path = tmp_path / "bf16-tp2" / "checkpoints" / "step_00000002"
    index = json.loads((path / "index.json").read_text())
    config = sections(tmp_path, "one", **OLD_MODEL)
    (found,) = run_ranks(1, loaded_old, config, path)
    assert len(found) == 3 * len({key for _name, key, _values in found})
    for name, key, values in found:
        entry = index[f"optimizer.state.{name}.{key}"]
        whole = torch.full(entry["shape"], torch.nan)
        for part in entry["parts"]:
            with safe_open(path / part["file"], "pt") as file:
                block = file.get_tensor(part["name"])
            axes = zip(part["offset"], block.shape, strict=True)
            whole[tuple(slice(begin, begin + size) for begin, size in axes)] = block
        assert torch.equal(values, whole), key
