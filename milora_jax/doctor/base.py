"""The frozen base: its config, its files and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.source import weight_files
from milora_jax.data.tokens import encode_prompt
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding
from milora_jax.doctor.subject import Subject

SHOWN = 12
"""Digits of a fingerprint that are shown, enough to tell two bases apart."""

FEW_BEYOND = 64
"""Tokens without an embedding that a published tokenizer may have, for images or padding, as Gemma 3."""


def base_findings(subject: Subject) -> Iterator[Finding]:
    """Check that the config describes a supported model that fits the run, and that it has weights."""
    model, longest = subject.model, subject.config.data.max_length
    weights = weight_files(subject.directory)
    if not weights:
        said = (
            f"{subject.directory} holds no .safetensors file: fetch the model whole, or convert its weights"
        )
        yield Finding(FAIL, "base", said)
        return
    if not model.eos_ids:
        yield Finding(FAIL, "base", "config.json names no eos_token_id: an answer would never end; add it")
    if longest > model.max_positions:
        said = f"data.max_length is {longest}: expected at most the model's {model.max_positions} positions"
        yield Finding(FAIL, "base", said)
    said = f"{model.family}, {model.num_layers} layers of {model.hidden_size}, {len(weights)} weight file(s)"
    yield Finding(OK, "base", f"{said}, fingerprint {base_fingerprint(subject.directory)[:SHOWN]}")


def tokenizer_findings(subject: Subject) -> Iterator[Finding]:
    """Check that all tokens of the tokenizer have embeddings, and say what it puts around a text."""
    tokenizer, model = subject.tokenizer, subject.model
    beyond = sum(token >= model.vocab_size for token in tokenizer.get_vocab().values())
    if beyond:
        said = f"{beyond} of {len(tokenizer)} tokens have no embedding, the model has {model.vocab_size}"
        few = beyond <= FEW_BEYOND
        do = "rows that hold one are refused" if few else "it is another model's tokenizer"
        yield Finding(WARN if few else FAIL, "tokenizer", f"{said}: {do}")
        if not few:
            return
    ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} {i}" for i in model.eos_ids)
    rule = subject.config.data.special_tokens
    before, after = around_a_text(tokenizer, rule)
    if after:
        said = f"data.special_tokens={rule} ends every prompt with {' '.join(after)}"
        yield Finding(WARN, "tokenizer", f"{said}: data.special_tokens=bos leaves it away")
    begin = f"prompts begin with {' '.join(before)}" if before else "nothing is put before a prompt"
    yield Finding(OK, "tokenizer", f"{len(tokenizer)} tokens, {begin}, answers end with {ends}")


def around_a_text(tokenizer: Any, special_tokens: str) -> tuple[list[str], list[str]]:
    """The tokens that a rule of ``prompt_format.PromptFormat`` puts before and after a text."""
    bare, ids = (encode_prompt(tokenizer, "x", rule) for rule in ("none", special_tokens))
    starts = [i for i in range(len(ids)) if ids[i : i + len(bare)] == bare]
    start = starts[0] if starts else 0
    parts = ids[:start], ids[start + len(bare) :]
    before, after = (list(map(str, tokenizer.convert_ids_to_tokens(part))) for part in parts)
    return before, after
