"""``python -m milora_jax.bench overhead``: the cost of a server compared with its engine.

In turns on one machine: the engine in this process, as in ``bench decode``, continues all prompts at once;
then a running server gets the same prompts from twice as many clients as it has batch slots. Both are
measured while all slots are in use: from the end of as many answers as there are slots to the end of all but
as many, since slots fill one after the other at the start and empty at the end. The time to the first token
of an idle server is compared with one prefill. Other servers of the same API and peers of ``bench decode``
can take turns as well. One JSON object.

    python -m milora_jax.bench files --into FOLDER
    python serve.py --base FOLDER/model --adapter a=FOLDER/adapter0 --adapter b=FOLDER/adapter1 &
    python -m milora_jax.bench overhead --model FOLDER/model --adapters a=FOLDER/adapter0,b=FOLDER/adapter1
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
from milora_jax.bench.rounds import BenchSettings, in_turns, option
from milora_jax.bench.traffic import FIRST_ID, LAST_ID, Asking, Outcome, closed_loop, completion, connected
from milora_jax.config import DTYPES
from milora_jax.errors import UserError, named_directory, require
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import load_adapter

CLIENTS_PER_ROW = 2
"""A request always waits for the next free batch slot."""


@dataclass
class Case:
    """One program that is measured.

    Attributes:
      rate: continues all prompts and returns tokens per second.
      first: returns the seconds to the first token of one prompt on an idle program; None if that is not
        measured.
    """

    name: str
    rate: Callable[[], float]
    first: Callable[[], float] | None = None
    tokens_per_second: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench overhead``.

    Attributes:
      model: Hugging Face directory, the server's --base.
      adapters: NAME=DIR,..., the server's --adapter.
      url: of the running server.
      key: environment variable with a key of that server; empty if it needs none.
      rows: the server's --rows.
      slots: the server's --adapters-on-device.
      context: the server's --context.
      dtype: dtype of the engine's base.
      requests: requests in a round, a multiple of ``rows`` and at least three times as many.
      prompt: tokens of a prompt.
      new: tokens of an answer.
      firsts: measurements of the first token in a round.
      peers: other programs that take turns.
      peer_python: a Python with torch, transformers and peft.
      rank: rank of the peers' adapters.
      other_url: URL of a running `transformers serve`.
      other_model: the model's name there.
      repeats: at least 5; the median counts.
    """

    model: str
    adapters: tuple[str, ...]
    url: str = "http://127.0.0.1:8000"
    key: str = ""
    rows: int = option(8, least=1)
    slots: int = option(8, least=1)
    context: int = option(0, least=0)
    dtype: str = option("float32", choices=DTYPES)
    requests: int = option(48, least=3)
    prompt: int = option(64, least=1)
    new: int = option(64, least=1)
    firsts: int = option(5, least=1)
    peers: tuple[str, ...] = option((), choices=PEERS)
    peer_python: str = "python"
    rank: int = option(32, least=1)
    other_url: str = ""
    other_model: str = ""
    repeats: int = option(7, least=5)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure, and yield the only report.

    Raises:
      UserError: for a number of requests that does not show all batch slots in use.
    """
    # The engine ends as many requests at once as it has slots: a part of them would be counted wrongly.
    shown = settings.requests >= 3 * settings.rows and settings.requests % settings.rows == 0
    asked = f"a multiple of the {settings.rows} batch slots, at least {3 * settings.rows}"
    require(shown, "--requests", settings.requests, asked)
    base, config = load_base(settings.model, settings.dtype, decode=True)
    adapters = {
        name: load_adapter(path)
        for name, path in (named_directory("--adapters", text) for text in settings.adapters)
    }
    rng = np.random.default_rng(0)
    prompts = rng.integers(FIRST_ID, LAST_ID, (settings.requests, settings.prompt)).tolist()
    with ExitStack() as stack:
        cases = [
            *_engines(base, config, adapters, prompts, settings),
            _server("server", settings.url, list(adapters), prompts, settings),
            *(
                _peer(stack, method, batch, settings)
                for method in settings.peers
                for batch in (1, settings.rows)
            ),
        ]
        if settings.other_url:
            cases.append(_other(settings))
        for case in cases:
            case.rate()  # compiles, or opens connections

        def take(case: Case) -> None:
            case.tokens_per_second.append(case.rate())
            if case.first is not None:
                # A round has several of these short measurements, of which it takes the median.
                case.first_ms.append(1e3 * statistics.median(case.first() for _ in range(settings.firsts)))

        bandwidth = in_turns(cases, settings.repeats, take, machine.measure_bandwidth)
    yield report(cases, settings, bandwidth)


def report(cases: Sequence[Case], settings: Settings, bandwidth: float) -> dict[str, Any]:
    """Medians of every case, and of the server's ratios to the others in the same round."""
    (server,) = (case for case in cases if case.name == "server")

    def ratio(case: Case) -> float:
        pairs = zip(server.tokens_per_second, case.tokens_per_second, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    return {
        "bench": "overhead",
        **{
            name: getattr(settings, name)
            for name in ("model", "rows", "requests", "prompt", "new", "repeats")
        },
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
    settings: Settings,
) -> list[Case]:
    """The engine with the first adapter alone, and with all adapters in a bank of the server's size."""
    first, *_ = adapters.values()
    bank = Bank(base, config, first, settings.slots + 1)  # the server has one slot for the base alone
    places = [bank.load(name, adapter, 1 + i) for i, (name, adapter) in enumerate(adapters.items())]
    kinds = {
        "engine, one adapter": (AdapterStack.single(adapter_decode_layout(first, base)), [0]),
        "engine, bank": (bank.adapters, places),
    }
    return [
        _engine(name, base, config, tenants, slots, prompts, settings)
        for name, (tenants, slots) in kinds.items()
    ]


def _engine(
    name: str,
    base: Base,
    config: ModelConfig,
    tenants: AdapterStack,
    slots: Sequence[int],
    prompts: list[list[int]],
    settings: Settings,
) -> Case:
    context = settings.context or config.max_positions
    engine = Engine(base, config, tenants, batch_slots=settings.rows, cache_length=context, penalties=False)

    def go_on(prompts: list[list[int]], new: int) -> list[float]:
        """Times at which the requests end."""
        each = GenerationSettings(max_new_tokens=new, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.submit(prompt, each, slots[i % len(slots)])
        ends: list[float] = []
        while not engine.idle:
            done = [request for request in engine.step() if request.done]
            ends += [time.perf_counter()] * len(done)
        return ends

    def first() -> float:
        begin = time.perf_counter()
        return go_on(prompts[:1], 1)[0] - begin

    def rate() -> float:
        return rate_of_full_slots(go_on(prompts, settings.new), settings.rows, settings.new)

    return Case(name, rate, first)


def rate_of_full_slots(ends: Sequence[float], rows: int, new: int) -> float:
    """Return the tokens per second of the time in which all batch slots were in use.

    Args:
      ends: times in seconds at which requests ended, a multiple of ``rows`` and at least three times as many.
      rows: batch slots.
      new: tokens of each answer.
    """
    ends = sorted(ends)
    return new * (len(ends) - 2 * rows) / (ends[-rows - 1] - ends[rows - 1])


def _server(name: str, url: str, models: list[str], prompts: list[list[int]], settings: Settings) -> Case:
    key = os.environ.get(settings.key, "")
    askings = [
        Asking(0, key, i, completion(models[i % len(models)], prompt, settings.new, stream=True))
        for i, prompt in enumerate(prompts)
    ]

    def rate() -> float:
        outcomes = asyncio.run(_send(url, askings, CLIENTS_PER_ROW * settings.rows))
        return _rate(outcomes, settings)

    def first() -> float:
        return asyncio.run(_send(url, askings[:1], 1))[0].first

    return Case(name, rate, first)


def _rate(outcomes: Sequence[Outcome], settings: Settings) -> float:
    ends = [outcome.begun + outcome.whole for outcome in outcomes]
    return rate_of_full_slots(ends, settings.rows, settings.new)


async def _send(url: str, askings: Sequence[Asking], clients: int) -> list[Outcome]:
    async with connected(url, 600.0) as session:
        outcomes = await closed_loop(session, askings, clients)
    wrong = [outcome for outcome in outcomes if not outcome.complete]
    if wrong:
        raise UserError(f"the server at {url!r} answered {len(wrong)} requests with {wrong[0].status}")
    return outcomes


def _other(settings: Settings) -> Case:
    """``transformers serve``: it accepts texts and Hugging Face's settings, and reports no usage."""
    generation = {"max_new_tokens": settings.new, "min_new_tokens": settings.new, "do_sample": False}
    # One letter is a token of its own in the tokenizer of ``bench files``.
    rng = np.random.default_rng(0)
    texts = [
        "".join(rng.choice(list("!#$%&()*+,-./:;<=>?@"), settings.prompt)) for _ in range(settings.requests)
    ]
    askings = [
        Asking(
            0,
            "",
            i,
            {
                "model": settings.other_model,
                "prompt": text,
                "max_tokens": settings.new,
                "stream": True,
                "generation_config": json.dumps(generation),
            },
            marked=False,
        )
        for i, text in enumerate(texts)
    ]

    def rate() -> float:
        outcomes = asyncio.run(_send(settings.other_url, askings, CLIENTS_PER_ROW * settings.rows))
        return _rate(outcomes, settings)

    def first() -> float:
        return asyncio.run(_send(settings.other_url, askings[:1], 1))[0].first

    return Case("other server", rate, first)


def _peer(stack: ExitStack, method: str, batch: int, settings: Settings) -> Case:
    """A loop that gives a peer ``batch`` prompts at a time."""
    sizes = {"dtype": settings.dtype, "batch": batch, "prompt": settings.prompt, "rank": settings.rank}
    peer: Peer = stack.enter_context(
        started(settings.peer_python, Path(settings.model), method, "decode", sizes)
    )
    rounds = max(1, settings.requests // batch // (settings.rows if batch == 1 else 1))

    def rate() -> float:
        begin = time.perf_counter()
        for _ in range(rounds):
            peer.run(settings.new)
        return rounds * batch * settings.new / (time.perf_counter() - begin)

    return Case(f"{method} loop of {batch}", rate)
