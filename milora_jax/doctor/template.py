"""Checks of the template: it renders a prompt, and an answer that it renders ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from milora_jax.data.chat import Message, encode_chat, render_chat
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding
from milora_jax.doctor.subject import Subject

QUESTION, ANSWER = "What is 3 * 7?", "Twenty-one"


def template_findings(subject: Subject) -> Iterator[Finding]:
    """Check that the template of the config can be used with this tokenizer."""
    if subject.config.data.template == "chat":
        yield from chat_findings(subject.tokenizer, subject.model.eos_ids)
        return
    end = prompt_text(Record(QUESTION, "", ANSWER, ANSWER)).rstrip().rpartition("\n")[2]
    has = getattr(subject.tokenizer, "chat_template", None) is not None
    other = "; the tokenizer has a chat template too: data.template=chat for a chat model" if has else ""
    yield Finding(OK, "template", f"alpaca, prompts end with {end!r}{other}")


def chat_findings(tokenizer: Any, eos_ids: tuple[int, ...]) -> Iterator[Finding]:
    """Check that a chat template renders, opens the assistant's turn, and ends it with an end token.

    Args:
      eos_ids: tokens that end an answer for the model.

    Raises:
      UserError: there is no template, or it fails.
    """
    asked = [Message("user", QUESTION)]
    prompt, closed = render_chat(tokenizer, asked), render_chat(tokenizer, asked, False)
    whole = render_chat(tokenizer, [*asked, Message("assistant", ANSWER)], False)
    if QUESTION not in prompt or ANSWER not in whole:
        yield Finding(FAIL, "template", "the chat template leaves out what the messages say: correct it")
        return
    if not encode_chat(tokenizer, asked):
        yield Finding(FAIL, "template", "the chat template gives a prompt of no tokens: correct it")
        return
    at = whole.rindex(ANSWER)
    tail = whole[at + len(ANSWER) :]
    # Some templates open a turn with nothing: the answer follows the end of the question.
    follows = whole.startswith(prompt) and not whole[len(prompt) : at].strip()
    ids = tokenizer.encode(tail, add_special_tokens=False)
    good = True
    if prompt == closed and not follows:
        good = False
        said = "the chat template writes no generation prompt: the model must guess that it is its turn"
        yield Finding(WARN, "template", f"{said}; add one under add_generation_prompt")
    if not set(ids) & set(eos_ids):
        good = False
        written = tokenizer.convert_ids_to_tokens(ids)
        ends = tokenizer.convert_ids_to_tokens(list(eos_ids))
        said = f"it ends a turn with {' '.join(written) or 'nothing'}, none of eos_token_id {' '.join(ends)}"
        do = "tuned answers get the first of those; name the turn's end in generation_config.json instead"
        yield Finding(WARN, "template", f"{said}: {do}")
    if good:
        opens = prompt.rstrip().rpartition("\n")[2][-40:]
        yield Finding(OK, "template", f"chat, prompts end with {opens!r}, turns with {tail.strip()!r}")
