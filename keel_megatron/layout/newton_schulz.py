"""Batches of Muon's orthogonalisation: how many matrices, their temporary memory and their FLOPs.

Matrices of one shape are orthogonalised together, as many as TEMPORARY_BYTES allow. A batch of k
matrices of r rows and c columns, m = min(r, c), takes two buffers of r x c and two of m x m
elements a matrix (`engines/megatron/muon/orthogonalize.py`). Under tensor parallelism the T ranks
of a group exchange the shards of T k matrices, so that each has k whole ones.
"""

from __future__ import annotations

TEMPORARY_BYTES = 256 * 2**20
"""Temporary memory of a batch; a larger matrix is a batch of its own."""


def matrix_bytes(rows: int, columns: int, size: int, tensor: int = 1) -> int:
    """Temporary bytes per whole matrix of a batch on one rank.

    Args:
        rows: of the whole matrix.
        columns: of the whole matrix.
        size: bytes of an element.
        tensor: tensor-parallel size.
    """
    elements, smaller = rows * columns, min(rows, columns)
    shards = elements if tensor > 1 else 0
    return size * (shards + 2 * elements + 2 * smaller * smaller)


def batch_size(rows: int, columns: int, size: int, tensor: int = 1) -> int:
    """Matrices of a batch, over all ranks of a tensor group; the arguments of `matrix_bytes`."""
    return tensor * max(1, TEMPORARY_BYTES // matrix_bytes(rows, columns, size, tensor))


def temporary_bytes(count: int, rows: int, columns: int, size: int, tensor: int = 1) -> int:
    """Temporary bytes on one rank to orthogonalise `count` matrices in batches."""
    together = min(count, batch_size(rows, columns, size, tensor))
    return -(-together // tensor) * matrix_bytes(rows, columns, size, tensor)


def flops(rows: int, columns: int, steps: int) -> float:
    """FLOPs to orthogonalise a matrix: three products a step."""
    smaller, larger = min(rows, columns), max(rows, columns)
    return steps * (4.0 * smaller * smaller * larger + 2.0 * smaller**3)
