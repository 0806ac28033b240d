"""A run's model as a model of EleutherAI's lm-evaluation-harness, `keel`.

Imports lm_eval, whose tasks take seconds to import: import this module where they are needed.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from keel_megatron.errors import UserError
from keel_megatron.evaluation.rows import Row, Score
from keel_megatron.evaluation.serving import Served
from keel_megatron.inference.sampling import Sampling

MAX_NEW_TOKENS = 256
"""Of a request that names no maximum, as of lm-eval's `hf` model."""
_IGNORED = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"}


class KeelLM(TemplateLM):
    """A model that answers lm-eval's requests.

    Texts become tokens as in lm-eval's `hf` model: context and continuation are encoded together,
    and spaces at the end of a context belong to the continuation. A text without a context follows
    the token that ends a document, as every document in training does. A sequence that is longer
    than the model's context is cut on the left, with a warning that counts them.

    Args:
        served: the model, on global rank 0.
        seed: random seed of sampled continuations.
    """

    def __init__(self, served: Served, seed: int = 0) -> None:
        super().__init__()
        self._served, self._seed = served, seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, before which a text without a context is scored."""
        return int(self._served.source.tokenizer.eod)

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at most."""
        return self._served.context

    @property
    def device(self) -> Any:
        """The device of rank 0."""
        return self._served.runtime.device

    def tok_encode(self, string: str, **_more: Any) -> list[int]:
        """Tokens of a text; as in training, no token is added whatever is asked."""
        return self._served.source.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """None; there is none to ask for.

        Raises:
            UserError: one is asked for.
        """
        if chat_template:
            raise UserError("--apply_chat_template: the model is trained on text and has none")
        return None

    def loglikelihood(self, requests: list[Any], **_more: Any) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], **_more: Any) -> list[float]:
        """Log probability of whole texts, in windows of the context that share one token."""
        rows: list[Row] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                rows.append(Row((*context, *continuation), len(continuation)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(rows), strict=True):
            totals[owner] += score.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], **_more: Any) -> list[str]:
        """Continuations up to a stop text, the end of a document or the maximum of new tokens."""
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[self._sampling(request)].append(number)
        texts = [""] * len(requests)
        cut = 0
        for sampling, numbers in groups.items():
            # The context ends what does not fit beside half a context of prompt.
            new = sampling.max_new_tokens
            room = self.max_length - new if new < self.max_length else (self.max_length + 1) // 2
            prompts = []
            for number in numbers:
                tokens = self.tok_encode(requests[number].args[0]) or [self.eot_token_id]
                cut += len(tokens) > room
                prompts.append(tokens[-room:])
            for number, text in zip(numbers, self._served.generate(prompts, sampling), strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        self._warn_of_cuts(cut, len(requests))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_more: Any,
    ) -> list[tuple[float, bool]]:
        """The same, of tokens."""
        rows = []
        cut = 0
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise _unscorable(texts, len(continuation), self.max_length)
            tokens = (*context, *continuation)
            cut += len(tokens) > self.max_length + 1
            rows.append(Row(tokens[-self.max_length - 1 :], len(continuation)))
        self._warn_of_cuts(cut, len(rows))
        answers = [(score.total, score.greedy) for score in self._scores(rows)]
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _scores(self, rows: Iterable[Row]) -> list[Score]:
        """A score a row; equal rows are scored once."""
        rows = list(rows)
        different = list(dict.fromkeys(rows))
        found = dict(zip(different, self._served.score(different), strict=True))
        return [found[row] for row in rows]

    def _sampling(self, request: Any) -> Sampling:
        """The settings of a request, as lm-eval's `hf` model understands them."""
        given = normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS)
        unknown = sorted({name for name, value in given.items() if value is not None} - _IGNORED)
        if unknown:
            raise UserError(
                f"--tasks: {request.task_name} asks for generation with {', '.join(unknown)}; "
                "supported are until, max_gen_toks, do_sample, temperature and top_p"
            )
        return Sampling(
            max_new_tokens=given["max_gen_toks"],
            temperature=given.get("temperature", 1.0) if given.get("do_sample") else 0.0,
            top_p=given.get("top_p") or 1.0,
            seed=self._seed,
            stop=tuple(text for text in given["until"] if text),
        )

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        if cut:
            print(
                f"{cut:,} of {total:,} requests are longer than the model's context of "
                f"{self.max_length:,} tokens and lose their beginning",
                file=sys.stderr,
            )


def _unscorable(texts: tuple[str, str], tokens: int, context: int) -> UserError:
    """The error of a continuation without tokens, or with too many."""
    shown = f"{texts[1][:40]!r} after {texts[0][-40:]!r}" if texts else "a continuation"
    if tokens == 0:
        return UserError(
            f"--tasks: {shown} has no token of its own, because the tokenizer joins it with the "
            "text before it; let the task's continuations begin with a space"
        )
    return UserError(
        f"--tasks: {shown} has {tokens:,} tokens, more than the model's context of {context:,}"
    )
