"""Structured output: grammars of requests, and constraints that hold a sample to one.

Grammars are compiled by llguidance, which knows JSON schemas, regular expressions and a dialect of Lark, and
gives the tokens that may come next as a packed mask. Everything here but :meth:`GrammarConstraint.mask` and
:meth:`~GrammarConstraint.accept`, which the device loop calls, runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from milora_jax.errors import printable
from milora_jax.generation.constraint import ConstraintError, words_of
from milora_jax.serving.api_errors import APIError, bad_request
from milora_jax.serving.grammar_trial import GrammarTrial
from milora_jax.serving.limits import Limits

PARSER_LIMITS: dict[str, Any] = {
    "max_items_in_row": 4000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Limits of llguidance: 20 ms for compiling a regular expression and 10 ms for a mask on a processor of 2024,
and 40 MB of a request's own memory."""

LARGEST_REPEAT = 10_000
"""The largest ``{n}`` or ``{n,m}`` in a regular expression: a million cost seconds in a single step."""

SPARE_SECONDS, SECONDS_A_TOKEN = 0.5, 0.005
"""Processor time that the masks of a sample may take: once, and for each of its tokens."""

CACHED = 64
"""Number of compiled grammars that are cached, and of sources that failed."""

WHITESPACE = r"[ \n\r\t]{1,32}"
"""The whitespace between tokens of JSON, limited so that a weak model cannot write blanks for ever."""

REPEAT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


@dataclass(frozen=True)
class Grammar:
    """A grammar as llguidance takes it.

    Attributes:
      source: JSON of its grammars.
      field: field of the request that asks for it.
    """

    source: str
    field: str


def json_grammar(schema: Any, field: str, lenient: bool = False) -> Grammar:
    """Return the grammar of the JSON texts that a schema allows.

    Args:
      lenient: ignore keywords that are not implemented.

    Raises:
      APIError: a regular expression in it repeats too often.
    """
    require_few_repeats(schema_patterns(schema), field)
    if isinstance(schema, dict):
        options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
        schema = {**schema, "x-guidance": options}
    return Grammar(json.dumps({"grammars": [{"json_schema": schema}]}), field)


def regex_grammar(pattern: str, field: str) -> Grammar:
    """Return the grammar of texts that a regular expression (syntax of Rust's ``regex``) matches whole."""
    from llguidance import LLMatcher

    require_few_repeats([pattern], field)
    return Grammar(LLMatcher.grammar_from_regex(pattern), field)


def choice_grammar(choices: Sequence[str], field: str) -> Grammar:
    """Return the grammar of some texts."""
    return lark_grammar("start: " + " | ".join(json.dumps(text) for text in choices), field)


def lark_grammar(text: str, field: str) -> Grammar:
    """Return a context-free grammar: llguidance's dialect of Lark, or GBNF, which llama.cpp takes.

    Raises:
      APIError: it is neither.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    require_few_repeats([text], field)
    try:
        text = any_to_lark(text)
    except Exception as error:  # the converter raises what its parts raise
        raise invalid_grammar(field, str(error) or type(error).__name__) from None
    return Grammar(LLMatcher.grammar_from_lark(text), field)


def require_small(text: str, field: str, limits: Limits) -> None:
    """Refuse a grammar that is too long.

    Raises:
      APIError: naming the limit.
    """
    if len(text) > limits.grammar_bytes:
        raise bad_request(
            f"{field} has {len(text)} characters: at most --grammar-bytes {limits.grammar_bytes}.", field
        )


def require_few_repeats(patterns: Sequence[str], field: str) -> None:
    """Refuse regular expressions that repeat a part too often.

    Raises:
      APIError: naming the repetition.
    """
    for pattern in patterns:
        for found in REPEAT.finditer(pattern):
            if any(number and int(number[:9]) > LARGEST_REPEAT for number in found.groups()):
                raise invalid_grammar(
                    field, f"it repeats {found[0][:40]}, at most {LARGEST_REPEAT} times are served"
                )


def schema_patterns(schema: Any) -> list[str]:
    """Return all that may be a regular expression in a schema: every text of its keywords for patterns."""
    found, pending = [], [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            patterns = value.get("patternProperties")
            found += list(patterns) if isinstance(patterns, dict) else []
            pattern = value.get("pattern")
            found += [pattern] if isinstance(pattern, str) else []
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return found


def invalid_grammar(field: str, reason: str) -> APIError:
    """Return the error for a grammar that cannot be served."""
    reason = printable(" ".join(reason.split()))[:300]
    return bad_request(f"{field} cannot be served: {reason}.", field, "invalid_grammar")


class GrammarConstraint:
    """Holds one sample to a grammar, see ``generation.constraint.Constraint``.

    Args:
      matcher: llguidance's, in the state of the sample.
      words: number of words of a mask.
      first: the mask of the state, if it is known.

    Attributes:
      field: field of the request that asks for the grammar.
    """

    def __init__(self, matcher: Any, words: int, first: np.ndarray | None = None) -> None:
        self._matcher, self._words, self._first = matcher, words, first
        self._seconds, self.field = SPARE_SECONDS, ""

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next, packed uint32 ``[ceil(V / 32)]``.

        Raises:
          ConstraintError: there is none, or the grammar is too complex.
        """
        if self._first is not None:
            return self._first
        mask = np.zeros(self._words, np.uint32)
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._spend(began)
        if not mask.any():
            raise ConstraintError("no token can follow in this grammar")
        return mask

    def accept(self, token: int) -> None:
        """Accept the token that was chosen.

        Raises:
          ConstraintError: the grammar is too complex.
        """
        self._first = None
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._seconds += SECONDS_A_TOKEN
        self._spend(began)

    def copy(self) -> GrammarConstraint:
        """Return a constraint in the same state."""
        return GrammarConstraint(self._matcher.deep_copy(), self._words, self._first)

    def _spend(self, began: float) -> None:
        self._seconds -= time.thread_time() - began
        if self._matcher.is_error():
            raise ConstraintError(_reason(self._matcher))
        if self._seconds < 0:
            raise ConstraintError("its masks take too much time")


class Grammars:
    """Compiles the grammars of requests for one model.

    Args:
      tokenizer: Hugging Face's fast tokenizer.
      vocab_size: V, the tokens of the model, at least those of the tokenizer.
      eos_ids: the model's end-of-sequence tokens, which end a complete text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int], limits: Limits) -> None:
        self._limits, self._vocab_size, self._eos_ids = limits, vocab_size, list(eos_ids)
        self._tokenizer, self._text = None, tokenizer_json(tokenizer)
        self._cache: OrderedDict[str, GrammarConstraint | str] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._trial = GrammarTrial(
            self._text or "", vocab_size, self._eos_ids, PARSER_LIMITS, limits.grammar_seconds
        )

    async def constraint(self, make: Callable[[Limits], Grammar | None]) -> GrammarConstraint | None:
        """Return a constraint at its beginning.

        Args:
          make: gives the grammar, or None for none; called in a thread.

        Raises:
          APIError: the grammar cannot be served; naming the field and the reason.
        """
        events = asyncio.get_running_loop()
        grammar = await events.run_in_executor(self._threads, make, self._limits)
        if grammar is None:
            return None
        found = self._cached(grammar.source)
        if found is None:
            found = await events.run_in_executor(self._threads, self.compile, grammar.source)
        if isinstance(found, str):
            raise invalid_grammar(grammar.field, found)
        constraint = found.copy()
        constraint.field = grammar.field
        return constraint

    def compile(self, source: str) -> GrammarConstraint | str:
        """Return the constraint of a grammar, or its error; this is called in a thread."""
        found = self._cached(source)
        if found is None:
            found = self._compiled(source)
            with self._lock:
                self._cache[source] = found
                while len(self._cache) > CACHED:
                    self._cache.popitem(last=False)
        return found

    def _cached(self, source: str) -> GrammarConstraint | str | None:
        with self._lock:
            if source in self._cache:
                self._cache.move_to_end(source)
            return self._cache.get(source)

    def _compiled(self, source: str) -> GrammarConstraint | str:
        from llguidance import LLMatcher, LLParserLimits

        if self._text is None:
            return "grammars need a tokenizer of the library tokenizers, which this model does not have"
        if not self._eos_ids:
            return "grammars need an end-of-sequence token, which this model does not have"
        if not self._trial.passes(source):
            limit = f"--grammar-seconds {self._limits.grammar_seconds}"
            return f"it is not compiled within {limit}, or takes too much memory"
        with self._lock:
            tokenizer = self._tokenizer = self._tokenizer or self._read_tokenizer(self._text)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
        if matcher.is_error():
            return _reason(matcher)
        constraint = GrammarConstraint(matcher, words_of(self._vocab_size))
        try:
            first = constraint.mask()
        except ConstraintError as error:
            return str(error)
        return GrammarConstraint(matcher, words_of(self._vocab_size), first)

    def _read_tokenizer(self, text: str) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_ids)


def tokenizer_json(tokenizer: Any) -> str | None:
    """Return the ``tokenizer.json`` of a fast tokenizer with its added tokens; None for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = copy(backend)
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _reason(matcher: Any) -> str:
    """What llguidance says, without the state of its parser."""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    known = {"": "it is too complex", "NoExtensionBias": "no text fits it"}
    return known.get(text) or text
