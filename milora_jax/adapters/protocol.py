"""What a fine-tuning method is to the rest of the house, and the adapter pytree it makes.

The Transformer knows four projection groups (``types.GROUPS``). For each group it computes the
frozen outputs and hands them, with the shared input, to ``Method.adapt``. Before each layer it
offers the residual stream to ``Method.route``. That is all it knows of any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import struct

from milora_jax.shapes import Array, Bool, Float, Key
from milora_jax.types import EXPERTS, PyTree, Route


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


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: settings only, hashable, hence static under ``jax.jit``.

    Parameters live in a tree of the method's own making whose leaves are stacked on a leading layer
    axis. Inside a layer the methods below see one layer's slice of it.
    """

    routes: ClassVar[bool] = False
    """Whether the method has a router, so that a forward pass needs a prompt mask or a route."""

    def init(self, key: Key[Array, ""], shape: Shape) -> PyTree:
        """Fresh float32 parameters, stacked on the layer axis, that leave the base unchanged."""
        raise NotImplementedError(f"{type(self).__name__}.init")

    def route(
        self,
        params: PyTree,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        depth: Float[Array, ""],
    ) -> Route | None:
        """Choose this layer's experts from the residual stream that enters it.

        Args:
          params: this layer's parameters.
          hidden: residual stream before the layer.
          members: which tokens are the prompt of which record.
          depth: layer index over L, in [0, 1).

        Returns:
          The layer's route, or None for a method without a router.
        """
        del params, hidden, members, depth
        return None

    def adapt(
        self,
        params: PyTree,
        names: tuple[str, ...],
        x: Float[Array, "B T _"],
        outputs: tuple[Float[Array, "B T _"], ...],
        weights: Float[Array, "B _ E"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Change the outputs of one projection group.

        Args:
          params: this layer's parameters.
          names: the group's modules.
          x: the input they share.
          outputs: what the frozen modules give for ``x``, bias included, one array per name.
          weights: routing weights of the layer, per row (middle axis 1) or per token (T).
          key: present while training with dropout.

        Returns:
          The adapted outputs, in the order of ``names``.
        """
        raise NotImplementedError(f"{type(self).__name__}.adapt")

    def is_coefficient(self, path: tuple[str, ...]) -> bool:
        """Whether the leaf at ``path`` belongs to Theta, the bi-level set (Appendix A)."""
        del path
        return False

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """Parameters of each expert over all layers: those in force where the expert is chosen."""
        raise NotImplementedError(f"{type(self).__name__}.expert_sizes")


@struct.dataclass
class Adapter:
    """A method's parameters together with what is needed to use them.

    Attributes:
      params: the trainable leaves: stacked on a layer axis, or a tuple of layers for decoding.
      method: the method that reads them.
      shape: the base they fit.
    """

    params: PyTree
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)


def init_adapter(method: Method, key: Key[Array, ""], shape: Shape) -> Adapter:
    """A fresh adapter: adding it to the base changes no output."""
    return Adapter(params=method.init(key, shape), method=method, shape=shape)


def tunable_parameters(method: Method, shape: Shape) -> int:
    """Exact number of trainable scalars, counted on shapes alone."""
    tree = jax.eval_shape(lambda: method.init(jax.random.key(0), shape))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def path_names(path: tuple) -> tuple[str, ...]:
    """Field and dictionary names along a ``jax.tree_util`` key path."""
    return tuple(str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path)


def coefficient_mask(adapter: Adapter) -> PyTree:
    """A tree like ``adapter.params`` that is True on the leaves of Theta."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: adapter.method.is_coefficient(path_names(path)), adapter.params
    )


def active_parameters(sizes: dict[str, int], share: dict[str, float]) -> float:
    """Mean expert parameters in force per generated token, the paper's "active" column.

    Routers are not counted: they run once per prompt and not at all while tokens are generated.

    Args:
      sizes: ``Method.expert_sizes``.
      share: for each expert the share of (prompt, layer) pairs that chose it.
    """
    return sum(sizes[name] * share[name] for name in sizes)
