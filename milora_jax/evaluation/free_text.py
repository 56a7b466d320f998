"""Measures of generated free text: BLEU, chrF and ROUGE-L against all references of a row.

BLEU and chrF are sacrebleu's, with their default signatures; ROUGE-L is rouge-score's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import Rule

FEW_WORDS = 4
"""BLEU counts sequences of up to four words, so texts of at most four words say little about it."""


@dataclass(frozen=True)
class TextMeasures:
    """Measures of all answers of one task, each from 0 to 100.

    Attributes:
      bleu: BLEU of the corpus.
      chrf: chrF2 of the corpus.
      rouge_l: ROUGE-L's F-measure against the reference for which it is largest, mean over rows; words are
        compared in lower case and are not stemmed.
      bleu_signature, chrf_signature: sacrebleu's signatures, to be reported with the figures.
    """

    bleu: float
    chrf: float
    rouge_l: float
    bleu_signature: str
    chrf_signature: str


def references_of(record: Record) -> tuple[str, ...]:
    """The references of an answer: those of the row, else its output, else its answer.

    >>> references_of(Record("Say hi.", "", "hi", "hi")), references_of(Record("Say.", "", "", "yes"))
    (('hi',), ('yes',))
    """
    return record.references or (record.output if record.output.strip() else record.answer,)


def is_free_text(rule: Rule, records: Sequence[Record]) -> bool:
    """Whether answers to these rows are measured as free text: a row lists references, or no rule of
    LLM-Adapters reads the gold answers and most of them have more than :data:`FEW_WORDS` words.

    Args:
      rule: the rule that reads the task's answers.
      records: all rows of the task.
    """
    if any(record.references for record in records):
        return True
    texts = [references_of(record)[0] for record in records]
    return rule.name == "text" and 2 * sum(len(text.split()) > FEW_WORDS for text in texts) > len(texts)


def require_text_packages() -> None:
    """Raise an error before a run whose :func:`text_measures` would fail.

    Raises:
      UserError: sacrebleu or rouge-score is not installed.
    """
    for module, package in (("sacrebleu", "sacrebleu"), ("rouge_score", "rouge-score")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"test rows of free text need the package {package}: pip install {package}")


def text_measures(generated: Sequence[str], references: Sequence[Sequence[str]]) -> TextMeasures:
    """Measure generated texts.

    Args:
      generated: one text a row, at least one row.
      references: the references of each row, at least one; rows may have different numbers of them.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf, rouge = BLEU(), CHRF(), RougeScorer(["rougeL"], use_stemmer=False)
    streams = list(zip_longest(*references))  # sacrebleu takes None for a missing reference
    bleu_score = bleu.corpus_score(generated, streams).score
    chrf_score = chrf.corpus_score(generated, streams).score
    rows = zip(generated, references, strict=True)
    best = [rouge.score_multi(right, text)["rougeL"].fmeasure for text, right in rows]
    return TextMeasures(
        bleu=bleu_score,
        chrf=chrf_score,
        rouge_l=100 * sum(best) / len(best),
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )
