"""A run never resumes on other data unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel_megatron.data.dataset import Dataset
from keel_megatron.errors import UserError

ANOTHER_RUN = (
    "train under another training.name, with training.initialize_from naming this run to start "
    "from its weights"
)
"""How the weights of a run are trained on other data."""
_OTHERWISE = (
    "A run resumes only on the same data (its place may change): restore it, or, on the new data, "
    + ANOTHER_RUN
)


def refuse_other(expected: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse a dataset other than that of the run's previous training.

    Args:
        expected: the identity in the checkpoint.
        dataset: the run's current dataset.

    Raises:
        UserError: they differ.
    """
    found = dataset.identity()
    if not expected or expected == found:  # a checkpoint of random tokens has no identity
        return
    if expected.get("fingerprint") != found["fingerprint"]:
        raise UserError(
            f"data.dataset: {dataset.folder} is not the data that the run was trained on: its "
            f"fingerprint was {_short(expected.get('fingerprint'))} then, and is "
            f"{_short(found['fingerprint'])} now. {_OTHERWISE}"
        )
    for name in ("files", "shards"):
        _refuse_other_files(expected.get(name, {}), found.get(name, {}), dataset)
    if expected.get("blend", {}) != found.get("blend", {}):
        raise UserError(
            "data.sources: the weights are not those of the run: per 1,000 samples, "
            f"{_shares(expected.get('blend', {}))} then, and {_shares(found.get('blend', {}))} "
            f"now. Restore them, or {ANOTHER_RUN}"
        )
    raise UserError(
        f"data.tokenizer: the tokenizer of {dataset.folder} is not the run's, which its weights "
        "require: restore it, or train under another training.name, which starts with new weights"
    )


def _refuse_other_files(
    expected: Mapping[str, Any], found: Mapping[str, Any], dataset: Dataset
) -> None:
    """Refuse other tokens from the same sources."""
    for name in sorted(expected.keys() | found.keys()):
        then, now = expected.get(name), found.get(name)
        if then != now:
            raise UserError(
                f"data.dataset: {name} of {dataset.folder} is not what the run was trained on: "
                f"{_file_text(then)} then, {_file_text(now)} now, from the same sources; other "
                "versions of the tokenizer's library may encode them differently. Restore that "
                f"folder or those versions, or {ANOTHER_RUN}"
            )


def _short(digest: object) -> str:
    return str(digest)[:16]


def _file_text(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "absent"
    return f"{record['bytes']} bytes with SHA-256 {record['sha256'][:12]}"


def _shares(quotas: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {quota}" for name, quota in quotas.items())
