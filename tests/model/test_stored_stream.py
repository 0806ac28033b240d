"""`model.stream`: every mode against plain torch, and the same random bits at every layout."""

from __future__ import annotations

import copy
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel_megatron import kernels
from keel_megatron.config.run import RunConfig
from keel_megatron.model import stream as streams
from keel_megatron.model.stream import Noise, stochastically, stored, storing
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import zero
from tests.model.test_exactness import config_of, pair_up, relative, shape_of
from tests.reference_model import ReferenceModel, SubLayerReference
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches, train_steps

MODES = ("bf16", "bf16_add", "bf16_stochastic")
RULES = [("keel", "v2"), ("keel", "v1"), ("pre_ln", "v2"), ("scaled_post_ln_beta", "v2")]
SEED = 1234
Round = Callable[[Tensor, int], Tensor]


def words(x: Any) -> Any:
    """The hash in numpy's own 32-bit arithmetic, which wraps."""
    x = np.asarray(x, dtype=np.uint32)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def expected_bits(seed: int, sequence: int, l: int, s: int, h: int) -> Any:
    """Bits [s, h] of a sequence after sub-layer l."""
    low = words((sequence & 0xFFFFFFFF) ^ int(words(seed)))
    key = words(low ^ np.uint32(sequence >> 32))
    key = words(key ^ words(l + 1))
    pairs = (h + 1) // 2
    word = words(words(np.arange(s * pairs).reshape(s, pairs)) ^ key)
    return np.concatenate((word & np.uint32(0xFFFF), word >> np.uint32(16)), axis=1)[:, :h]


def near(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def at_random(x: Tensor, l: int) -> Tensor:
    """Stochastic rounding of [b, s, h] by whole numbers: units of the last place, rounded down."""
    b, s, h = x.shape
    bits = np.stack([expected_bits(SEED, number, l, s, h) for number in range(b)])
    exact = x.detach().float().double().numpy()
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    rounded = np.trunc(exact / unit + np.sign(exact) * bits / 65536) * unit
    return torch.from_numpy(rounded).to(x.dtype)


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded x, with a gradient that passes through and is rounded itself."""
    out = x + (rounded - x).detach()
    out.register_hook(near)
    return out


def after(m: SubLayerReference, x: Tensor, mode: str, rounding: Round) -> Tensor:
    """The stored stream after a sub-layer, from the equation of model/stream.py."""
    alpha = {"keel": m.shape.L if m.l >= 2 else 1, "pre_ln": 1}.get(m.shape.residual, m.shape.L)
    z = m.beta * x if hasattr(m, "beta") else m.N_in(x)
    branch = m.F(z)
    if mode == "bf16_add":
        x = (x.bfloat16() * alpha + branch.bfloat16()).to(x.dtype)
    else:
        x = alpha * x + branch
    x = m.N_out(x) if hasattr(m, "N_out") else x
    return through(x, rounding(x, m.l))


def reference_loss(model: ReferenceModel, mode: str, tokens: Tensor, labels: Tensor) -> Tensor:
    rounding: Round = at_random if mode == "bf16_stochastic" else lambda x, _l: near(x)
    x = model.embedding[tokens]
    x = through(x, rounding(x, -1))
    for m in model.sub_layers:
        x = after(m, x, mode, rounding)
    log_p = torch.log_softmax(model.final_norm(x) @ model.head.T, dim=-1)
    return -log_p.gather(-1, labels[..., None]).mean()


def pair(config: RunConfig, runtime: Any) -> tuple[Any, ReferenceModel]:
    """The package's model in fp64, and a reference with the same weights."""
    from keel_megatron.model.language_model import build_model

    (package,) = build_model(config, runtime, compute_dtype=torch.float64)
    reference = ReferenceModel(shape_of(config)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in package.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for _name, ours, theirs in pair_up(package, reference):
            theirs.copy_(ours)
    return package, reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rule", "first_block"), RULES)
def test_losses_and_gradients_are_those_of_plain_torch(
    mode: str, rule: str, first_block: str
) -> None:
    """In fp64, where two implementations round to the same bf16 number."""
    config = config_of(rule, 4, model__first_block=first_block)
    config = config.model_copy(update={"model": config.model.model_copy(update={"stream": mode})})
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        package, reference = pair(config, runtime)
        rows = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(1))
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        loss = package(tokens, None, None, labels=labels, sequences=torch.arange(2)).mean()
        loss.backward()
        expected = reference_loss(reference, mode, tokens, labels)
        expected.backward()
        plain = copy.deepcopy(reference)(tokens, labels)
        assert abs(loss.item() / plain.item() - 1) > 1e-6, "nothing was rounded"
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        for parameter in package.parameters():
            parameter.data = parameter.grad
        for name, ours, theirs in pair_up(package, reference):
            assert relative(ours, theirs.grad) < 1e-8, name


def test_an_fp32_stream_is_untouched() -> None:
    assert storing("fp32", kernels.scaled_add_norm) is kernels.scaled_add_norm
    x = torch.randn(3, 2, 8)
    assert stored("fp32", x) is x


def test_the_stored_gradient_is_bf16() -> None:
    x = torch.randn(5, 2, 8, requires_grad=True)
    stored("bf16", x).backward(gradient := torch.randn(x.shape))
    assert torch.equal(x.grad, gradient.bfloat16().float())


def test_stochastic_rounding_is_unbiased() -> None:
    """Over 1000 steps the mean is the exact value, and every result one of its two neighbours."""
    x = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
    steps, total = 1000, torch.zeros(x.shape, dtype=torch.float64)
    unit = torch.exp2(x.abs().log2().floor() - 7)
    share = (x / unit).frac().abs()  # of the way from the number towards 0 to the next one
    for step in range(steps):
        found = stochastically(x, Noise(SEED, 4 * step + torch.arange(4)).bits(5, x))
        assert torch.equal(found, near(found))
        assert ((found - x).abs() < unit).all()
        total += found
    error = (total / steps - x) / unit
    deviation = (share * (1 - share) / steps).sqrt()
    print(f"largest error {float((error / deviation).abs().max()):.2f} standard deviations")
    assert (error.abs() <= 5 * deviation + 1e-12).all()
    assert abs(float((error / deviation).mean())) < 5 / x.numel() ** 0.5


def test_what_is_not_finite_stays() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0])
    ones = torch.full((6,), 0xFFFF, dtype=torch.int32)
    assert torch.equal(stochastically(x, ones)[1:], x[1:])
    negative = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN of ones alone
    assert stochastically(torch.cat((x[:1], negative)), ones[:2]).isnan().all()


def test_bits_depend_on_every_coordinate() -> None:
    x = torch.empty(6, 3, 10)
    base = Noise(SEED, torch.tensor([0, 1, 2**33])).bits(4, x)
    for b, number in enumerate((0, 1, 2**33)):
        assert np.array_equal(base[:, b].numpy(), expected_bits(SEED, number, 4, 6, 10))
    same = (base[:, 0] == base[:, 1]).float().mean()
    others = [
        Noise(SEED + 1, torch.arange(3)).bits(4, x),
        Noise(SEED, torch.arange(3)).bits(5, x),
        Noise(SEED, torch.arange(3), part=1).bits(4, x),
    ]
    assert max(float(same), *(float((one == base).float().mean()) for one in others)) < 0.02


PP2 = {"parallel__pipeline": 2}
COMMON: dict[str, Any] = {
    "model__blocks": 4,
    "model__num_query_groups": 2,
    "model__stream": "bf16_stochastic",
    "training__global_batch_size": 8,
}
ONE: dict[str, dict[str, Any]] = {
    "one micro-batch": {"training__micro_batch_size": 8},
    "micro-batches of 2, recomputed": {"parallel__recompute": "full"},
    "light recomputation": {"parallel__recompute": "light"},
}
TWO: dict[str, dict[str, Any]] = {
    "DP 2": {"training__micro_batch_size": 1},
    "PP 2 x VPP 2": {**PP2, "parallel__virtual_pipeline": 2},
    "PP 2, recomputed": {**PP2, "parallel__recompute": "full"},
    "TP 2": {"parallel__tensor": 2},
    "TP 2 + SP": {"parallel__tensor": 2, "parallel__sequence": True},
}
if importlib.util.find_spec("deepspeed") is not None:
    ONE["ZeRO 2"] = {**zero(2), "optimizer__clip_grad": 1.0}

Bits = dict[tuple[int, int], dict[int, bytes]]
"""(sub-layer, sequence) to a rank's part of the sequence to its bits."""


def recorded(sections: dict[str, dict[str, Any]]) -> tuple[Bits, list[tuple[float, float]]]:
    """The bits that this rank drew in two steps, and what the steps and a validation gave."""
    found: Bits = defaultdict(dict)
    plain = Noise.bits

    def record(noise: Noise, l: int, x: Tensor) -> Tensor:
        bits = plain(noise, l, x)
        for b, number in enumerate(noise.sequences.tolist()):
            row = bits[:, b].numpy().astype(np.uint16).tobytes()
            assert found[l, number].setdefault(noise.part, row) == row, "a repeated pass differs"
        return bits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Noise, "bits", record)
        steps = train_steps(sections, 2)
    return dict(found), steps


def record_all(runs: list[dict[str, dict[str, Any]]]) -> list[Any]:
    return [recorded(sections) for sections in runs]


def merged(ranks: list[Bits]) -> dict[tuple[int, int], bytes]:
    """All sequences whole; ranks that hold the same part agree."""
    parts: Bits = defaultdict(dict)
    for rank in ranks:
        for place, rows in rank.items():
            for part, row in rows.items():
                assert parts[place].setdefault(part, row) == row, "ranks differ"
    return {place: b"".join(row for _part, row in sorted(parts[place].items())) for place in parts}


@pytest.fixture(scope="module")
def layouts() -> dict[str, tuple[dict[tuple[int, int], bytes], Any]]:
    found = {}
    for size, runs in ((1, ONE), (2, TWO)):
        sections = [settings(**{**COMMON, **overrides}) for overrides in runs.values()]
        ranks = run_ranks(size, record_all, sections)
        for name, of_ranks in zip(runs, zip(*ranks, strict=True), strict=True):
            found[name] = merged([bits for bits, _losses in of_ranks]), of_ranks[0][1]
    return found


@pytest.mark.parametrize("layout", [name for name in (*ONE, *TWO) if name != "one micro-batch"])
def test_every_layout_draws_the_same_bits(layout: str, layouts: dict[str, Any]) -> None:
    (bits, losses), (expected, losses_there) = layouts[layout], layouts["one micro-batch"]
    assert len(expected) == 2 * 8 * (2 * 4 + 1)  # steps, sequences, sub-layers and the embedding
    assert len({*expected.values()}) == len(expected)
    assert bits == expected
    print(layout, *zip(losses, losses_there, strict=True))
    for here, there in zip(losses, losses_there, strict=True):
        assert here == pytest.approx(there, rel=2e-4)


def passes(mode: str, recompute: str) -> tuple[float, list[Tensor], dict[int, list[Tensor]]]:
    """Loss, gradients, and the streams of every pass through each sub-layer."""
    from keel_megatron.engines.base import forward
    from keel_megatron.model.language_model import build_model

    config = small_config(**{**COMMON, "model__stream": mode}, parallel__recompute=recompute)
    seen: dict[int, list[Tensor]] = defaultdict(list)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            layer.observer = lambda l, _x, _f, _alpha, x_new: seen[l].append(x_new.detach())
        loss = forward(chunk, made_up_batches(config, runtime, 0)[1]).mean()
        loss.backward()
        return loss.item(), [p.grad for p in chunk.parameters()], seen  # type: ignore[misc]


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_repeats_the_stored_stream(mode: str) -> None:
    loss, gradients, plain = passes(mode, "none")
    for recompute, times in (("full", 2), ("light", 1)):
        again, others, seen = passes(mode, recompute)
        assert again == loss
        assert all(map(torch.equal, gradients, others))
        for l, (stream,) in plain.items():
            assert torch.equal(stream, near(stream))
            assert len(seen[l]) == times
            assert all(torch.equal(stream, other) for other in seen[l])


def test_validation_rounds_to_nearest() -> None:
    from keel_megatron.engines.base import forward
    from keel_megatron.model.language_model import build_model

    found = []
    for mode in ("bf16", "bf16_stochastic"):
        config = small_config(**{**COMMON, "model__stream": mode})
        with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
            (chunk,) = build_model(config, runtime)
            batch = made_up_batches(config, runtime, 0)[0]
            with torch.no_grad():
                found.append([forward(chunk.train(training), batch) for training in (True, False)])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[1][0], found[1][1])


def test_training_without_the_sequences_numbers_is_an_error() -> None:
    from keel_megatron.model.language_model import build_model

    config = small_config(**COMMON)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        with pytest.raises(ValueError, match="needs the sequences' numbers"):
            chunk(torch.zeros(1, 4, dtype=torch.long), None, None)
