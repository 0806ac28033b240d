from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.local_tasks import write_tasks
from tests.huggingface.conftest import sentencepiece_model
from tests.huggingface.models import write_run

__all__ = ["sentencepiece_model"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    """A folder with the runs keel and pre_ln, of random weights."""
    place = tmp_path_factory.mktemp("evaluated")
    for rule in ("keel", "pre_ln"):
        write_run(place / rule, sentencepiece_model, model__residual=rule, model__init_std=0.1)
    return place


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lm-eval tasks over local data."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))
