"""JSON codec for Python state that is not a sharded tensor, instead of pickle.

Numbers, text, None, lists and dicts with text keys are themselves; a tuple, tensor, NumPy array
or dict with other keys is a mapping of one tagged entry. Floats come back to the last bit.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_TUPLE, _TENSOR, _ARRAY, _PAIRS = "$tuple", "$tensor", "$array", "$pairs"
_TENSOR_TYPES = {
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
    "bool": torch.bool,
}
_ARRAY_TYPES = {"uint8", "uint32", "uint64", "int32", "int64", "float32", "float64", "bool"}


def to_json(value: Any) -> Any:
    """A value that `json.dumps` takes.

    Raises:
        TypeError: there is something in it that JSON cannot hold.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        name = str(value.dtype).removeprefix("torch.")
        if name not in _TENSOR_TYPES:
            raise TypeError(f"a tensor of {value.dtype}")
        content = base64.b64encode(array.reshape(-1).numpy().tobytes()).decode()
        return {_TENSOR: [name, list(value.shape), content]}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _ARRAY_TYPES:
            raise TypeError(f"an array of {value.dtype}")
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: [value.dtype.name, list(value.shape), content]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [to_json(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return {_PAIRS: [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__}")


def from_json(value: Any) -> Any:
    """What `to_json` was given.

    Raises:
        ValueError: it is not such a value.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag in _READERS:
            try:
                return _READERS[tag](content)
            except (TypeError, KeyError, ValueError, RuntimeError, OverflowError):
                raise ValueError(f"not a valid {tag[1:]}") from None
    return {key: from_json(item) for key, item in value.items()}


def _tensor(content: Any) -> torch.Tensor:
    name, shape, text = content
    raw = bytearray(base64.b64decode(text, validate=True))
    dtype = _TENSOR_TYPES[name]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _array(content: Any) -> Any:
    name, shape, text = content
    if name not in _ARRAY_TYPES:
        raise ValueError(name)
    return np.frombuffer(bytearray(base64.b64decode(text, validate=True)), name).reshape(shape)


_READERS: dict[str, Callable[[Any], Any]] = {
    _TUPLE: lambda content: tuple(from_json(item) for item in content),
    _TENSOR: _tensor,
    _ARRAY: _array,
    _PAIRS: lambda content: {from_json(key): from_json(item) for key, item in content},
}
