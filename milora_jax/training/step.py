"""One training step: ``train_step(state, base, batch)``.

The base is another argument. It is not in the state, not in the optimiser and not in a checkpoint,
and the gradient is taken with respect to the adapter alone, so nothing needs to be masked or stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from milora_jax.adapters.inputs import RoutingSchedule
from milora_jax.adapters.protocol import Adapter, router_mask
from milora_jax.base.attention import Attend, attention
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward
from milora_jax.config import TrainSection
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.training.accumulate import value_and_gradient
from milora_jax.training.loss import LossParts, Totals, adapted_loss, summed_loss, totals_of
from milora_jax.training.optim import join_params, leaf_rates, make_optimizer, split_params
from milora_jax.training.preference import preference_loss, preference_totals
from milora_jax.types import Batch, Metrics, PyTree


@struct.dataclass
class TrainState:
    """All state that training changes.

    Attributes:
      step: number of optimiser steps, skipped ones included; also the position in the data.
      adapter: the adapter, whose parameters are trained.
      memory: the method's state beside the parameters; None for most methods.
      omega_state, theta_state: optimiser states of the two parameter sets.
      omega_rate, theta_rate: their peak learning rates.
      key: the run's random key; each step folds its number in.
      bad_steps: updates of Omega skipped in a row because something was not finite; the host counts those of
        Theta.
    """

    step: Int[Array, ""]
    adapter: Adapter
    memory: PyTree
    omega_state: PyTree
    theta_state: PyTree
    omega_rate: Float[Array, ""]
    theta_rate: Float[Array, ""]
    key: Key[Array, ""]
    bad_steps: Int[Array, ""]


@dataclass(frozen=True)
class Steps:
    """The compiled programs of a run.

    Attributes:
      train: ``(state, base, batch) -> (state, metrics)``, an update of Omega; donates the state.
      coefficients: the same for Theta, on a dev batch; it does not advance the step.
      evaluate: ``(adapter, base, batch) -> (summed loss, tokens, route or None)``; with a preference
        objective, ``(sums, route or None)``.

    With a preference objective each takes the adapter of the reference model as one more argument; None,
    the default, is the plain base.
    """

    train: Callable[..., tuple[TrainState, Metrics]]
    coefficients: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., tuple[Any, ...]]


def _optimizers(
    settings: TrainSection, total_steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    theta_steps = -(-total_steps // settings.coefficient_every)
    return (
        make_optimizer(settings, total_steps),
        make_optimizer(settings, theta_steps),
    )


def init_state(adapter: Adapter, key: Key[Array, ""], settings: TrainSection, total_steps: int) -> TrainState:
    """The state before the first step."""
    omega, theta, _ = split_params(adapter)
    omega_optimizer, theta_optimizer = _optimizers(settings, total_steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        adapter=adapter,
        memory=adapter.method.init_memory(adapter.params),
        omega_state=omega_optimizer.init(omega),
        theta_state=theta_optimizer.init(theta),
        omega_rate=jnp.asarray(settings.learning_rate, jnp.float32),
        theta_rate=jnp.asarray(adapter.method.theta_rate(settings.coefficient_learning_rate), jnp.float32),
        key=key,
        bad_steps=jnp.zeros((), jnp.int32),
    )


def make_steps(
    model: ModelConfig,
    settings: TrainSection,
    total_steps: int,
    shardings: Callable[[TrainState], PyTree] | None = None,
    attend: Attend = attention,
) -> Steps:
    """Make the training programs, which are compiled once: method and learning rates are parts of the state.

    Args:
      total_steps: number of optimiser steps of the schedules.
      shardings: sharding of every leaf of a state; without it the compiler chooses where an update leaves
        them, and the second step is compiled again for its choice.
      attend: the attention function, see ``parallel.rules.attend_over``.
    """
    omega_optimizer, theta_optimizer = _optimizers(settings, total_steps)

    def loss(
        schedule: RoutingSchedule,
        memory: PyTree,
        reference: Adapter | None,
        adapter: Adapter,
        base: Base,
        batch: Batch,
        key: Array | None,
        totals: Totals | None,
    ) -> tuple[Array, LossParts]:
        if settings.prefers:
            return preference_loss(
                adapter,
                base,
                model,
                batch,
                settings=settings,
                key=key,
                reference=reference,
                attend=attend,
                totals=totals,
                schedule=schedule,
                memory=memory,
            )
        return adapted_loss(
            adapter,
            base,
            model,
            batch,
            key=key,
            remat=settings.remat,
            loss_chunk=settings.loss_chunk,
            attend=attend,
            totals=totals,
            schedule=schedule,
            memory=memory,
            neftune_alpha=settings.neftune_alpha,
        )

    def routed(
        schedule: RoutingSchedule,
        reference: Adapter | None,
        adapter: Adapter,
        base: Base,
        batch: Batch,
        key: Array | None,
    ) -> Totals:
        if settings.prefers:
            return preference_totals(
                adapter,
                base,
                model,
                batch,
                settings=settings,
                key=key,
                reference=reference,
                attend=attend,
                top_k=schedule.top_k,
            )
        route = None
        if adapter.method.routes:
            top_k = schedule.top_k
            route = forward(base, model, batch, adapter=adapter, key=key, attend=attend, top_k=top_k).route
        return totals_of(batch, route)

    def settled(state: TrainState) -> TrainState:
        if shardings is None:
            return state
        key = state.key  # typed keys cannot be constrained
        places = shardings(state)
        placed = jax.lax.with_sharding_constraint(
            dataclasses.replace(state, key=None), dataclasses.replace(places, key=None)
        )
        return dataclasses.replace(placed, key=key)

    def gradient(
        state: TrainState,
        reference: Adapter | None,
        adapter_of: Callable[[PyTree], Adapter],
        params: PyTree,
        *inputs: Any,
    ) -> tuple:
        schedule = state.adapter.method.schedule(state.step, total_steps)
        return value_and_gradient(
            functools.partial(loss, schedule, state.memory, reference),
            functools.partial(routed, schedule, reference),
            settings.accumulate,
            adapter_of,
            params,
            *inputs,
        )

    def train(
        state: TrainState, base: Base, batch: Batch, reference: Adapter | None = None
    ) -> tuple[TrainState, Metrics]:
        method = state.adapter.method
        omega, *rest = split_params(state.adapter)
        draws = method.stochastic or settings.neftune_alpha > 0
        key = jax.random.fold_in(state.key, state.step) if draws else None

        def adapter_of(omega: PyTree) -> Adapter:
            return join_params(state.adapter, omega, *rest)

        (value, parts), grads = gradient(state, reference, adapter_of, omega, base, batch, key)
        norm = optax.tree.norm(grads)
        of_router = router_mask(method, omega)
        router_norm = optax.tree.norm(_where(of_router, grads))
        grads = _clipped_apart(grads, of_router, settings)
        rates = leaf_rates(method, omega, state.omega_rate, settings)
        new_omega, opt_state = _updated(omega_optimizer, omega, state.omega_state, grads, rates)
        adapter = join_params(state.adapter, new_omega, *rest)
        params, memory = method.after_update(
            adapter.params, grads, state.memory, state.step + 1, total_steps, parts.use
        )
        finite = _all_finite(value, norm, params)
        bad = jnp.where(finite, 0, state.bad_steps + 1).astype(jnp.int32)
        new = (dataclasses.replace(adapter, params=params), memory, opt_state)
        adapter, memory, opt_state = _keep_if(finite, new, (state.adapter, state.memory, state.omega_state))
        state = dataclasses.replace(
            state, step=state.step + 1, adapter=adapter, memory=memory, omega_state=opt_state, bad_steps=bad
        )
        return settled(state), _metrics(value, parts, norm, router_norm, bad)

    def coefficients(
        state: TrainState, base: Base, batch: Batch, reference: Adapter | None = None
    ) -> tuple[TrainState, Metrics]:
        omega, theta, rest = split_params(state.adapter)

        def adapter_of(theta: PyTree) -> Adapter:
            return join_params(state.adapter, omega, theta, rest)

        (value, parts), grads = gradient(state, reference, adapter_of, theta, base, batch, None)
        norm = optax.tree.norm(grads)
        rates = jax.tree.map(lambda _: state.theta_rate, theta)
        grads = _clipped(grads, settings.clip_norm)
        new = _updated(theta_optimizer, theta, state.theta_state, grads, rates)
        finite = _all_finite(value, norm, new[0])
        theta, opt_state = _keep_if(finite, new, (theta, state.theta_state))
        adapter = join_params(state.adapter, omega, theta, rest)
        state = dataclasses.replace(state, adapter=adapter, theta_state=opt_state)
        # A good update of Theta says nothing about Omega: it must not end a sequence of bad ones.
        return settled(state), _metrics(value, parts, norm, norm, (~finite).astype(jnp.int32))

    def evaluate(adapter: Adapter, base: Base, batch: Batch, reference: Adapter | None = None) -> tuple:
        if settings.prefers:
            _, parts = preference_loss(
                adapter, base, model, batch, settings=settings, key=None, reference=reference, attend=attend
            )
            return parts.preference, parts.route
        return summed_loss(adapter, base, model, batch, settings.loss_chunk, attend)

    return Steps(
        train=jax.jit(train, donate_argnums=0),
        coefficients=jax.jit(coefficients, donate_argnums=0),
        evaluate=jax.jit(evaluate),
    )


def _where(mask: PyTree, tree: PyTree, kept: bool = True) -> PyTree:
    """Keep the leaves whose mask is ``kept``; the others become None, which is no leaf."""
    return jax.tree.map(lambda masked, leaf: leaf if masked == kept else None, mask, tree)


def _clipped_apart(grads: PyTree, of_router: PyTree, settings: TrainSection) -> PyTree:
    """Clip gradients together, or those of the routers by a norm of their own."""
    if settings.router_clip_norm == 0:
        return _clipped(grads, settings.clip_norm)
    routers = _clipped(_where(of_router, grads), settings.router_clip_norm)
    others = _clipped(_where(of_router, grads, kept=False), settings.clip_norm)
    return jax.tree.map(
        lambda one, other: other if one is None else one, routers, others, is_leaf=lambda leaf: leaf is None
    )


def _clipped(grads: PyTree, largest: float) -> PyTree:
    """Scale gradients down to a global norm of at most ``largest``; 0 leaves them."""
    if largest == 0:
        return grads
    clip = optax.clip_by_global_norm(largest)
    return clip.update(grads, clip.init(grads))[0]


def _updated(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    rates: PyTree,
) -> tuple[PyTree, PyTree]:
    """Compute parameters and optimiser state after one update, in which each leaf has its rate."""
    # optax computes schedules and bias corrections as float ** int, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state, params)
    updates = jax.tree.map(jnp.multiply, rates, updates)
    return optax.apply_updates(params, updates), opt_state


def _all_finite(value: Array, norm: Array, params: PyTree) -> Bool[Array, ""]:
    """Whether the loss, the gradient and the new parameters are finite.

    A sum of squares is finite only if every term is.
    """
    return jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))


def _keep_if(finite: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """``new`` if the update is finite, else ``old``."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _metrics(value: Array, parts: LossParts, norm: Array, router_norm: Array, bad_steps: Array) -> Metrics:
    return Metrics(
        loss=value,
        cross_entropy=parts.cross_entropy,
        load_balance=parts.load_balance,
        grad_norm=norm,
        router_grad_norm=router_norm,
        expert_share=parts.use.chosen,
        pooled_max=parts.pooled_max,
        tokens=parts.tokens,
        bad_steps=bad_steps,
        preference=parts.preference,
    )
