"""Tasks of lm-eval: found by name, and loaded with their data."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.terminal import is_live
from keel_megatron.errors import UserError

EXTRA = "pip install 'keel-megatron[evaluate]'"
OFFLINE = (
    "Load it once on a machine that reaches https://huggingface.co, copy the cache (HF_HOME) here "
    "and set HF_DATASETS_OFFLINE=1, or name task files with local data, --include-path DIR"
)

_BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables that leave out the progress bars of lm-eval and of what loads its data."""


@dataclass(frozen=True)
class Choice:
    """Which tasks, and how they are asked.

    Args:
        names: of tasks, groups or tags; glob patterns too.
        include: a folder of task files, besides lm-eval's own.
        limit: documents of each task; below 1, a share of them.
        shots: examples before each question; None: the task's own number.
        seed: of the examples' choice; None: lm-eval's.
        unsafe_code: run tasks that execute the code that the model writes.
    """

    names: tuple[str, ...]
    include: Path | None = None
    limit: float | None = None
    shots: int | None = None
    seed: int | None = None
    unsafe_code: bool = False

    @property
    def mark(self) -> str:
        """What tells these results apart, in the names of metrics, from those of whole tasks."""
        shots = "" if self.shots is None else f".{self.shots}shot"
        return shots + ("" if self.limit is None else f".limit{self.limit:g}")


def require_harness() -> None:
    """Check that lm-eval is installed.

    Raises:
        UserError: it is not.
    """
    if not is_live(sys.stderr):
        for name in _BARS:  # in a log file each refresh of a bar would be a line
            os.environ.setdefault(name, "1")
    try:
        import lm_eval  # noqa: F401  # takes 0.03 s: it imports its parts when they are used
    except ImportError as error:
        raise UserError(f"EleutherAI's evaluation harness is not installed: {EXTRA}") from error


def load_tasks(choice: Choice) -> dict[str, Any]:
    """Load tasks and their data.

    Args:
        choice: the tasks.

    Returns:
        What lm-eval's `evaluate` takes: `tasks`, `groups` and `group_map`.

    Raises:
        UserError: lm-eval is not installed, a number is out of range, a name is unknown, a task's
            data cannot be loaded, a task is in two of the groups, or one executes code and that is
            not confirmed.
    """
    require_harness()
    limit = choice.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise UserError(f"--limit: {limit:g} must be a whole number from 1, or a share below 1")
    if choice.shots is not None and choice.shots < 0:
        raise UserError(f"--num-fewshot: {choice.shots} must be at least 0")
    if choice.seed is not None and not 0 <= choice.seed < 2**32:
        raise UserError(f"--seed: {choice.seed} must be from 0 to 2^32 - 1")
    manager = _manager(choice)
    loaded: list[Any] = []
    for name in _known(manager, choice.names):
        try:
            found = manager.load([name])
        except Exception as error:  # a task file may call any function
            raise _not_loaded(manager, name, error) from error
        whole = found["groups"].get(name)
        loaded += [whole] if whole is not None else found["tasks"].values()
    try:
        tasks: dict[str, Any] = manager.load(loaded)
    except ValueError as error:
        raise UserError(f"--tasks: {error}") from error
    _check_code(tasks["tasks"], confirmed=choice.unsafe_code)
    for task in tasks["tasks"].values():
        _ask(task, choice)
    return tasks


def _manager(choice: Choice) -> Any:
    """The index of task files: the included folder's alone, if it has all that is needed.

    lm-eval's own 14,000 files take seconds to read.
    """
    from lm_eval.tasks import TaskManager

    if choice.include is not None:
        if not choice.include.is_dir():
            raise UserError(f"--include-path: there is no folder {choice.include}")
        own = TaskManager(include_path=str(choice.include), include_defaults=False)
        if all(_is_whole(own, name) for name in choice.names):
            return own
    return TaskManager(include_path=str(choice.include) if choice.include else None)


def _is_whole(manager: Any, name: Any) -> bool:
    """Whether an index has a task, and all tasks of it if it is a group."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if entry is None:
        return False
    parts = (entry.cfg or {}).get("task")
    return not isinstance(parts, list) or all(_is_whole(manager, part) for part in parts)


def _known(manager: Any, names: Sequence[str]) -> list[str]:
    """The tasks' names, patterns resolved, each once."""
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, 5, 0.6)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(
                f"--tasks: there is no task, group or tag {name}{hint}; `keel lm-eval ls tasks` "
                "lists all, --include-path DIR adds task files"
            )
        found += matches
    return list(dict.fromkeys(found))


def _not_loaded(manager: Any, name: str, error: Exception) -> UserError:
    """The error of a task that cannot be loaded: almost always its data set."""
    entry = manager.task_index.get(name)
    data = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    wanted = f", which wants the data set {data}," if data is not None else ""
    if isinstance(error, OSError) or is_data_error(error):
        return UserError(f"--tasks: {name}{wanted} cannot be loaded: {lines[0]}. {OFFLINE}")
    shown = f"{type(error).__name__}: {lines[0]}"
    return UserError(f"--tasks: {name}{wanted} cannot be loaded: {shown}")


def is_data_error(error: Exception) -> bool:
    """Whether a data set could not be reached."""
    libraries = ("datasets.", "huggingface_hub.")
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(libraries)


def _check_code(tasks: dict[str, Any], *, confirmed: bool) -> None:
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not confirmed:
        raise UserError(
            f"--tasks: {', '.join(unsafe)} would execute the code that the model writes, on this "
            "machine; --confirm-run-unsafe-code allows it"
        )


def _ask(task: Any, choice: Choice) -> None:
    """Set the number of examples and how they are chosen, as lm-eval's command does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    if choice.shots is not None and own != 0:  # 0 in the file means that there can be none
        task.set_config(key="num_fewshot", value=choice.shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED if choice.seed is None else choice.seed)
