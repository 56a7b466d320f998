"""What a fine-tuning method is to the rest of the house, and the adapter pytree it makes.

The Transformer knows four projection groups (``types.GROUPS``). For each group it computes the
frozen outputs and hands them, with the shared input, to ``Method.adapt``. Before each layer it
offers the residual stream to ``Method.route`` and ``Method.prefix``, and beside each of the layer's
two sublayers it asks for ``Method.branch``. That is all it knows of any method. Every hook but
``init`` has a default that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.routing import ExpertUse, LayerInput, RoutingSchedule
from milora_jax.errors import require
from milora_jax.prompt_format import PromptFormat
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, PyTree, Route

SUBLAYERS = ("attention", "feedforward")
"""The two residual branches of a layer, beside which a method may add one of its own."""


@dataclass(frozen=True)
class Shape:
    """The part of a base's shape that decides an adapter's: widths of the seven modules and depth.

    Attributes:
      modules: ``(name, (input width, output width))`` in the order of ``types.EXPERTS``.
      num_layers: L.
      hidden_size: D.
    """

    modules: tuple[tuple[str, tuple[int, int]], ...]
    num_layers: int
    hidden_size: int

    @classmethod
    def of(cls, module_dims: dict[str, tuple[int, int]], num_layers: int, hidden_size: int) -> Shape:
        """Build from the mapping that ``ModelConfig.module_dims`` gives, in any order."""
        return cls(tuple((name, module_dims[name]) for name in EXPERTS), num_layers, hidden_size)

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """Input and output width by module."""
        return dict(self.modules)


class Frozen(NamedTuple):
    """The leaves of one frozen linear module, for methods that look at the weight they change."""

    kernel: Float[Array, "d_in d_out"]
    bias: Float[Array, " d_out"] | None


@dataclass(frozen=True)
class ProjectionGroup:
    """Modules that share an input, as one layer evaluates them.

    Attributes:
      names: of the modules.
      x: the input they share.
      outputs: what the frozen modules give for ``x``, bias included, one array per name.
      frozen: the modules' own leaves.
      weights: routing weights of the layer, per row (middle axis 1) or per token (T); None without a route.
      key: present while training with dropout.
    """

    names: tuple[str, ...]
    x: Float[Array, "B T _"]
    outputs: tuple[Float[Array, "B T _"], ...]
    frozen: tuple[Frozen, ...]
    weights: Float[Array, "B _ E"] | None
    key: Key[Array, ""] | None


FrozenLayer = Callable[[int], tuple[Frozen, ...]]
"""The leaves of one layer's projection groups, by place in ``types.GROUPS``."""

Kernels = Mapping[str, Any]
"""The frozen kernels of all layers, ``[L, d_in, d_out]``, by module."""

Project = Callable[[Array], tuple[Array, Array]]
"""Hidden vectors ``[B P D]`` to the keys and values ``[B P K*H]`` that the frozen layer gives them."""


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: settings only, hashable, hence static under ``jax.jit``.

    Parameters live in a tree of the method's own making whose leaves are stacked on a leading layer
    axis. Inside a layer ``route``, ``prefix``, ``adapt`` and ``branch`` see one layer's slice of it.
    The fields of a subclass are its settings, named as in ``config.AdapterSection``.
    """

    name: ClassVar[str] = ""
    """What ``adapter.method`` calls it."""

    routes: ClassVar[bool] = False
    """Whether the method has a router, so that a forward pass needs a prompt mask or a route."""

    @property
    def prefix_length(self) -> int:
        """P, the keys and values that the method puts before every record's tokens."""
        return 0

    @property
    def stochastic(self) -> bool:
        """Whether training draws random numbers, as dropout does."""
        return False

    def schedule(self, step: Int[Array, ""], total_steps: int) -> RoutingSchedule:
        """The routing settings of a training step; lambda is 0 without a router.

        Args:
          step: number of the step, from 0.
          total_steps: how many there will be.
        """
        del step, total_steps
        return self.final_schedule

    @property
    def final_schedule(self) -> RoutingSchedule:
        """The routing settings after all schedules: those of dev evaluations and of the saved adapter."""
        return RoutingSchedule(None, 0.0)

    @property
    def theta(self) -> str:
        """How the leaves that ``is_coefficient`` names are trained; one of ``config.COEFFICIENTS``."""
        return "joint"

    def theta_rate(self, rate: float) -> float:
        """Peak learning rate of a bi-level Theta, given the run's ``coefficient_learning_rate``."""
        return rate

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> PyTree:
        """Fresh float32 parameters, stacked on the layer axis.

        They leave the base unchanged where the method's definition allows it.

        Args:
          kernels: the frozen weights, for methods that start from them.
        """
        raise NotImplementedError(f"{type(self).__name__}.init")

    def settle(self, params: PyTree) -> PyTree:
        """What the layers read, from the stacked parameters: for what no layer can compute alone."""
        return params

    def prepare(self, params: PyTree, frozen: FrozenLayer, dtype: jnp.dtype) -> PyTree:
        """One layer's settled parameters in the form that decoding reads.

        For what need not be done again at every token: joining matrices, casting them, whatever depends
        on frozen weights alone. The other hooks take either form.

        Args:
          frozen: the layer's frozen leaves by place in ``types.GROUPS``; called only by methods that
            need them.
          dtype: of the base, in which activations are computed.
        """
        del frozen, dtype
        return params

    @property
    def is_pairs(self) -> bool:
        """Whether all that a prepared adapter does after prefill is what ``pairs_of`` says."""
        return False

    def pairs_of(self, params: PyTree, group: ProjectionGroup) -> tuple[Any, Float[Array, "B _ M 1"] | None]:
        """The joined pairs that act on a group, and what their products are multiplied by, if anything.

        Args:
          params: of one layer, prepared.
        """
        raise NotImplementedError(f"{type(self).__name__}.pairs_of")

    def served(self) -> Method:
        """The settings that a prepared adapter depends on; all others take their defaults.

        Adapters whose served methods are equal can be tenants of one bank. A rank is not among these
        settings: it is read off the prepared pairs, which a bank fills up with zeros to its own rank.
        """
        return self

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

    @property
    def measures_features(self) -> bool:
        """Whether the router's features are measured on the frozen base before the first step."""
        return False

    def pooled_features(self, entering: LayerInput) -> Float[Array, "B Z D"]:
        """What is measured of one layer's input, by the router as it is before the first step."""
        raise NotImplementedError(f"{type(self).__name__}.pooled_features")

    def with_feature_statistics(
        self, params: PyTree, mean: Float[Array, "L D"], deviation: Float[Array, "L D"]
    ) -> PyTree:
        """Parameters that hold what was measured of :meth:`pooled_features`."""
        raise NotImplementedError(f"{type(self).__name__}.with_feature_statistics")

    def prefix(
        self,
        params: PyTree,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        project: Project,
    ) -> tuple[Float[Array, "B ZP _"], Float[Array, "B ZP _"]] | None:
        """Keys and values that every token of a record attends to, beside those of its tokens.

        They are computed once, while the prompt passes through, and live in the cache afterwards.

        Returns:
          ``prefix_length`` keys and as many values, after any rotation, per record of the row: record
          by record, ``[B, Z * P, K * H]``; or None.
        """
        del params, hidden, members, project
        return None

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs of one projection group, in the order of its modules.

        Args:
          params: this layer's parameters.
          group: what the method may read.
        """
        del params
        return group.outputs

    def branch(self, params: PyTree, sublayer: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"] | None:
        """What is added to a sublayer's output, from the normed stream that enters the sublayer.

        Args:
          sublayer: one of :data:`SUBLAYERS`.
        """
        del params, sublayer, x
        return None

    def penalty(self, params: PyTree) -> Float[Array, ""]:
        """A term of the loss that depends on the parameters alone."""
        del params
        return jnp.zeros((), jnp.float32)

    def init_memory(self, params: PyTree) -> PyTree:
        """What the method remembers between steps beside its parameters; part of a checkpoint."""
        del params
        return None

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
          grads: of the loss before the update, clipped as the optimiser saw them; None in place of the
            leaves of a bi-level Theta and of those that are not trained.
          step: number of the update, from 1.
          total_steps: how many there will be.
          use: of the experts by the batch; None with a method that does not route.
        """
        del grads, use, step, total_steps
        return params, memory

    def first_choices(self, memory: PyTree, first: Float[Array, "L E"]) -> Float[Array, "L E"]:
        """``f_i`` of the load-balance term, from the batch's and what is remembered of earlier ones."""
        del memory
        return first

    def ready(self, step: int, total_steps: int) -> bool:
        """Whether the adapter after ``step`` updates is what the method gives, within its budget.

        Before that a dev evaluation is logged, but its adapter is not kept as the best.
        """
        del step, total_steps
        return True

    def is_coefficient(self, path: tuple[str, ...]) -> bool:
        """Whether the leaf at ``path`` belongs to Theta, the bi-level set (Appendix A)."""
        del path
        return False

    def is_measured(self, path: tuple[str, ...]) -> bool:
        """Whether the leaf at ``path`` is set by rule, and never by a gradient."""
        del path
        return False

    def is_router(self, path: tuple[str, ...]) -> bool:
        """Whether the leaf at ``path`` decides a route, so that ``train.router_rate`` applies to it."""
        del path
        return False

    def tunable_parameters(self, shape: Shape) -> int:
        """Scalars that remain tuned at the end of training; of a method that prunes, its budget."""
        return trained_size(self, abstract_params(self, shape))

    def count_parameters(self, params: PyTree) -> int:
        """Trained scalars of this very adapter that have an effect: fewer than there are after pruning."""
        return trained_size(self, params)

    def active_parameters(self, shape: Shape, share: Mapping[str, float], tunable: int) -> float:
        """Mean adapter parameters that have a part in a generated token, the paper's "active" column.

        As in its Table 1, only what a router switches off, and the router that does, is left out.

        Args:
          share: for each expert the share of (prompt, layer) pairs that chose it.
          tunable: parameters of the adapter, by ``count_parameters`` or, before there is one, by
            ``tunable_parameters``.
        """
        del shape, share
        return float(tunable)


@dataclass(frozen=True)
class WidthMethod(Method):
    """Settings of the methods whose size is one width.

    Attributes:
      width: W, of a bottleneck or of a short vector that is projected.
    """

    width: int = 1

    def __post_init__(self) -> None:
        require(self.width >= 1, "adapter.width", self.width, "at least 1")


@struct.dataclass
class Adapter:
    """A method's parameters together with what is needed to use them.

    Attributes:
      params: the trainable leaves: stacked on a layer axis, or a settled tuple of layers for decoding.
      method: the method that reads them.
      shape: the base they fit.
      prompt_format: how the prompts were written that it was trained on; no computation depends on it.
    """

    params: PyTree
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)
    prompt_format: PromptFormat = struct.field(pytree_node=False, default=PromptFormat())


def init_adapter(method: Method, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> Adapter:
    """A fresh adapter for the base with these kernels, see ``base.transformer.frozen_kernels``."""
    return Adapter(params=method.init(key, shape, kernels), method=method, shape=shape)


def abstract_params(method: Method, shape: Shape) -> PyTree:
    """Shapes and dtypes of a method's parameters; nothing is computed."""
    kernels = {
        name: jax.ShapeDtypeStruct((shape.num_layers, *dims), jnp.float32) for name, dims in shape.modules
    }
    return jax.eval_shape(lambda kernels: method.init(jax.random.key(0), shape, kernels), kernels)


def path_names(path: tuple) -> tuple[str, ...]:
    """Field and dictionary names along a ``jax.tree_util`` key path."""
    return tuple(str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path)


def trained_size(method: Method, params: PyTree) -> int:
    """Scalars that a gradient trains: all but those of measured leaves."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not method.is_measured(path_names(path))
    )


def router_mask(method: Method, params: PyTree) -> PyTree:
    """A tree like ``params`` that is True on the leaves of routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: method.is_router(path_names(path)), params)
