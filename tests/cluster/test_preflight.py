"""The comparison of nodes: what differs is told by host, what is not shared is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.cluster import preflight
from keel_megatron.cluster.preflight import Node
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.rendezvous import differences
from tests.distributed import run_ranks
from tests.settings import settings, small_config


def test_differences_are_told_by_host() -> None:
    norm = {"torch": "2.13.0", "model.blocks": 8, "numpy": "2.4.6"}
    told = [
        ("a", norm),
        ("a", norm),
        ("b", norm | {"torch": "2.12.0", "model.blocks": 12}),
        ("b", norm | {"torch": "2.12.0", "model.blocks": 12}),
        ("c", {name: value for name, value in norm.items() if name != "numpy"}),
    ]
    assert differences(told).splitlines() == [
        "the nodes differ; compared with host a, which has rank 0",
        "  host b: torch is 2.12.0, not 2.13.0; model.blocks is 12, not 8 (rank 2, 3)",
        "  host c: numpy is absent, not 2.4.6 (rank 4)",
    ]
    assert differences(told[:2]) == ""
    many = {f"key{n}": n for n in range(20)}
    assert differences([("a", many), ("b", {})]).count(" is absent") == 6
    assert "; and 14 more (rank 1)" in differences([("a", many), ("b", {})])


def disagree(sections: dict) -> tuple[str, bool]:
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    # Layouts whose groups would wait for each other for ever.
    size = 2 if os.environ["RANK"] == "2" else 1
    parallel = config.parallel.model_copy(update={"pipeline": size})
    try:
        with start(parallel, config.training, identical={"parallel.pipeline": size}):
            return "no error", False
    except UserError as error:
        return str(error), error.reported


def test_ranks_of_other_layouts_learn_it_before_they_make_groups() -> None:
    found = run_ranks(4, disagree, settings())
    assert all("parallel.pipeline is 2, not 1 (rank 2)" in text for text, _ in found)
    assert [reported for _, reported in found] == [False, True, True, True]


def check(sections: dict, folders: list[str]) -> Any:
    from keel_megatron.runtime.distributed import start

    os.environ["LOCAL_RANK"] = "0"
    sections["training"]["runs_dir"] = folders[int(os.environ["RANK"])]
    sections["data"]["cache_dir"] = folders[0]
    config = RunConfig.model_validate(sections)
    preflight.SHARED_SECONDS = 0.5
    with start(config.parallel, config.training) as runtime:
        rank = runtime.rank
        runtime = type(runtime)(**{**vars(runtime), "hosts": ("a", "b")})
        assert runtime.host == "ab"[rank]
        try:
            return preflight.check(config, runtime)
        except UserError as error:
            return str(error)


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    sections = settings(parallel__pipeline=2)
    shared = [str(tmp_path / "runs")] * 2
    one, two = run_ranks(2, check, sections, shared)
    assert one == two
    assert one[0].startswith("pre-flight of 2 node(s), 2 rank(s), ")
    assert one[1].startswith("  pipeline, between hosts: 1 link(s), ")
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left behind

    own = [str(tmp_path / "runs"), str(tmp_path / "elsewhere")]
    one, two = run_ranks(2, check, sections, own)
    assert one == two
    assert "on host b does not show what rank 0 wrote; it must be one folder that all" in one


def test_two_launchers_on_one_node_are_refused() -> None:
    nodes = [
        Node("a", 0, [80.0], 0.0),
        Node("b", 0, [80.0], 0.0),
        Node("a", 0, [80.0], 0.0),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight.dist, "get_rank", lambda: 0)
        with pytest.raises(
            UserError, match="ranks 0 and 2 are both process 0 of a host a: start one"
        ):
            preflight._check_devices(nodes)
        preflight._check_devices(nodes[:2])


def test_clocks_and_devices_that_differ_are_warned_of() -> None:
    nodes = [Node("a", 0, [80.0] * 8, 100.0), Node("b", 0, [80.0] * 7, 107.5)]
    lines = preflight._report(small_config(), nodes, [], [], 0.4)
    assert lines[1:] == [
        "warning: the clock of host b is 7.5 s ahead of that of host a: time limits and "
        "log times will differ",
        "warning: host b has 7 device(s) of 80 GB, others 8 of 80 GB",
    ]


@pytest.mark.parametrize(
    ("choice", "launch", "expected"),
    [
        ("auto", Launch(0, 4, 0, 4), False),
        ("auto", Launch(0, 4, 0, 2), True),
        ("always", Launch(0, 1, 0, 1), True),
        ("never", Launch(0, 4, 0, 2), False),
    ],
)
def test_when_there_is_one(choice: str, launch: Launch, expected: bool) -> None:
    assert preflight.wanted(small_config(parallel__preflight=choice), launch) is expected
