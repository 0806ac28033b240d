"""A configuration's file that the configuration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import yaml
from tests.settings import settings


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    return path
