"""Control tokens of a tokenizer, and the chat template that writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from milora_jax.errors import UserError

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Set around control tokens in messages. Unicode promises that no text holds these two; one that does
is treated as a control token itself."""


def template_source(tokenizer: Any) -> str:
    """The program text of the tokenizer's template: two tokenizers with the same one write chats alike.

    Raises:
      UserError: there is none, or there are several and none is called ``default``.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        names = ", ".join(sorted(map(str, found)))
        found = found.get("default")
        if found is None:
            raise UserError(f"the tokenizer has the chat templates {names}: expected one called 'default'")
    if not isinstance(found, str):
        what = "no chat template" if found is None else f"a chat template of type {type(found).__name__}"
        raise UserError(f"the tokenizer has {what}: expected the tokenizer of a chat model")
    return found


def tool_template(tokenizer: Any) -> str | None:
    """The program text of the template that writes tools and their calls; None where there is none."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("tool_use", found.get("default"))
    return found if isinstance(found, str) and re.search(r"\btools\b", found) else None


@dataclass(frozen=True)
class Controls:
    """Texts that a tokenizer takes for control tokens.

    Attributes:
      special: matches its special tokens.
      every: matches those, and added tokens that the template writes: ``<|im_start|>`` is no special token
        in some tokenizers.
      marked: matches a control token between marks, or a mark that the template tore off.
      added: ids of all added tokens.
    """

    special: re.Pattern[str]
    every: re.Pattern[str]
    marked: re.Pattern[str]
    added: frozenset[int]

    def mark(self, role: str, content: str) -> str:
        """``content`` with every control token in it between marks.

        An assistant may write what is no special token: the tokens around its thoughts are such.
        """
        pattern = self.special if role == "assistant" else self.every
        return pattern.sub(f"{OPEN}\\g<0>{CLOSE}", content)

    def mark_all(self, value: Any) -> Any:
        """A value of JSON whose texts, names of fields too, are marked."""
        if isinstance(value, str):
            return self.every.sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.mark_all(name): self.mark_all(each) for name, each in value.items()}
        return [self.mark_all(each) for each in value] if isinstance(value, (list, tuple)) else value


def controls_of(tokenizer: Any) -> Controls:
    """The control tokens of a tokenizer, and those that its templates write.

    Raises:
      UserError: it has no template.
    """
    source, with_tools = template_source(tokenizer), tool_template(tokenizer) or ""
    return _controls(tokenizer, source if with_tools in source else source + with_tools, len(tokenizer))


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, source: str, size: int) -> Controls:
    """``size`` is the tokenizer's length: one that grew is looked at again."""
    added = tokenizer.added_tokens_decoder
    special = {token.content for token in added.values() if token.special}
    special |= {text for text in tokenizer.all_special_tokens if isinstance(text, str)}
    written = {token.content for token in added.values() if token.content in source}
    written = {text for text in written if not text.isspace()}  # "\n" is a token of Gemma, and no control

    def pattern(texts: set[str]) -> str:
        longest_first = sorted({*texts, OPEN, CLOSE} - {""}, key=lambda text: (-len(text), text))
        return "|".join(map(re.escape, longest_first))

    every = pattern(special | written)
    return Controls(
        special=re.compile(pattern(special)),
        every=re.compile(every),
        marked=re.compile(f"{OPEN}({every}){CLOSE}|[{OPEN}{CLOSE}]"),
        added=frozenset(added),
    )
