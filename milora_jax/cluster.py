"""Which of several processes this one is."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import require


@dataclass(frozen=True)
class Cluster:
    """Which of several processes this one is, where a person says so.

    Attributes:
      coordinator: HOST:PORT of the first process; empty leaves all to the environment.
      processes: how many there are.
      process: which one this is, from 0.
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
