"""Prepared data that the data tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import PreparedData, prepare
from tests.settings import small_config


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real text: a few modules of the standard library."""
    import argparse
    import ast
    import datetime
    import tarfile

    folder = tmp_path_factory.mktemp("text")
    for module in (argparse, ast, datetime, tarfile):
        (folder / f"{module.__name__}.py").write_text(Path(module.__file__).read_text())
    return folder


@pytest.fixture(scope="session")
def data_config(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(data__text=str(text), data__cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def prepared(data_config: RunConfig) -> PreparedData:
    return prepare(data_config, lambda _text: None)
