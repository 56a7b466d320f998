"""The settings of the device mesh."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import require


@dataclass(frozen=True)
class MeshSection:
    """Devices along each axis of the mesh; -1 on one axis means all that remain.

    Attributes:
      data: devices that divide the rows of a step among them, each with the whole base; -1, on any one axis,
        means all that remain.
      fsdp: devices that divide the rows, and the base as well.
      tensor: devices that divide the work of every layer among them.
      expert: devices that divide the rows, and the experts of a base that has them, evenly.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor, self.expert)
        for name, size in zip(("data", "fsdp", "tensor", "expert"), sizes, strict=True):
            require(size >= 1 or size == -1, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one -1")

    def __str__(self) -> str:
        """The size of each axis; that of the experts only where it is not 1."""
        expert = "" if self.expert == 1 else f" expert={self.expert}"
        return f"data={self.data} fsdp={self.fsdp}{expert} tensor={self.tensor}"


def parse_mesh(text: str, name: str = "--mesh") -> MeshSection:
    """Parse ``data=1,fsdp=16,tensor=1``; an axis that is not named is 1.

    >>> parse_mesh("fsdp=4,tensor=2")
    MeshSection(data=1, fsdp=4, tensor=2, expert=1)
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
    for entry in text.split(","):
        axis, _, size = entry.strip().partition("=")
        number = size.removeprefix("-").isdecimal()
        require(axis in sizes and number, name, text, "such as data=1,fsdp=16,tensor=1")
        sizes[axis] = int(size)
    return MeshSection(**sizes)
