"""What is told of a run before its first step."""

from __future__ import annotations

from keel_megatron.training.describe import version_changes


def test_other_versions_are_named_and_the_same_are_not() -> None:
    saved = {"torch": "2.12", "numpy": "2.0", "triton": "3.4"}
    current = {"torch": "2.13", "numpy": "2.0", "deepspeed": "0.19"}
    assert version_changes(saved, current) == [
        "deepspeed was absent when the checkpoint was written, now 0.19: the last bits may differ",
        "torch was 2.12 when the checkpoint was written, now 2.13: the last bits may differ",
        "triton was 3.4 when the checkpoint was written, now absent: the last bits may differ",
    ]
    assert version_changes(current, current) == []
