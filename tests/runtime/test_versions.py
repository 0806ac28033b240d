"""Versions of packages."""

from __future__ import annotations

from importlib import metadata

import pytest

from keel_megatron import __version__
from keel_megatron.cluster import doctor
from keel_megatron.mlflow_delivery.tags import code_tags
from keel_megatron.runtime import versions


def test_one_list_serves_checkpoints_tags_and_the_comparison_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package that is not installed is in none of them."""

    def installed(name: str) -> str:
        if name in ("transformer-engine", "apex"):
            raise metadata.PackageNotFoundError(name)
        return f"1.0+{name}"

    monkeypatch.setattr(metadata, "version", installed)
    found = versions.package_versions()
    assert found["keel-megatron"] == __version__
    assert found["triton"] == "1.0+triton"
    assert found.keys().isdisjoint({"transformer-engine", "apex"})
    tags = {name: tag for name, tag in code_tags().items() if name.startswith("version.")}
    assert tags == {f"version.{name}": text for name, text in found.items()}
    compared = doctor.versions()
    assert found.keys() < compared.keys()
    assert compared["deepspeed"] == found["deepspeed"]
