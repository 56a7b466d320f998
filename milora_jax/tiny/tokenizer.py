"""The tiny model's tokenizer: byte-level BPE, which can encode any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.tiny import TASKS
from milora_jax.tiny.corpus import document
from milora_jax.tiny.tasks import LEAD, make_task

VOCAB_SIZE = 1024
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
"""Ids 0 to 3: unknown (never produced), begin, end, padding."""

DOCUMENTS = 20_000
"""Corpus documents from which the merges are learnt."""


def make_tokenizer(seed: int) -> Any:
    """Learn the merges from the corpus, the prompt template and the words of the tasks.

    A space is put before every text, so that a word has the same token at the start of a line and inside it;
    every digit is a token of its own, so that sums can be learnt digit by digit.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from milora_jax.data.prompts import prompt_text
    from milora_jax.data.records import Record

    rng = np.random.default_rng([seed, len(TASKS)])
    texts = [document(rng) for _ in range(DOCUMENTS)]
    for name in TASKS:
        unique = {row["instruction"]: row for row in make_task(name, seed)["train"]}
        rows = list(unique.values())[:400]
        # A lone "true" teaches no merge; the wording of LLM-Adapters does.
        texts += [
            prompt_text(Record(row["instruction"], row["input"], row["output"], row["answer"]))
            + (f"{LEAD}{row['output']}" if name == "true_false" else row["output"])
            for row in rows
        ]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )


def save_tokenizer(directory: Path, seed: int) -> Any:
    """Make the tokenizer, write it in Hugging Face's format, and return it."""
    tokenizer = make_tokenizer(seed)
    tokenizer.save_pretrained(directory)
    return tokenizer
