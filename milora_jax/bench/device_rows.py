"""What ``bench device`` measures, most important first, and how long each row will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milora_jax.config import TrainSection
from milora_jax.model_config import ModelConfig

RANK = 32

ROUNDS = 3
"""Measured rounds of a row; the median counts."""

EFFICIENCY = 0.5
"""The least share of a device's ceilings at which a row is expected to run."""

FIRST_COMPILATION = {"cpu": 10.0}
"""Seconds that a row's programs are expected to compile on a platform, before any has been compiled."""

OTHER_COMPILATION = 40.0

CEILINGS = {"cpu": (5e9, 2e10)}
"""Bytes and floating-point operations per second that are expected before they are measured."""

OTHER_CEILINGS = (2e11, 2e13)


@dataclass(frozen=True)
class Sizes:
    """The lengths of a run.

    Attributes:
      prompt, new: tokens of a prompt and of its continuation, in decoding.
      long: tokens of the prompt that is only prefilled.
      seq, rows: tokens and number of packed rows of a training step.
      batches: of decoding.
    """

    prompt: int
    new: int
    long: int
    seq: int
    rows: int
    batches: tuple[int, ...]


ACCELERATOR = Sizes(prompt=448, new=64, long=2048, seq=2048, rows=4, batches=(1, 8, 32, 128))
REHEARSAL = Sizes(prompt=16, new=9, long=256, seq=512, rows=1, batches=(1, 8, 32))


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: its name in the file.
      kind: "checks", "ceilings", "decode", "prefill" or "train".
      options: values of the variant, and lengths; see ``bench.decode.Variant`` and ``bench.train.Variant``.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As the worker reads it."""
        return dataclasses.asdict(self)


def rows_of(sizes: Sizes, peers: bool) -> Iterator[Row]:
    """All rows of a run.

    Args:
      peers: whether torch and PEFT are there.
    """
    yield Row("kernels against their references", "checks")
    yield Row("ceilings", "ceilings")
    for batch in sizes.batches:
        yield _decoding(sizes, "none", batch)
        yield _decoding(sizes, "milora", batch)
        if batch > 1:
            yield _decoding(sizes, "milora", batch, tenants=batch)
    most = sizes.batches[-1]
    yield _decoding(sizes, "milora", most, tenants=most, top_k=7)
    yield _decoding(sizes, "milora", 1, beams=3)
    yield Row("prefill, MiLoRA", "prefill", _variant(sizes, "milora", prompt=sizes.long, new=2))
    yield _training(sizes, "milora")
    yield _training(sizes, "lora")
    for quantize in ("int8", "nf4"):
        for batch in (1, 32):
            yield _decoding(sizes, "milora", batch, quantize=quantize)
    if peers:
        yield _decoding(sizes, "peft-lora", 1)
        yield _decoding(sizes, "peft-lora", 8)
        yield _training(sizes, "peft-lora")


NAMES = {"none": "base alone", "milora": "MiLoRA", "lora": "LoRA", "peft-lora": "PEFT LoRA"}


def _variant(sizes: Sizes, method: str, **changed: Any) -> dict[str, Any]:
    ranked, routed = method != "none", method == "milora"
    return {
        "method": method,
        "batch": 1,
        "beams": 1,
        "tenants": int(ranked),
        "rank": RANK if ranked else 0,
        "top_k": 3 if routed else 0,
        "quantize": "none",
        "prompt": sizes.prompt,
        "new": sizes.new,
        **changed,
    }


def _decoding(sizes: Sizes, method: str, batch: int, **changed: Any) -> Row:
    options = _variant(sizes, method, batch=batch, **changed)
    words = [f"decode, batch {batch}, {NAMES[method]}"]
    words += [f"{value} {name.replace('_', '-')}" for name, value in changed.items() if name != "quantize"]
    words += [options["quantize"]] if options["quantize"] != "none" else []
    return Row(", ".join(words), "decode", options)


def _training(sizes: Sizes, method: str) -> Row:
    packed = not method.startswith("peft")
    options = {
        "method": method,
        "batch": sizes.rows,
        "rank": RANK,
        "remat": TrainSection().remat if packed else "none",
        "quantize": "none",
        "rows": "packed" if packed else "full",
        "seq": sizes.seq,
    }
    return Row(f"train, {sizes.rows} x {sizes.seq}, {NAMES[method]}", "train", options)


@dataclass(frozen=True)
class Prediction:
    """Predicts how long rows take, from the model's size and what has been measured so far.

    Attributes:
      config: the model's shape.
      width: bytes of a weight.
      platform: of the device, as JAX names it.
      done: the rows of the file that are done, with their ``kind``, ``options``, ``seconds`` and ``report``.
    """

    config: ModelConfig
    width: int
    platform: str
    done: Sequence[Mapping[str, Any]]

    def seconds(self, row: Row) -> float:
        """Seconds of a row: its work, and what the row of its kind with the most beside its work took."""
        beside = [
            each["seconds"] - self._work(each["kind"], each["options"])
            for each in self.done
            if each["kind"] == row.kind
        ]
        first = FIRST_COMPILATION.get(self.platform, OTHER_COMPILATION)
        return max(beside, default=first) + self._work(row.kind, row.options) / EFFICIENCY

    def _ceilings(self) -> tuple[float, float]:
        for each in self.done:
            if each["kind"] == "ceilings":
                return each["report"]["bandwidth"], each["report"]["matmul"]
        return CEILINGS.get(self.platform, OTHER_CEILINGS)

    def _work(self, kind: str, given: Mapping[str, Any]) -> float:
        """Seconds at the ceilings."""
        bandwidth, matmul = self._ceilings()
        parameters = self.config.matrix_parameters
        if kind == "train":
            return (ROUNDS + 1) * 4 * parameters * given["batch"] * given["seq"] / matmul
        if kind not in ("decode", "prefill"):
            return 0.0
        width = self.width / {"none": 1, "int8": 2, "nf4": 4}[given["quantize"]]
        texts = given["batch"] * given["beams"]
        step = max(width * parameters / bandwidth, 2 * parameters * texts / matmul)
        prefill = 2 * parameters * given["batch"] * given["prompt"] / matmul
        return (ROUNDS + 1) * (2 * prefill + given["new"] * step)
