"""The protocols of a fine-tuning method, one for each package that uses it.

=================  =======================================================  ==============================
protocol           what it answers                                          asked by
=================  =======================================================  ==============================
LayerHooks         how the method changes the layers of the frozen base     ``base.transformer``
TrainingHooks      what is trained, by which schedules and rules            ``training``
DecodingHooks      what decoding and a bank of adapters need                ``generation``
ParameterCounts    how many parameters it tunes and uses                    ``evaluation``
ExportHooks        how it is written for other programs                     ``storage``
=================  =======================================================  ==============================

Every hook but ``LayerHooks.init`` has a default, that of a method without the feature in question; a method
overrides the hooks of its features. ``pairs_of`` and ``weight_change`` are called only on a method that
declares them by ``is_pairs`` and ``record``. ``adapters.protocol.Method`` is all five.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from milora_jax.adapters.inputs import (
    ExpertUse,
    FrozenLayer,
    Kernels,
    LayerInput,
    Project,
    ProjectionGroup,
    RoutingSchedule,
    Shape,
)
from milora_jax.adapters.records import Parts, WeightChange
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import PyTree, Route


class LayerHooks:
    """How a method changes the layers of the frozen base.

    Parameters are a tree of the method's own making whose leaves are stacked on a leading layer axis. Inside
    a layer, ``route``, ``prefix``, ``adapt`` and ``branch`` receive that layer's slice of it.
    """

    routes: ClassVar[bool] = False
    """Whether the method has a router, so that a forward pass computes a route or is given one."""

    additive: ClassVar[bool] = False
    """Whether ``adapt`` only adds terms that depend on neither the outputs nor the frozen leaves, so that all
    experts of a base can share them; on a base with experts every other method is refused."""

    @property
    def reads_prompt(self) -> bool:
        """Whether a prompt changes what the method does, beside what attention makes of it."""
        return self.routes

    @property
    def route_scope(self) -> str:
        """What of a prompt the method reads, one of ``prompt_format.ROUTE_ON``."""
        return "prompt"

    @property
    def prefix_length(self) -> int:
        """P, the number of keys and values that the method puts before every record's tokens."""
        return 0

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> PyTree:
        """Make fresh float32 parameters, stacked on the layer axis.

        They leave the base unchanged where the method's definition allows it.

        Args:
          kernels: the frozen weights, for methods that start from them.
        """
        raise NotImplementedError(f"{type(self).__name__}.init")

    def settle(self, params: PyTree) -> PyTree:
        """Compute from the stacked parameters what no layer can compute alone; layers read the result."""
        return params

    def route(
        self, params: PyTree, entering: LayerInput, top_k: Int[Array, ""] | None = None
    ) -> Route | None:
        """Choose this layer's experts from the residual stream that enters it.

        Args:
          params: this layer's parameters.
          entering: the stream and where the prompts are.
          top_k: experts to choose, where a schedule says other than the method.

        Returns:
          The layer's route, or None for a method without a router.
        """
        del params, entering, top_k
        return None

    def prefix(
        self, params: PyTree, hidden: Float[Array, "B T D"], members: Bool[Array, "B Z T"], project: Project
    ) -> tuple[Float[Array, "B P KH"], Float[Array, "B P KH"]] | None:
        """Keys and values that go before the tokens of every record, ``Z * prefix_length`` of each.

        Args:
          members: whether each token belongs to the prompt of each record.
          project: maps soft tokens to the keys and values of the frozen layer.
        """
        del params, hidden, members, project
        return None

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs of one projection group, in the order of its modules.

        Args:
          params: this layer's parameters.
          group: the frozen outputs and everything else that the method may read.
        """
        del params
        return group.outputs

    def branch(self, params: PyTree, sublayer: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"] | None:
        """The term added to a sublayer's output, from the normed stream that enters the sublayer.

        Args:
          sublayer: one of ``inputs.SUBLAYERS``.
        """
        del params, sublayer, x
        return None


class LeafRole(NamedTuple):
    """The role of a leaf of the parameters in training.

    Attributes:
      trained: whether a gradient trains it; otherwise the method sets it by a rule.
      router: whether it belongs to a router, so that ``train.router_rate`` applies to it.
      coefficient: whether it belongs to Theta, the set trained bi-level (Appendix A).
      output: whether it is the B of a low-rank pair, zero at the start, so that ``train.lora_plus_ratio``
        applies to it.
    """

    trained: bool = True
    router: bool = False
    coefficient: bool = False
    output: bool = False


@dataclass(frozen=True)
class Calibration:
    """How the statistics of a router's features are measured on the frozen base before the first step.

    Attributes:
      features: returns the pooled vectors of a layer's prompts, ``[B, Z, D]``, by a fresh pooler.
      store: takes ``(params, mean, deviation)``, statistics ``[L, D]``, and returns parameters that hold
        them.
    """

    features: Callable[[LayerInput], Float[Array, "B Z D"]]
    store: Callable[[PyTree, Float[Array, "L D"], Float[Array, "L D"]], PyTree]


class TrainingHooks:
    """What is trained, by which schedules, and what happens after the optimiser's update."""

    @property
    def stochastic(self) -> bool:
        """Whether training draws random numbers, as dropout does."""
        return False

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of the leaf at ``path``, the names of fields and keys along it."""
        del path
        return LeafRole()

    @property
    def theta(self) -> str:
        """How Theta is trained; one of ``config.COEFFICIENTS``."""
        return "joint"

    def theta_rate(self, rate: float) -> float:
        """Peak learning rate of Theta in bi-level training, given the run's ``coefficient_learning_rate``."""
        return rate

    @property
    def calibration(self) -> Calibration | None:
        """How the router's features are measured before the first step; None where nothing is measured."""
        return None

    @property
    def final_schedule(self) -> RoutingSchedule:
        """The routing settings after all schedules, which dev evaluations and the saved adapter use."""
        return RoutingSchedule(None, 0.0)

    def schedule(self, step: Int[Array, ""], total_steps: int) -> RoutingSchedule:
        """The routing settings of a training step; lambda is 0 without a router.

        Args:
          step: number of the step, from 0.
          total_steps: number of steps of the run.
        """
        del step, total_steps
        return self.final_schedule

    def ready(self, step: int, total_steps: int) -> bool:
        """Whether the adapter after ``step`` updates is one that may be kept, such as one within its budget.

        Before that a dev evaluation is logged, but its adapter is not stored as the best.
        """
        del step, total_steps
        return True

    def penalty(self, params: PyTree) -> Float[Array, ""]:
        """A term of the loss that depends on the parameters alone."""
        del params
        return jnp.zeros((), jnp.float32)

    def init_memory(self, params: PyTree) -> PyTree:
        """The method's state between steps beside its parameters, which checkpoints hold."""
        del params
        return None

    def first_choices(self, memory: PyTree, first: Float[Array, "L E"]) -> Float[Array, "L E"]:
        """``f_i`` of the load-balance term, from the batch's and those of earlier batches in ``memory``."""
        del memory
        return first

    def after_update(
        self,
        params: PyTree,
        grads: PyTree,
        memory: PyTree,
        step: Int[Array, ""],
        total_steps: int,
        use: ExpertUse | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Change parameters and memory after the optimiser's update, as pruning does.

        Args:
          grads: gradients of the loss before the update, clipped as the optimiser saw them; None in place of
            the leaves of a bi-level Theta and of leaves that are not trained.
          step: number of the update, from 1.
          total_steps: number of steps of the run.
          use: the batch's use of the experts; None with a method that does not route.
        """
        del grads, use, step, total_steps
        return params, memory


class DecodingHooks:
    """The form in which decoding and a bank of adapters use a method."""

    def prepare(self, params: PyTree, frozen: FrozenLayer, dtype: jnp.dtype) -> PyTree:
        """Convert one layer's settled parameters to the form that decoding reads.

        Work that need not be repeated at every token belongs here: joining matrices, casting them, and
        whatever depends on frozen weights alone. The hooks of :class:`LayerHooks` accept both forms.

        Args:
          frozen: the layer's frozen leaves by place in ``types.GROUPS``; only methods that need them call it.
          dtype: dtype of the base, in which activations are computed.
        """
        del frozen, dtype
        return params

    @property
    def is_pairs(self) -> bool:
        """Whether ``pairs_of`` describes all that a prepared adapter does after prefill."""
        return False

    def pairs_of(self, params: PyTree, group: ProjectionGroup) -> tuple[Any, Float[Array, "B _ M 1"] | None]:
        """The joined pairs that act on a group, and the factors of their products, if there are any.

        Args:
          params: one layer's prepared parameters.
        """
        raise NotImplementedError(f"{type(self).__name__}.pairs_of")

    def served(self) -> Any:
        """The method with the settings that a prepared adapter depends on; all others have their defaults.

        Adapters whose served methods are equal can share a bank. The rank is not among these settings: the
        prepared pairs have it, and a bank pads them with zeros to its own rank.
        """
        return self


def path_names(path: tuple) -> tuple[str, ...]:
    """Field and dictionary names along a ``jax.tree_util`` key path."""
    return tuple(str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path)


def abstract_params(method: LayerHooks, shape: Shape) -> PyTree:
    """Shapes and dtypes of a method's parameters, without computing them."""
    kernels = {
        name: jax.ShapeDtypeStruct((shape.num_layers, *dims), jnp.float32) for name, dims in shape.modules
    }
    return jax.eval_shape(lambda kernels: method.init(jax.random.key(0), shape, kernels), kernels)


class ParameterCounts(LayerHooks, TrainingHooks):
    """How many parameters a method tunes, and how many take part in a token.

    The defaults count the leaves that ``init`` makes and ``role`` declares trained.
    """

    def tunable_parameters(self, shape: Shape) -> int:
        """Number of parameters that are tuned at the end of training; the budget of a method that prunes."""
        return self.count_parameters(abstract_params(self, shape))

    def count_parameters(self, params: PyTree) -> int:
        """Number of trained parameters of this adapter that have an effect; pruned ones have none."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return sum(leaf.size for path, leaf in leaves if self.role(path_names(path)).trained)

    def active_parameters(self, shape: Shape, share: Mapping[str, float], tunable: int) -> float:
        """Mean number of adapter parameters used per generated token, the paper's "active" column.

        As in its Table 1, only the experts that a router switches off, and the router itself, are left out.

        Args:
          share: share of (prompt, layer) pairs that chose the expert, by expert.
          tunable: parameters of the adapter, by ``count_parameters`` or, before there is one, by
            ``tunable_parameters``.
        """
        del shape, share
        return float(tunable)


class ExportHooks:
    """How an adapter is written for other programs. Checkpoints and format ``orbax`` need none of it."""

    record: ClassVar[type | None] = None
    """The dataclass of ``adapters.records`` that changes one module's weight (under a fixed route, where the
    method routes); None for a method that is more than one change of each weight."""

    portable: ClassVar[bool] = False
    """Whether the parameters are such records, plus a router where the method routes, and nothing else."""

    def weight_change(self, params: PyTree) -> WeightChange:
        """The change that an adapter, or each of its experts where it is chosen, makes to every weight.

        Called only on a method with a ``record``.

        Args:
          params: in the stacked layout.
        """
        raise NotImplementedError(f"{type(self).__name__}.weight_change")

    def parts(self, params: PyTree) -> Parts:
        """The records and the router of a portable method's parameters."""
        return Parts(params, None)

    def from_parts(self, parts: Parts) -> PyTree:
        """The parameters that have these parts; inverse of :meth:`parts`."""
        return parts.records
