"""The tokenizer's files in a Hugging Face folder, proven to encode as the run's own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from keel_megatron.data.chat.templates import FILE as TEMPLATE
from keel_megatron.data.huggingface import FILE as JSON
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import MODEL, SPACE_MARK, Tokenizer
from keel_megatron.data.tokenizer_json import NoEquivalentError, to_tokenizer_json
from keel_megatron.errors import UserError

CONFIG: Final = "tokenizer_config.json"
DIFFICULT = (
    *("", " ", "  a", "a  ", " " * 7, " " * 1000, "\n\n\t", "a\r\nb\n", "\u00a0\u3000\ufeff"),
    *("\u2581", "a\u2581b \u2581", "<eod>", "</s><unk><|endoftext|>", "<0x41><0xE2>", "0123456789"),
    *("e\u0301\u00e9", "\ufb01\uff21", "\U0001f469\u200d\U0001f52c", "\u4e2d\u6587\u3002"),
    *("\u05e9\u05dc\u05d5\u05dd", "aaaaaaaaaaaaa", "def f(x):\n    return x  # \u03b1 \u2264 1\n"),
)
"""Texts on which conversions of tokenizers differ."""


@dataclass(frozen=True)
class Files:
    """The files of a tokenizer."""

    content: dict[str, bytes]
    """By name."""
    remarks: tuple[str, ...] = ()
    """What a user should know of them."""


def tokenizer_files(
    tokenizer: Tokenizer | HuggingFaceTokenizer, context: int, template: str | None = None
) -> Files:
    """tokenizer.json and tokenizer_config.json; of a SentencePiece model also the model itself.

    Encoding adds no token, and a special token's name in a text is encoded as text, as in training.
    With a chat template it is the token, because other programs encode what the template renders.

    Args:
        tokenizer: the run's.
        context: tokens that the model sees.
        template: of its conversations, if it was trained on them.
    """
    files = _files(tokenizer, context, special=template is not None)
    if template is not None:
        files.content[TEMPLATE] = template.encode()
    return files


def _files(tokenizer: Tokenizer | HuggingFaceTokenizer, context: int, *, special: bool) -> Files:
    """The files without the template; `special`: whether names of special tokens are found."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content, remarks = _copied(tokenizer)
        return Files(_named(content, tokenizer.eod, context, special=special), remarks)
    model = {MODEL: tokenizer.file_content()}
    try:
        converted = _with_plain_spaces(json.loads(to_tokenizer_json(model[MODEL])))
    except NoEquivalentError as error:
        return Files(
            model,
            (
                f"{JSON} is not written, because {tokenizer.path} has no equivalent: {error}; "
                f"{MODEL} is",
            ),
        )
    return Files({**_named(converted, tokenizer.eod, context, special=special), **model})


def proven_files(
    tokenizer: Tokenizer | HuggingFaceTokenizer,
    context: int,
    texts: Iterable[str],
    template: str | None = None,
) -> Files:
    """The files, of which tokenizer.json encodes and decodes these texts as the run's tokenizer.

    If that of a SentencePiece model does not, only the model is there, and a remark.

    Raises:
        UserError: a copied tokenizer.json encodes a text differently.
    """
    files = tokenizer_files(tokenizer, context, template)
    try:
        difference = _difference(tokenizer, files, texts)
    except ImportError:
        lack = f"{JSON} was not compared with {tokenizer.path}: the package tokenizers is missing"
        return replace(files, remarks=(*files.remarks, lack))
    if difference is None:
        return files
    if MODEL not in files.content:
        raise UserError(f"{tokenizer.path}: {difference}")
    remark = f"WARNING: {JSON} is not written, because {difference}; {MODEL} is"
    kept = {name: text for name, text in files.content.items() if name in (MODEL, TEMPLATE)}
    return Files(kept, (*files.remarks, remark))


def _difference(
    tokenizer: Tokenizer | HuggingFaceTokenizer, files: Files, texts: Iterable[str]
) -> str | None:
    """The first text that is encoded or decoded differently.

    Raises:
        ImportError: the package `tokenizers` is missing.
    """
    if JSON not in files.content:
        return None
    import tokenizers

    exported = tokenizers.Tokenizer.from_str(files.content[JSON].decode())
    exported.encode_special_tokens = True  # as split_special_tokens of tokenizer_config.json
    for text in texts:
        tokens = tokenizer.encode(text)
        found = exported.encode(text).ids
        if found != tokens or exported.decode(found) != tokenizer.decode(tokens):
            return (
                f"its {JSON} would encode {text[:80]!r} differently: {found[:20]}, not "
                f"{tokens[:20]}"
            )
    return None


def _with_plain_spaces(content: dict[str, Any]) -> dict[str, Any]:
    """Spaces as spaces in the vocabulary, so that U+2581 in a text is no space either."""
    model = content["model"]
    model["vocab"] = {_plain(piece): number for piece, number in model["vocab"].items()}
    model["merges"] = [[_plain(part) for part in pair] for pair in model["merges"]]
    for step in content["normalizer"]["normalizers"]:
        if step["type"] == "Prepend":
            step["prepend"] = " "
    for name, steps in (("normalizer", "normalizers"), ("decoder", "decoders")):
        kept = [step for step in content[name][steps] if step["type"] != "Replace"]
        content[name] = {"type": "Sequence", steps: kept} if kept else None
    return content


def _plain(piece: str) -> str:
    return piece.replace(SPACE_MARK, " ")


def _copied(tokenizer: HuggingFaceTokenizer) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A tokenizer.json without a template that adds tokens to every text."""
    import tokenizers

    content: dict[str, Any] = json.loads(tokenizer.json)
    if not tokenizers.Tokenizer.from_str(tokenizer.json).encode("").ids:
        return content, ()
    remark = (
        f"{JSON} is written without its post_processor, which adds special tokens to every text; "
        "the run was trained without them"
    )
    return {**content, "post_processor": None}, (remark,)


def _named(content: dict[str, Any], eod: int, context: int, *, special: bool) -> dict[str, bytes]:
    """tokenizer.json, and tokenizer_config.json that says what its tokens mean."""
    names = {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
    if eod not in names:
        vocabulary = content["model"]["vocab"]  # Unigram: a list of pieces and their scores
        pieces = [one[0] for one in vocabulary] if isinstance(vocabulary, list) else vocabulary
        numbers = range(len(pieces)) if isinstance(pieces, list) else pieces.values()
        names |= dict(zip(numbers, pieces, strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[eod],
        "pad_token": names[eod],
        "unk_token": content["model"].get("unk_token"),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "split_special_tokens": not special,
    }
    return {JSON: _text(content), CONFIG: _text(config)}


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
