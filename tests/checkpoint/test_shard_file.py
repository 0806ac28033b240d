"""Tensors in files of the safetensors format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.checkpoint.shard_file import Part, ShardFile, blocks
from keel_megatron.checkpoint.sharding import _TYPE_NAMES, _bytes


def write(path: Path, tensors: dict[str, torch.Tensor]) -> ShardFile:
    parts = [
        Part(name, _TYPE_NAMES[value.dtype], tuple(value.shape), lambda value=value: _bytes(value))
        for name, value in tensors.items()
    ]
    path.write_bytes(b"".join(bytes(block) for block in blocks(parts, {"a": "b"})))
    return ShardFile(path)


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """By hand from the format's description: length, JSON padded with spaces, little-endian."""
    write(tmp_path / "file", {"x": torch.tensor([1.0, -2.0])})
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"a": "b"},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    assert content[8 + length :] == struct.pack("<2f", 1.0, -2.0)


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(t): (torch.randn(3, 5) * 100).to(t) for t in _TYPE_NAMES}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t(),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    file = write(tmp_path / "file", tensors)
    assert file.metadata == {"a": "b"}
    for name, tensor in tensors.items():
        raw = torch.from_numpy(file.read(name))
        assert file.shape(name) == tuple(tensor.shape)
        assert torch.equal(raw, torch.from_numpy(_bytes(tensor)))
        if tensor.numel():  # alignment lets the mapped bytes be viewed as what they are
            assert raw.view(tensor.dtype).view(tensor.shape).shape == tensor.shape


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (entry(offsets=(0, 4)), "does not lie where its shape says"),
        (entry(offsets=(4, 12)), "does not lie where its shape says"),
        (entry(shape=(3,), offsets=(0, 12)), "do not fill it"),
        (entry(shape=(1,), offsets=(0, 4)), "do not fill it"),
        (entry(dtype="O"), "unknown type O"),
        (entry(shape=(-2,)), "no valid shape"),
        (entry(offsets=(8, 0)), "no valid offsets"),
        (entry(offsets=(0,)), "no offsets"),
        ({"x": 1}, "no offsets"),
        ({**entry(), "y": entry()["x"]}, "does not lie where its shape says"),
        ({**entry(), "__metadata__": []}, "metadata is no mapping"),
        ([], "header is no mapping"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, why: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=why):
        ShardFile(tmp_path / "file")


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2) + b"{]"]
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="its header is"):
        ShardFile(tmp_path / "file")
