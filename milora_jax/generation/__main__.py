"""Continue prompts on a terminal.

``python -m milora_jax.generation --workdir RUN --prompt "..."`` takes a run of ``train.py``;
``--base DIR`` takes a model directory, with ``--adapter DIR`` or without. Prompts come from ``--prompt``
(as often as wanted), from ``--file`` (one per line, or JSON lines with a record each), or from standard
input, which is one prompt. They are put into the template of training unless ``--raw``: the run's own, the
tokenizer's chat template with ``--chat``, and else the one of ``data.prompts``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from milora_jax.base.load import load_base
from milora_jax.base.source import model_directory
from milora_jax.cli import Console, Parser
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.data.chat import Message
from milora_jax.data.prompts import prompt_messages
from milora_jax.data.records import Record, read_question
from milora_jax.data.tokens import encode_question, load_tokenizer
from milora_jax.errors import EXIT_BAD_INPUT, UserError, run_command
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import Answer, generate
from milora_jax.prompt_format import PromptFormat

_HELP = {
    "max_new_tokens": "longest continuation in tokens",
    "temperature": "0 is greedy",
    "top_k": "keep the k most probable tokens, 0 all",
    "top_p": "keep the most probable tokens up to this probability",
    "min_p": "keep tokens at least this fraction as probable as the best",
    "repetition_penalty": "above 1: tokens seen before become less probable",
    "presence_penalty": "taken from the logits of tokens the continuation holds",
    "seed": "of the random numbers",
    "logprobs": "with --json: log-probabilities of the n best tokens",
    "num_samples": "continuations per prompt",
    "num_beams": "above 1: beam search",
    "length_penalty": "of beam search",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m milora_jax.generation", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="workdir of train.py: its base and its best adapter")
    parser.add_argument(
        "--base", help="of the base: Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH"
    )
    parser.add_argument(
        "--adapter", type=Path, help="exported adapter, or a workdir; default with --base: none"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the run's, or float32")
    parser.add_argument(
        "--quantize", choices=QUANTIZE, help="how the base is kept; default: as the adapter's was"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--file", type=Path, help="a prompt per line, or a record per line if it ends in .jsonl"
    )
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the template")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message in the tokenizer's chat template"
    )
    parser.add_argument("--system", help="in a chat template: the system message of every prompt")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends it; may be repeated")
    parser.add_argument("--early-stopping", action="store_true", help="of beam search")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument(
        "--merge", action="store_true", help="fold the chosen experts into a copy of the weights"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    for name, text in _HELP.items():
        default = getattr(GenerationSettings(), name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=text)
    return parser.parse_args(arguments)


def read_prompts(arguments: argparse.Namespace) -> list[str | Record]:
    """The prompts as they are given: texts, and records of a ``.jsonl`` file."""
    given: list[str | Record] = list(arguments.prompt)
    if arguments.file is not None:
        try:
            lines = arguments.file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{arguments.file}: expected UTF-8 text") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            is_row = arguments.file.suffix == ".jsonl"
            given.append(read_question(line, f"{arguments.file}:{number}") if is_row else line)
    if not arguments.prompt and arguments.file is None:
        given.append(sys.stdin.read())
    return given


def in_template(
    tokenizer: Any, given: str | Record, written: PromptFormat, system: str | None, raw: bool
) -> str | list[int]:
    """A prompt as ``generate`` takes it.

    Args:
      written: how prompts are written for the adapter.
      system: a message that a chat begins with.
      raw: leave texts as they are.

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
    return encode_question(tokenizer, given, written)


def main() -> None:
    """Read, continue, print; the exit code says whether every prompt could be served."""
    arguments = parse_arguments()
    if (arguments.workdir is None) == (arguments.base is None):
        raise UserError("command line: expected either --workdir or --base")
    named = {name: getattr(arguments, name) for name in _HELP}
    settings = GenerationSettings(
        stop=tuple(arguments.stop),
        early_stopping=arguments.early_stopping,
        ignore_eos=arguments.ignore_eos,
        **named,
    )
    if arguments.raw and (arguments.chat or arguments.system is not None):
        raise UserError("command line: expected --raw, or --chat and --system")
    given = read_prompts(arguments)
    directory, dtype, adapter_path = arguments.base, arguments.dtype or "float32", arguments.adapter
    written = None
    if arguments.workdir is not None:
        from milora_jax.storage.workdir import read_workdir_config

        run = read_workdir_config(arguments.workdir)
        directory, dtype = run.model.path, arguments.dtype or run.model.dtype
        adapter_path = arguments.adapter or arguments.workdir
        written = run.data.prompt_format
    adapter, quantize = None, "none"
    directory = model_directory(directory)
    if adapter_path is not None:
        from milora_jax.storage.adapters import read_adapter, require_its_base

        adapter, metadata = read_adapter(adapter_path)
        quantize = require_its_base(metadata, adapter_path, directory)
    known = PromptFormat() if adapter is None else adapter.prompt_format
    known = written or known
    template = "chat" if arguments.chat else known.template or "alpaca"
    written = dataclasses.replace(known, template=template)
    if arguments.system is not None and template != "chat":
        raise UserError(
            "command line: --system is of chats: expected --chat, or a run with data.template=chat"
        )
    tokenizer = load_tokenizer(str(directory))
    prompts = [in_template(tokenizer, each, written, arguments.system, arguments.raw) for each in given]
    quantize = arguments.quantize or quantize
    with Console().loading("base") as progress:
        base, config = load_base(directory, dtype, decode=True, quantize=quantize, progress=progress)
    streams = len(prompts) == 1 and settings.num_samples == 1 and not arguments.json
    answers = generate(
        base,
        config,
        tokenizer,
        prompts,
        adapter=adapter,
        settings=settings,
        batch_size=max(arguments.batch_size, settings.num_samples),
        merge=arguments.merge,
        return_errors=True,
        stream=_show if streams else None,
    )
    if streams:
        print()
    for i, answer in enumerate(answers):
        if answer.error:
            print(f"error: prompt {i}: {answer.error}", file=sys.stderr, flush=True)
        elif arguments.json:
            print(json.dumps(_as_json(i, answer), ensure_ascii=False), flush=True)
        elif not streams:
            for sample in answer.samples:
                print(sample.text, flush=True)
    if any(answer.error for answer in answers):
        raise SystemExit(EXIT_BAD_INPUT)


def _show(prompt: int, sample: int, text: str) -> None:
    print(text, end="", flush=True)


def _as_json(number: int, answer: Answer) -> dict:
    return {
        "prompt": number,
        "samples": [dataclasses.asdict(sample) for sample in answer.samples],
        "route": None if answer.route is None else answer.route.round(6).tolist(),
    }


if __name__ == "__main__":
    run_command(main)
