"""Generation from texts to texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base, decode_layout
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.data.chat import Message, Messages
from milora_jax.data.scopes import EncodedPrompt, encode_messages, whole_prompt
from milora_jax.data.tokens import encode_prompt, require_embedded
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.beam import Found, beam_search
from milora_jax.generation.engine import Engine
from milora_jax.generation.lengths import Need, bucket_of, groups_by_length, position_cost
from milora_jax.generation.prompt_lookup import MOST_PROPOSALS
from milora_jax.generation.request import Request, TokenLogprobs, require_served
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.stream import TextStream
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat

Prompt: TypeAlias = str | Sequence[int] | EncodedPrompt | Messages
"""A text, its token ids, ids with the part of them that the routers read, or a chat."""


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
      text: decoded, without special tokens and without the stop string.
      tokens: new token ids up to and including the one that ended it.
      finish: why it ended: "stop" or "length"; "error" where a logit was not finite.
      logprobs: log-probabilities of every token, where requested.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The samples of one prompt, or its error.

    Attributes:
      samples: its continuations; several if ``num_samples`` asked for them; none after an error.
      route: routing weights ``[L, E]`` of the prompt; None without a router.
      error: one line, if the prompt or its settings could not be served.
      prompt_logprobs: those of every token of the prompt but the first, where requested.
    """

    samples: tuple[Continuation, ...]
    route: np.ndarray | None = None
    error: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.samples[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the first sample."""
        return self.samples[0].tokens


def generate(
    base: Base,
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    adapter: Adapter | None = None,
    bank: Bank | None = None,
    tenants: Sequence[str] = (),
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    prefill_rows: int = 1,
    merge: bool = False,
    prompt_lookup: int = 0,
    parse_special_tokens: bool = True,
    return_errors: bool = False,
    layout: DeviceLayout | None = None,
    progress: Callable[[int], None] | None = None,
    stream: Callable[[int, int, str], None] | None = None,
) -> list[Answer]:
    """Continue prompts; the answers are in the order of the prompts.

    Args:
      base: from ``load_base``; turned into the decode layout where it is not yet.
      tokenizer: from ``milora_jax.data.tokens.load_tokenizer``.
      prompts: full prompt texts; token ids; or chats, lists of messages with ``role`` and ``content``, which
        the tokenizer's chat template writes. Special tokens are put around a text as the adapter was trained
        with (``Adapter.prompt_format``); without one, by the tokenizer's own rule. Of a text and of ids the
        routers read all; of a chat, and of an ``EncodedPrompt``, what ``adapter.route_on`` says.
      adapter: from ``load_adapter``; None, and no bank, answers with the plain base.
      bank: adapters of several tenants, instead of ``adapter``.
      tenants: with a bank, the tenant of each prompt.
      settings: settings of all prompts or of each; None is greedy with ``max_new_tokens``.
      max_new_tokens: longest answer in tokens, where there are no ``settings``.
      batch_size: continuations decoded together.
      prefill_rows: prompts of like length that are prefilled together.
      merge: after a prompt's prefill, fold its chosen experts into a private copy of the weights; prompts
        are then continued one after the other, see ``generation.merge``.
      prompt_lookup: tokens that a text may propose as its own next ones at each step, which one pass checks,
        see ``generation.prompt_lookup``; 0 switches that off. Beams take no proposals.
      parse_special_tokens: read special tokens that are written in texts, as Hugging Face's tokenizers and
        vLLM do: right for a chat that ``apply_chat_template`` rendered. Give False for texts that hold what
        a third party has typed, which could otherwise end a turn and begin another. Chats need no flag: their
        contents are never read so.
      return_errors: give an answer with an error for a prompt that cannot be served, and serve the
        others, instead of raising.
      layout: of rows and heads over several devices, see ``Engine``; ``batch_size`` and ``prefill_rows`` are
        multiples of its ``row_parts``.
      progress: called with the number of answers each time some are ready.
      stream: called with prompt, sample and new text as it comes.

    Raises:
      UserError: unless ``return_errors``, for the first prompt that cannot be served: empty, too long
        for the model with its answer, or with settings out of range. For an adapter that was made for a
        base of another shape.
    """
    require(not isinstance(prompts, str), "prompts", prompts, "a list of prompts")
    if settings is None:
        settings = GenerationSettings(max_new_tokens=max_new_tokens)
    each = [settings] * len(prompts) if isinstance(settings, GenerationSettings) else list(settings)
    require(len(each) == len(prompts), "settings", f"{len(each)} long", f"one per prompt, {len(prompts)}")
    if adapter is not None and adapter.shape != adapter_shape(config):
        raise UserError(
            f"the adapter fits a base of {_said(adapter.shape)}, this one has {_said(adapter_shape(config))}"
        )
    fits = 0 <= prompt_lookup <= MOST_PROPOSALS
    require(fits, "prompt_lookup", prompt_lookup, f"0 to {MOST_PROPOSALS}")
    require(adapter is None or bank is None, "adapter", "given", "none beside a bank")
    if bank is None:
        require(not tenants, "tenants", tenants, "none without a bank")
    else:
        fits = len(tenants) == len(prompts)
        require(fits, "tenants", f"{len(tenants)} long", f"one per prompt, {len(prompts)}")
    if not base.unrolled:
        base = decode_layout(base)
    if adapter is not None and not isinstance(adapter.params, tuple):
        adapter = adapter_decode_layout(adapter, base)
    served = bank.adapters if bank is not None else None if adapter is None else AdapterStack.single(adapter)
    answers: dict[int, Answer] = {}
    work: dict[int, _Job] = {}
    for i, (prompt, mine) in enumerate(zip(prompts, each, strict=True)):
        try:
            slot = 0 if bank is None else bank.slot_of(tenants[i])
            written = PromptFormat() if adapter is None else adapter.encoding
            if bank is not None:
                written = bank.prompt_formats[tenants[i]]
            encoded = prompt_ids(tokenizer, prompt, written, parse_special_tokens)
            require_room(config, tokenizer, encoded.ids, mine, batch_size)
            work[i] = _Job(encoded.ids, mine, slot, encoded.route_tokens)
        except UserError as error:
            if not return_errors:
                raise UserError(f"prompt {i}: {error}") from None
            answers[i] = Answer((), None, str(error))
    report = _Report(progress, stream)
    report.answered(len(answers))
    # Like lengths follow each other: they share a prefill, and end at about the same time.
    order = sorted(work, key=lambda i: len(work[i].ids))
    plain = {i: work[i] for i in order if work[i].settings.num_beams == 1}
    beams = {i: work[i] for i in order if work[i].settings.num_beams > 1}
    parts = 1 if layout is None else layout.row_parts
    for group in _of_like_length(base, config, plain, 1 if merge else batch_size):
        count = max if merge else sum
        samples = count(job.settings.num_samples for job in group.values())
        length = max(job.length(config) for job in group.values())
        engine = Engine(
            base,
            config,
            served,
            batch_slots=min(batch_size, -(-samples // parts) * parts),
            cache_length=length,
            penalties=any(job.settings.penalized for job in plain.values()),
            prefill_rows=prefill_rows,
            merge=merge,
            layout=layout,
            prompt_lookup=min(prompt_lookup, length - 1),
        )
        answers |= _run(engine, tokenizer, group, report)
        del engine  # its cache goes before the next one is made
    for group in _alike(config, beams, batch_size):
        first = beams[group[0]]
        ids = [beams[i].ids for i in group]
        found = beam_search(
            base,
            config,
            served,
            ids,
            first.settings,
            adapter_slot=first.adapter_slot,
            rows=min(batch_size, -(-len(beams) // parts) * parts),
            route_tokens=[beams[i].route_tokens for i in group],
            layout=layout,
        )
        for i, best in zip(group, found, strict=True):
            answers[i] = Answer((_continued(tokenizer, best, first.settings),), best.route)
            report.text(i, 0, answers[i].text)
        report.answered(len(group))
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Job:
    """A prompt that can be served."""

    ids: list[int]
    settings: GenerationSettings
    adapter_slot: int
    route_tokens: int

    def length(self, config: ModelConfig) -> int:
        """Cache positions it may fill, its prompt rounded up to its bucket."""
        longest = bucket_of(len(self.ids), config.max_positions) + self.settings.max_new_tokens
        return min(longest, config.max_positions)


@dataclass(frozen=True)
class _Report:
    """The callbacks of a generation."""

    progress: Callable[[int], None] | None
    stream: Callable[[int, int, str], None] | None

    def answered(self, count: int) -> None:
        if count and self.progress is not None:
            self.progress(count)

    def text(self, prompt: int, sample: int, fresh: str) -> None:
        if fresh and self.stream is not None:
            self.stream(prompt, sample, fresh)


def _of_like_length(
    base: Base, config: ModelConfig, jobs: dict[int, _Job], rows: int
) -> list[dict[int, _Job]]:
    """Jobs in groups that each get a cache as long as they need; see ``generation.lengths``."""
    numbers = list(jobs)
    needs = [
        Need(job.length(config), job.settings.num_samples, job.settings.max_new_tokens)
        for job in jobs.values()
    ]
    groups = groups_by_length(needs, rows, position_cost(base, config))
    return [{numbers[i]: jobs[numbers[i]] for i in group} for group in groups]


def _alike(config: ModelConfig, jobs: dict[int, _Job], most: int) -> list[list[int]]:
    """Groups of at most ``most`` prompts that one beam search can take: the same but for their tokens."""
    groups: dict[tuple, list[list[int]]] = {}
    for i, job in jobs.items():
        lots = groups.setdefault(
            (job.settings, job.adapter_slot, bucket_of(len(job.ids), config.max_positions)), [[]]
        )
        if len(lots[-1]) == most:
            lots.append([])
        lots[-1].append(i)
    return [lot for lots in groups.values() for lot in lots]


def _run(engine: Engine, tokenizer: Any, jobs: dict[int, _Job], report: _Report) -> dict[int, Answer]:
    """Prompts through an engine."""
    answers: dict[int, Answer] = {}
    numbers: dict[Request, int] = {}
    streams: dict[tuple[int, int], TextStream] = {}
    for i, job in jobs.items():
        request = engine.submit(job.ids, job.settings, job.adapter_slot, route_tokens=job.route_tokens)
        numbers[request] = i
        for sample in range(job.settings.num_samples):
            streams[i, sample] = TextStream(tokenizer, job.settings.stop)
    while not engine.idle:
        ready = 0
        for request in engine.step():
            i = numbers[request]
            samples = range(request.settings.num_samples)
            for sample in samples:
                report.text(i, sample, _feed(engine, request, sample, streams[i, sample]))
            if request.done:
                continuations = (_continuation(request, sample, streams[i, sample]) for sample in samples)
                found = request.route, "", request.prompt_logprobs
                answers[i] = Answer(tuple(continuations), *found)
                ready += 1
        report.answered(ready)
    return answers


def _feed(engine: Engine, request: Request, sample: int, text: TextStream) -> str:
    """Turn a sample's new tokens into text, and end it at a stop string."""
    finish = request.finish[sample]
    tokens = request.tokens[sample]
    shown = tokens[:-1] if finish == "stop" else tokens
    fresh = text.add(shown[len(text.tokens) :], last=finish is not None)
    if text.stopped and finish != "stop":
        del tokens[len(text.tokens) :]
        del request.logprobs[sample][len(text.tokens) :]
        engine.end(request, sample, "stop")
        request.finish[sample] = "stop"  # also where its length ended it meanwhile
    return fresh


def _continuation(request: Request, sample: int, text: TextStream) -> Continuation:
    return Continuation(
        text=text.text,
        tokens=tuple(request.tokens[sample]),
        finish=request.finish[sample] or "length",
        logprobs=tuple(request.logprobs[sample]),
    )


def _continued(tokenizer: Any, found: Found, settings: GenerationSettings) -> Continuation:
    """The continuation that beam search found."""
    text = TextStream(tokenizer, settings.stop)
    text.add(found.tokens[:-1] if found.finish == "stop" else found.tokens, last=True)
    if text.stopped:
        return Continuation(text.text, tuple(text.tokens), "stop")
    return Continuation(text.text, found.tokens, found.finish)


def prompt_ids(
    tokenizer: Any, prompt: Prompt, prompt_format: PromptFormat, parse_special_tokens: bool
) -> EncodedPrompt:
    """Encode a text, ids, or a chat as the model gets it.

    Args:
      prompt_format: format of the adapter that answers.
      parse_special_tokens: see :func:`generate`.

    Raises:
      UserError: the prompt is empty, cannot be written, or has not what the routers read.
    """
    if not (prompt.strip() if isinstance(prompt, str) else len(prompt)):
        raise UserError("the prompt is empty")
    if isinstance(prompt, EncodedPrompt):
        return prompt
    if isinstance(prompt, str):
        rule = prompt_format.special_tokens
        ids = encode_prompt(tokenizer, prompt, rule, parse_special_tokens=parse_special_tokens)
    elif isinstance(prompt[0], (Message, Mapping)):
        return encode_messages(tokenizer, cast(Messages, prompt), prompt_format)
    else:
        ids = [int(token) for token in cast(Sequence[int], prompt)]
    return whole_prompt(ids, prompt_format)


def require_room(
    config: ModelConfig, tokenizer: Any, ids: Sequence[int], settings: GenerationSettings, rows: int
) -> None:
    """Refuse a prompt that cannot be served.

    Raises:
      UserError: it holds a token that the model has no embedding of, leaves no room for its answer, or its
        settings are out of range.
    """
    try:
        require_embedded(tokenizer, ids, config.vocab_size)
    except UserError as error:
        raise UserError(f"the prompt holds {error}") from None
    room = config.max_positions - settings.max_new_tokens
    if len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens: expected at most {room} "
            f"({config.max_positions} positions less {settings.max_new_tokens} new tokens)"
        )
    require_served(config, settings, rows)


def _said(shape: Shape) -> str:
    return f"{shape.num_layers} layers, width {shape.hidden_size} and modules {dict(shape.modules)}"
