"""Replicas under Ray Serve: one front end with keys, limits and HTTP, and engines behind it.

    serve run milora_jax.serving.ray_serve:build base=DIR adapters=math=runs/math,law=runs/law replicas=2

The front end is the application of ``serve.py``; its backend is :class:`Replicas` instead of a ``Service``,
and calls engines in other processes. Ray's multiplexing sends a request to a replica that used its adapter
lately, or to the least busy one. Adapters are loaded and unloaded on every replica.

Needs ``pip install -e '.[ray]'``. Ray's own proxy stands in front: it has no time limit for the head of a
request, and answers ``/-/healthz`` and ``/-/routes`` without a key.
"""

# pyright: reportMissingImports=false
# (Ray is an extra)

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, named_directory
from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.api_errors import APIError, internal_error, model_not_found
from milora_jax.serving.app import make_app
from milora_jax.serving.backend import Delta, Generation, GenerationBody
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.keys import Keyring, Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.registry import Registered, Registry
from milora_jax.serving.server import MAX_CONNECTIONS
from milora_jax.serving.tokenization import DetokenizeRequest, Tokenized, TokenizeRequest

log = logging.getLogger("milora_jax.serving")


@dataclass(frozen=True)
class Started:
    """The first message of an engine about a request: it has been queued."""

    id: str
    prompts: tuple[tuple[int, ...], ...]


class Engine:
    """A replica: one base, one bank, one device loop.

    Args:
      registered: adapters to load at the start, by name.
    """

    def __init__(self, offer: Offer, registered: dict[str, Registered], limits: Limits) -> None:
        from ray import serve

        self._service = build_service(offer, Registry(None, registered), limits)
        self._service.loop.start()
        # Ray's router learns which adapters a replica has used last, as many as the bank holds.
        self._mark_used: Any = serve.multiplexed(max_num_models_per_replica=limits.adapters_on_device)(_name)

    async def generate(
        self, tenant: Tenant, body: GenerationBody
    ) -> AsyncGenerator[Started | Delta | APIError]:
        """Yield the start and the deltas, or an error, which is the last message."""
        try:
            async with self._service.generate(tenant, body) as generation:
                await self._mark_used(body.model)
                yield Started(generation.id, generation.prompts)
                async for delta in generation.deltas:
                    yield delta
        except APIError as error:
            yield error

    async def tokenize(self, tenant: Tenant, body: TokenizeRequest) -> Tokenized | APIError:
        """Return the token ids of a prompt, or an error."""
        try:
            return await self._service.tokenize(tenant, body)
        except APIError as error:
            return error

    async def detokenize(self, tenant: Tenant, body: DetokenizeRequest) -> str | APIError:
        """Return the text of token ids, or an error."""
        try:
            return await self._service.detokenize(tenant, body)
        except APIError as error:
            return error

    async def load(self, name: str, registered: Registered) -> str:
        """Load an adapter; return the error, or an empty text if it is loaded."""
        try:
            await self._service.load(name, registered)
        except (UserError, OSError) as error:
            return str(error)
        return ""

    async def unload(self, name: str) -> bool:
        """Unload an adapter; return False if no adapter of that name is loaded."""
        return await self._service.unload(name)

    async def health(self) -> tuple[bool, int]:
        """Return whether requests can be served, and the number of free batch slots."""
        return await self._service.health()

    async def metrics_text(self) -> str:
        """Return the counters in the format of Prometheus."""
        return (await self._service.metrics_text()).decode()

    def check_health(self) -> None:
        """Raise if the engine fails; Ray calls this and replaces a replica that raises.

        Raises:
          RuntimeError: the device loop has ended.
        """
        if self._service.loop.error is not None:
            raise RuntimeError("the device loop has ended")


async def _name(name: str) -> str:
    return name


class Replicas:
    """The backend of the front end: engines in other processes, see ``backend.Backend``.

    Args:
      engines: handle of the deployment.
      names: adapters that the engines load at the start.
    """

    def __init__(self, engines: Any, offer: Offer, names: set[str], limits: Limits) -> None:
        self._engines, self._base_name, self._names = engines, offer.name, names
        self._tokenizer = load_tokenizer(offer.base)
        self.limits, self.admission, self.metrics = limits, AdmissionControl(limits), Metrics()
        self.metrics.gauge("milora_under_way", "Admitted requests", lambda: self.admission.active_requests)

    def models(self, tenant: Tenant) -> list[str]:
        """Return the names of the models that a tenant may use."""
        return [name for name in (self._base_name, *sorted(self._names)) if tenant.may_use(name)]

    @asynccontextmanager
    async def generate(self, tenant: Tenant, body: GenerationBody) -> AsyncIterator[Generation]:
        """Queue a request on an engine; leaving the context ends it there."""
        if body.model not in self.models(tenant):
            # Not after Ray has looked for a replica: the time of that would tell whether the adapter exists.
            raise model_not_found(body.model)
        engine = self._engines.options(method_name="generate", stream=True, multiplexed_model_id=body.model)
        messages = engine.remote(tenant, body)
        try:
            started = await _next(messages)
            if not isinstance(started, Started):
                raise internal_error()
            yield Generation(started.id, body.model, started.prompts, _deltas(messages))
        finally:
            messages.cancel()  # does nothing if it has ended

    def token_text(self, token: int) -> str:
        """Return the text of one token."""
        return self._tokenizer.decode([token])

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of several tokens, including special ones."""
        return self._tokenizer.decode(list(tokens))

    async def tokenize(self, tenant: Tenant, body: TokenizeRequest) -> Tokenized:
        """Return the token ids of a prompt, from an engine, which knows the adapter's prompt format."""
        return await self._ask("tokenize", tenant, body)

    async def detokenize(self, tenant: Tenant, body: DetokenizeRequest) -> str:
        """Return the text of token ids."""
        return await self._ask("detokenize", tenant, body)

    async def _ask(self, method: str, tenant: Tenant, body: TokenizeRequest | DetokenizeRequest) -> Any:
        if body.model is not None and body.model not in self.models(tenant):
            raise model_not_found(body.model)
        try:
            found = await self._engines.options(method_name=method).remote(tenant, body)
        except Exception as error:  # Ray's errors have no common base class but this
            log.warning("an engine did not answer: %s", type(error).__name__)
            raise internal_error() from None
        if isinstance(found, APIError):
            raise found
        return found

    async def load(self, name: str, registered: Registered) -> None:
        """Load an adapter on all engines; if one cannot, a new name is unloaded from the others.

        Raises:
          UserError: it cannot be loaded.
        """
        found = await self._engines.broadcast("load", name, registered).results_async()
        wrong = [text for text in found if text]
        if wrong:
            if name not in self._names:
                await self._engines.broadcast("unload", name).results_async()
            raise UserError(wrong[0])
        self._names.add(name)

    async def unload(self, name: str) -> bool:
        """Unload an adapter from all engines."""
        self._names.discard(name)
        return any(await self._engines.broadcast("unload", name).results_async())

    async def health(self) -> tuple[bool, int]:
        """Return whether an engine serves requests, and the number of free batch slots of all."""
        try:
            found = await self._engines.broadcast("health").results_async()
        except Exception as error:  # Ray's errors have no common base class but this
            log.warning("the health of the engines is unknown: %s", type(error).__name__)
            return False, 0
        return any(alive for alive, _ in found), sum(free for _, free in found)

    async def metrics_text(self) -> bytes:
        """Return the counters of the front end and of all engines, with the process in a label."""
        engines = await self._engines.broadcast("metrics_text").results_async()
        names = ("front", *(str(number) for number in range(len(engines))))
        return generate_latest(
            _Labelled(dict(zip(names, (self.metrics.text().decode(), *engines), strict=True)))
        )


@dataclass(frozen=True)
class _Labelled:
    """Metrics of several processes as one collector, by the name of the process."""

    texts: dict[str, str]

    def collect(self) -> list[Metric]:
        """The metric families of all, with a label for the process."""
        families: dict[str, Metric] = {}
        for process, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
        return list(families.values())


async def _next(messages: Any) -> Started | Delta | None:
    """The next message of an engine; None after the last.

    Raises:
      APIError: of the engine, or because it did not answer.
    """
    try:
        message = await anext(messages, None)
    except Exception as error:  # the engine has ended, or had an internal error
        log.warning("an engine did not answer: %s", type(error).__name__)
        raise internal_error() from None
    if isinstance(message, APIError):
        raise message
    return message


async def _deltas(messages: Any) -> AsyncIterator[Delta]:
    while isinstance(message := await _next(messages), Delta):
        yield message


class Front:
    """The deployment that clients connect to.

    Args:
      engines: handle of the engines.
      registry: path of its file; None to keep nothing.
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
        self._app = make_app(Replicas(engines, offer, set(known.to_load()), limits), keys, known)

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray serves."""
        return self._app


def build(arguments: dict[str, str]) -> Any:
    """Return the application, for ``serve run`` and for Ray's config files.

    Args:
      arguments: ``base`` (a Hugging Face directory that every node has), ``adapters`` (NAME=DIR,...), and
        if wanted ``name``, ``dtype``, ``quantize``, ``tensor``, ``replicas``, ``cpus`` and ``gpus`` of each,
        ``keys`` and ``registry`` (files on the front end's node), and any limit of ``serving/limits.py``.
        Without a file the keys are those of the environment; without any key nothing is served.

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
        # Ray decides which addresses it listens to, and its config files listen to all by default.
        raise UserError("there are no keys: give keys=FILE, or MILORA_API_KEY in the environment")
    registered = {name: Registered(directory.resolve()) for name, directory in adapters.items()}
    engines = serve.deployment(Engine).options(
        name="engines",
        num_replicas=replicas,
        max_ongoing_requests=limits.rows + limits.queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    first = Registry(path, registered).to_load()
    # Not a decorator of the class: Ray pickles a class by its name, which would mean the decorated one then.
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front", num_replicas=1, max_ongoing_requests=MAX_CONNECTIONS
    )
    return front.bind(engines.bind(offer, first, limits), offer, path, registered, ring, limits)
