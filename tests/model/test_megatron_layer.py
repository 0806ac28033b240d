"""`pre_ln` against Megatron-core's own pre-norm TransformerLayer: losses and all gradients."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks
from tests.settings import small_config

STEPS = 3


def train_both() -> list[dict[str, float]]:
    """Relative differences of loss and gradients over some steps of plain SGD on both models."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from keel_megatron.layout.stages import own_partition
    from keel_megatron.model.language_model import build_model, transformer_config
    from keel_megatron.runtime.distributed import start
    from tests.training.ranks import made_up_batches

    config = small_config(model__residual="pre_ln", model__num_query_groups=2)
    found = []
    with start(config.parallel, config.training) as runtime:
        (ours,) = build_model(config, runtime)
        layout = own_partition(config, runtime).layout
        theirs = GPTModel(
            transformer_config(config, layout, 0, torch.float32, runtime.device),
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=config.data.vocab_size,
            max_sequence_length=config.data.seq_length,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
            share_embeddings_and_output_weights=False,
        )
        weights = dict(ours.named_parameters())
        assert weights.keys() == dict(theirs.named_parameters()).keys()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.dim() == 1:  # gains of 1 would hide a gain that is not applied
                    weights[name].add_(0.2 * torch.randn(parameter.shape))
                parameter.copy_(weights[name])
        s = config.data.seq_length
        later = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
        for step in range(STEPS):
            batch = made_up_batches(config, runtime, step)[0]
            losses = [
                model(batch.tokens, batch.position_ids, mask, labels=batch.labels).mean()
                for model, mask in ((ours, None), (theirs, later))
            ]
            for loss in losses:
                loss.backward()
            apart = [
                ((weights[name].grad - other.grad).norm() / other.grad.norm()).item()
                for name, other in theirs.named_parameters()
            ]
            found.append(
                {"loss": abs(losses[0].item() / losses[1].item() - 1), "gradient": max(apart)}
            )
            with torch.no_grad():
                for model in (ours, theirs):
                    for parameter in model.parameters():
                        parameter.sub_(0.5 * parameter.grad)
                        parameter.grad = None
    return found


def test_pre_ln_is_megatron_cores_own_layer() -> None:
    found = run_ranks(1, train_both)[0]
    assert len(found) == STEPS
    for difference in found:
        assert difference["loss"] == pytest.approx(0.0, abs=1e-6)
        assert difference["gradient"] == pytest.approx(0.0, abs=1e-5)
