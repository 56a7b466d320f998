"""The settings of the rows and their prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from milora_jax.columns import parse_columns
from milora_jax.errors import one_of, require
from milora_jax.prompt_format import SPECIAL_TOKENS, TEMPLATES, PromptFormat

TRAIN_ON = ("all", "last")


def parse_weights(text: str) -> dict[str, float]:
    """Parse ``data.weights``: the weight of each source, by its name.

    >>> parse_weights("gsm8k=2, boolq=0.5")
    {'gsm8k': 2.0, 'boolq': 0.5}

    Raises:
      UserError: an entry is no ``NAME=WEIGHT``, a name stands twice, or a weight is not above 0 and finite.
    """
    weights: dict[str, float] = {}
    for entry in text.split(",") if text else ():
        name, separator, number = (part.strip() for part in entry.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        fits = bool(name and separator) and 0 < weight < math.inf
        require(fits, "data.weights", entry.strip(), "NAME=WEIGHT, a weight above 0, as in gsm8k=2")
        require(name not in weights, "data.weights", text, f"{name!r} once")
        weights[name] = weight
    return weights


@dataclass(frozen=True)
class DataSection:
    """The data sets of a run and the form of their prompts.

    Attributes:
      train: files or Hub data sets, comma-separated, each ``[NAME=]SOURCE``; see
        ``milora_jax.data.sources``.
      dev: as ``train``; where it is empty, ``dev_share`` of the training rows is used.
      test: as ``train``; every entry is one task of the final table.
      weights: shares of the sources of ``train`` in the training examples: comma-separated ``NAME=WEIGHT``, a
        weight for each source. Only ratios count; sources below their share are repeated. Empty takes every
        row once in an epoch. See docs/tuning.md.
      columns: which column of the rows holds which field: comma-separated ``[SOURCE:]FIELD=COLUMN``,
        ``FIELD="a text"`` for the same text in every row, or ``COLUMN=`` to leave a column out; see
        docs/data.md.
      dev_share: share of the training rows held out as dev rows when ``dev`` is empty.
      dev_limit: most dev rows, for quick evaluations: the first rows of every entry of ``dev``, or the number
        of rows held out; 0 means no limit.
      template: form of a prompt: alpaca, see ``milora_jax.data.prompts``; chat, the tokenizer's own template,
        see ``milora_jax.data.chat``.
      special_tokens: special tokens around a prompt of the ``alpaca`` template and around plain texts:
        tokenizer, those of ``tokenizer(text)``; bos, one beginning-of-sequence token before it; none.
      template_time: the time that a chat template gets from ``strftime_now``, as in 2026-11-29T12:00:00;
        empty is the time at which the run begins. It is stored with the adapter.
      train_on: answers of a chat that are learned: all; or last, the last one of those that are not switched
        off in the row. Dev rows follow; test rows ask every turn.
      prompt_tokens: tokens at the beginning of a plain text, row ``{"text": ...}``, that are its prompt and
        not learned; methods that read a prompt need at least one. 0 learns all but the first token.
      max_length: longest row in tokens, prompt and response together; plain texts are cut there.
      pack: put several training records into a row of ``max_length`` tokens; each has its own attention,
        positions, loss and route.
      prepared_path: directory that keeps the tokenised training and dev rows in files, as Axolotl's
        ``dataset_prepared_path``; later starts read them there, row by row, and hold none in memory. Empty
        keeps all rows in memory. See docs/data.md.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    weights: str = ""
    columns: str = ""
    dev_share: float = 0.05
    dev_limit: int = 0
    template: str = "alpaca"
    special_tokens: str = "tokenizer"
    template_time: str = ""
    train_on: str = "all"
    prompt_tokens: int = 0
    max_length: int = 768
    pack: bool = False
    prepared_path: str = ""

    def __post_init__(self) -> None:
        parse_columns(self.columns)
        parse_weights(self.weights)
        one_of("data.template", self.template, TEMPLATES)
        one_of("data.train_on", self.train_on, TRAIN_ON)
        one_of("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        _ = self.prompt_format  # checks the time
        require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8 tokens")
        tokens, most = self.prompt_tokens, f"from 0 to below data.max_length {self.max_length}"
        require(0 <= tokens < self.max_length, "data.prompt_tokens", tokens, most)
        require(0 < self.dev_share < 1, "data.dev_share", self.dev_share, "between 0 and 1")
        require(self.dev_limit >= 0, "data.dev_limit", self.dev_limit, "0 or more")
        local = "://" not in self.prepared_path
        require(local, "data.prepared_path", self.prepared_path, "a directory of this machine or its network")

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts are written; ``Config.prompt_format`` adds what of them the routers read."""
        return PromptFormat(self.template, self.special_tokens, self.template_time)
