"""Continue prompts on a terminal.

``--workdir RUN`` uses a run of ``train.py``; ``--base DIR`` uses a model directory, and ``--adapter DIR`` an
adapter on it. Prompts come from ``--prompt``, which may be repeated, from ``--file`` (one per line, or JSON
lines with a record each), or from standard input, which is one prompt. Unless ``--raw`` is given, they are
put into a template: the run's or the adapter's own, the tokenizer's chat template with ``--chat``, and else
the one of ``data.prompts``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from milora_jax.addresses import local_path
from milora_jax.commands.command_line import Parser
from milora_jax.commands.options import add_options, settings_of
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.data.chat import Message
from milora_jax.data.prompts import prompt_messages
from milora_jax.data.records import Record, read_question
from milora_jax.data.scopes import EncodedPrompt
from milora_jax.data.tokens import encode_question
from milora_jax.errors import EXIT_BAD_INPUT, UserError
from milora_jax.evaluation.subject import Named, named_subject, read_subject
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import Answer, generate
from milora_jax.prompt_format import TEMPLATES, PromptFormat
from milora_jax.storage.mirror import local_copy

GIVEN_APART = ("stop", "stop_token_ids", "logit_bias")
"""Settings that are no option, or one that may be repeated."""


def token_bias(text: str) -> tuple[int, float]:
    """The parts of TOKEN:NUMBER."""
    token, _, number = text.partition(":")
    return int(token), float(number)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = Parser(prog="python -m milora_jax.generation", description=__doc__)
    parser.add_argument("--workdir", type=local_copy, help="workdir of train.py, or its gs:// address")
    parser.add_argument(
        "--base", help="of the base: Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH"
    )
    parser.add_argument(
        "--adapter",
        type=local_copy,
        help="export, workdir, PEFT adapter or hf://OWNER/NAME; default with --base: none",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the run's, or float32")
    parser.add_argument(
        "--quantize", choices=QUANTIZE, help="how the base is kept; default: as the adapter's was"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--file", type=local_path, help="a prompt per line, or a record per line if it ends in .jsonl"
    )
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the template")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message in the tokenizer's chat template"
    )
    parser.add_argument("--system", help="in a chat template: the system message of every prompt")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends it; may be repeated")
    parser.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=token_bias,
        metavar="TOKEN:NUMBER",
        help="a number that is added to the logit of a token id; may be repeated",
    )
    parser.add_argument(
        "--merge", action="store_true", help="fold the chosen experts into a copy of the weights"
    )
    parser.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="tokens that a text proposes as its own next ones at each step; 0: no speculation",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per prompt, with what was asked for beside text",
    )
    add_options(parser, GenerationSettings, skip=GIVEN_APART)
    return parser.parse_args(arguments)


def read_prompts(asked: argparse.Namespace) -> list[str | Record]:
    """Read the prompts as given: texts, and records of a ``.jsonl`` file."""
    given: list[str | Record] = list(asked.prompt)
    if asked.file is not None:
        try:
            lines = asked.file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{asked.file}: expected UTF-8 text") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            is_row = asked.file.suffix == ".jsonl"
            given.append(read_question(line, f"{asked.file}:{number}") if is_row else line)
    if not asked.prompt and asked.file is None:
        given.append(sys.stdin.read())
    return given


def in_template(
    tokenizer: Any, given: str | Record, prompt_format: PromptFormat, system: str | None, raw: bool
) -> str | EncodedPrompt:
    """A prompt as ``generate`` takes it.

    Args:
      prompt_format: format of the adapter's prompts.
      system: system message of a chat.
      raw: leave texts unchanged.

    Raises:
      UserError: the prompt cannot be written in this template.
    """
    if isinstance(given, str):
        if raw or not given.strip():
            return given
        given = Record(given.strip(), "", "", "")
    if system is not None:
        if given.messages and given.messages[0].role == "system":
            raise UserError(
                "--system is given, and a chat begins with a system message: expected one of them"
            )
        given = dataclasses.replace(given, messages=(Message("system", system), *prompt_messages(given)))
    return encode_question(tokenizer, given, prompt_format)


def named(asked: argparse.Namespace) -> Named:
    """The base and the adapter of the options; ``--adapter`` may replace the workdir's."""
    found = named_subject(
        asked.workdir,
        None if asked.workdir else asked.adapter,
        asked.base,
        template="chat" if asked.chat else None,
        otherwise=TEMPLATES[0],
        dtype=asked.dtype,
        quantize=asked.quantize,
    )
    return dataclasses.replace(found, adapter=asked.adapter or found.adapter)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read prompts, generate, print; the exit code says whether every prompt was served."""
    asked = parse_arguments(arguments)
    if (asked.workdir is None) == (asked.base is None):
        raise UserError("command line: expected either --workdir or --base")
    apart = {"stop": tuple(asked.stop), "stop_token_ids": (), "logit_bias": tuple(asked.logit_bias)}
    settings = settings_of(GenerationSettings, asked, **apart)
    if asked.raw and (asked.chat or asked.system is not None):
        raise UserError("command line: expected --raw, or --chat and --system")
    given = read_prompts(asked)
    subject = read_subject(named(asked))
    prompt_format = subject.prompt_format
    if asked.system is not None and prompt_format.template != "chat":
        raise UserError(
            "command line: --system is of chats: expected --chat, or a run with data.template=chat"
        )
    tokenizer = subject.tokenizer
    prompts = [in_template(tokenizer, each, prompt_format, asked.system, asked.raw) for each in given]
    model = subject.load()
    streams = len(prompts) == 1 and settings.num_samples == 1 and not asked.json
    answers = generate(
        model.base,
        model.config,
        tokenizer,
        prompts,
        adapter=model.adapter,
        settings=settings,
        batch_size=max(asked.batch_size, settings.num_samples),
        merge=asked.merge,
        prompt_lookup=asked.prompt_lookup,
        return_errors=True,
        stream=_print_piece if streams else None,
    )
    if streams:
        print()
    for i, answer in enumerate(answers):
        if answer.error:
            print(f"error: prompt {i}: {answer.error}", file=sys.stderr, flush=True)
        elif asked.json:
            print(json.dumps(_as_json(i, answer), ensure_ascii=False), flush=True)
        elif not streams:
            for sample in answer.samples:
                print(sample.text, flush=True)
    if any(answer.error for answer in answers):
        raise SystemExit(EXIT_BAD_INPUT)


def _print_piece(prompt: int, sample: int, text: str) -> None:
    print(text, end="", flush=True)


def _as_json(number: int, answer: Answer) -> dict:
    return {
        "prompt": number,
        "samples": [dataclasses.asdict(sample) for sample in answer.samples],
        "prompt_logprobs": [dataclasses.asdict(each) for each in answer.prompt_logprobs],
        "route": None if answer.route is None else answer.route.round(6).tolist(),
    }
