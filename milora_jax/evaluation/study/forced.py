"""Whether routing pays: a trained adapter under routes that its routers did not choose.

Each replaced route is scored on the same test rows as the adapter's own, by the likelihood of the outputs;
the program then has no router. ``exact`` needs no generation: greedy decoding writes an output token for
token if and only if each of its tokens is the most probable one after those before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.evaluation.routing import route_prompts
from milora_jax.evaluation.static_route import modal_route
from milora_jax.evaluation.study.rows import ByTask, Encoded
from milora_jax.shapes import Float
from milora_jax.training.prepare import Run

Routes = Float[np.ndarray, "N L E"]

SWAPPED, SWAPPED_ANY = "another prompt's, of the task", "another prompt's, of any task"
COMMON, COMMON_ANY = "commonest of the task", "commonest of all tasks"
RANDOM = "random"
FORCED = (SWAPPED, COMMON, RANDOM, SWAPPED_ANY, COMMON_ANY)
"""Routes that replace a prompt's own. ``commonest`` is, layer by layer, the commonest set of the dev prompts;
``random`` has as many experts in each layer as the route, with its weights."""

STREAM = 7
"""Separates these draws from every other use of the run's seed."""


def forced_scores(
    run: Run,
    base: Base,
    adapter: Adapter,
    rows: Mapping[str, Encoded],
    advance: Callable[[int], None],
) -> dict[str, ByTask]:
    """Likelihoods of the test rows under each of :data:`FORCED`; routes of several tasks are left out where
    there is one task.

    Args:
      base, adapter: both in the decode layout.
      rows: encoded rows by task.
      advance: called with the number of rows each time some are scored; it may raise to stop.
    """
    own = {
        task: _routes_of(run, base, adapter, [p.tokens[: p.prompt] for p in each.passages])
        for task, each in rows.items()
    }
    found: dict[str, ByTask] = {}
    for task, routes in _replaced(run, base, adapter, own).items():
        for name, forced in routes.items():
            found.setdefault(name, {})[task] = rows[task].scores(run, base, adapter, forced, advance)
    return found


def _routes_of(run: Run, base: Base, adapter: Adapter, prompts: list) -> Routes:
    return route_prompts(base, run.model, adapter, prompts, rows=run.config.eval.batch_size).weights


def _replaced(
    run: Run, base: Base, adapter: Adapter, own: Mapping[str, Routes]
) -> dict[str, dict[str, Routes]]:
    """The routes that replace those of a task's prompts, by task and by their names."""
    rng = np.random.default_rng([run.config.train.seed, STREAM])
    dev = [example for row in run.dev for example in row]
    learned = _routes_of(run, base, adapter, [example.tokens[: example.routed].tolist() for example in dev])
    swapped_any = np.split(
        next_in_a_cycle(rng, np.concatenate(list(own.values()))),
        np.cumsum([len(each) for each in own.values()])[:-1],
    )
    commonest = modal_route(list(learned)).weights
    found: dict[str, dict[str, Routes]] = {}
    for (task, routes), others in zip(own.items(), swapped_any, strict=True):
        mine = [route for route, example in zip(learned, dev, strict=True) if example.source == task]
        found[task] = {
            SWAPPED: next_in_a_cycle(rng, routes),
            COMMON: np.broadcast_to(modal_route(mine).weights, routes.shape),
            RANDOM: rng.permuted(routes, axis=-1),
        }
        if len(own) > 1:
            found[task] |= {SWAPPED_ANY: others, COMMON_ANY: np.broadcast_to(commonest, routes.shape)}
    return found


def next_in_a_cycle(rng: np.random.Generator, routes: Routes) -> Routes:
    """Give each prompt the route of another one, and each route once: the next in a random cycle."""
    order = rng.permutation(len(routes))
    given = np.empty_like(routes)
    given[order] = routes[np.roll(order, -1)]
    return given
