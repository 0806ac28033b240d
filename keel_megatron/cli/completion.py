"""`keel completion`: what the Tab key offers in a shell."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer

from keel_megatron.config.bundled import bundled_names

VARIABLE: Final = "_KEEL_COMPLETE"
"""Variable by which a shell's script asks for completions instead of running a command."""
_BASH: Final = """\
_keel_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$' \\t\\n' word words found
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    found="$(IFS=$'\\n'; COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) \\
        _KEEL_COMPLETE=complete_bash "$1" 2> /dev/null)"
    mapfile -t COMPREPLY <<< "$found"
    [[ -z $found ]] && COMPREPLY=()
    # Bash counts = as the end of a word, and replaces only what follows it.
    [[ $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _keel_completion keel
"""


class Shell(StrEnum):
    """A shell whose completion there is."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a shell's completion script.

    It completes commands, options, settings and files of `keel`, which must be on the PATH.
    """
    if shell is Shell.BASH:
        print(_BASH, end="")
        return
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name="keel", complete_var=VARIABLE, shell=shell.value))


def answer(app: typer.Typer) -> None:
    """Print the completions that a shell's script asks for, and end, if one does."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
        app(prog_name="keel")


def configurations(incomplete: str) -> list[str]:
    """Bundled configurations that begin so; none if a file does, which the shell completes."""
    if any(Path().glob(f"{glob.escape(incomplete)}*")):
        return []
    return [name for name in bundled_names() if name.startswith(incomplete)]


def settings(incomplete: str) -> list[tuple[str, str]]:
    """Overrides that begin so: names of settings, or one setting's values, with their help."""
    from keel_megatron.architecture.residual import RULES
    from keel_megatron.config.run import RunConfig

    found: list[tuple[str, str]] = []
    for section, field in RunConfig.model_fields.items():
        kind: Any = field.annotation
        for key, setting in kind.model_fields.items():
            name = f"{section}.{key}="
            if incomplete.startswith(name):
                known = RULES if name == "model.residual=" else _values(setting.annotation)
                found += [(name + value, "") for value in known]
            else:
                found.append((name, (setting.description or "").partition(".")[0]))
    return [one for one in found if one[0].startswith(incomplete)]


def _values(annotation: Any) -> Iterator[str]:
    """The values of a setting's type, as far as they can be listed."""
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    else:
        for part in get_args(annotation):
            if isinstance(part, str):
                yield part
            else:
                yield from _values(part)
