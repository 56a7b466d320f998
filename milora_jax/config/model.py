"""The settings of the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import one_of

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8", "nf4")


@dataclass(frozen=True)
class ModelSection:
    """The frozen base: where it is and how it is stored in memory.

    Attributes:
      path: a Hugging Face directory, ``hf://OWNER/NAME[@REVISION]`` of the Hub, or ``gs://BUCKET/PATH``.
      dtype: dtype of its computation, and of its weights where they are not quantised.
      quantize: how the matrices of its layers are stored: none; int8, a scale per output; nf4, 4 bits and a
        scale per 64 inputs.
    """

    path: str = ""
    dtype: str = "float32"
    quantize: str = "none"

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.quantize", self.quantize, QUANTIZE)
