"""The place of this process among those of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import require


@dataclass(frozen=True)
class Cluster:
    """The place of this process among those of a cluster, where options give it.

    Attributes:
      coordinator: HOST:PORT of the first process; where it is empty, JAX reads the environment.
      processes: the number of processes.
      process: the number of this process, from 0.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1

    def __post_init__(self) -> None:
        if not self.coordinator:
            require(self.processes == 0, "--processes", self.processes, "--coordinator=HOST:PORT beside it")
            require(self.process == -1, "--process", self.process, "--coordinator=HOST:PORT beside it")
            return
        host, _, port = self.coordinator.rpartition(":")
        require(bool(host) and port.isdecimal(), "--coordinator", self.coordinator, "HOST:PORT")
        require(self.processes >= 1, "--processes", self.processes, "at least 1 with --coordinator")
        inside = 0 <= self.process < self.processes
        require(inside, "--process", self.process, f"0 to {self.processes - 1} with --coordinator")
