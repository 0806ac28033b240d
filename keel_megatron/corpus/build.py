"""Builds a dataset folder from sources: plan, jobs, finish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.config.data import DataConfig
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.corpus import contents as contents_
from keel_megatron.corpus.contents import Contents
from keel_megatron.corpus.documents import Source
from keel_megatron.corpus.find import Listing, examine, list_files
from keel_megatron.corpus.finish import clean, finish, unfinished
from keel_megatron.corpus.plan import SAID, Plan, read_plan
from keel_megatron.corpus.planning import make_plan
from keel_megatron.corpus.pool import run_jobs
from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.corpus.tokenize import peak_memory, result_of
from keel_megatron.data.manifest import MANIFEST, SOURCES, Manifest
from keel_megatron.errors import UserError
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.tables import count

Say = Callable[[str], None]
Execute = Callable[[Path, Plan, BuildProgress], None]
"""Does the unfinished jobs of a folder."""


@dataclass(frozen=True)
class Identified:
    """What is to be built."""

    fingerprint: str
    listing: Listing
    sources: tuple[Source, ...] | None = None
    """None: their content is remembered, they were not opened."""
    contents: Contents | None = None


def identify(data: DataConfig, say: Say) -> Identified:
    """Find the sources and their fingerprint; hashes all files unless they are remembered.

    Raises:
        UserError: a source or data.tokenizer is missing or cannot be read.
    """
    listing = list_files(data, say)
    known = contents_.remembered(data, listing)
    if known is not None:
        return Identified(known, listing)
    return _hashed(data, listing, say)


def _hashed(data: DataConfig, listing: Listing, say: Say) -> Identified:
    sources = tuple(examine(listing, say))
    contents = contents_.hash_files(sources, say)
    fingerprint = contents_.fingerprint_of(data, sources, contents)
    contents_.remember(data, listing, fingerprint)
    return Identified(fingerprint, listing, sources, contents)


def partial_of(folder: Path) -> Path:
    """The folder in which a dataset folder is built, beside it."""
    return folder.with_name(f"{folder.name}.partial")


def local(workers: int = 0) -> Execute:
    """Does the jobs with processes of this machine; 0: one for each core."""

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        jobs = unfinished(partial, plan)
        progress.begin(sum(job.bytes for job in jobs))
        run_jobs(partial, plan, jobs, workers or available_cores(), progress.add)

    return execute


def build(
    data: DataConfig, found: Identified, folder: Path, say: Say, execute: Execute
) -> Manifest | None:
    """Build a dataset folder, or resume an interrupted build of it. The caller holds its lock.

    Args:
        data: the run's data settings.
        found: what is to be built.
        folder: the dataset folder, which does not exist.
        say: called with messages and progress.
        execute: does the jobs.

    Returns:
        The manifest; None if `execute` left jobs to others.

    Raises:
        UserError: the data or tokenizer does not fit the settings, a job failed, or the folder
            cannot be written.
    """
    partial = partial_of(folder)
    manifest = _finished(partial, found.fingerprint)
    if manifest is not None:
        say(f"resuming {partial}: it is complete")
    else:
        manifest = _built(data, found, partial, say, execute)
    if manifest is None:
        return None
    clean(partial)
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    say(f"the dataset is in {folder}")
    return manifest


def _built(
    data: DataConfig, found: Identified, partial: Path, say: Say, execute: Execute
) -> Manifest | None:
    """Build in the partial folder; None if jobs are left to others."""
    plan = _resumable(partial, found.fingerprint)
    sources, contents = _opened(data, found, partial if plan else None, say)
    if plan is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    progress = BuildProgress(say, partial / SAID)
    try:
        if plan is None:
            (partial / SOURCES).write_text(json.dumps(contents))
            plan = make_plan(data, found.fingerprint, sources, partial, progress.say)
        else:
            done = len(plan.jobs) - len(unfinished(partial, plan))
            progress.say(f"resuming {partial}: {done} of {count(len(plan.jobs), 'job')} done")
        execute(partial, plan, progress)
        if unfinished(partial, plan):
            return None
        manifest = finish(partial, plan, sources, contents, data.validation_fraction)
        _say_results(partial, plan, manifest, progress.say)
    finally:
        progress.close()
    return manifest


def _finished(partial: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a build of the same data that lacks only its final name."""
    path = partial / MANIFEST
    if partial.is_symlink() or path.is_symlink():
        return None
    try:
        manifest = Manifest.model_validate_json(read_small(path, LARGE))
    except (OSError, ValueError):
        return None
    return manifest if manifest.fingerprint == fingerprint else None


def _resumable(partial: Path, fingerprint: str) -> Plan | None:
    """The plan of an interrupted build of the same data."""
    try:
        plan = read_plan(partial)
    except (OSError, ValueError):
        return None
    is_same = plan.fingerprint == fingerprint and not partial.is_symlink()
    return plan if is_same and (partial / plan.tokenizer.file).is_file() else None


def _opened(
    data: DataConfig, found: Identified, partial: Path | None, say: Say
) -> tuple[tuple[Source, ...], Contents]:
    """The sources and the hashes of their files, of which an interrupted build has a list."""
    if found.sources is not None and found.contents is not None:
        return found.sources, found.contents
    if partial is not None:
        try:
            contents: Contents = parse_json(read_small(partial / SOURCES, LARGE))
            sources = tuple(examine(found.listing, say))
            if contents_.fingerprint_of(data, sources, contents) == found.fingerprint:
                return sources, contents
        except (OSError, ValueError, LookupError, TypeError):
            pass
    again = _hashed(data, found.listing, say)
    if again.fingerprint != found.fingerprint:
        # A file was changed, and its old size and modification time restored.
        raise UserError(
            f"data.cache_dir: the list of source files cached in {data.cache_dir} is out of date; "
            "start again"
        )
    return again.sources or (), again.contents or {}


def _say_results(partial: Path, plan: Plan, manifest: Manifest, say: Say) -> None:
    """Report what was built, and what was left out."""
    for source in manifest.sources:
        say(
            f"{source.name}: {source.tokens('train'):,} training and "
            f"{source.tokens('validation'):,} validation tokens of "
            f"{source.documents('train'):,} and {count(source.documents('validation'), 'document')}"
        )
        bad = source.bad_records
        if bad is not None:
            records = count(bad.count, "damaged record")
            say(f"warning: {source.name}: skipped {records}, such as {bad.first}")
    results = [result for job in plan.jobs if (result := result_of(partial, job)) is not None]
    say(
        f"{count(len(plan.jobs), 'job')}, {sum(result.seconds for result in results):,.0f} s of "
        f"worker time; memory of a worker {max(r.peak_memory for r in results) / 1e6:,.0f} MB, of "
        f"this process {peak_memory() / 1e6:,.0f} MB"
    )
    unsafe = plan.unsafe_cuts + sum(result.unsafe_cuts for result in results)
    if unsafe:
        say(
            f"warning: long texts were cut at {unsafe:,} places where a few tokens may differ from "
            "those of the whole text"
        )
