"""Rank 0 leads, the others serve its calls until it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keel_megatron.errors import UserError
from keel_megatron.evaluation.rows import Row
from keel_megatron.evaluation.serving import Served
from keel_megatron.inference.sampling import Sampling
from keel_megatron.inference.source import opened
from tests.distributed import run_ranks


def lead(run: str, diverged: bool, call: str) -> str:
    """What a rank ends with.

    Args:
        run: of two replicas.
        diverged: whether the second one's weights are not finite.
        call: what rank 0 calls before an error of its own.
    """
    with opened(Path(run), processes=2, model_processes=1) as (source, runtime):
        served = Served(source, runtime)
        if diverged and runtime.data_rank == 1:
            with torch.no_grad():
                next(source.model.parameters()).fill_(float("nan"))
        try:
            if not runtime.is_main:
                served.serve()
                return "ended"
            with served.leading():
                if call == "score":
                    assert len(served.score([Row((1, 2, 3), 2), Row((1, 2), 1)])) == 2
                else:
                    assert len(served.generate([[1], [2]], Sampling(2, 0.0))) == 2
                raise UserError("rank 0 alone")
        except UserError as error:
            return f"{error.reported}: {error}"


def test_an_error_of_rank_0_ends_the_others(runs: Path) -> None:
    found = run_ranks(2, lead, str(runs / "keel"), False, "score")
    assert found == ["False: rank 0 alone", "ended"]


@pytest.mark.parametrize("call", ["score", "generate"])
def test_an_error_of_a_call_is_every_ranks(runs: Path, call: str) -> None:
    """Also if only one replica meets it."""
    main, other = run_ranks(2, lead, str(runs / "keel"), True, call)
    assert main.startswith("False: the model's logits are not finite")
    assert other == main.replace("False", "True", 1)
