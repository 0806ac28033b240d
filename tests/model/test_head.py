"""The head within the whole model: losses without logits, and logits where they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tests.distributed import run_ranks
from tests.settings import settings

N, V, H = 2 * 64, 2048, 64
"""Tokens of a micro-batch, the vocabulary and the hidden size."""
# Of those tokens' logits 25 at once.
PIECES: dict[str, Any] = {"kernels__logits_mib": 0.2, "kernels__triton": ["norm"]}
SHAPE = {"model__blocks": 2, "data__seq_length": 64, "data__vocab_size": V}
CASES: list[dict[str, Any]] = [
    {**SHAPE, "model__tie_embeddings": tied, **more}
    for tied in (False, True)
    for more in ({}, PIECES)
]


def gradients(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every case summed gradients of two micro-batches, ours and torch's from the logits."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.optimizer import wrap_data_parallel
    from keel_megatron.kernels import selection
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from tests.memory import Watch
    from tests.training.ranks import made_up_batches

    found = []
    for case in cases:
        config = RunConfig.model_validate(settings(**case))
        with start(config.parallel, config.training) as runtime:
            chunks = build_model(config, runtime)
            (model,), (chunk,) = wrap_data_parallel(config, chunks, runtime), chunks
            batches = made_up_batches(config, runtime, 0)[:2]
            results: dict[str, Any] = {"selected": selection._selected}
            for way in ("losses", "logits"):
                model.zero_grad_buffer()
                results[way] = []
                for batch in batches:
                    inputs = (batch.tokens, batch.position_ids, None)
                    with Watch() as watch:
                        if way == "losses":
                            losses = model(*inputs, labels=batch.labels)
                        else:
                            logits = model(*inputs)
                            losses = functional.cross_entropy(
                                logits.transpose(1, 2), batch.labels, reduction="none"
                            )
                        losses.sum().backward()
                    results[way].append(losses.detach())
                results[way] += [p.main_grad.clone() for p in chunk.parameters()]
                results[f"{way} largest"] = watch.largest
            found.append(results)
    return found


def test_losses_train_like_those_of_the_logits() -> None:
    for case, found in zip(CASES, run_ranks(1, gradients, CASES)[0], strict=True):
        for one, other in zip(found["losses"], found["logits"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=str(case))
        assert found["logits largest"] == 4 * N * V
        if "kernels__triton" in case:
            assert found["selected"] == {"norm"}
        # In pieces the largest tensor of all is the gradient of the embedding.
        largest = 4 * H * V if "kernels__logits_mib" in case else 4 * N * V
        assert found["losses largest"] == largest, case
