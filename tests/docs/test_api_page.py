"""docs/api.md: its code runs, and it names what the package offers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import keel_megatron as keel
from tests.docs.commands import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_its_session_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("yaml", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    session: dict[str, Any] = {}
    try:
        for block in CODE:
            exec(compile(block, "docs/api.md", "exec"), session)
    finally:
        if "model" in session:
            session["model"].close()
    losses, validations = session["losses"], session["validations"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert [record["step"] for record in validations] == [10, 20]
    assert session["outcome"].exit_code == 0
    assert [variant.model.residual for variant in session["variants"]] == ["keel", "pre_ln"]
    assert keel.load_config("api.yaml") == session["config"]
    assert session["profile"].step == 20
    assert tuple(session["logits"].shape)[1] == 384
    assert session["completion"].tokens == 8
    # The text is the one that it was trained on.
    assert session["total"].bits_per_byte < 8
    assert "did you mean model.blocks?" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in keel.__all__ if name != "__version__"])
def test_every_name_is_on_the_page(name: str) -> None:
    assert re.search(rf"`{name}[`(]", PAGE)


def test_its_keys_are_those_of_the_records() -> None:
    from keel_megatron.tracking.records import CheckpointRecord, StepRecord, ValidationRecord

    for kind in (StepRecord, ValidationRecord, CheckpointRecord):
        for name in kind.__dataclass_fields__.keys() - {"sources"}:
            assert f"`{name}`" in PAGE, name
