from __future__ import annotations

from tests.huggingface.conftest import sentencepiece_model

__all__ = ["sentencepiece_model"]
