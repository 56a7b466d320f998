"""The adapters of a bank as its kernels read them, and their products in plain XLA."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.joined import JoinedPairs
from milora_jax.shapes import Array, Float, Int


@struct.dataclass
class SlotPairs:
    """:class:`JoinedPairs` of a bank, laid out so that one module's matrix is one block of memory.

    Attributes:
      a: the A matrices, transposed.
      b: tiles of the B matrices.
      tiles: number of tiles of each module.
    """

    a: Float[Array, "*S M R d_in"]
    b: Float[Array, "*S tiles R width"]
    tiles: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, pairs: JoinedPairs) -> SlotPairs:
        """Convert from the form that products with all rows read."""
        d_in = pairs.a.shape[-2]
        a = jnp.moveaxis(pairs.a, -1, -2).reshape(*pairs.a.shape[:-2], len(pairs.tiles), pairs.rank, d_in)
        return cls(a=a, b=pairs.b, tiles=pairs.tiles)

    def joined(self) -> JoinedPairs:
        """Convert back to the form that :meth:`of` takes."""
        flat = self.a.reshape(*self.a.shape[:-3], -1, self.a.shape[-1])
        return JoinedPairs(a=jnp.moveaxis(flat, -1, -2), b=self.b, tiles=self.tiles)


def reference_products(
    x: Float[Array, "B d_in"], pairs: SlotPairs, slot: Int[Array, " B"], share: Float[Array, "B M"]
) -> Float[Array, "tiles B width"]:
    """Compute ``kernel.row_products`` by plain products; copies every matrix of every row's slot."""
    return own_products(x, SlotPairs(pairs.a[slot], pairs.b[slot], pairs.tiles), share)


def own_products(
    x: Float[Array, "B d_in"], pairs: SlotPairs, share: Float[Array, "B M"]
) -> Float[Array, "tiles B width"]:
    """Compute :func:`reference_products` where row i has the pairs of slot i."""
    u = jnp.einsum("BD,BMRD->BMR", x, pairs.a, preferred_element_type=jnp.float32)
    u = (u * share[..., None]).astype(x.dtype)
    by_tile = jnp.stack([u[:, m] for m in module_of_tile(pairs.tiles)])
    wide = jnp.einsum("MBR,BMRO->MBO", by_tile, pairs.b, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def module_of_tile(tiles: tuple[int, ...]) -> list[int]:
    """Return the module of each tile."""
    return [m for m, count in enumerate(tiles) for _ in range(count)]
