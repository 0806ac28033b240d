"""Write the README's tables of settings from the configuration models' own descriptions.

python tools/settings_table.py          # rewrite README.md between its markers
python tools/settings_table.py --check  # fail if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from keel_megatron.config import RunConfig

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- settings: tools/settings_table.py -->", "<!-- /settings -->"


def table() -> str:
    lines = ["| setting | default | |", "|---|---|---|"]
    for section, field in RunConfig.model_fields.items():
        model: Any = field.annotation
        for key, setting in model.model_fields.items():
            value = setting.get_default(call_default_factory=True)
            default = "" if value is PydanticUndefined else f"`{shown(value)}`"
            text = (setting.description or "").replace("|", "\\|")
            lines.append(f"| `{section}.{key}` | {default} | {text} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value) + "}"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _old, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md: run python tools/settings_table.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
