"""Replicas under Ray Serve: one front with keys, limits and HTTP, and engines behind it.

    serve run milora_jax.serving.ray_serve:build base=DIR adapters=math=runs/math,law=runs/law replicas=2

The front is the application of ``serve.py`` itself; what is behind it, :class:`Replicas` instead of a
``Service``, asks an engine in another process. A request goes to a replica that has had its adapter on the
device lately, as Ray's multiplexing has it, and to the least busy one where none has. Loading and unloading
reach every replica.

Needs ``pip install -e '.[ray]'``. Ray's own proxy stands before the front: it has no deadline for the head of
a request, and answers ``/-/healthz`` and ``/-/routes`` to everybody.
"""

# pyright: reportMissingImports=false
# (Ray is an extra)

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, named_directory
from milora_jax.serving.app import App
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.door import Door
from milora_jax.serving.keys import Keyring, Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.refusal import Refusal, internal, no_such_model
from milora_jax.serving.registry import Registered, Registry
from milora_jax.serving.schema import Chat, Completion
from milora_jax.serving.server import CONNECTIONS
from milora_jax.serving.service import Piece, Turn
from milora_jax.serving.wire import Receive, Scope, Send

log = logging.getLogger("milora_jax.serving")


@dataclass(frozen=True)
class Head:
    """What an engine says first of a request: it has been begun."""

    id: str
    prompt_tokens: int


class Engine:
    """A replica: one base, one bank, one device loop.

    Args:
      registered: adapters to begin with, by name.
    """

    def __init__(self, offer: Offer, registered: dict[str, Registered], limits: Limits) -> None:
        from ray import serve

        self._service = build_service(offer, Registry(None, registered), limits)
        self._service.loop.start()
        # Ray asks who has which adapter: it hears of those that were wanted last, as the bank keeps them.
        self._note: Any = serve.multiplexed(max_num_models_per_replica=limits.adapters_on_device)(_name)

    async def answer(
        self, tenant: Tenant, asked: Completion | Chat
    ) -> AsyncGenerator[Head | Piece | Refusal]:
        """The head, and the pieces as they come; or a refusal, of which nothing follows."""
        try:
            async with self._service.turn(tenant, asked) as turn:
                await self._note(asked.model)
                yield Head(turn.id, turn.prompt_tokens)
                async for piece in turn.pieces:
                    yield piece
        except Refusal as refusal:
            yield refusal

    async def load(self, name: str, registered: Registered) -> str:
        """Offer an adapter; says what is wrong with it, and nothing where it is offered."""
        try:
            await self._service.load(name, registered)
        except (UserError, OSError) as error:
            return str(error)
        return ""

    async def unload(self, name: str) -> bool:
        """Offer an adapter no more."""
        return await self._service.unload(name)

    async def state(self) -> tuple[bool, int]:
        """Whether requests can be served, and how many rows are free."""
        return await self._service.state()

    async def figures(self) -> str:
        """The counters."""
        return (await self._service.figures()).decode()

    def check_health(self) -> None:
        """Ray asks; a replica that raises is replaced.

        Raises:
          RuntimeError: the device loop has ended.
        """
        if self._service.loop.error is not None:
            raise RuntimeError("the device loop has ended")


async def _name(name: str) -> str:
    return name


class Replicas:
    """What stands behind HTTP: engines in other processes, see ``service.Backend``.

    Args:
      engines: handle of the deployment.
      names: of the adapters that the engines begin with.
    """

    def __init__(self, engines: Any, offer: Offer, names: set[str], limits: Limits) -> None:
        self._engines, self._base_name, self._names = engines, offer.name, names
        self._tokenizer = load_tokenizer(offer.base)
        self.limits, self.door, self.metrics = limits, Door(limits), Metrics()
        self.metrics.gauge("milora_under_way", "Requests that were let in", lambda: self.door.under_way)

    def models(self, tenant: Tenant) -> list[str]:
        """Names that a tenant may ask for."""
        return [name for name in (self._base_name, *sorted(self._names)) if tenant.may_use(name)]

    @asynccontextmanager
    async def turn(self, tenant: Tenant, asked: Completion | Chat) -> AsyncIterator[Turn]:
        """Begin a request on an engine; leaving ends it there."""
        if asked.model not in self.models(tenant):
            raise no_such_model(asked.model)  # before Ray is asked who has it: that takes time that tells
        engine = self._engines.options(method_name="answer", stream=True, multiplexed_model_id=asked.model)
        coming = engine.remote(tenant, asked)
        try:
            head = await _next(coming)
            if not isinstance(head, Head):
                raise internal()
            yield Turn(head.id, asked.model, head.prompt_tokens, _pieces(coming))
        finally:
            coming.cancel()  # of one that has ended nothing is left to cancel

    def say(self, token: int) -> str:
        """The text of one token."""
        return self._tokenizer.decode([token])

    async def load(self, name: str, registered: Registered) -> None:
        """Offer an adapter on all engines; a new name that one refuses is taken back from the others.

        Raises:
          UserError: it cannot be.
        """
        found = await self._engines.broadcast("load", name, registered).results_async()
        wrong = [text for text in found if text]
        if wrong:
            if name not in self._names:
                await self._engines.broadcast("unload", name).results_async()
            raise UserError(wrong[0])
        self._names.add(name)

    async def unload(self, name: str) -> bool:
        """Offer an adapter no more on any engine."""
        self._names.discard(name)
        return any(await self._engines.broadcast("unload", name).results_async())

    async def state(self) -> tuple[bool, int]:
        """Whether some engine serves, and the free rows of all."""
        try:
            found = await self._engines.broadcast("state").results_async()
        except Exception as error:  # Ray's own errors have no common root below it
            log.warning("the engines' state is not known: %s", type(error).__name__)
            return False, 0
        return any(alive for alive, _ in found), sum(free for _, free in found)

    async def figures(self) -> bytes:
        """The counters of the front and of all engines, each with its process in a label."""
        engines = await self._engines.broadcast("figures").results_async()
        names = ("front", *(str(number) for number in range(len(engines))))
        return generate_latest(
            _Labelled(dict(zip(names, (self.metrics.text().decode(), *engines), strict=True)))
        )


@dataclass(frozen=True)
class _Labelled:
    """Counters of several processes, by name, as one collector."""

    texts: dict[str, str]

    def collect(self) -> list[Metric]:
        """Families of all, each sample with its process."""
        families: dict[str, Metric] = {}
        for process, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
        return list(families.values())


async def _next(coming: Any) -> Head | Piece | None:
    """The next of what an engine says; None when it has said all.

    Raises:
      Refusal: it refuses, or is gone.
    """
    try:
        said = await anext(coming, None)
    except Exception as error:  # the engine died, or an error of ours was raised there
        log.warning("an engine did not answer: %s", type(error).__name__)
        raise internal() from None
    if isinstance(said, Refusal):
        raise said
    return said


async def _pieces(coming: Any) -> AsyncIterator[Piece]:
    while isinstance(said := await _next(coming), Piece):
        yield said


class Front:
    """The one that clients see.

    Args:
      engines: handle of the engines.
      registry: its file; None keeps nothing.
    """

    def __init__(
        self,
        engines: Any,
        offer: Offer,
        registry: Path | None,
        adapters: dict[str, Registered],
        keys: Keyring,
        limits: Limits,
    ) -> None:
        known = Registry(registry, adapters)
        behind = Replicas(engines, offer, set(known.to_load()), limits)
        self._app = App(behind, keys, known)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray serves."""
        return _with_lifespan(self._app)


def _with_lifespan(app: App) -> Any:
    """An application that is asked to start and to stop, and has nothing to do then."""

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            while (await receive())["type"] != f"lifespan.{step}":
                await asyncio.sleep(0)
            await send({"type": f"lifespan.{step}.complete"})

    return whole


def build(arguments: dict[str, str]) -> Any:
    """The application, for ``serve run`` and for Ray's config files.

    Args:
      arguments: ``base`` (a Hugging Face directory that every node has), ``adapters`` (NAME=DIR,...), and
        if wanted ``name``, ``dtype``, ``quantize``, ``tensor``, ``replicas``, ``cpus`` and ``gpus`` of each,
        ``keys`` and ``registry`` (files of the front's node), and any limit of ``serving/limits.py``. Without
        a file the keys are those of the environment; without any nothing is served.

    Raises:
      UserError: naming the argument that is wrong.
    """
    from ray import serve

    given = dict(arguments)

    def take(name: str, default: str) -> str:
        return str(given.pop(name, default))

    offer = Offer(
        take("base", ""),
        take("name", "base"),
        take("dtype", "float32"),
        take("quantize", "none"),
        int(take("tensor", "1")),
    )
    if not offer.base:
        raise UserError("base is missing: expected a Hugging Face directory")
    adapters = dict(named_directory("adapters", text) for text in take("adapters", "").split(",") if text)
    keys, path = (Path(text) if text else None for text in (take("keys", ""), take("registry", "")))
    replicas, cpus, gpus = int(take("replicas", "1")), float(take("cpus", "1")), float(take("gpus", "0"))
    limits, ring = Limits.of(given), Keyring.of(keys)
    if ring.open:
        # What Ray listens to is Ray's affair: its config files begin with all addresses.
        raise UserError("there are no keys: give keys=FILE, or MILORA_API_KEY in the environment")
    registered = {name: Registered(directory.resolve()) for name, directory in adapters.items()}
    engines = serve.deployment(Engine).options(
        name="engines",
        num_replicas=replicas,
        max_ongoing_requests=limits.rows + limits.queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    first = Registry(path, registered).to_load()
    # Decorated here and not above: Ray sends a class by its name only where the name means the class.
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front", num_replicas=1, max_ongoing_requests=CONNECTIONS
    )
    return front.bind(engines.bind(offer, first, limits), offer, path, registered, ring, limits)
