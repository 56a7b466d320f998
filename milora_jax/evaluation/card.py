"""The model card of an adapter that is pushed to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from milora_jax.config import Config
from milora_jax.data.sources import run_sources
from milora_jax.evaluation.report import TEXT_MEASURES

OF_TRAINING = "objective epochs batch_size optimizer learning_rate schedule warmup_share seed".split()
"""Settings of ``train`` that a card has."""

IN_HUB = "hf:"
"""How the location of a data set on the Hub begins."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
      address: of the adapter, ``hf://OWNER/NAME``.
      form: milora, orbax or peft: who can load it.
      base: name of the base on the Hub; "" where it is not known.
      adapter: the settings of the method; empty for an adapter of others.
      run: the settings of the run; None where there is no run.
      summary: the run's ``summary.json``; empty where there is none.
    """

    address: str
    form: str
    base: str
    adapter: Mapping[str, Any]
    run: Config | None
    summary: Mapping[str, Any]

    def text(self) -> str:
        """The card in Markdown, with the Hub's metadata before it; the license is left to its author.

        It holds names of data sets, and no path of the machine.
        """
        parts = [self._metadata(), f"# {self.address.rpartition('/')[2]}", self._what()]
        parts += filter(None, (self._results(), self._use(), self._training(), self._settings()))
        return "\n\n".join(parts) + "\n"

    @property
    def _method(self) -> str:
        return str(self.adapter.get("method", "adapter"))

    def _metadata(self) -> str:
        lines = ["---"]
        if self.base:
            lines += [f"base_model: {json.dumps(self.base)}", "base_model_relation: adapter"]
        lines += [
            f"library_name: {'peft' if self.form == 'peft' else 'milora_jax'}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in dict.fromkeys((self._method, "milora_jax", "adapter"))),
        ]
        if hub := [name for name, location in self._sources("train") if location.startswith(IN_HUB)]:
            lines += ["datasets:", *(f"- {json.dumps(name)}" for name in hub)]
        return "\n".join([*lines, "---"])

    def _sources(self, split: str) -> Iterator[tuple[str, str]]:
        """Name and location of the data sets of a run; on the Hub its name there."""
        for source in [] if self.run is None else run_sources(self.run.data)[split]:
            on_hub = source.location.startswith(IN_HUB)
            yield source.location.split(":")[1] if on_hub else source.name, source.location

    def _what(self) -> str:
        base = f"[{self.base}](https://huggingface.co/{self.base})" if self.base else "a frozen base"
        return f"An adapter of method `{self._method}` for {base}, trained with milora_jax."

    @property
    def _own_metric(self) -> str:
        """The name of the function of ``eval.metric``."""
        return "metric" if self.run is None else self.run.eval.metric.rpartition(":")[2]

    def _results(self) -> str:
        """Scores of base and adapter on the run's test rows; "" where there are none."""
        rows = []
        for figure, title, shown in (
            ("accuracy", "accuracy", lambda value: f"{100 * value:.1f} %"),
            ("loss", "loss", lambda value: f"{value:.3f}"),
            ("perplexity", "perplexity", lambda value: f"{value:.2f}"),
            ("metric", self._own_metric, lambda value: f"{value:.4g}"),
        ):
            both = self.summary.get(figure) or {}
            rows += _compared(title, both.get("base") or {}, both.get("adapter") or {}, shown)
        both = self.summary.get("measures") or {}
        for name, title in TEXT_MEASURES.items():
            before, after = (
                {task: values[name] for task, values in (both.get(which) or {}).items()}
                for which in ("base", "adapter")
            )
            rows += _compared(title, before, after, lambda value: f"{value:.1f}")
        parts = []
        if rows:
            parts.append("\n".join(["| task | figure | base | adapter |", "|---|---|---|---|", *rows]))
        if (perplexity := self.summary.get("dev_perplexity")) is not None:
            parts.append(f"Dev perplexity {perplexity:.3f}, at step {self.summary['best_step']}.")
        return "\n\n".join(["## Results", *parts]) if parts else ""

    def _use(self) -> str:
        base = self.base or "BASE"
        place = f"hf://{base}" if self.base else base
        if self.form == "peft":
            code = [
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("{base}")',
                f'model = PeftModel.from_pretrained(model, "{self.address.removeprefix("hf://")}")',
            ]
        else:
            code = [
                "import milora_jax",
                "",
                f'base, config = milora_jax.load_base("{place}", decode=True)',
                f'adapter = milora_jax.load_adapter("{self.address}")',
            ]
        commands = [
            f'python -m milora_jax.generation --base {place} --adapter {self.address} --prompt "..."',
            f"python serve.py --base {place} --adapter mine={self.address}",
        ]
        return "\n".join(["## Use", "", "```python", *code, "```", "", "```", *commands, "```"])

    def _training(self) -> str:
        if self.run is None:
            return ""
        splits = {split: ", ".join(name for name, _ in self._sources(split)) for split in ("train", "test")}
        facts = {
            "training data": splits["train"],
            "test data": splits["test"],
            "steps": self.summary.get("steps"),
            "best step": self.summary.get("best_step"),
            "tunable parameters": self.summary.get("tunable_parameters"),
            **{name: getattr(self.run.train, name) for name in OF_TRAINING},
            "dtype of the base": self.run.model.dtype,
            "quantisation of the base": self.run.model.quantize,
        }
        return _table("## Training", facts)

    def _settings(self) -> str:
        return _table(f"## Settings of {self._method}", dict(self.adapter)) if self.adapter else ""


def _compared(title: str, before: Mapping[str, Any], after: Mapping[str, Any], shown: Any) -> Iterator[str]:
    """A row of the table of results for each task."""
    for task, value in after.items():
        cells = ["-" if each is None else shown(each) for each in (before.get(task), value)]
        yield f"| {_cell(task)} | {title} | {' | '.join(cells)} |"


def _table(title: str, facts: Mapping[str, Any]) -> str:
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in known.items()]
    return "\n".join([title, "", "| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
