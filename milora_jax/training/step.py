"""One training step: ``train_step(state, base, batch)``.

The base is another argument. It is not in the state, not in the optimiser and not in a checkpoint,
and the gradient is taken with respect to the adapter alone, so nothing needs to be masked or stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import struct

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.transformer import Base
from milora_jax.config import AdapterSection, ModelConfig, TrainSection
from milora_jax.shapes import Array, Float, Int, Key
from milora_jax.training.loss import adapted_loss, summed_loss
from milora_jax.training.optim import join_params, make_optimizer, split_params
from milora_jax.types import Batch, Metrics, PyTree


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: optimiser steps taken, skipped ones included; also the position in the data.
      adapter: the trainable parameters.
      omega_state, theta_state: optimiser states of the two parameter sets.
      key: the run's random key; a step folds its number in.
      bad_steps: updates of Omega skipped in a row because something was not finite; the host counts
        Theta's.
    """

    step: Int[Array, ""]
    adapter: Adapter
    omega_state: PyTree
    theta_state: PyTree
    key: Key[Array, ""]
    bad_steps: Int[Array, ""]


@dataclass(frozen=True)
class Steps:
    """The compiled programs of a run.

    Attributes:
      train: ``(state, base, batch) -> (state, metrics)``, an update of Omega; donates the state.
      coefficients: the same for Theta, on a dev batch; it does not advance the step.
      evaluate: ``(adapter, base, batch) -> (summed loss, tokens, expert share [L, E])``.
    """

    train: Callable[[TrainState, Base, Batch], tuple[TrainState, Metrics]]
    coefficients: Callable[[TrainState, Base, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Adapter, Base, Batch], tuple[Float[Array, ""], Int[Array, ""], Float[Array, "L E"]]]


def _optimizers(
    settings: TrainSection, total_steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    theta_steps = -(-total_steps // settings.coefficient_every)
    return (
        make_optimizer(settings, settings.learning_rate, total_steps),
        make_optimizer(settings, settings.coefficient_learning_rate, theta_steps),
    )


def init_state(
    adapter: Adapter, key: Key[Array, ""], settings: TrainSection, coefficients: str, total_steps: int
) -> TrainState:
    """The state before the first step."""
    omega, theta, _ = split_params(adapter, coefficients)
    omega_optimizer, theta_optimizer = _optimizers(settings, total_steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        adapter=adapter,
        omega_state=omega_optimizer.init(omega),
        theta_state=theta_optimizer.init(theta),
        key=key,
        bad_steps=jnp.zeros((), jnp.int32),
    )


def make_steps(
    model: ModelConfig, method: AdapterSection, settings: TrainSection, total_steps: int, prompts: int
) -> Steps:
    """Compile-once training programs for a run.

    Args:
      total_steps: optimiser steps the schedules stretch over.
      prompts: Z, the most records packed into one row.
    """
    omega_optimizer, theta_optimizer = _optimizers(settings, total_steps)

    def loss(adapter: Adapter, base: Base, batch: Batch, key: Array | None) -> tuple:
        return adapted_loss(
            adapter, base, model, batch, prompts=prompts, balance_weight=method.load_balance, key=key
        )

    def train(state: TrainState, base: Base, batch: Batch) -> tuple[TrainState, Metrics]:
        omega, *rest = split_params(state.adapter, method.coefficients)
        key = jax.random.fold_in(state.key, state.step) if method.dropout > 0 else None

        def of_omega(omega: PyTree) -> tuple:
            return loss(join_params(state.adapter, omega, *rest), base, batch, key)

        (value, parts), grads = jax.value_and_grad(of_omega, has_aux=True)(omega)
        norm = optax.tree.norm(grads)
        omega, opt_state, bad = _guarded_update(
            omega_optimizer, omega, state.omega_state, grads, value, norm, state.bad_steps
        )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            adapter=join_params(state.adapter, omega, *rest),
            omega_state=opt_state,
            bad_steps=bad,
        )
        return state, _metrics(value, parts, norm, bad)

    def coefficients(state: TrainState, base: Base, batch: Batch) -> tuple[TrainState, Metrics]:
        omega, theta, rest = split_params(state.adapter, method.coefficients)

        def of_theta(theta: PyTree) -> tuple:
            return loss(join_params(state.adapter, omega, theta, rest), base, batch, None)

        (value, parts), grads = jax.value_and_grad(of_theta, has_aux=True)(theta)
        norm = optax.tree.norm(grads)
        # A good update of Theta says nothing about Omega's: it must not end a row of bad ones.
        theta, opt_state, skipped = _guarded_update(
            theta_optimizer, theta, state.theta_state, grads, value, norm, jnp.zeros((), jnp.int32)
        )
        state = dataclasses.replace(
            state,
            adapter=join_params(state.adapter, omega, theta, rest),
            theta_state=opt_state,
        )
        return state, _metrics(value, parts, norm, skipped)

    def evaluate(adapter: Adapter, base: Base, batch: Batch) -> tuple:
        return summed_loss(adapter, base, model, batch, prompts)

    return Steps(
        train=jax.jit(train, donate_argnums=0),
        coefficients=jax.jit(coefficients, donate_argnums=0),
        evaluate=jax.jit(evaluate),
    )


def _guarded_update(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    value: Array,
    norm: Array,
    bad_steps: Array,
) -> tuple[PyTree, PyTree, Array]:
    """The optimiser's update, or no change at all where the loss, the gradient or the result is not
    finite.

    Returns:
      Parameters, optimiser state, and the number of skipped updates in a row.
    """
    # optax computes schedules and bias corrections as float ** int, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    # The sum of squares of the new parameters is finite only if every one of them is.
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(new_params))

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    return (
        jax.tree.map(keep, new_params, params),
        jax.tree.map(keep, new_opt_state, opt_state),
        jnp.where(finite, 0, bad_steps + 1).astype(jnp.int32),
    )


def _metrics(value: Array, parts: PyTree, norm: Array, bad_steps: Array) -> Metrics:
    return Metrics(
        loss=value,
        cross_entropy=parts.cross_entropy,
        load_balance=parts.load_balance,
        grad_norm=norm,
        expert_share=parts.expert_share,
        pooled_max=parts.pooled_max,
        tokens=parts.tokens,
        bad_steps=bad_steps,
    )
