"""tools/bench/demo.py: both recipes are valid, and the page says how they compare."""

from __future__ import annotations

from keel_megatron.config.load import load_config
from tools.bench.demo import DEMO, EARLIER, Figures, page


def test_the_page_compares_both_recipes_over_the_same_model_and_layout() -> None:
    earlier, demo = load_config(DEMO, EARLIER, world_size=2), load_config(DEMO, world_size=2)
    assert (earlier.model, earlier.parallel) == (demo.model, demo.parallel)
    assert demo.parallel.pipeline == 2
    assert 2 * demo.model.blocks == 128
    common = {"training": 1.0, "cpu": 2.0, "tokens_per_second": 3.0, "load": 2.0}
    found = [
        Figures("earlier", earlier, wall=500.0, loss=4.2, **common),
        Figures("demo-1234", demo, wall=200.0, loss=4.1, **common),
    ]
    text = page(found, 6.0)
    assert "| demo-1234 | 1234 | 4.100 | 1.900 | 200 s | 0.40 | 1 s | 2 s |" in text
    assert "adamw 0.005, 20 steps of warm-up, 200 steps of 16 sequences" in text
