"""Depth profiles: right in one process, and the same at every layout, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.depth.collector import DepthCollector, logit_max
from keel_megatron.depth.profile import QUANTITIES, DepthProfile, first_nonfinite
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from tests.distributed import run_ranks
from tests.model.test_exactness import pair_up, shape_of
from tests.reference_model import Attention, ReferenceModel
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches

STEPS = 2
POISONED = 5
SPLIT: dict[str, Any] = {"parallel__tensor": 2, "parallel__sequence": True}
PIPELINED: dict[str, Any] = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
RECOMPUTE: dict[str, Any] = {"parallel__recompute": "full"}
REPLICATED: dict[str, Any] = {"parallel__distributed_optimizer": False}
# All on four ranks: what tensor and pipeline leave over is data parallelism.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-replicated": REPLICATED,
    "tp2-dp2": {"parallel__tensor": 2},
    "tp2-sp-dp2-recompute": {**SPLIT, **RECOMPUTE},
    "tp2-sp-pp2-vpp2": {**SPLIT, **PIPELINED},
    "pp2-vpp2-dp2-recompute": {**PIPELINED, **RECOMPUTE},
}
MUON: dict[str, Any] = {"optimizer__name": "muon"}
SMALLER: dict[str, Any] = {"model__blocks": 5, "data__seq_length": 16}
MODELS: dict[str, dict[str, Any]] = {
    "keel": {**SMALLER, "model__num_query_groups": 2},
    "hybrid_norm": {**SMALLER, "model__residual": "hybrid_norm"},
    "scaled_post_ln_beta": {
        **SMALLER,
        "model__residual": "scaled_post_ln_beta",
        "model__qk_norm": True,
        "training__z_loss": 1e-3,
    },
    "hyper_connections": {**SMALLER, "model__residual": "hyper_connections"},
    "peri_ln": {**SMALLER, "model__residual": "peri_ln"},
    "layer_norm_scaling": {**SMALLER, "model__residual": "layer_norm_scaling"},
    "complete_p": {**SMALLER, "model__residual": "complete_p"},
}


def profiles(sections: dict[str, Any], poisoned: bool = False) -> list[DepthProfile]:
    """Profiles of some steps; gains and matrices are first made unlike each other."""
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, perturbed(build_model(config, runtime), poisoned))
        engine.optimizer.reload_model_params()
        found = []
        for step in range(STEPS):
            batches = made_up_batches(config, runtime, step)
            depth = DepthCollector(engine)
            rate = config.optimizer.learning_rate
            engine.train_step(batches, len(batches), rate, depth=depth)
            assert all(
                layer.observer is None
                and not layer.self_attention.core_attention._forward_pre_hooks
                for chunk in engine.chunks
                for layer in chunk.decoder.layers
            )
            found.append(depth.profile(step + 1))
        return found


def perturbed(chunks: list[Any], poisoned: bool) -> list[Any]:
    """Gains other than 1, so that one gain is not another's; or one matrix not a number."""
    with torch.no_grad():
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                generator = torch.Generator().manual_seed(layer.layer_number)
                for parameter in layer.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                if poisoned and layer.layer_number - 1 == POISONED // 2:
                    layer.mlp.linear_fc2.weight.fill_(torch.nan)
    return chunks


def at_each(runs: list[dict[str, Any]], poison_last: bool) -> list[list[DepthProfile]]:
    """The runs one after the other in this process."""
    found = []
    for number, sections in enumerate(runs):
        found.append(profiles(sections, poison_last and number == len(runs) - 1))
    return found


def launched(
    world_size: int, runs: dict[str, Any], poison_last: bool
) -> list[dict[str, list[DepthProfile]]]:
    """The runs' profiles by name, on every rank."""
    ranks = run_ranks(world_size, at_each, list(runs.values()), poison_last)
    return [dict(zip(runs, found, strict=True)) for found in ranks]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[DepthProfile]]:
    """Every model in one process, and Keel recomputed and in bf16."""
    runs = {name: settings(**model) for name, model in MODELS.items()}
    runs["recompute"] = settings(**MODELS["keel"], **RECOMPUTE)
    runs["bf16"] = settings(**MODELS["keel"], training__precision="bf16")
    runs["muon"] = settings(**MODELS["keel"], **MUON)
    return launched(1, runs, False)[0]


@pytest.fixture(scope="module")
def spread() -> dict[str, list[list[DepthProfile]]]:
    """Keel at every layout, all models at the hardest and one with a NaN: one launch."""
    runs = {name: settings(**MODELS["keel"], **layout) for name, layout in LAYOUTS.items()}
    hardest = {**SPLIT, **PIPELINED, **RECOMPUTE}
    runs |= {name: settings(**model, **hardest) for name, model in MODELS.items()}
    runs["bf16"] = settings(**MODELS["keel"], training__precision="bf16", parallel__pipeline=2)
    runs["muon"] = settings(**MODELS["keel"], **MUON, parallel__tensor=2)
    runs["poisoned"] = settings(**MODELS["keel"], **SPLIT, **PIPELINED)
    ranks = launched(4, runs, True)
    return {name: [found[name] for found in ranks] for name in runs}


def agree(found: list[DepthProfile], expected: list[DepthProfile], tolerance: float) -> None:
    worst = 0.0
    for here, there in zip(found, expected, strict=True):
        for name in QUANTITIES:
            ours, theirs = here.values[name], there.values[name]
            assert np.array_equal(np.ma.getmaskarray(ours), np.ma.getmaskarray(theirs)), name
            assert np.isfinite(theirs.compressed()).all(), name
            # A cosine near 0 is as exact as one near 1.
            absolute = tolerance if name == "update_cosine" else 0.0
            np.testing.assert_allclose(
                ours.compressed(), theirs.compressed(), tolerance, absolute, err_msg=name
            )
            if name != "update_cosine":
                worst = max([worst, *np.abs(ours / theirs - 1.0).compressed().tolist()])
    print(f"largest relative error: {worst:.1e}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_one_process_s_profile(
    layout: str, spread: dict[str, list[list[DepthProfile]]], alone: dict[str, list[DepthProfile]]
) -> None:
    for rank in spread[layout]:
        agree(rank, alone["keel"], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_one_process_s_profile_at_the_hardest_layout(
    model: str, spread: dict[str, list[list[DepthProfile]]], alone: dict[str, list[DepthProfile]]
) -> None:
    agree(spread[model][0], alone[model], 1e-5)


def test_muons_matrices_are_counted_by_their_owners(
    spread: dict[str, list[list[DepthProfile]]], alone: dict[str, list[DepthProfile]]
) -> None:
    for rank in spread["muon"]:
        agree(rank, alone["muon"], 1e-5)
    ours, adamws = (alone[name][0].values["update_to_weight"] for name in ("muon", "keel"))
    assert (np.abs(ours / adamws - 1.0) > 0.01).all()


def test_a_recomputed_pass_counts_once(alone: dict[str, list[DepthProfile]]) -> None:
    agree(alone["recompute"], alone["keel"], 1e-6)


def test_bf16_updates_are_the_fp32_masters(
    spread: dict[str, list[list[DepthProfile]]], alone: dict[str, list[DepthProfile]]
) -> None:
    """Of Adam's first update: every element by the rate, whatever the gradient's precision.

    Weights of 0.02 in bf16 are 1.2e-4 apart or nearer: an update read there would be off.
    """
    for found in (alone["bf16"], spread["bf16"][0]):
        ours, theirs = found[0].values["update_to_weight"], alone["keel"][0].values
        np.testing.assert_allclose(ours, theirs["update_to_weight"], rtol=1e-3)
        np.testing.assert_allclose(found[0].values["stream_rms"], theirs["stream_rms"], rtol=1e-2)


def test_what_is_not_finite_is_found_at_its_depth(
    spread: dict[str, list[list[DepthProfile]]],
) -> None:
    values = spread["poisoned"][0][0].values
    first = {name: first_nonfinite(found) for name, found in values.items()}
    assert first["branch_rms"] == first["stream_rms"] == first["weight_rms"] == POISONED
    assert first["update_cosine"] == first["update_size"] == POISONED
    assert first["attention_logit_max"] == POISONED + 1
    assert first["gradient_norm"] == 0
    assert first["outer_gain_mean"] is None


@pytest.mark.parametrize(("s", "groups"), [(1, 1), (700, 2), (1024, 4)])
def test_the_largest_logit_is_that_of_the_whole_matrix(s: int, groups: int) -> None:
    torch.manual_seed(s)
    query, key = torch.randn(s, 2, 4, 8), torch.randn(s, 2, groups, 8)
    key[-1] = 40.0 * query[0].mean(1, keepdim=True)  # the largest of all would be of the future
    whole = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(4 // groups, 2))
    causal = whole.tril() + torch.full((s, s), -torch.inf).triu(1)
    assert logit_max(query, key).item() == pytest.approx(causal.max().item() / 8**0.5, rel=1e-6)


REFERENCE: dict[str, Any] = {
    "model__num_query_groups": 2,
    "model__qk_norm": True,
    "training__global_batch_size": 2,
    "training__micro_batch_size": 2,
}
REFERENCES: dict[str, dict[str, Any]] = {
    "keel": REFERENCE,
    "layer_norm_scaling": {**REFERENCE, "model__residual": "layer_norm_scaling"},
    "peri_ln": {**REFERENCE, "model__residual": "peri_ln", "model__embedding_norm": True},
    "complete_p": {**REFERENCE, "model__residual": "complete_p"},
    "hyper_connections": {**REFERENCE, "model__residual": "hyper_connections"},
}
Beside = tuple[DepthProfile, dict[str, list[float]]]


def all_beside(runs: list[dict[str, Any]]) -> list[Beside]:
    return [beside_the_reference(sections) for sections in runs]


def beside_the_reference(sections: dict[str, Any]) -> Beside:
    """A step's profile, and what the plain model of tests/reference_model.py says it should be."""
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, perturbed(build_model(config, runtime), False))
        reference = ReferenceModel(shape_of(config))
        with torch.no_grad():
            for _name, ours, theirs in pair_up(engine.chunks[0], reference):
                theirs.copy_(ours)
        expected = plainly(reference, config, runtime)
        batches = made_up_batches(config, runtime, 0)
        depth = DepthCollector(engine)
        engine.train_step(batches, len(batches), config.optimizer.learning_rate, depth=depth)
        with torch.no_grad():
            pairs = list(pair_up(engine.chunks[0], reference))
            before = {id(theirs): theirs.clone() for _name, _ours, theirs in pairs}
            for _name, ours, theirs in pairs:
                theirs.copy_(ours)
        for sub in reference.sub_layers:
            matrices = matrices_of(sub)
            change = sum((p - before[id(p)]).square().sum() for p in matrices)
            size = sum(before[id(p)].square().sum() for p in matrices)
            expected["update_to_weight"].append((change / size).sqrt().item())
        return depth.profile(1), expected


def plainly(
    reference: ReferenceModel, config: RunConfig, runtime: Runtime
) -> dict[str, list[float]]:
    """What can be seen of a plain model from outside, by hooks on its sub-layers and branches."""
    seen: dict[int, dict[str, Tensor]] = {}

    shape = reference.shape
    factor = shape.base_blocks / shape.blocks if shape.residual == "complete_p" else 1.0

    def watch(l: int, sub: Any) -> Iterator[Any]:
        seen[l] = {}
        yield sub.register_forward_hook(lambda _m, i, o: seen[l].update(x=i[0], new=o))
        yield sub.F.register_forward_hook(lambda _m, i, _o: seen[l].update(z=i[0]))
        added = getattr(sub, "N_branch", sub.F)
        yield added.register_forward_hook(lambda _m, _i, o: seen[l].update(f=factor * o))

    hooks = [h for l, sub in enumerate(reference.sub_layers) for h in watch(l, sub)]
    (batch,) = made_up_batches(config, runtime, 0)
    reference(batch.tokens, batch.labels).backward()
    for hook in hooks:
        hook.remove()
    expected: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for l, sub in enumerate(reference.sub_layers):
        parameters = list(sub.parameters())
        matrices = torch.cat([p.flatten() for p in matrices_of(sub)])
        x, f, new = stream(seen[l]["x"]), seen[l]["f"], stream(seen[l]["new"])
        alpha = shape.L if shape.residual == "keel" and l >= 2 else 1.0
        cosine = torch.nn.functional.cosine_similarity(x, f, dim=-1)
        found = {
            "gradient_norm": torch.cat([p.grad.flatten() for p in parameters]).norm(),
            "gradient_rms": torch.cat([p.grad.flatten() for p in matrices_of(sub)])
            .square()
            .mean()
            .sqrt(),
            "stream_rms": new.square().mean().sqrt(),
            "branch_rms": f.square().mean().sqrt(),
            "update_cosine": cosine.mean(),
            "update_size": (f.norm(dim=-1) / (alpha * x).norm(dim=-1)).mean(),
            "weight_rms": matrices.square().mean().sqrt(),
            "attention_logit_max": largest_logit(sub.F, seen[l]["z"]) if l % 2 == 0 else None,
        }
        norms = {"outer": "N_out", "inner": "N_in", "branch": "N_branch"}
        for which, kept in norms.items():
            norm = getattr(sub, kept, None)
            gain = None if norm is None else norm.gain
            found[f"{which}_gain_mean"] = None if gain is None else gain.mean()
            found[f"{which}_gain_min"] = None if gain is None else gain.min()
            found[f"{which}_gain_max"] = None if gain is None else gain.max()
        found["update_kept"] = None  # the stream is fp32
        for name, value in found.items():
            expected[name].append(np.nan if value is None else value.item())
    return expected


def matrices_of(sub: Any) -> list[Tensor]:
    """Of a sub-layer of the reference, without the mixes of its streams."""
    return [p for name, p in sub.named_parameters() if p.dim() > 1 and name != "A_r"]


def stream(x: Tensor) -> Tensor:
    """The stream [b, s, h]; of several the mean."""
    return x.mean(0) if x.dim() == 4 else x


def test_what_a_bf16_stream_keeps_of_an_update() -> None:
    """Sub-layer 2 of Keel, whose sum has an outer norm, beside fp64."""
    config = small_config(
        model__blocks=2,
        model__stream="bf16",
        data__seq_length=16,
        training__global_batch_size=2,
    )
    shape, alpha, generator = (16, 2, 64), 512.0, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16().float()
    f = torch.randn(shape, generator=generator)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        from keel_megatron.model.language_model import build_model

        engine: Any = SimpleNamespace(
            config=config, runtime=runtime, chunks=perturbed(build_model(config, runtime), False)
        )
        gain = engine.chunks[0].decoder.layers[1].attention_outer_norm.weight.detach().double()
        u = alpha * x.double() + f.double()
        exact = u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        stored = exact.bfloat16()
        depth = DepthCollector(engine)
        depth._joined(2, x, f, alpha, stored.float())
        found = depth.profile(1).values["update_kept"]
    cosine = torch.cosine_similarity(stored.double() - x, exact - x, dim=-1).mean().item()
    assert found[2] == pytest.approx(cosine, abs=1e-4)
    assert not np.ma.getmaskarray(found).any()


def largest_logit(attention: Attention, z: Tensor) -> Tensor:
    s, d = z.size(1), attention.shape.head_dim
    q, k, _v = attention.heads(z)
    k = k.repeat_interleave(q.size(2) // k.size(2), 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / d**0.5
    return scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -torch.inf).max()


@pytest.fixture(scope="module")
def beside() -> dict[str, Beside]:
    runs = [settings(**overrides) for overrides in REFERENCES.values()]
    return dict(zip(REFERENCES, run_ranks(1, all_beside, runs)[0], strict=True))


@pytest.mark.parametrize("rule", REFERENCES)
def test_a_profile_is_what_an_independent_model_says(rule: str, beside: dict[str, Beside]) -> None:
    profile, expected = beside[rule]
    for name in QUANTITIES:
        found = profile.values[name].filled(np.nan)
        # fp32 in another order; an update is a small difference of weights.
        np.testing.assert_allclose(found, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
