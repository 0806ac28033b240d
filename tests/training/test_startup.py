"""What `keel train` knows before it imports torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import yaml
from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.identity import claim
from keel_megatron.config import UserError
from keel_megatron.runtime.ownership import take
from keel_megatron.training import startup
from tests.checkpoint.samples import write_checkpoint
from tests.settings import settings, small_config

# Every command in one process: torch would show, and each new interpreter takes half a second.
COMMANDS = """
import json, sys
from keel_megatron.cli.main import main
ends = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["keel", *arguments]
    try:
        main()
    except SystemExit as end:
        ends.append(end.code)
    print("--", flush=True)
    print("--", file=sys.stderr, flush=True)
assert "torch" not in sys.modules and "megatron.core" not in sys.modules, "torch was imported"
print(json.dumps(ends))
"""


def keel(home: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each command; none of them imports torch."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMANDS, json.dumps(commands)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *shown, ends = done.stdout.split("--\n")
    return list(zip(json.loads(ends), shown, done.stderr.split("--\n"), strict=False))


def test_mistakes_and_a_complete_run_need_no_torch_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").mkdir()
    sections = settings(data__text="text", tracking__sample_prompt="def ")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    done = small_config(
        training__runs_dir=str(tmp_path / "done"), data__text="text", tracking__sample_prompt="def "
    )
    claim(done)
    made = write_complete(done.training.folder, (done.training.folder / "config.yaml"))
    checkpoint = made.relative_to(tmp_path)
    (done.training.folder / "samples.txt").write_text("def sample():\n")
    run = ["train", "run.yaml"]
    with take(tmp_path / "busy" / "test"):
        ends = keel(
            tmp_path,
            [*run, "data.text=nowhere"],
            [*run, "data.text=[empty]", "--processes", "2"],
            [*run, "data.tokenizer=nowhere.model"],
            [*run, "evaluation.every=2", "evaluation.tasks=nowhere.jsonl"],
            [*run, "parallel.pipeline=2", "--processes", "3"],
            [*run, "training.runs_dir=busy"],
            [*run, "training.runs_dir=done", "model.alpha=3"],
            [*run, "training.runs_dir=done"],
            ["bench", "run.yaml", "parallel.pipeline=2", "--processes", "3"],
        )
        assert [path.name for path in (tmp_path / "busy" / "test").iterdir()] == ["owner.lock"]
    assert [code for code, _shown, _error in ends] == [2, 2, 2, 2, 2, 2, 2, 0, 2]
    errors = [error for _code, _shown, error in ends]
    assert errors[0] == "error: data.text: nowhere does not exist\n"
    assert "there is no text in empty; give files or folders" in errors[1]
    assert "data.tokenizer: nowhere.model does not exist" in errors[2]
    assert "evaluation.tasks: nowhere.jsonl does not exist" in errors[3]
    assert "start 2 or a multiple of it (keel train --processes 2; torchrun" in errors[4]
    assert f"busy/test is being trained by process {os.getpid()} on host" in errors[5]
    assert "model.alpha: auto there, 3.0 now" in errors[6]
    assert "start 2 or a multiple of it" in errors[8]
    assert f"done/test is complete: 4 steps, newest checkpoint {checkpoint}." in ends[7][1]
    assert "sample (done/test/samples.txt):\ndef sample():" in ends[7][1]
    assert not (tmp_path / "runs").exists()
    assert not (done.training.folder / "owner.lock").exists()


def write_complete(run: Path, config: Path) -> Path:
    """A checkpoint of step 4 with a run's configuration."""
    checkpoint = write_checkpoint(run, 4)
    files = manifest.read_manifest(checkpoint)
    files[manifest.CONFIG] = manifest.write_checked(
        checkpoint / manifest.CONFIG, [config.read_bytes()]
    )
    manifest.write_manifest(checkpoint, 4, files)
    return checkpoint


def test_a_run_is_complete_if_its_last_checkpoint_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    assert startup.complete(config) is None
    write_checkpoint(config.training.folder, 3)
    assert startup.complete(config) is None
    newest = write_checkpoint(config.training.folder, 4)
    assert startup.complete(config) == newest
    monkeypatch.setattr(startup, "READ_BYTES", 10)  # the ranks are to read it
    assert startup.complete(config) is None
    monkeypatch.undo()
    shards = newest / manifest.shards_name(0)
    content = bytearray(shards.read_bytes())
    content[-1] ^= 1
    shards.write_bytes(content)
    assert startup.complete(config) is None


def test_what_cannot_be_trained_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path / "runs"))
    startup.check(config)  # the demo's text
    for name, content in (("blank", ""), ("some", "text")):
        (tmp_path / name).write_text(content)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    none = [str(tmp_path / name) for name in ("blank", "folder")]
    with pytest.raises(UserError, match=r"^data.text: there is no text in .*blank, .*folder; give"):
        startup.check(small_config(data__text=none))
    startup.check(small_config(data__text=[*none, str(tmp_path / "some")]))
    (tmp_path / "folder" / "deep" / "file").write_text("text")
    startup.check(small_config(data__text=none))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        startup.check(small_config(data__text=[*none, str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match=r"data.tokenizer: gone.model does not exist"):
        startup.check(small_config(data__tokenizer="gone.model"))
    startup.check(small_config(data__tokenizer="gone.model", data__dataset="set"))  # has its own
    assert not (tmp_path / "runs").exists()


def test_the_newest_checkpoint_s_configuration_counts_too(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path), training__steps=9)
    claim(config)
    write_complete(config.training.folder, config.training.folder / "config.yaml")
    (config.training.folder / "config.yaml").unlink()
    startup.check(config)
    assert folder.steps(config.training.folder) == [4]
    with pytest.raises(UserError, match=r"model\.blocks: 8 there, 4 now"):
        startup.check(
            small_config(training__runs_dir=str(tmp_path), training__steps=9, model__blocks=4)
        )
