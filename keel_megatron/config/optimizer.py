"""`optimizer` and `schedule`: AdamW or Muon, and the learning rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from keel_megatron.config.section import Section


class RatesConfig(Section):
    """`optimizer.rates`: factors of the learning rate, one per kind of parameter."""

    matrices: float = Field(default=1.0, ge=0.0, description="Weight matrices of the blocks.")
    embeddings: float = Field(
        default=1.0, ge=0.0, description="The embedding, also where the output layer shares it."
    )
    head: float = Field(default=1.0, ge=0.0, description="The output layer's matrix.")
    norms: float = Field(default=1.0, ge=0.0, description="Norm weights and other vectors.")


class DepthRateConfig(Section):
    """An entry of `optimizer.depth_rates`: a range of blocks and its factor of the rate."""

    blocks: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = Field(
        description="First and last block of the range, counted from 0."
    )
    factor: float = Field(ge=0.0, description="Factor of the learning rate.")

    @field_validator("blocks", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Accept a list."""
        return tuple(value) if isinstance(value, list) else value


class OptimizerConfig(Section):
    """AdamW, or Muon with AdamW; AdamW's defaults are the paper's."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description=(
            "adamw: AdamW for all weights. muon: Muon (orthogonalised momentum) for the matrices "
            "of the blocks, AdamW for embeddings, output layer and norm weights. Each matrix is "
            "updated by one replica, also without parallel.distributed_optimizer, and under tensor "
            "parallelism it is orthogonalised as a whole; query, key and value, and gate and up, "
            "are separate matrices. Cannot change when a run resumes."
        ),
    )
    learning_rate: float = Field(gt=0.0, description="Peak learning rate.")
    weight_decay: float = Field(
        default=0.01,
        ge=0.0,
        description=(
            "Decoupled weight decay of matrices; norm weights are decayed only with decay_norms. "
            "Each step subtracts learning rate x weight_decay x weight, so a factor of the "
            "learning rate also scales the decay."
        ),
    )
    decay_norms: bool = Field(
        default=False,
        description=(
            "Decay norm weights and other vectors as well, but never the mixes of streams of "
            "residual: hyper_connections, which are its skip path."
        ),
    )
    rates: RatesConfig = Field(
        default_factory=RatesConfig,
        description=(
            "Factors of the learning rate, for example {embeddings: 2.0, norms: 0.5}: matrices "
            "(of the blocks), embeddings (tied ones too), head (the output layer) and norms "
            "(and other vectors). Each is 1 by default; 0: not updated."
        ),
    )
    depth_rates: tuple[DepthRateConfig, ...] = Field(
        default=(),
        description=(
            "Factors of the learning rate of ranges of blocks, on top of rates, for example "
            "[{blocks: [0, 7], factor: 0.5}]: first and last block, counted from 0. Blocks in no "
            "range keep 1."
        ),
    )
    clip_grad: float = Field(
        default=1.0, ge=0.0, description="Maximum global gradient norm. 0: no clipping."
    )
    beta1: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="Decay rate of Adam's first moment."
    )
    beta2: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="Decay rate of Adam's second moment."
    )
    epsilon: float = Field(default=1e-8, gt=0.0, description="Adam's epsilon.")
    momentum: float = Field(
        default=0.95,
        ge=0.0,
        lt=1.0,
        description="Decay rate of Muon's momentum. Applies to name: muon only.",
    )
    nesterov: bool = Field(
        default=True, description="Nesterov momentum. Applies to name: muon only."
    )
    ns_steps: int = Field(
        default=5,
        ge=1,
        le=99,
        description="Newton-Schulz iterations of Muon; in bf16 on CUDA, in fp32 on a CPU. "
        "Applies to name: muon only.",
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        default="match_rms_adamw",
        description=(
            "Factor of Muon's learning rate for a matrix of m rows and n columns. original: "
            "sqrt(max(1, m / n)). match_rms_adamw: 0.2 sqrt(max(m, n)), which gives updates of "
            "about the size of AdamW's, so its learning rate and weight decay carry over. "
            "Applies to name: muon only."
        ),
    )

    @field_validator("depth_rates", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Accept a list."""
        return tuple(value) if isinstance(value, list) else value


class RampupConfig(Section):
    """`schedule.rampup_batch_size`."""

    start: int = Field(gt=0, description="Sequences of the first step.")
    increment: int = Field(gt=0, description="Sequences that each increment adds.")
    samples: int = Field(
        gt=0, description="Samples after which the batch has training.global_batch_size sequences."
    )


class ScheduleConfig(Section):
    """Learning rate and batch size over the steps: warm-up, then decay over the remaining steps."""

    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    decay: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description=(
            "Decay after the warm-up. cosine: cosine to min_learning_rate. wsd: stable, then "
            "decay_shape to min_learning_rate over the last decay_fraction. constant: no decay."
        ),
    )
    decay_fraction: float = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description=(
            "Fraction of the steps, at the end of the run, that decay. Applies to decay: wsd only."
        ),
    )
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"] = Field(
        default="linear",
        description=(
            "Shape of the decay with decay: wsd, where p is the completed fraction of the decay, "
            "from 0 to 1. linear: 1 - p. cosine: (1 + cos(pi p)) / 2. sqrt: 1 - sqrt(p). "
            "exponential: the same factor at every step, which needs min_learning_rate > 0."
        ),
    )
    min_learning_rate: float = Field(
        default=1e-7,
        ge=0.0,
        description="Learning rate at the last step. Applies to decay: cosine and wsd only.",
    )
    rampup_batch_size: RampupConfig | None = Field(
        default=None,
        description=(
            "Batch size ramp-up as in Megatron-LM, {start: S, increment: I, samples: N}: the "
            "global batch grows from S to training.global_batch_size in equal increments of I "
            "sequences, over the first N samples. Steps of any size count in training.steps and "
            "warmup_steps. null: no ramp-up."
        ),
    )
