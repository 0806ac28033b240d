"""With a key/value cache the logits are those without one, however sequences are batched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.inference import static_step
from keel_megatron.inference.decoder import Decoder
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.huggingface.models import disturb
from tests.settings import small_config

VOCABULARY = 512
RULES = {
    "keel": {"model__num_query_groups": 2},
    "pre_ln": {"model__num_query_groups": 4, "model__tie_embeddings": True},
    "hybrid_norm": {"model__num_query_groups": 2},
    "layer_norm_scaling": {},
    "complete_p": {"model__base_blocks": 1},
    "hyper_connections": {"model__expansion_rate": 2},
    "peri_ln": {"model__num_query_groups": 2, "model__embedding_norm": True},
    "mix_ln": {"model__num_query_groups": 2, "model__qk_norm": True},
    "scaled_post_ln_beta": {"model__num_query_groups": 1, "model__final_norm": False},
}


def run_config(rule: str, **overrides: Any) -> RunConfig:
    """A small run with weights so large that attention is sharp."""
    return small_config(
        model__residual=rule,
        model__blocks=3,
        model__init_std=0.1,
        **{**RULES[rule], **overrides},
    )


class Setup:
    """A model of random weights."""

    def __init__(self, config: RunConfig, runtime: Any) -> None:
        from keel_megatron.model.language_model import build_model

        (self.chunk,) = build_model(config, runtime)
        disturb(self.chunk)
        self.decoder = Decoder(self.chunk, config.model, runtime)
        self.static = Decoder(self.chunk, config.model, runtime, static=True)

    @torch.inference_mode()
    def recomputed(self, tokens: list[int]) -> Tensor:
        """Logits after tokens, without a cache."""
        positions = torch.arange(len(tokens))[None]
        logits: Tensor = self.chunk(torch.tensor([tokens]), positions, None)[0, -1]
        return logits


@pytest.fixture(scope="module", params=RULES)
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    config = run_config(request.param)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        yield Setup(config, runtime)


def tokens_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def check(cached: Tensor, recomputed: Tensor) -> None:
    """Logits [vocabulary] within 1e-5 of the largest, and the same choice where it is clear."""
    scale = max(1.0, float(recomputed.abs().max()))
    assert float((cached - recomputed).abs().max()) <= 1e-5 * scale
    first, second = recomputed.topk(2).values.tolist()
    if first - second > 1e-4:
        assert int(cached.argmax()) == int(recomputed.argmax())


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    new=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_logits_are_those_without_a_cache(
    setup: Setup, lengths: list[int], new: int, seed: int
) -> None:
    rows, following = tokens_of(lengths, seed), tokens_of([new] * len(lengths), seed + 1)
    logits = setup.decoder.prefill(rows, new)
    for step in range(new):
        assert logits is not None
        for row, line in zip(rows, logits, strict=True):
            check(line, setup.recomputed(row))
        column = [tokens[step] for tokens in following]
        rows = [[*row, token] for row, token in zip(rows, column, strict=True)]
        logits = setup.decoder.step(column)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    new=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_static_steps_have_the_same_logits(
    setup: Setup, lengths: list[int], new: int, seed: int
) -> None:
    rows, following = tokens_of(lengths, seed), tokens_of([new] * len(lengths), seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_step, "SMALLEST", 2)  # several extents
        setup.decoder.prefill(rows, new)
        setup.static.prefill(rows, new)
        for step in range(new):
            column = [tokens[step] for tokens in following]
            plain, static = setup.decoder.step(column), setup.static.step(column)
            assert plain is not None
            assert static is not None
            for own, other in zip(plain, static, strict=True):
                check(other, own)


def test_extents_are_few_and_hold_the_next_column() -> None:
    capacity = 1000
    extents = [static_step.extent_of(length, capacity) for length in range(capacity)]
    assert all(extent > length for length, extent in enumerate(extents))
    assert sorted(set(extents)) == [128, 256, 512, 1000]


def test_a_cache_that_does_not_fit_is_refused(setup: Setup) -> None:
    with pytest.raises(UserError, match=r"--batch-size: keys and values .* need \S+ GB, and"):
        setup.decoder.prefill([[1]], 10**12)


def split_logits(rule: str, tensor: int, pipeline: int) -> list[list[list[float]]] | None:
    """Logits of a prefill and two steps, from a rank of the last stage."""
    config = run_config(rule, parallel__tensor=tensor, parallel__pipeline=pipeline)
    with start(config.parallel, config.training) as runtime:
        from keel_megatron.model.language_model import build_model

        (chunk,) = build_model(config, runtime)
        decoder = Decoder(chunk, config.model, runtime)
        found = [decoder.prefill(tokens_of([5, 9], 0), 2), decoder.step([1, 2])]
        assert decoder.agree([runtime.rank] * 3) == [tensor * (pipeline - 1)] * 3
        found.append(decoder.step([3, 4]))
        return [one.tolist() for one in found if one is not None]


@pytest.mark.parametrize(
    ("rule", "tensor", "pipeline"),
    [("keel", 1, 3), ("hybrid_norm", 2, 2), ("mix_ln", 2, 1), ("hyper_connections", 1, 2)],
)
def test_every_layout_has_the_same_logits(rule: str, tensor: int, pipeline: int) -> None:
    (expected,) = run_ranks(1, split_logits, rule, 1, 1)
    found = run_ranks(tensor * pipeline, split_logits, rule, tensor, pipeline)
    assert found[0] == ([] if pipeline > 1 else found[-1])
    for own, other in zip(expected, found[-1], strict=True):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(own), rtol=1e-5, atol=1e-5)


def stored_stream_errors() -> tuple[float, float]:
    """Distances of logits from a bf16 stream's own pass: decoded, and of an fp32 stream."""
    overrides: dict[str, Any] = {"model__alpha": 1024.0, "model__stream": "bf16"}
    config, wide = run_config("keel", **overrides), run_config("keel", model__alpha=1024.0)
    (tokens,) = tokens_of([24], 3)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        setup, plain = Setup(config, runtime), Setup(wide, runtime)
        plain.chunk.load_state_dict(setup.chunk.state_dict())
        setup.decoder.prefill([tokens[:20]], 4)
        for token in tokens[20:]:
            cached = setup.decoder.step([token])
        assert cached is not None
        own, other = setup.recomputed(tokens), plain.recomputed(tokens)
        return float((cached[0] - own).norm()), float((other - own).norm())


def test_a_bf16_stream_is_stored_as_in_the_model_s_own_pass() -> None:
    """Products of other shapes differ by 1e-7, which turns few roundings into the other one."""
    ((decoded, wide),) = run_ranks(1, stored_stream_errors)
    assert decoded < 0.1 * wide
