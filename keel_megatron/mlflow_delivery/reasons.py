"""Meaning of MLflow's errors, and messages about them."""

from __future__ import annotations

import re

from keel_megatron.urls import without_credentials

_REJECTIONS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
)
"""Error codes of items that MLflow will never accept; other errors may be temporary."""
_LENGTH = 300
_STATUS = re.compile(r"error code (\d{3})\b|too many (\d{3}) error responses")
_CAUSE = re.compile(r"\(Caused by (.*)\)$", re.DOTALL)
# urllib3 says where its connection objects lie in memory.
_OBJECT = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>:? ?|\bHTTPS?Connection\([^)]*\):? ?")
_STATUS_WORDS = {
    400: "Bad Request",
    404: "Not Found",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class UnconfirmedError(Exception):
    """Reports are for an address that only the run's folder names, unconfirmed by the user."""


def is_rejected(error: Exception) -> bool:
    """Whether MLflow will never accept this item."""
    if isinstance(error, FileNotFoundError):
        return True
    code = getattr(error, "error_code", None)
    if code == "BAD_REQUEST" and not hasattr(error, "json"):
        return False  # the text of a proxy, not of MLflow
    return code in _REJECTIONS


def problem(error: Exception) -> str:
    """The problem with MLflow, as the predicate of a sentence."""
    if isinstance(error, UnconfirmedError):
        return "is an address that the run's folder names, and not today's tracking.uri"
    status = _status(str(error))
    if status in (401, 403):
        return (
            f"refuses the credentials (HTTP {status}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return f"does not answer: {reason(error)}"


def reason(error: Exception) -> str:
    """The cause of an error, in one line without credentials."""
    text = " ".join(str(error).split())
    status = _status(text)
    if cause := _CAUSE.search(text):
        text = _OBJECT.sub("", cause[1])  # before it is only the address
    told = f"{type(error).__name__}: {_shortened(without_credentials(text))}"
    if status is None:
        return told
    words = _STATUS_WORDS.get(status)
    return f"HTTP {status} {words}, {told}" if words else f"HTTP {status}, {told}"


def _status(text: str) -> int | None:
    """The HTTP status of an answer that MLflow's client gave up on."""
    found = _STATUS.search(text)
    return None if found is None else int(found[1] or found[2])


def _shortened(text: str) -> str:
    """The text, shortened at a word boundary."""
    if len(text) <= _LENGTH:
        return text
    return f"{text[:_LENGTH].rpartition(' ')[0] or text[:_LENGTH]} ..."
