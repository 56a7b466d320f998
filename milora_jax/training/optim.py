"""The optimisers of Omega (experts and routers) and Theta (rational coefficients, Appendix A)."""

from __future__ import annotations

import dataclasses

import jax
import optax

from milora_jax.adapters.hooks import path_names
from milora_jax.adapters.protocol import Adapter, Method, output_mask, router_mask
from milora_jax.config import TrainSection
from milora_jax.shapes import Array, Float
from milora_jax.types import PyTree

OMEGA, THETA, REST = range(3)
"""The parts of :func:`split_params`, in order."""

NO_RATIO = (0, 1)
"""Values of ``train.lora_plus_ratio`` with which A and B have one learning rate."""


def learning_rate_schedule(settings: TrainSection, total_steps: int, peak: float) -> optax.Schedule:
    """Linear rise over the first ``warmup_share`` of the steps, then the course of ``settings.schedule``.

    The first update is not zero: it uses ``peak / warm-up steps``. A fall reaches 0 one step after the last.
    """
    warmup = max(1, round(settings.warmup_share * total_steps))
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    left = max(1, total_steps - warmup)
    if settings.schedule == "wsd":
        falling = min(left, max(1, round(settings.decay_share * total_steps)))
        fall = optax.linear_schedule(peak, 0.0, falling)
        steady = optax.constant_schedule(peak)
        return optax.join_schedules([rise, steady, fall], [warmup, warmup + left - falling])
    courses = {
        "linear": optax.linear_schedule(peak, 0.0, left),
        "cosine": optax.cosine_decay_schedule(peak, left),
        "constant": optax.constant_schedule(peak),
    }
    return optax.join_schedules([rise, courses[settings.schedule]], [warmup])


def make_optimizer(settings: TrainSection, total_steps: int) -> optax.GradientTransformation:
    """The optimiser and the schedule of the settings, at a peak learning rate of 1.

    The step clips the gradient before, and multiplies the update, weight decay included, by the actual peak
    afterwards. The peak is a value of the state, so that one compiled program serves every learning rate.
    """
    schedule = learning_rate_schedule(settings, total_steps, 1.0)
    if settings.optimizer == "adafactor":
        decay = optax.add_decayed_weights(settings.weight_decay)
        return optax.chain(factored_rms(), decay, optax.scale_by_learning_rate(schedule))
    return optax.adamw(schedule, weight_decay=settings.weight_decay)


def factored_rms() -> optax.GradientTransformation:
    """Adafactor's scaling of gradients (Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4), layer by layer.

    Leaves are stacked over layers. Each layer's matrix is factored and its update clipped by itself: optax
    factors the two largest axes, and there are more layers than a pair has ranks. Learning rates stay
    absolute, without the algorithm's factor of a parameter's own size, which is zero for a fresh B, and there
    is no momentum.
    """
    scale = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    layer = optax.chain(scale, optax.clip_by_block_rms(1.0))
    places = (optax.FactoredState(None, 0, 0, 0), optax.EmptyState())  # pyright: ignore[reportArgumentType]

    def init(params: PyTree) -> PyTree:
        if not jax.tree.leaves(params):
            return layer.init(params)
        return jax.vmap(layer.init, out_axes=places)(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if not jax.tree.leaves(updates):
            return layer.update(updates, state, params)
        return jax.vmap(layer.update, in_axes=(0, places, 0), out_axes=(0, places))(updates, state, params)

    return optax.GradientTransformation(init, update)


def leaf_rates(method: Method, omega: PyTree, rate: Float[Array, ""], settings: TrainSection) -> PyTree:
    """The peak learning rate of every leaf of Omega: that of the routers' and of the pairs' B matrices is a
    multiple of the others' (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

    Args:
      rate: the peak learning rate of the run.
    """
    plus = settings.lora_plus_ratio

    def of_leaf(routes: bool, is_output: bool) -> Float[Array, ""]:
        if routes:
            return rate * settings.router_rate
        return rate * plus if is_output and plus not in NO_RATIO else rate

    return jax.tree.map(of_leaf, router_mask(method, omega), output_mask(method, omega))


def split_params(adapter: Adapter) -> tuple[PyTree, PyTree, PyTree]:
    """Split an adapter's parameters into Omega, Theta and what is not trained.

    Each part is a tree like the whole, with None, which is no leaf, in place of the others' leaves;
    :func:`join_params` is the inverse.

    ``Method.theta`` decides: ``bilevel`` makes the method's coefficients Theta, ``joint`` leaves them in
    Omega, ``frozen`` does not train them.
    """
    places = {"joint": OMEGA, "bilevel": THETA, "frozen": REST}
    method = adapter.method

    def place(path: tuple, _: PyTree) -> int:
        role = method.role(path_names(path))
        if not role.trained:
            return REST
        return places[method.theta] if role.coefficient else OMEGA

    placed = jax.tree_util.tree_map_with_path(place, adapter.params)

    def part(which: int) -> PyTree:
        return jax.tree.map(lambda leaf, its: leaf if its == which else None, adapter.params, placed)

    return part(OMEGA), part(THETA), part(REST)


def join_params(adapter: Adapter, *parts: PyTree) -> Adapter:
    """The adapter whose parameters are the disjoint ``parts`` of :func:`split_params`."""

    def first(*leaves: PyTree) -> PyTree:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return dataclasses.replace(adapter, params=jax.tree.map(first, *parts, is_leaf=lambda leaf: leaf is None))
