"""The experts that prompts choose, found by prefill alone, and statistics of them.

A router reads a prompt once (paper, section 3.2), so its choice is known before a token is generated. Shares
per layer, expert and task are Figure 2 of the paper. The rest helps to judge a router: how decided it is, how
much the prompts of one task agree, and how different the tasks are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout, forward
from milora_jax.console import Console
from milora_jax.data.batches import collate_prompts
from milora_jax.data.records import fingerprint, read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_question
from milora_jax.errors import UserError, require
from milora_jax.evaluation.score import limited
from milora_jax.evaluation.static_route import modal_route
from milora_jax.evaluation.subject import Named, read_subject
from milora_jax.generation.lengths import bucket_of
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import is_first, package_versions, place, require_same, to_host
from milora_jax.parallel.rules import place_rows
from milora_jax.shapes import Array, Float
from milora_jax.training.health import decisions
from milora_jax.types import EXPERTS, LETTERS, Batch

PAPER_LIMIT = 0.30
"""Largest share of one expert among the choices of a layer in the paper's Figure 2."""


@dataclass(frozen=True)
class Routes:
    """The routes of prompts, in order.

    Attributes:
      weights: factor of each expert's output; 0 where it is not chosen.
      probs: softmax of the router.
    """

    weights: Float[np.ndarray, "N L E"]
    probs: Float[np.ndarray, "N L E"]


@dataclass(frozen=True)
class TaskRouting:
    """Statistics of the routes of a task's prompts.

    Attributes:
      prompts: number of prompts.
      top_k: number of experts that a prompt chooses in a layer.
      share: share of each expert among the choices of a layer; sums to 1 over the experts (Figure 2).
      entropy: entropy of the router's softmax in nats, mean over prompts; at most log 7 = 1.95.
      margin: probability by which the k-th choice exceeds the next, mean over prompts; None where all seven
        are chosen.
      agreement: share of the prompts that chose the layer's commonest set of experts.
    """

    task: str
    prompts: int
    top_k: int
    share: Float[np.ndarray, "L E"]
    entropy: Float[np.ndarray, " L"]
    margin: Float[np.ndarray, " L"] | None
    agreement: Float[np.ndarray, " L"]

    def to_json(self) -> dict[str, Any]:
        """Fields for ``routing.json``."""
        return {
            "prompts": self.prompts,
            "top_k": self.top_k,
            "share": self.share.round(4).tolist(),
            "entropy": self.entropy.round(4).tolist(),
            "margin": None if self.margin is None else self.margin.round(4).tolist(),
            "agreement": self.agreement.round(4).tolist(),
        }


def require_router(adapter: Adapter, where: object) -> None:
    """Refuse an adapter whose method does not route prompts.

    Raises:
      UserError: the error names the method, and those that have a router.
    """
    routed = [name for name, method in METHOD_CLASSES.items() if method.routes]
    if not adapter.method.routes:
        raise UserError(
            f"{str(where)!r}: method {adapter.method.name!r} has no router that reads the prompt, so there "
            f"are no routes: expected an adapter of {' or '.join(routed)}"
        )


def route_prompts(
    base: Base,
    config: ModelConfig,
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int = 16,
    layout: DeviceLayout | None = None,
    progress: Callable[[int], None] | None = None,
) -> Routes:
    """Compute the routes of prompts as generation would choose them, without generating.

    Prompts of similar length share a batch, padded to a power of two; one program is compiled for each padded
    length.

    Args:
      base: in either layout.
      adapter: of a method with a router, in the stacked layout or in the base's.
      prompts: the token ids that the routers read, from ``data.scopes.EncodedPrompt.routed``.
      rows: prompts of a batch.
      layout: of rows over several devices.
      progress: called with the number of prompts each time some are done.

    Raises:
      UserError: the method has no router; there is no prompt; or one is empty or too long for the model.
    """
    require_router(adapter, "adapter")
    require(len(prompts) > 0, "prompts", len(prompts), "at least one")
    for i, prompt in enumerate(prompts):
        fits = 1 <= len(prompt) <= config.max_positions
        require(fits, f"prompt {i}: its length in tokens", len(prompt), f"1 to {config.max_positions}")
    if base.unrolled and not isinstance(adapter.params, tuple):
        adapter = adapter_decode_layout(adapter, base)
    shape = (len(prompts), config.num_layers, len(EXPERTS))
    weights, probs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(bucket_of(len(prompt), config.max_positions), []).append(i)
    for length, members in sorted(by_length.items()):
        for start in range(0, len(members), rows):
            mine = members[start : start + rows]
            batch = collate_prompts([prompts[i] for i in mine], length, config.eos_ids[0], rows)
            found = to_host(_routes(base, adapter, place_rows(batch, layout), config))
            weights[mine], probs[mine] = (leaf[: len(mine)] for leaf in found)
            if progress is not None:
                progress(len(mine))
    return Routes(weights, probs)


def route_tasks(
    named: Named, sources: Sequence[Source], limit: int, rows: int, mesh: str = ""
) -> dict[str, Routes]:
    """Compute the routes of the prompts of several tasks, read from their files.

    Args:
      sources: one source for each task.
      limit: prompts of each task; 0 means all.
      rows: number of prompts in a batch.
      mesh: see ``Subject.mesh``.

    Raises:
      UserError: there is no adapter, or none with a router; or as in :func:`route_prompts`, with the task.
    """
    records = {source.name: limited(read_records(source, scored=True), limit) for source in sources}
    subject = read_subject(named)
    adapter = subject.adapter
    if adapter is None:
        raise UserError("a plain base has no routes: expected --workdir DIR, or --adapter DIR and --base DIR")
    require_router(adapter, named.adapter)
    prompts = {
        task: [encode_question(subject.tokenizer, record, subject.prompt_format).routed for record in mine]
        for task, mine in records.items()
    }
    require_same(
        lambda: {
            **package_versions(),
            **subject.identity(),
            **{f"the fingerprint of the rows of {task}": fingerprint(mine) for task, mine in records.items()},
        }
    )
    console, model = Console(silent=not is_first()), subject.load(subject.mesh(mesh, rows))
    routes, placed = {}, place(adapter, model.base.everywhere)
    for task, mine in prompts.items():
        with console.progress(f"routing {task}", len(mine), "prompts") as bar:
            try:
                routes[task] = route_prompts(
                    model.base,
                    model.config,
                    placed,
                    mine,
                    rows=rows,
                    layout=model.layout,
                    progress=bar.advance,
                )
            except UserError as error:
                raise UserError(f"{task}: {error}") from None
    return routes


@functools.partial(jax.jit, static_argnames="config")
def _routes(
    base: Base, adapter: Adapter, batch: Batch, config: ModelConfig
) -> tuple[Float[Array, "B L E"], Float[Array, "B L E"]]:
    """Weights and probabilities; the computation ends with the last router."""
    route = forward(base, config, batch, adapter=adapter).route
    if route is None:
        raise AssertionError("a method that routes gives a route")
    return route.weights[:, :, 0].swapaxes(0, 1), route.probs[:, :, 0].swapaxes(0, 1)


def letters_of(route: Float[np.ndarray, "L E"]) -> str:
    """The letters of a prompt's experts, layer by layer.

    >>> letters_of(np.array([[0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]], float))
    'KV QD'
    """
    return " ".join("".join(LETTERS[i] for i in np.flatnonzero(layer)) for layer in route)


def measure(task: str, routes: Routes) -> TaskRouting:
    """Compute the statistics of the routes of one task's prompts."""
    chosen = routes.weights != 0
    top_k = int(chosen[0, 0].sum())
    entropy, margin = decisions(routes.probs.swapaxes(0, 1), top_k)
    agreement = modal_route(list(routes.weights)).share
    return TaskRouting(task, len(chosen), top_k, chosen.mean(axis=0) / top_k, entropy, margin, agreement)


def distance(one: Float[np.ndarray, "L E"], other: Float[np.ndarray, "L E"]) -> float:
    """Jensen-Shannon divergence of two tasks' shares in bits, mean over layers: 0 alike, 1 nothing shared.

    >>> both = np.array([[0.5, 0.5, 0.0]])
    >>> distance(both, both), distance(both, np.array([[0.0, 0.0, 1.0]]))
    (0.0, 1.0)
    """
    middle = (one + other) / 2
    ratios = [np.where(p > 0, p / np.where(middle > 0, middle, 1.0), 1.0) for p in (one, other)]
    terms = [(p * np.log2(r)).sum(axis=-1) for p, r in zip((one, other), ratios, strict=True)]
    return float(np.mean((terms[0] + terms[1]) / 2))


def distances(routes: Mapping[str, Routes]) -> Float[np.ndarray, "tasks tasks"]:
    """:func:`distance` between every two tasks; on the diagonal between two halves of one task's prompts.

    The diagonal shows how much of a distance is chance. It is 0 for a task of one prompt.
    """
    shares = [_share(each.weights) for each in routes.values()]
    table = np.array([[distance(one, other) for other in shares] for one in shares])
    for i, each in enumerate(routes.values()):
        halves = each.weights[::2], each.weights[1::2]
        table[i, i] = distance(*map(_share, halves)) if len(halves[1]) else 0.0
    return table


def _share(weights: Float[np.ndarray, "N L E"]) -> Float[np.ndarray, "L E"]:
    """The share of each expert among the choices of a layer."""
    chosen = weights != 0
    return chosen.mean(axis=0) / chosen[0, 0].sum()


def summary_lines(found: Sequence[TaskRouting], table: Float[np.ndarray, "tasks tasks"]) -> list[str]:
    """The statistics in words."""
    width = max(len("task"), *(len(each.task) for each in found))
    lines = [f"{'task':<{width}}  prompts  largest share    agree  entropy  margin"]
    for each in found:
        margin = "   none" if each.margin is None else f"{each.margin.mean():7.3f}"
        lines.append(
            f"{each.task:<{width}}  {each.prompts:7d}  {_largest(each)[1]:<15}  "
            f"{each.agreement.mean():5.0%}  {each.entropy.mean():7.2f} {margin}"
        )
    lines += [
        "agree: prompts that chose the commonest set of experts, mean over layers; entropy of the router in",
        "nats, from 0 (sure) to 1.95 (no preference); margin: by how much the last chosen expert was ahead",
        "",
        *_limit_lines(found),
    ]
    if len(found) > 1:
        pairs = [(table[i, j], i, j) for i in range(len(found)) for j in range(i)]
        chance = max(table[i, i] for i in range(len(found)))
        for word, (value, i, j) in (("alike", min(pairs)), ("different", max(pairs))):
            lines.append(
                f"most {word} routes: {found[j].task} and {found[i].task}, distance {value:.3f} bits "
                f"(0 alike, 1 nothing shared; halves of one task: at most {chance:.3f})"
            )
    return lines


def _limit_lines(found: Sequence[TaskRouting]) -> list[str]:
    """Lines that compare the largest share of an expert with the paper's."""
    worst = max(found, key=lambda each: _largest(each)[0])
    value, said = _largest(worst)
    line = f"no expert above {PAPER_LIMIT:.0%} of a layer's choices: "
    line += f"{'yes' if value <= PAPER_LIMIT else 'no'} (largest {said}, {worst.task})"
    above = sum(int((each.share > PAPER_LIMIT).any(axis=1).sum()) for each in found)
    layers = sum(len(each.share) for each in found)
    return [
        line,
        f"  above it in {above} of {layers} layers, by task; no preference is {1 / len(EXPERTS):.0%}, "
        f"the most possible with {worst.top_k} of {len(EXPERTS)} is {1 / worst.top_k:.0%}",
    ]


def _largest(each: TaskRouting) -> tuple[float, str]:
    """The largest share in a task, with its expert and layer."""
    layer, expert = np.unravel_index(int(each.share.argmax()), each.share.shape)
    value = float(each.share[layer, expert])
    return value, f"{value:.0%}: {LETTERS[expert]} in layer {layer}"
