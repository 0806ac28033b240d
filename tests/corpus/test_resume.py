"""An interrupted build resumes: jobs that were complete are not done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keel_megatron.config.data import DataConfig
from keel_megatron.corpus import build as build_module
from keel_megatron.corpus import finish as finish_module
from keel_megatron.corpus import plan, pool
from keel_megatron.corpus.build import build, identify, local, partial_of
from keel_megatron.corpus.finish import clean, unfinished
from keel_megatron.corpus.plan import Plan, read_plan
from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.corpus.tokenize import Tokenizing, path_of
from keel_megatron.data.manifest import MANIFEST, Manifest
from keel_megatron.errors import UserError
from tests.corpus.datasets import built, documents, write_texts
from tests.corpus.files import data, ignore
from tests.corpus.tokenizers import write_sentencepiece

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Of a text that makes several jobs."""
    monkeypatch.setattr(plan, "SMALLEST_JOB", 2000)
    monkeypatch.setattr(plan, "COST_OF_FILE", 0)
    return data(
        text=str(write_texts(tmp_path / "text")),
        tokenizer=str(write_sentencepiece(tmp_path)),
        vocab_size=400,
        cache_dir=str(tmp_path / "cache"),
    )


def do_some(count: int):  # type: ignore[no-untyped-def]
    """Does the first jobs and leaves the rest."""

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        tokenizing = Tokenizing(partial, plan)
        for job in unfinished(partial, plan)[:count]:
            tokenizing.run(job, progress.add)

    return execute


def test_complete_jobs_are_not_done_again(tmp_path: Path, config: DataConfig) -> None:
    found = identify(config, ignore)
    folder = tmp_path / "d"
    assert build(config, found, folder, ignore, do_some(3)) is None
    partial = partial_of(folder)
    planned = read_plan(partial)
    first = planned.jobs[0]
    before = path_of(partial, first, "bin").stat().st_mtime_ns
    path_of(partial, planned.jobs[1], "json").write_text("damaged")
    said: list[str] = []
    assert build(config, identify(config, ignore), folder, said.append, do_some(1)) is None
    assert f"resuming {partial}: 2 of {len(planned.jobs)} jobs done" in said[0]
    assert path_of(partial, first, "bin").stat().st_mtime_ns == before
    built(config, folder)
    built(config, tmp_path / "whole")
    assert documents(folder) == documents(tmp_path / "whole")
    assert not partial.exists()


def test_a_build_of_other_text_begins_anew(tmp_path: Path, config: DataConfig) -> None:
    folder = tmp_path / "d"
    build(config, identify(config, ignore), folder, ignore, do_some(3))
    (tmp_path / "text" / "00.txt").write_text("other text")
    said: list[str] = []
    build(config, identify(config, ignore), folder, said.append, local(1))
    assert not [line for line in said if "resuming" in line]
    assert [1 for tokens in documents(folder)["train"] if len(tokens) < 10]


def test_an_interrupted_finish_is_repeated(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_paths: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "_sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            built(config, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    built(config, tmp_path / "d")
    built(config, tmp_path / "whole")
    assert documents(tmp_path / "d") == documents(tmp_path / "whole")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_complete_build_lacks_only_its_name(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupted(folder: Path) -> None:
        if when == "after":
            clean(folder)
        raise KeyboardInterrupt

    folder, said = tmp_path / "d", list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "clean", interrupted)
        with pytest.raises(KeyboardInterrupt):
            built(config, folder, say=said.append)
    assert not [line for line in said if "the dataset is in" in line]
    before = (partial_of(folder) / MANIFEST).stat().st_mtime_ns
    monkeypatch.setattr(build_module, "run_jobs", None)
    manifest = built(config, folder, say=said.append)
    assert said[-2:] == [
        f"resuming {partial_of(folder)}: it is complete",
        f"the dataset is in {folder}",
    ]
    assert manifest == Manifest.model_validate_json((folder / MANIFEST).read_text())
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    assert not (folder / "jobs").exists()


def test_a_complete_build_of_other_text_is_not_taken(tmp_path: Path, config: DataConfig) -> None:
    built(config, tmp_path / "d")
    (tmp_path / "d").rename(partial_of(tmp_path / "d"))
    (tmp_path / "text" / "00.txt").write_text("other text")
    built(config, tmp_path / "d")
    assert [1 for tokens in documents(tmp_path / "d")["train"] if len(tokens) < 10]


SCRIPT = """
import json, sys
from pathlib import Path
from keel_megatron.config.data import DataConfig
from keel_megatron.corpus import plan, pool, tokenize
from keel_megatron.corpus.build import build, identify, local
plan.SMALLEST_JOB, plan.COST_OF_FILE, pool.SMALL = 2000, 0, 0
pool.python = lambda: [sys.executable, "-c", sys.argv[3]]
config = DataConfig.model_validate(json.loads(sys.argv[1]))
build(config, identify(config, print), Path(sys.argv[2]), print, local(2))
"""


# A worker that hangs at the fourth job of the build.
WORKER = """
import sys, time
from pathlib import Path
from keel_megatron.corpus import tokenize, worker
run = tokenize.Tokenizing.run
def hanging(self, job, report):
    if len(list((Path(sys.argv[-1]) / "jobs").glob("*.json"))) >= 3:
        time.sleep(600)
    return run(self, job, report)
tokenize.Tokenizing.run = hanging
sys.argv[1] = sys.argv[-1]
worker.main()
"""


def test_killed_with_its_workers(tmp_path: Path, config: DataConfig) -> None:
    folder = tmp_path / "d"
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json(), str(folder), WORKER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    jobs = partial_of(folder) / "jobs"
    end = time.monotonic() + 120
    while len(list(jobs.glob("*.json"))) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in jobs.glob("*.json")}
    assert len(done) >= 3
    kept: dict[str, int] = {}

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        local(1)(partial, plan, progress)
        kept.update({name: (jobs / name).stat().st_mtime_ns for name in done})

    build(config, identify(config, ignore), folder, ignore, execute)
    assert kept == done
    built(config, tmp_path / "whole")
    assert documents(folder) == documents(tmp_path / "whole")


def test_a_worker_that_dies_is_reported(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SMALL", 0)
    monkeypatch.setattr(pool, "python", lambda: [sys.executable, "-c", "import os; os._exit(3)"])
    with pytest.raises(UserError, match=r"a worker process ended while it did text-.*code 3"):
        built(config, tmp_path / "d", workers=2)


def test_a_worker_reports_a_users_mistake(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SMALL", 0)

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        (tmp_path / "text" / "05.txt").write_text("shorter")
        local(2)(partial, plan, progress)

    with pytest.raises(UserError, match=r"05.txt changed while it was read"):
        build(config, identify(config, ignore), tmp_path / "d", ignore, execute)
