"""`kernels.compile`: a block as one function of tensors, which torch compiles once for all blocks.

torch.compile caches by the properties of the arguments. The weights are passed as tensors and not
in a module, so all blocks of the same structure share one compiled function. Only Keel's first
block and the last block of a chunk have another structure.

The function uses plain operators, which torch differentiates and fuses; tests compare them with the
custom autograd functions. Autograd returns the weights' gradients, and Megatron-core's DDP or ZeRO
accumulates them.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from keel_megatron.architecture.residual import Inner, Reader, SubLayer
from keel_megatron.compat import compile_cache
from keel_megatron.errors import UserError
from keel_megatron.kernels import reference, streams, triton_is_installed
from keel_megatron.kernels.head_norms import Weights
from keel_megatron.model.attention import causal_attention
from keel_megatron.model.documents import Documents, Packed
from keel_megatron.model.join import COLUMNS, join
from keel_megatron.model.layer import AfterWeights, KeelLayer
from keel_megatron.model.rotary import apply_rotary

KINDS = 32
"""Maximum number of compiled graphs: block structures, with and without gradients."""

COMPILED = Reader("kernels.compile", (*COLUMNS, "head_norms"))

FrontWeights = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Structure:
    """The structure of a block, besides sizes and types; one compiled function per structure."""

    groups: int
    epsilon: float
    attention: SubLayer
    """Without `inner_factor`, which differs from block to block: it is part of the weights."""
    mlp: SubLayer
    following: Inner | None
    """In front of the next block's attention; None: unknown."""
    factors: tuple[bool, bool]
    """Whether the norms of `mlp` and `following` have a factor: a parameter and its product with a
    factor are different arguments to torch.compile."""


def block(
    structure: Structure,
    x: Tensor,
    z: Tensor,
    table: Tensor,
    products: tuple[Tensor, Tensor, Tensor, Tensor],
    after: tuple[AfterWeights, AfterWeights],
    inner: tuple[FrontWeights, FrontWeights],
    heads: Weights | None,
    within: Tensor | Packed | None,
) -> tuple[Tensor, Tensor | None]:
    """`KeelLayer.forward` as a function.

    Args:
        structure: the kind of block.
        x: the stream [s, b, h], fp32.
        z: the attention's input [s, b, h], in the compute type.
        table: the rotary table [2, s, 1, 1, d].
        products: weights of linear_qkv, linear_proj, linear_fc1 and linear_fc2.
        after: weights of N_b, N_out and the streams' mix of attention and FFN, or None.
        inner: norm weights or vectors in front of the FFN and of the next attention, times their
            factors (`model.join.weight_of`), and the mix that these read; or None.
        heads: weights of the norms of query, key and value, or None.
        within: of the micro-batch's documents (`Documents.within`), or None.

    Returns:
        The stream after the block, and the next block's attention input or None.
    """
    qkv, proj, fc1, fc2 = products
    mixed = functional.linear(z, qkv)
    query, key, value = _query_key_value(mixed, table, structure, heads)
    context = causal_attention(query, key, value, within=within)
    branch = functional.linear(context, proj)
    x, z = _join(structure, structure.attention, x, branch, after[0], structure.mlp.inner, inner[0])
    gate, up = functional.linear(z, fc1).chunk(2, dim=-1)
    branch = functional.linear(functional.silu(gate) * up, fc2)
    return _join(structure, structure.mlp, x, branch, after[1], structure.following, inner[1])


def _join(
    structure: Structure,
    rule: SubLayer,
    x: Tensor,
    branch: Tensor,
    after: AfterWeights,
    inner: Inner | None,
    weights: FrontWeights,
) -> tuple[Tensor, Any]:
    """`model.join` with the reference operations, which torch compiles."""
    return join(
        reference.scaled_add_norm,
        rule,
        x,
        branch,
        *after,
        None if inner is None else (inner, *weights),
        structure.epsilon,
        branch.dtype,
        norm=reference.rms_norm,
        write=streams.reference_write,
    )


def _query_key_value(
    mixed: Tensor, table: Tensor, structure: Structure, weights: Weights | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_norms` where there are weights, and `split_rotary`."""
    s, b = mixed.shape[:2]
    d = table.size(-1)
    parts = mixed.view(s, b, structure.groups, -1, d)
    query, key, value = torch.split(parts, [parts.size(3) - 2, 1, 1], dim=3)
    query, key, value = query.reshape(s, b, -1, d), key.squeeze(3), value.squeeze(3)
    if weights is not None:
        stream = torch.promote_types(mixed.dtype, torch.float32)
        query, key, value = (
            one
            if weight is None
            else reference.rms_norm(
                one.to(stream), weight.to(stream), structure.epsilon, mixed.dtype
            )
            for one, weight in zip((query, key, value), weights, strict=True)
        )
    return apply_rotary(query, table), apply_rotary(key, table), value


@dataclass
class Compiler:
    """Compiles the blocks of this process's chunks, and counts the compiled graphs."""

    graphs: set[tuple[Structure, bool]] = field(default_factory=set)
    reported: int = 0
    _function: Any = None

    def __post_init__(self) -> None:
        compile_cache.use()
        compile_cache.allow_graphs(KINDS)
        self._function = torch.compile(block, fullgraph=True, dynamic=False)

    def run(self, structure: Structure, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        """Run `block`; the first call for a structure compiles it.

        Raises:
            UserError: torch.compile fails.
        """
        kind = (structure, torch.is_grad_enabled())
        if kind in self.graphs:
            result: tuple[Tensor, Tensor | None] = self._function(structure, *tensors)
            return result
        try:
            result = self._function(structure, *tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                "kernels.compile: torch.compile fails "
                f"({reason[0] if reason else type(error).__name__}); set it to false"
            ) from error
        self.graphs.add(kind)
        return result

    def report(self, seconds: float) -> str | None:
        """See `compile_report`."""
        fresh = len(self.graphs) - self.reported
        self.reported = len(self.graphs)
        if not fresh:
            return None
        return f"kernels.compile: {fresh} graph(s) of the blocks; this step took {seconds:.1f} s"


class CompiledBlock:
    """Calls the shared compiled function with one block's tensors.

    Args:
        layer: the block, linked to the next one.
        compiler: the compiler of the process.
    """

    def __init__(self, layer: KeelLayer, compiler: Compiler) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        first = 2 * (layer.layer_number - 1)
        rules = [COMPILED.sub_layer(first + l, layer.model) for l in range(2)]
        following = None
        if layer.following:
            following = COMPILED.sub_layer(first + 2, layer.model)
        self._compiler = compiler
        self._structure = Structure(
            groups=attention.num_query_groups_per_partition,
            epsilon=layer.config.layernorm_epsilon,
            attention=replace(rules[0], inner_factor=1.0),
            mlp=replace(rules[1], inner_factor=1.0),
            following=None if following is None else following.inner,
            factors=(_has_factor(rules[1]), _has_factor(following)),
        )
        self._products = tuple(
            one.weight
            for one in (
                attention.linear_qkv,
                attention.linear_proj,
                mlp.linear_fc1,
                mlp.linear_fc2,
            )
        )
        self._after = tuple(
            tuple(map(_weight, layer.after(which))) for which in ("attention", "mlp")
        )
        self._layer = layer
        heads = (attention.q_layernorm, attention.k_layernorm, attention.v_layernorm)
        self._heads = tuple(map(_weight, heads)) if rules[0].head_norms else None

    def __call__(
        self, x: Tensor, z: Tensor, table: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `model.layer.Compiled`."""
        return self._compiler.run(
            self._structure,
            x,
            z,
            table,
            self._products,
            self._after,
            self._fronts(),
            self._heads,
            None if documents is None else _within(documents, z, table),
        )

    def _fronts(self) -> tuple[FrontWeights, FrontWeights]:
        """What the FFN and the next attention read with; without the next one, None."""
        _inner, weight, mix = self._layer.front("mlp")
        if not self._layer.following:
            return (weight, mix), (None, None)
        return (weight, mix), self._layer.following[0].front("attention")[1:]


def _weight(module: nn.Module | None) -> Tensor | None:
    weight: Tensor | None = getattr(module, "weight", None)
    return weight


def _has_factor(rule: SubLayer | None) -> bool:
    return rule is not None and rule.inner_factor != 1.0


def _within(documents: Documents, z: Tensor, table: Tensor) -> Tensor | Packed:
    """`Documents.within` in a form for which one graph serves every micro-batch."""
    within = documents.within(z, table.size(-1))
    if isinstance(within, Tensor):
        return within
    torch._dynamo.mark_dynamic(within.borders, 0)
    return Packed(within.borders, documents.numbers.size(1))  # a number is a constant of the graph


def compile_blocks(chunks: list[nn.Module], device: torch.device) -> None:
    """Set the compiled form of every block of these chunks; torch compiles at its first use.

    Raises:
        UserError: no compiler is installed, or another user can write the cache.
    """
    require_compiler(device.type)
    compiler = Compiler()
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            layer.compiled = CompiledBlock(layer, compiler)
        chunk.compiler = compiler  # type: ignore[assignment]


def require_compiler(device: str) -> None:
    """Check that what torch.compile needs for a device is installed.

    Raises:
        UserError: it is not.
    """
    if device == "cuda":
        if not triton_is_installed():
            raise UserError(
                "kernels.compile: true needs Triton on CUDA, which cannot be imported; install it, "
                "or set kernels.compile to false"
            )
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"kernels.compile: true needs a C++ compiler, and there is no {compiler}; install one, "
            "name one in CXX, or set kernels.compile to false"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise UserError(
            "kernels.compile: true needs Python's headers (Python.h; Debian's python3-dev); "
            "install them, or set kernels.compile to false"
        )


def compile_report(chunks: list[nn.Module], seconds: float) -> str | None:
    """A report of the graphs compiled since the last call; None if there are none.

    Args:
        chunks: this rank's model chunks.
        seconds: duration of the step, in which the backward passes are compiled too.
    """
    compiler: Any = getattr(chunks[0], "compiler", None)
    return None if compiler is None else compiler.report(seconds)
