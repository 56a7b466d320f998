"""Shape annotations: jaxtyping's where it is installed, plain names where it is not.

Signatures say ``Float[Array, "B T D"]`` with the letters of ``milora_jax.types``. The tests check them at run
time; elsewhere they are plain text, and the core does not need jaxtyping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt
    except ImportError:
        from typing import Any

        from jax import Array

        Bool = Float = Int = Key = Shaped = UInt = Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped", "UInt"]
