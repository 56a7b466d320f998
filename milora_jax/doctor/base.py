"""The frozen base: its config, its files and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.source import weight_files
from milora_jax.doctor.findings import FAIL, OK, Finding
from milora_jax.doctor.subject import Subject

SHOWN = 12
"""Letters of a fingerprint that are shown; two bases with the same ones are not met."""


def base_findings(subject: Subject) -> Iterator[Finding]:
    """Whether the config is one of a model that we have, fits the run, and has weights beside it."""
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
    """Whether every token that the tokenizer can give has a place in the model's vocabulary."""
    tokenizer, model = subject.tokenizer, subject.model
    if len(tokenizer) > model.vocab_size:
        said = f"{len(tokenizer)} tokens for a model of {model.vocab_size}: it is another model's tokenizer"
        yield Finding(FAIL, "tokenizer", said)
        return
    ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} {i}" for i in model.eos_ids)
    bos = tokenizer.bos_token_id
    begin = "no beginning-of-sequence token" if bos is None else f"begins with {tokenizer.bos_token!r} {bos}"
    yield Finding(OK, "tokenizer", f"{len(tokenizer)} tokens, {begin}, answers end with {ends}")
