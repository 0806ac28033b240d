"""`keel data show`, `verify` and `sample`, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import yaml
from keel_megatron.cli.main import app
from keel_megatron.data.manifest import Manifest
from tests.corpus.datasets import write_texts
from tests.corpus.tokenizers import write_sentencepiece
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.settings import settings

SOURCES = {"web": [made_up(60, 0), made_up(20, 1)], "books": [made_up(30, 2)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", SOURCES, weights={"web": 7, "books": 3})


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder.parent / "run.yaml"
    sections = settings(
        data__dataset=str(folder),
        data__vocab_size=VOCABULARY,
        data__cache_dir=str(folder.parent / "cache"),
        training__runs_dir=str(folder.parent / "runs"),
    )
    path.write_text(yaml.safe_dump(sections))
    return path


def keel(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.mark.parametrize("given", ["folder", "config"])
def test_show_lists_sources_and_shares(folder: Path, config: Path, given: str) -> None:
    shown = keel("show", folder if given == "folder" else config)
    assert shown.exit_code == 0
    rows = {line.split()[0]: line.split() for line in shown.stdout.splitlines() if line.strip()}
    assert rows["web"][-1] == "70.0%"
    assert rows["books"][-1] == "30.0%"
    training = sum(len(d) for n, d in enumerate(SOURCES["books"][0]) if n % 10)
    assert rows["books"][5] == f"{training:,}"
    assert "tokenizer.model, trained on these sources, 320 tokens" in shown.stdout


def test_show_as_json(folder: Path) -> None:
    shown = keel("show", folder, "--json")
    assert json.loads(shown.stdout) == json.loads((folder / "data.json").read_text())


def test_show_tells_what_was_skipped(folder: Path) -> None:
    path = folder / "data.json"
    content = json.loads(path.read_text())
    skipped = {"reason": ".png: no text", "count": 3, "bytes": 4000, "first": "a/b.png"}
    content["sources"][0] |= {"skipped": [skipped], "bad_records": skipped}
    path.write_text(Manifest.model_validate_json(json.dumps(content)).model_dump_json())
    shown = keel("show", folder).stdout
    assert "web: skipped 3 (4,000 bytes): .png: no text, such as a/b.png" in shown
    assert "web: skipped 3 damaged records (4,000 bytes), such as a/b.png" in shown


def test_show_has_the_weights_of_the_configuration(config: Path) -> None:
    sources = "[{name: web, weight: 1}, {name: books, weight: 3}]"
    shown = keel("show", config, f"data.sources={sources}").stdout
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert (rows["web"][-1], rows["books"][-1]) == ("25.0%", "75.0%")


@pytest.mark.parametrize("given", ["folder", "config"])
def test_a_whole_dataset_is_verified(folder: Path, config: Path, given: str) -> None:
    done = keel("verify", folder if given == "folder" else config)
    assert done.exit_code == 0
    assert done.stdout.count(" documents, ") == 3
    assert "is as it was built" in done.stdout


def one_bit(folder: Path) -> None:
    path = folder / "shards" / "web-00001.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def gone(folder: Path) -> None:
    (folder / "shards" / "web-00001.idx").unlink()


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"other")


def recorded(folder: Path, change: Callable[[Path], None]) -> None:
    """A change that data.json vouches for."""
    from tests.datasets import record

    change(folder / "shards")
    path = folder / "data.json"
    content = json.loads(path.read_text())
    for source in content["sources"]:
        for shard in source["shards"]:
            for end in shard["files"]:
                shard["files"][end] = record(folder / "shards" / f"{shard['name']}.{end}")
    path.write_text(json.dumps(content))


def foreign_token(folder: Path) -> None:
    def change(shards: Path) -> None:
        tokens = np.fromfile(shards / "web-00001.bin", np.uint16)
        tokens[3] = VOCABULARY
        tokens.tofile(shards / "web-00001.bin")

    recorded(folder, change)


def no_end(folder: Path) -> None:
    def change(shards: Path) -> None:
        tokens = np.fromfile(shards / "web-00001.bin", np.uint16)
        tokens[-1] = 5
        tokens.tofile(shards / "web-00001.bin")

    recorded(folder, change)


def other_index(folder: Path) -> None:
    def change(shards: Path) -> None:
        content = bytearray((shards / "web-00001.idx").read_bytes())
        content[34:38] = b"\xff\xff\xff\x7f"
        (shards / "web-00001.idx").write_bytes(content)

    recorded(folder, change)


def held_out(folder: Path) -> None:
    def change(shards: Path) -> None:
        with (shards / "web-00001.npy").open("wb") as file:
            np.lib.format.write_array(file, np.array([3], np.int64))

    recorded(folder, change)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (one_bit, "web-00001.bin was changed since"),
        (gone, "web-00001.idx is missing or cannot be read"),
        (tokenizer, "tokenizer.model was changed"),
        (foreign_token, "web-00001.bin has a token outside of the vocabulary of 320"),
        (no_end, "web-00001 has a document without a token at its end (0)"),
        (other_index, "web-00001.idx is not an index of web-00001.bin"),
        (held_out, "web-00001 has 1 held-out documents, and 2 in data.json"),
    ],
)
def test_damage_is_named_and_ends_with_1(
    folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    done = keel("verify", folder)
    assert done.exit_code == 1
    damaged = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    assert said in damaged[0]
    assert "as it was built" not in done.stdout


def test_samples_are_decoded_with_borders(config: Path) -> None:
    shown = keel("sample", config, "--step", "2", "--samples", "3")
    assert shown.exit_code == 0, shown.exception
    heads = [line for line in shown.stdout.splitlines() if line.startswith("--- ")]
    assert [head.split(":")[0] for head in heads] == [f"--- sample {n}" for n in (16, 17, 18)]
    assert "<<< end of document >>>\n<<< next document >>>" in shown.stdout
    assert keel("sample", config, "--step", "2", "--samples", "3").stdout == shown.stdout


def test_samples_are_those_of_a_growing_batch(config: Path) -> None:
    """Four, four, four and eight."""
    ramp = "schedule.rampup_batch_size={start: 4, increment: 4, samples: 32}"
    shown = keel("sample", config, ramp, "--step", "4", "--samples", "9")
    heads = [line for line in shown.stdout.splitlines() if line.startswith("--- ")]
    assert [head.split(":")[0] for head in heads] == [f"--- sample {n}" for n in range(12, 20)]


def test_samples_of_a_step_that_was_trained_are_those_it_read(config: Path) -> None:
    run = config.parent / "runs" / "test"
    run.mkdir(parents=True)
    values = {"consumed_samples": 24, "consumed_tokens": 768, "tokens_per_second": 512.0}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "seconds": 0.5, **values}) + "\n")
    shown = keel("sample", config, "--step", "2", "--samples", "2")
    heads = [line for line in shown.stdout.splitlines() if line.startswith("--- ")]
    assert [head.split(":")[0] for head in heads] == ["--- sample 16", "--- sample 17"]
    note = f"step 2: samples 16 to 23, as recorded in {run / 'metrics.jsonl'}"
    assert note in shown.stderr.splitlines()
    refused = keel("sample", config, "--step", "5")
    assert "--step: 5 is after the last step of the run, 4" in str(refused.exception)


def test_a_dataset_that_is_built_for_samples_says_so(tmp_path: Path) -> None:
    sections = settings(
        data__text=str(write_texts(tmp_path / "text", 5)),
        data__tokenizer=str(write_sentencepiece(tmp_path)),
        data__vocab_size=400,
        data__cache_dir=str(tmp_path / "cache"),
        training__runs_dir=str(tmp_path / "runs"),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    shown = keel("sample", tmp_path / "run.yaml")
    assert shown.exit_code == 0, shown.exception
    assert "the dataset is in" in shown.stderr
    assert "the dataset is in" not in shown.stdout


def test_settings_need_a_configuration(folder: Path) -> None:
    refused = keel("show", folder, "data.seq_length=8")
    assert "need a configuration" in str(refused.exception)
