"""``python -m milora_jax.bench overhead``: what a server costs beside the engine that it runs.

In turns, on one machine: the engine in this process, as ``bench decode`` runs it, continues all prompts at
once; then a running server gets the same ones from twice as many clients as it has rows, so that none is ever
free. And the time to the first token of an idle server beside one prefill. Other servers of the same API and
peers of ``bench decode`` can take turns as well. One JSON object.

    python -m milora_jax.bench files --into FOLDER
    python serve.py --base FOLDER/model --adapter a=FOLDER/adapter0 --adapter b=FOLDER/adapter1 &
    python -m milora_jax.bench overhead --model FOLDER/model --adapters a=FOLDER/adapter0,b=FOLDER/adapter1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.bench import machine
from milora_jax.bench.peer import PEERS, Peer, started
from milora_jax.bench.rounds import in_turns, names, require_least, require_names
from milora_jax.bench.traffic import FIRST_ID, LAST_ID, Asking, Outcome, closed_loop, completion, connected
from milora_jax.cli import Parser, named_directory
from milora_jax.config import DTYPES
from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import load_adapter

CLIENTS_PER_ROW = 2
"""So that somebody always waits for a row that becomes free."""


@dataclass
class Case:
    """One thing that is measured.

    Attributes:
      all: continues all prompts; gives the tokens that came.
      first: seconds to the first token of one prompt, with nothing else to do; None where that is not
        measured.
    """

    name: str
    all: Callable[[], int]
    first: Callable[[], float] | None = None
    tokens_per_second: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)


def main(argv: list[str]) -> None:
    """Measure and print."""
    asked = _parse(argv)
    base, config = load_base(asked.model, asked.dtype, decode=True)
    adapters = {
        name: load_adapter(path)
        for name, path in (named_directory("--adapters", text) for text in asked.adapters)
    }
    rng = np.random.default_rng(0)
    prompts = rng.integers(FIRST_ID, LAST_ID, (asked.requests, asked.prompt)).tolist()
    with ExitStack() as stack:
        cases = [
            *_engines(base, config, adapters, prompts, asked),
            _server("server", asked.url, list(adapters), prompts, asked),
            *(_peer(stack, method, batch, asked) for method in asked.peers for batch in (1, asked.rows)),
        ]
        if asked.other_url:
            cases.append(_other(asked))
        for case in cases:
            case.all()  # compiles, or opens connections

        def take(case: Case) -> None:
            begin = time.perf_counter()
            tokens = case.all()
            case.tokens_per_second.append(tokens / (time.perf_counter() - begin))
            if case.first is not None:
                # Of a moment the median counts as well: a round has several of them.
                case.first_ms.append(1e3 * statistics.median(case.first() for _ in range(asked.firsts)))

        bandwidth = in_turns(cases, asked.repeats, take, machine.measure_bandwidth)
    print(json.dumps(report(cases, asked, bandwidth)), flush=True)


def report(cases: Sequence[Case], asked: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Medians of every case, and of the server's ratios to the others, round by round."""
    (server,) = (case for case in cases if case.name == "server")

    def ratio(case: Case) -> float:
        pairs = zip(server.tokens_per_second, case.tokens_per_second, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    return {
        "bench": "overhead",
        **{name: getattr(asked, name) for name in ("model", "rows", "requests", "prompt", "new", "repeats")},
        "cases": {
            case.name: {
                "tokens_per_second": statistics.median(case.tokens_per_second),
                "server_over_it": ratio(case),
                "first_token_ms": statistics.median(case.first_ms) if case.first_ms else None,
            }
            for case in cases
        },
        "bandwidth_gb_s": bandwidth / 1e9,
        **machine.describe(),
    }


def _engines(
    base: Base,
    config: ModelConfig,
    adapters: dict[str, Adapter],
    prompts: list[list[int]],
    asked: argparse.Namespace,
) -> list[Case]:
    """The engine with the first adapter alone, and with all of them in a bank of the server's size."""
    first, *_ = adapters.values()
    bank = Bank(base, config, first, asked.slots + 1)  # the server keeps one for the base alone
    places = [bank.load(name, adapter, 1 + i) for i, (name, adapter) in enumerate(adapters.items())]
    kinds = {
        "engine, one adapter": (AdapterStack.single(adapter_decode_layout(first, base)), [0]),
        "engine, bank": (bank.adapters, places),
    }
    return [
        _engine(name, base, config, tenants, slots, prompts, asked)
        for name, (tenants, slots) in kinds.items()
    ]


def _engine(
    name: str,
    base: Base,
    config: ModelConfig,
    tenants: AdapterStack,
    slots: Sequence[int],
    prompts: list[list[int]],
    asked: argparse.Namespace,
) -> Case:
    context = asked.context or config.max_positions
    engine = Engine(base, config, tenants, batch_slots=asked.rows, cache_length=context, penalties=False)

    def go_on(prompts: list[list[int]], new: int) -> int:
        settings = GenerationSettings(max_new_tokens=new, ignore_eos=True)
        requests = [
            engine.submit(prompt, settings, slots[i % len(slots)]) for i, prompt in enumerate(prompts)
        ]
        engine.run()
        return sum(len(request.tokens[0]) for request in requests)

    def first() -> float:
        begin = time.perf_counter()
        go_on(prompts[:1], 1)
        return time.perf_counter() - begin

    return Case(name, lambda: go_on(prompts, asked.new), first)


def _server(
    name: str, url: str, models: list[str], prompts: list[list[int]], asked: argparse.Namespace
) -> Case:
    key = os.environ.get(asked.key, "")
    askings = [
        Asking(0, key, i, completion(models[i % len(models)], prompt, asked.new, stream=True))
        for i, prompt in enumerate(prompts)
    ]

    def all_of_them() -> int:
        outcomes = asyncio.run(_send(url, askings, CLIENTS_PER_ROW * asked.rows))
        return sum(outcome.tokens for outcome in outcomes)

    def first() -> float:
        return asyncio.run(_send(url, askings[:1], 1))[0].first

    return Case(name, all_of_them, first)


async def _send(url: str, askings: Sequence[Asking], clients: int) -> list[Outcome]:
    async with connected(url, 600.0) as session:
        outcomes = await closed_loop(session, askings, clients)
    wrong = [outcome for outcome in outcomes if not outcome.complete]
    if wrong:
        raise UserError(f"the server at {url!r} answered {len(wrong)} requests with {wrong[0].status}")
    return outcomes


def _other(asked: argparse.Namespace) -> Case:
    """``transformers serve``: it takes texts and Hugging Face's settings, and says no usage."""
    settings = {"max_new_tokens": asked.new, "min_new_tokens": asked.new, "do_sample": False}
    # One letter is a token of its own in the tokenizer of ``bench files``.
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("!#$%&()*+,-./:;<=>?@"), asked.prompt)) for _ in range(asked.requests)]
    askings = [
        Asking(
            0,
            "",
            i,
            {
                "model": asked.other_model,
                "prompt": text,
                "max_tokens": asked.new,
                "stream": True,
                "generation_config": json.dumps(settings),
            },
            marked=False,
        )
        for i, text in enumerate(texts)
    ]

    def all_of_them() -> int:
        outcomes = asyncio.run(_send(asked.other_url, askings, CLIENTS_PER_ROW * asked.rows))
        return asked.new * len(outcomes)

    def first() -> float:
        return asyncio.run(_send(asked.other_url, askings[:1], 1))[0].first

    return Case("other server", all_of_them, first)


def _peer(stack: ExitStack, method: str, batch: int, asked: argparse.Namespace) -> Case:
    """A loop that gives a peer so many prompts at a time."""
    sizes = {"dtype": asked.dtype, "batch": batch, "prompt": asked.prompt, "rank": asked.rank}
    peer: Peer = stack.enter_context(started(asked.peer_python, Path(asked.model), method, "decode", sizes))
    rounds = max(1, asked.requests // batch // (asked.rows if batch == 1 else 1))

    def all_of_them() -> int:
        for _ in range(rounds):
            peer.run(asked.new)
        return rounds * batch * asked.new

    return Case(f"{method} loop of {batch}", all_of_them)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m milora_jax.bench overhead", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory, the server's --base")
    add("--adapters", type=names, required=True, help="NAME=DIR,..., the server's --adapter")
    add("--url", default="http://127.0.0.1:8000", help="of the running server")
    add("--key", default="", help="environment variable with a key of that server; empty for none")
    add("--rows", type=int, default=8, help="the server's --rows")
    add("--slots", type=int, default=8, help="the server's --adapters-on-device")
    add("--context", type=int, default=0, help="the server's --context")
    add("--dtype", default="float32", choices=DTYPES, help="of the engine's base")
    add("--requests", type=int, default=32, help="in a round")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--new", type=int, default=64, help="tokens of an answer")
    add("--firsts", type=int, default=5, help="first tokens that are waited for in a round")
    add("--peers", type=names, default=[], help=f"of {', '.join(PEERS)}")
    add("--peer-python", default="python", help="with torch, transformers and peft")
    add("--rank", type=int, default=32, help="of the peers' adapters")
    add("--other-url", default="", help="of a running `transformers serve`")
    add("--other-model", default="", help="as it calls the model")
    add("--repeats", type=int, default=7, help="at least 5; the median counts")
    asked = parser.parse_args(argv)
    least = ("requests", "prompt", "new", "rows", "slots", "firsts", "rank")
    require_least(asked, {"repeats": 5, **dict.fromkeys(least, 1), "context": 0})
    require_names("--peers", asked.peers, PEERS)
    return asked
