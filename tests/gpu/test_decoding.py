"""Decoding with one CUDA graph a token, on a device."""

from __future__ import annotations

import pytest
import torch

from keel_megatron.inference import static_step
from keel_megatron.inference.decoder import Decoder
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.huggingface.models import disturb
from tests.settings import small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["keel", "hybrid_norm", "pre_ln"])
def test_graphs_have_the_logits_of_plain_steps(
    rule: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keel_megatron.model.language_model import build_model

    monkeypatch.setattr(static_step, "SMALLEST", 4)  # several graphs
    config = small_config(
        model__residual=rule,
        model__num_query_groups=2,
        training__precision=precision,
        training__device="cuda",
    )
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        disturb(chunk)
        plain = Decoder(chunk, config.model, runtime)
        graphed = Decoder(chunk, config.model, runtime, static=True)
        for prompts in ([[5, 6, 7], [8]], [[9]]):  # another cache has other graphs
            plain.prefill(prompts, 20)
            graphed.prefill(prompts, 20)
            for token in range(20):
                column = [token + row for row in range(len(prompts))]
                own, other = plain.step(column), graphed.step(column)
                assert own is not None
                assert other is not None
                scale = max(1.0, float(own.abs().max()))
                assert float((other - own).abs().max()) <= tolerance * scale
