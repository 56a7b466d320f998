"""A small but complete model and five instruction tasks inside the package, for trying every feature.

``model/`` is a LLaMA-architecture Hugging Face directory, and ``tasks/NAME/{train,dev,test}.jsonl`` are
records in the LLM-Adapters schema; ``tasks/preferences/{train,dev}.jsonl`` are pairs of answers to sums.
``python -m milora_jax.tiny`` makes all of them again from a seed.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The pretrained base: config.json, model.safetensors, tokenizer."""

TASKS_DIR = Path(__file__).parent / "tasks"
"""One folder per task, with ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``."""

TASKS: tuple[str, ...] = ("true_false", "multiple_choice", "completion", "arithmetic", "word_order")
"""The five tasks, shaped like the paper's: BoolQ, ARC, HellaSwag, GSM8K, and one on strings."""
