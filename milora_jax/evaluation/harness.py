"""A tuned model for lm-evaluation-harness, whose router reads contexts only.

:func:`harness_class` registers the model in lm_eval as ``milora_jax``, for the command ``lm-eval``. No router
reads a continuation, so that all choices of a question share one route. docs/lm_eval.md has the rules.
"""

from __future__ import annotations

import functools
import inspect
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from milora_jax.console import Console
from milora_jax.data.chat import Message, encode_chat, render_chat, template_source
from milora_jax.data.prompts import WITHOUT_INPUT, prompt_text
from milora_jax.data.records import Record
from milora_jax.data.scopes import EncodedPrompt, route_tokens, whole_prompt
from milora_jax.data.tokens import encode_prompt
from milora_jax.errors import UserError, one_of, require
from milora_jax.evaluation.likelihood import Passage, log_likelihoods, rolling_passages
from milora_jax.evaluation.score import PREFILL_ROWS
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.generation.settings import LARGEST_SEED, GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.prompt_format import TEMPLATES

NAME = "milora_jax"
"""The model's name in lm_eval."""

log = logging.getLogger("milora_jax.evaluation")

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first that is given counts."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

GROUP = 8
"""Number of batches of prompts in one call of ``generate``; after each, lm_eval's cache has the answers."""


class Harness:
    """The methods of ``lm_eval.api.model.TemplateLM``; :func:`harness_class` adds that base class.

    Args:
      workdir, base, adapter, dtype, quantize, template: see ``evaluation.subject.named_subject``.
      batch_size: rows of a batch.
      max_length: longest context and continuation in tokens; 0 is the model's positions. Longer ones are
        truncated on the left, as in lm_eval.
      max_gen_toks: longest answer of a task that does not set it.
      add_bos_token: True or False: whether a text begins with a beginning-of-sequence token. Default: the
        rule of the adapter's training; for a base, and for most adapters, the tokenizer's own.
      seed: seed of sampled answers.
    """

    cache_hook: Any  # set by lm_eval, which stores answers as they come

    def __init__(
        self,
        workdir: str = "",
        base: str = "",
        adapter: str = "",
        dtype: str = "",
        quantize: str = "",
        template: str = "",
        batch_size: int = 8,
        max_length: int = 0,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_gen_toks", max_gen_toks, 1)):
            require(isinstance(value, int) and value >= least, name, value, f"a whole number from {least}")
        said = add_bos_token is None or isinstance(add_bos_token, bool)
        require(said, "add_bos_token", add_bos_token, "True or False")
        fits = isinstance(seed, int) and 0 <= seed <= LARGEST_SEED
        require(fits, "seed", seed, f"a whole number from 0 to {LARGEST_SEED}")
        if template:
            one_of("template", template, TEMPLATES)
        named = named_subject(workdir, adapter, base, template=template, dtype=dtype, quantize=quantize)
        self.tuned = read_subject(named).load()
        most = self.tuned.config.max_positions
        fits = isinstance(max_length, int) and (max_length == 0 or 2 <= max_length <= most)
        require(fits, "max_length", max_length, f"2 to the model's {most} positions")
        self.tokenizer = self.tuned.tokenizer
        self.max_length, self.batch_size = max_length or most, batch_size
        self._max_gen_toks, self._seed = max_gen_toks, seed
        self._special_tokens = self.tuned.prompt_format.special_tokens
        if add_bos_token is not None:
            self._special_tokens = "bos" if add_bos_token else "none"
        self._chats: dict[str, tuple[tuple[Message, ...], str]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tuned.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The context of an empty context: the token that texts begin with, or else end with."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and the template in lm_eval's cache of requests.

        lm_eval reads it for chat contexts. Its cache does not store which chat a context was, and without
        that a context would be plain text, so the name is unique to this model.
        """
        return f"{self.tuned.name.replace('/', '__')}-{self.tuned.prompt_format.template}-{uuid.uuid4().hex}"

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model that lm_eval writes into its results."""
        adapter = self.tuned.adapter
        return {
            "model_dtype": str(self.tuned.base.dtype),
            "method": None if adapter is None else adapter.method.name,
            "max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Encode a text as lm_eval's ``hf`` does, or, if :meth:`apply_chat_template` wrote it, as chats in
        training.

        Args:
          add_special_tokens: False adds no special tokens.
        """
        if string in self._chats:
            asked, begun = self._chats[string]
            written = self.tuned.prompt_format
            if written.template == "chat":
                prompt = encode_chat(self.tokenizer, asked, time=written.time)
            else:
                text = prompt_text(_instruction(asked))
                prompt = encode_prompt(self.tokenizer, text, written.special_tokens)
            return prompt + (self.tok_encode(begun, add_special_tokens=False) if begun else [])
        rule = "none" if add_special_tokens is False else self._special_tokens
        return encode_prompt(self.tokenizer, string, rule, parse_special_tokens=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template of :meth:`apply_chat_template`, for lm_eval's records."""
        if not chat_template:
            return None
        return (
            template_source(self.tokenizer) if self.tuned.prompt_format.template == "chat" else WITHOUT_INPUT
        )

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat in the adapter's template, or without an adapter in the tokenizer's.

        Args:
          add_generation_prompt: False where the last message is the beginning of the answer.

        Raises:
          UserError: the template cannot write this chat.
        """
        messages = tuple(Message(each["role"], each["content"]) for each in chat_history)
        begun = "" if add_generation_prompt else messages[-1].content
        asked = messages if add_generation_prompt else messages[:-1]
        if self.tuned.prompt_format.template == "chat":
            text = render_chat(self.tokenizer, asked, time=self.tuned.prompt_format.time) + begun
        else:
            text = prompt_text(_instruction(asked)) + begun
        self._chats[text] = (asked, begun)
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation. In texts of a template the continuation begins where the
        template ends; elsewhere lm_eval's rule holds, by which spaces between the two belong to the
        continuation."""
        if context not in self._chats:
            whole, before = self.tok_encode(context + continuation), self.tok_encode(context.rstrip())
            after = whole[len(before) :]
            if continuation and not after:  # it was merged into the context's last token
                after = self.tok_encode(continuation, add_special_tokens=False)
            return before or [self.prefix_token_id], after
        ids = self.tok_encode(context)
        if self.tuned.prompt_format.template == "chat":
            # Encoded together: a tokenizer may put a space before a text of its own.
            texts = (context, context + continuation)
            before, whole = (self.tokenizer.encode(text, add_special_tokens=False) for text in texts)
            if whole[: len(before)] == before:
                return ids, whole[len(before) :]
        return ids, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether it is the greedy one."""
        passages, places, cut = [], [], 0
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for place, (texts, context, continuation) in enumerate(requests):
            if not continuation:  # nothing is certain
                continue
            fits = len(continuation) <= self.max_length
            expected = f"at most max_length {self.max_length} tokens"
            require(fits, "a continuation", f"{len(continuation)} tokens long", expected)
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            lost = len(context) + len(continuation) - len(tokens)
            cut += lost > 0
            prompt, scope = len(tokens) - len(continuation), self._prompt(context, texts).route_tokens
            passages.append(Passage(tokens, scope - lost if scope > lost else prompt, len(continuation)))
            places.append(place)
        _tell_cut(cut, self.max_length)
        for place, result in zip(places, self._scored(passages, disable_tqdm), strict=True):
            found[place] = result
        for request, result in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def _prompt(self, ids: Sequence[int], texts: tuple[str, str] | None) -> EncodedPrompt:
        """An encoded context, and what of it the routers read.

        Args:
          texts: the context, and what follows it; None where lm_eval gives token ids alone.
        """
        written = self.tuned.prompt_format
        if texts is None or texts[0] not in self._chats or written.template != "chat":
            return whole_prompt(list(ids), written)
        asked, _ = self._chats[texts[0]]
        return EncodedPrompt(list(ids), route_tokens(self.tokenizer, asked, ids, written))

    def _scored(self, passages: Sequence[Passage], silent: bool) -> list[tuple[float, bool]]:
        tuned, found = self.tuned, {}
        with Console(silent).progress("log-likelihoods", len(passages), "requests") as bar:
            for results in log_likelihoods(
                tuned.base, tuned.config, tuned.adapter, passages, self.batch_size
            ):
                found.update(results)
                bar.advance(len(results))
        return [(found[i].log_probability, found[i].greedy) for i in range(len(passages))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts after the prefix token.

        A text longer than ``max_length`` is scored in lm_eval's windows. For an adapter that reads prompts,
        the prefix token is the prompt of the whole text, as when the text is generated after it: it begins
        every window, so that each has its route. Other adapters, and the base, get lm_eval's windows
        unchanged.
        """
        method = None if self.tuned.adapter is None else self.tuned.adapter.method
        led = method is not None and (method.routes or method.prefix_length > 0)
        owners, passages = [], []
        for owner, request in enumerate(requests):
            tokens = whole_prompt(self.tok_encode(request.args[0]), self.tuned.prompt_format).ids
            windows = rolling_passages(tokens, self.prefix_token_id, self.max_length, led)
            owners += [owner] * len(windows)
            passages += windows
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(passages, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of the task's stop strings."""
        prompts, settings, cut = [], [], 0
        for number, request in enumerate(requests):
            context, asked = request.args
            wanted = generation_settings(asked, self._max_gen_toks, (self._seed + number) % LARGEST_SEED)
            room = self.max_length - wanted.max_new_tokens
            expected = f"fewer than max_length {self.max_length}"
            require(room >= 1, "max_gen_toks", wanted.max_new_tokens, expected)
            prompt = self._prompt(self.tok_encode(context) or [self.prefix_token_id], (context, ""))
            lost = max(0, len(prompt) - room)
            cut += lost > 0
            prompts.append(EncodedPrompt(prompt.ids[lost:], max(0, prompt.route_tokens - lost)))
            settings.append(wanted)
        _tell_cut(cut, self.max_length)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i].ids))
        texts: dict[int, str] = {}
        with Console(disable_tqdm).progress("answers", len(prompts), "requests") as bar:
            for start in range(0, len(order), GROUP * self.batch_size):
                places = order[start : start + GROUP * self.batch_size]
                answers = generate(
                    self.tuned.base,
                    self.tuned.config,
                    self.tokenizer,
                    [prompts[i] for i in places],
                    adapter=self.tuned.adapter,
                    settings=[settings[i] for i in places],
                    batch_size=self.batch_size,
                    prefill_rows=min(PREFILL_ROWS, self.batch_size),
                    progress=bar.advance,
                )
                for i, answer in zip(places, answers, strict=True):
                    texts[i] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer.text)
        return [texts[i] for i in range(len(prompts))]

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the model from lm_eval's ``--model_args``, with its ``--batch_size`` where they have none.

        lm_eval passes a device and a largest batch to every model; they are ignored, as JAX finds its
        devices.

        Raises:
          UserError: an argument is unknown.
        """
        arguments = dict(arg_dict)
        if "batch_size" not in arguments and (additional_config or {}).get("batch_size") is not None:
            arguments["batch_size"] = (additional_config or {})["batch_size"]
        names = tuple(inspect.signature(Harness).parameters)
        for name in arguments:
            one_of("an argument of the model", name, names)
        if isinstance(arguments.get("batch_size"), str) and arguments["batch_size"].isdecimal():
            arguments["batch_size"] = int(arguments["batch_size"])
        return cls(**arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the model from ``name=value,name=value``, as :meth:`create_from_arg_obj`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)


def generation_settings(asked: Mapping[str, Any], longest: int, seed: int) -> GenerationSettings:
    """Convert a task's ``generation_kwargs``; sampling settings apply where ``do_sample`` is true.

    Args:
      longest: longest answer in tokens, where the task does not set it.

    Raises:
      UserError: a name or a value is not supported.
    """
    known = ("until", "do_sample", "num_beams", *LENGTHS, *SAMPLING)
    for name in asked:
        one_of("of generation_kwargs", name, known)
    until = asked.get("until") or []
    stops = tuple(dict.fromkeys(stop for stop in ([until] if isinstance(until, str) else until) if stop))
    lengths = [asked[name] for name in LENGTHS if asked.get(name) is not None]
    sampled = asked.get("do_sample")
    if sampled is None:
        sampled = float(asked.get("temperature") or 0.0) > 0
    chances = {name: asked[name] for name in SAMPLING if asked.get(name) is not None} if sampled else {}
    if sampled:
        chances = {"temperature": 1.0, **chances}
    return GenerationSettings(
        max_new_tokens=int(lengths[0] if lengths else longest),
        stop=stops,
        seed=seed,
        num_beams=asked.get("num_beams") or 1,
        **chances,
    )


def _instruction(messages: Sequence[Message]) -> Record:
    """Convert a chat to one instruction, for a template without turns.

    Raises:
      UserError: it has several turns.
    """
    system = [message.content for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    if [message.role for message in others] != ["user"]:
        raise UserError(
            "the template of this model is 'alpaca', which writes one question: expected "
            "--fewshot_as_multiturn False"
        )
    return Record("\n\n".join([*system, others[0].content]), "", "", "")


def _tell_cut(count: int, length: int) -> None:
    if count:
        log.warning("%d requests are longer than max_length %d: cut on the left", count, length)


@functools.cache
def harness_class() -> type:
    """The model as a subclass of lm_eval's ``TemplateLM``, registered as :data:`NAME`.

    Raises:
      UserError: lm_eval is not installed.
    """
    try:
        # lm_eval lists its own models only while no model is registered, so they are imported first.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'milora-jax[eval]'"
        ) from None
    return register_model(NAME)(type("MiLoRAHarness", (Harness, TemplateLM), {"__doc__": Harness.__doc__}))
