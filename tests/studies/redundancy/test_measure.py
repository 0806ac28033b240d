"""How far a study is, and what it needs."""

from __future__ import annotations

from keel_megatron.studies.redundancy.measure import Progress, memory
from tests.studies.redundancy.models import run_config


def test_progress_says_the_time_left_every_few_seconds() -> None:
    now, said = [0.0], list[str]()
    progress = Progress(1000, said.append, lambda: now[0])
    for seconds, passes in ((6.0, 1), (10.0, 99), (12.0, 100), (30.0, 300), (60.0, 500)):
        now[0] = seconds
        progress.add(passes)
    assert said == [" 10%  1m 30s left", " 50%  0m 30s left", "100%  0m 00s left"]


def test_memory_grows_with_what_runs_together_not_with_the_depth() -> None:
    config = run_config()
    deep = run_config(model__blocks=400)
    assert memory(config, 20, 10, 16) == memory(deep, 20, 10, 16)
    assert memory(config, 40, 20, 16) == 2 * memory(config, 20, 10, 16)
    # Five streams, and gate, up and product of the FFN, of (20 + 10) x 16 tokens in fp32.
    assert memory(config, 20, 10, 16) == 4 * 30 * 16 * (5 * 32 + 3 * (4 + 2 * 2) * 8)
