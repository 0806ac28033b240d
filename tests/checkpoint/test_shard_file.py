"""Tensors in files of the safetensors format: what is written, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from keel_megatron.checkpoint.manifest import DamagedError, open_shards
from keel_megatron.checkpoint.shard_file import Part, blocks
from keel_megatron.checkpoint.sharding import _TYPE_NAMES


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
    parts = [
        Part(name, _TYPE_NAMES[value.dtype], tuple(value.shape), lambda value=value: _bytes(value))
        for name, value in tensors.items()
    ]
    path.write_bytes(b"".join(bytes(block) for block in blocks(parts, {"a": "b"})))
    return open_shards(path, "pt")


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
    assert file.metadata() == {"a": "b"}
    for name, tensor in tensors.items():
        held = file.get_slice(name)
        assert held.get_dtype() == _TYPE_NAMES[tensor.dtype]
        assert tuple(held.get_shape()) == tuple(tensor.shape)
        whole = tuple(slice(0, size) for size in tensor.shape)
        assert held[whole].dtype == tensor.dtype
        assert torch.equal(_raw(held[whole]), _raw(tensor))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: NaN equals itself, and -0.0 is not 0.0."""
    return torch.from_numpy(_bytes(tensor))


def test_a_part_of_a_tensor_is_mapped_not_read_and_the_file_cannot_be_changed_through_it(
    tmp_path: Path,
) -> None:
    """Checkpoints are loaded at other layouts by parts; 256 MB of holes take no memory."""
    rows, columns = 64, 1 << 20
    header = json.dumps(entry(shape=(rows, columns), offsets=(0, 4 * rows * columns))).encode()
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * rows * columns)
    before = psutil.Process().memory_info().rss
    held = open_shards(path, "pt").get_slice("x")
    part = held[2:4, 0:3]
    assert part.tolist() == [[0.0] * 3] * 2
    assert psutil.Process().memory_info().rss - before < 64 << 20
    part.fill_(1.0)
    assert open_shards(path, "pt").get_slice("x")[2:4, 0:3].sum() == 0.0


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.security
@pytest.mark.parametrize(
    ("header", "why"),
    [
        (entry(offsets=(0, 4)), "invalid shape, data type, or offset"),
        (entry(offsets=(4, 12)), "invalid offset for tensor `x`"),
        (entry(shape=(3,), offsets=(0, 12)), "file not fully covered"),
        (entry(shape=(1,), offsets=(0, 4)), "file not fully covered"),
        (entry(dtype="O"), "unknown variant `O`"),
        (entry(shape=(-2,)), "integer `-2`"),
        (entry(shape=(2.0,)), "floating point `2.0`"),
        (entry(shape=(1 << 40,) * 3), "overflow"),
        (entry(shape=(1 << 62, 4), offsets=(0, 0)), "overflow"),
        (entry(offsets=(8, 0)), "invalid offset for tensor `x`"),
        (entry(offsets=(0,)), "expected a tuple of size 2"),
        ({"x": 1}, "expected struct TensorInfo"),
        ({**entry(), "y": entry()["x"]}, "invalid offset for tensor `[xy]`"),
        ({**entry(), "__metadata__": []}, "expected a map"),
        ([], "invalid type: sequence"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, why: str) -> None:
    """By the library, in the version that is installed; so no tensor lies outside of its file."""
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(DamagedError, match=rf"file is not a safetensors file: .*{why}"):
        open_shards(tmp_path / "file")


@pytest.mark.security
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header too small"),
        (b"1234567", "header too small"),
        (struct.pack("<Q", 9) + b"{}", "invalid header length"),
        (struct.pack("<Q", 2) + b"{]", "invalid JSON in header"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header too large"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header too large"),
        (struct.pack("<Q", 120_000) + b'{"x":' * 24_000, "recursion limit"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedError, match=f"file is not a safetensors file: .*{why}"):
        open_shards(tmp_path / "file")


@pytest.mark.security
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """Opening a FIFO would wait for its writer."""
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("fifo", "not a regular file"), (".", "not a regular"), ("none", "No such")):
        with pytest.raises(DamagedError, match=f"cannot be read: .*{why}"):
            open_shards(tmp_path / name)
