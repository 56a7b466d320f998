"""The process of ``bench device`` that owns the accelerator and runs one row after another.

``python -m milora_jax.bench.device_worker SETTINGS`` prints what the machine is, then reads a row from each
line of standard input and answers it in a line: a report, or the error that the row ended with. The process
that started it ends it when a row takes too long, and starts another after one has crashed.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import jax

from milora_jax.base.modules import Base
from milora_jax.bench import decode, device_checks, machine, train
from milora_jax.bench.device_rows import ROUNDS
from milora_jax.bench.models import load_model
from milora_jax.bench.peer import PEERS
from milora_jax.bench.rounds import in_turns
from milora_jax.errors import short
from milora_jax.model_config import ModelConfig


class Runner:
    """Runs rows on one model.

    Args:
      model, dtype: see ``bench.rounds.ModelSettings``; empty ones are those for the device.
      peer_python: a Python with torch and PEFT.
    """

    def __init__(self, model: str, dtype: str, peer_python: str) -> None:
        cpu = jax.default_backend() == "cpu"
        self.model = model or ("random:llama-30m" if cpu else "random:llama2-7b")
        self.dtype = dtype or ("float32" if cpu else "bfloat16")
        self._python = peer_python
        self._held: tuple[tuple[bool, str], tuple[Base, ModelConfig]] | None = None

    def machine(self) -> dict[str, Any]:
        """What the machine and the model are."""
        torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
        found = {name: value for name, value in machine.describe().items() if name != "command"}
        peers = torch or self._python != sys.executable
        return {**found, "model": self.model, "dtype": self.dtype, "peers": peers}

    def run(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """The report of a row, without what :meth:`machine` says of all."""
        report = self._report(kind, options)
        said = machine.describe()
        return {
            name: value for name, value in report.items() if value != said.get(name) and name != "command"
        }

    def _report(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        if kind == "checks":
            return device_checks.check_all()
        if kind == "ceilings":
            return self._ceilings()
        if kind == "train":
            return self._train(options)
        report = self._decode(options)
        if kind == "prefill":
            tokens = options["prompt"] * options["batch"] / (report["prefill_ms"] / 1e3)
            config, matmul = self._base(True, options["quantize"])[1], machine.measure_matmul(self.dtype)
            flops = 2 * config.matrix_parameters * tokens
            report |= {"tok_s": tokens, "matmul_flops_s": matmul, "matmul_share": flops / matmul}
        return report

    def _base(self, for_decoding: bool, quantize: str) -> tuple[Base, ModelConfig]:
        """The base; one is held at a time."""
        wanted = for_decoding, quantize
        if self._held is None or self._held[0] != wanted:
            self._held = None
            gc.collect()
            loaded = load_model(self.model, self.dtype, decode=for_decoding, quantize=quantize)
            self._held = wanted, loaded
        return self._held[1]

    def _for_peer(self) -> ModelConfig:
        """The model's shape, once its weights are given up for those of a peer."""
        config = self._held[1][1] if self._held is not None else self._base(True, "none")[1]
        self._held = None
        gc.collect()
        return config

    def _ceilings(self) -> dict[str, Any]:
        bandwidth = statistics.median(machine.measure_bandwidth() for _ in range(5))
        matmul = statistics.median(machine.measure_matmul(self.dtype) for _ in range(5))
        return {"bandwidth": bandwidth, "matmul": matmul}

    def _decode(self, options: dict[str, Any]) -> dict[str, Any]:
        lengths = {name: options[name] for name in ("prompt", "new")}
        settings = decode.Settings(
            self.model, self.dtype, repeats=ROUNDS, peer_python=self._python, **lengths
        )
        variant = decode.Variant(**{name: options[name] for name in options.keys() - lengths})
        with ExitStack() as stack:
            if variant.method in PEERS:
                config = self._for_peer()
                case = decode.make_peer(stack, config, variant, settings)
            else:
                base, config = self._base(True, variant.quantize)
                case = decode.make_case(base, config, variant, settings)
            bandwidth = decode.measure_in_turns([case], settings)
            return decode.report(case, config, settings, bandwidth)

    def _train(self, options: dict[str, Any]) -> dict[str, Any]:
        settings = train.Settings(
            self.model, self.dtype, repeats=ROUNDS, peer_python=self._python, seq=options["seq"]
        )
        variant = train.Variant(**{name: options[name] for name in options.keys() - {"seq"}})
        with ExitStack() as stack:
            if variant.method in PEERS:
                config = self._for_peer()
                case = train.make_peer(stack, config, variant, settings)
            else:
                base, config = self._base(False, variant.quantize)
                case = train.make_case(base, config, variant, settings)
            matmul = in_turns([case], ROUNDS, train.take_step, lambda: machine.measure_matmul(self.dtype))
            return train.report(case, config, settings, matmul)


def main() -> None:
    """Answer rows until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # nothing but answers goes to who started this
    runner = Runner(**json.loads(sys.argv[1]))
    print(json.dumps(runner.machine()), file=answers)
    for line in sys.stdin:
        row = json.loads(line)
        begin = time.perf_counter()
        try:
            answer: dict[str, Any] = {"report": runner.run(row["kind"], row["options"])}
        except Exception as error:  # whatever it is, it costs this row alone
            answer = {"error": short(error)}
        if "error" in answer:
            gc.collect()
            jax.clear_caches()
        print(json.dumps({**answer, "seconds": time.perf_counter() - begin}), file=answers)


if __name__ == "__main__":
    main()
