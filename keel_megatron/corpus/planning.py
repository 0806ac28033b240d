"""The first stage of a build: tokenizer, encoder, split and jobs, for the folder's plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from keel_megatron.config.data import DataConfig
from keel_megatron.corpus.cuts import cuts_of
from keel_megatron.corpus.documents import Source
from keel_megatron.corpus.encoders import choose
from keel_megatron.corpus.plan import PLAN, Plan, PlannedSource, Planner
from keel_megatron.corpus.readers import Tally
from keel_megatron.corpus.sample import Sampled, training_text
from keel_megatron.corpus.skips import megabytes
from keel_megatron.corpus.split import is_single_text, key_hash, limit_of, split_offset
from keel_megatron.data.chat.templates import FILE, find_template
from keel_megatron.data.chat.tokens import ChatTokenizer
from keel_megatron.data.huggingface import FILE as HUGGING_FACE
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.manifest import CHAT, TokenizerRecord
from keel_megatron.data.tokenizer import (
    MODEL,
    SAMPLE_CHARACTERS,
    Tokenizer,
    open_tokenizer,
    train_tokenizer,
)
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.tables import count

Say = Callable[[str], None]
AnyTokenizer = Tokenizer | HuggingFaceTokenizer

_TRIED_ON: Final = 2_000_000
"""Characters on which encoders, and a given tokenizer, are tried."""
_LOST_AT_MOST: Final = 0.001


def make_plan(
    data: DataConfig, fingerprint: str, sources: Sequence[Source], partial: Path, say: Say
) -> Plan:
    """Make a folder's tokenizer and plan its jobs.

    Args:
        data: the run's data settings.
        fingerprint: of the dataset.
        sources: the sources.
        partial: the folder that is being built.
        say: called with messages.

    Raises:
        UserError: the tokenizer does not fit the settings or the text, or a record is damaged and
            not to be skipped.
        OSError: the folder cannot be written.
    """
    limits = [limit_of(source, data.validation_fraction) for source in sources]
    tally = Tally(data.on_bad_record)
    sampled = [
        Sampled(source, limit, _text_stop(source, data.validation_fraction), tally)
        for source, limit in zip(sources, limits, strict=True)
    ]
    for source, limit in zip(sources, limits, strict=True):
        say(describe(source, limit, data.validation_fraction))
    tokenizer = _tokenizer(data, sampled, tally, partial, say)
    texts = ["".join(chunks) for chunks in training_text(sampled, _TRIED_ON)]
    lost = _lost(data, tokenizer, texts, say)
    template = _chat_template(data, sources, tokenizer, partial, say)
    choice = choose(tokenizer, texts, say)
    say(f"tokenizing with {choice.description}")
    cuts = cuts_of(tokenizer, texts)
    planner = Planner(partial, cuts, data.validation_fraction)
    for number, (source, limit) in enumerate(zip(sources, limits, strict=True)):
        planner.add(number, source, limit)
    plan = Plan(
        fingerprint=fingerprint,
        tokenizer=TokenizerRecord(
            file=_name_of(tokenizer),
            sha256=hashlib.sha256(tokenizer.file_content()).hexdigest(),
            given=data.tokenizer is not None,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            encoder=choice.description,
            lost=lost,
        ),
        chat_template=template,
        encoder=choice.name,
        proven_cuts=cuts.is_proven,
        on_bad_record=data.on_bad_record,
        sources=tuple(
            PlannedSource(name=source.name, setting=source.setting, limit=limit)
            for source, limit in zip(sources, limits, strict=True)
        ),
        jobs=tuple(planner.jobs),
        unsafe_cuts=planner.unsafe,
    )
    write_whole(partial / PLAN, plan.model_dump_json())
    return plan


def describe(source: Source, limit: int, fraction: float) -> str:
    """What a source is, and what of it is held out."""
    size = f"{source.name}: {source.description}, {count(len(source.files), 'file')}, "
    size += f"{megabytes(source.size)}; validation: "
    if is_single_text(source):
        return f"{size}the last {100 * fraction:.3g}% of the only document"
    if any(file.part == "validation" for file in source.files):
        return f"{size}its own files"
    if source.kind != "text" or limit == 0:
        return f"{size}about {100 * fraction:.3g}% of the documents"
    held = [file for file in source.files if key_hash(file.name) < limit]
    share = sum(file.size for file in held) / max(1, source.size)
    return (
        f"{size}{count(len(held), 'document')}, {share:.1%} of the bytes "
        f"(data.validation_fraction = {fraction:g})"
    )


def _text_stop(source: Source, fraction: float) -> int | None:
    """Where the training part of a single plain text ends."""
    return split_offset(source.files[0], fraction) if is_single_text(source) else None


def _tokenizer(
    data: DataConfig, sampled: Sequence[Sampled], tally: Tally, partial: Path, say: Say
) -> AnyTokenizer:
    """The given tokenizer, or a new one, in the folder."""
    if data.tokenizer is None:
        if all(item.source.kind == "megatron" for item in sampled):
            raise UserError(
                "data.tokenizer: pre-tokenized data needs the tokenizer that encoded it; give its "
                "path"
            )
        say(f"training a tokenizer of {data.vocab_size} pieces")
        try:
            model = train_tokenizer(training_text(sampled, SAMPLE_CHARACTERS), data.vocab_size)
        except UserError as error:
            if (bad := tally.first_bad) is None:
                raise
            skipped = f"damaged records were skipped, such as {bad.where()}: {bad.reason}"
            raise UserError(f"{error} ({skipped})") from error
        write_whole(partial / MODEL, model)
        return Tokenizer(partial / MODEL)
    given = open_tokenizer(data.tokenizer)
    if given.vocab_size != data.vocab_size:
        raise UserError(
            f"data.vocab_size: {data.vocab_size} must be {given.vocab_size}, the size of "
            f"data.tokenizer = {data.tokenizer}"
        )
    name = _name_of(given)
    write_whole(partial / name, given.file_content())
    return open_tokenizer(partial / name)


def _chat_template(
    data: DataConfig,
    sources: Sequence[Source],
    tokenizer: AnyTokenizer,
    partial: Path,
    say: Say,
) -> str | None:
    """The template of the chat sources, in the folder; returns its SHA-256, or None without any.

    Raises:
        UserError: it cannot be read, is not a template, or cannot be used with the tokenizer.
    """
    if all(source.kind != CHAT for source in sources):
        return None
    template = find_template(data.chat_template, data.tokenizer)
    with ChatTokenizer(tokenizer, template.text, template.origin) as chat:
        ends = ", ".join(tokenizer.name_of(token) for token in chat.ends())
    say(f"chat template: {template.origin}; an answer ends with {ends}")
    write_whole(partial / FILE, template.text)
    return template.sha256


def _name_of(tokenizer: AnyTokenizer) -> Literal["tokenizer.model", "tokenizer.json"]:
    return HUGGING_FACE if isinstance(tokenizer, HuggingFaceTokenizer) else MODEL


def _lost(data: DataConfig, tokenizer: AnyTokenizer, texts: Sequence[str], say: Say) -> float:
    """Share of a sample's characters that the tokenizer loses.

    Raises:
        UserError: it is more than 0.1 %, and not allowed.
    """
    size = sum(map(len, texts))
    lost = sum(tokenizer.lost(text) for text in texts) if data.tokenizer is not None else 0
    if not lost:
        return 0.0
    share = lost / size
    said = (
        f"data.tokenizer: {data.tokenizer} loses {share:.2%} of the text's characters "
        f"({lost:,} of a sample of {size:,}): "
        f"{'; '.join(tokenizer.losses()) or 'it encodes too few'}"
    )
    if share <= _LOST_AT_MOST or data.allow_lossy_tokenizer:
        say(f"warning: {said}")
        return share
    raise UserError(
        f"{said}. Use one trained with byte_fallback=true, normalization_rule_name=identity and "
        "remove_extra_whitespaces=false, or null to train one; or set "
        "data.allow_lossy_tokenizer to true"
    )
