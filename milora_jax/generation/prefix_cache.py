"""A cache of keys and values of blocks of earlier prompts, keyed by the tokens that they depend on.

The keys and values of a token depend on the adapter, on the route, and on all tokens before it. A block is
found by a chain of hashes: the root stands for adapter and route, each link for the tokens of one block. The
route depends on the tokens that the routers read, so the root holds those; where the routers read the whole
prompt, only the same whole prompt finds its blocks again.

Only blocks that prefill computed are kept. What decode steps wrote has been rounded otherwise, and a reply
that comes back as a part of the next prompt is prefilled once: tokens are the same, bit for bit, with the
cache and without it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class KeptPrefix:
    """The cached part of a prompt.

    Attributes:
      blocks: keys and values of its first blocks, ``[L, 2, K, T, H]`` each.
      route: routing weights of each layer, ``[1, 1, E]``; None without a router.
    """

    blocks: tuple[Any, ...] = ()
    route: tuple[Any, ...] | None = None


@dataclass
class CacheCounts:
    """Counters of a prefix cache.

    Attributes:
      queries, hits: prompt tokens that were looked up, and that were found.
      evicted: entries that were dropped for others.
      used: bytes that are kept.
    """

    queries: int = 0
    hits: int = 0
    evicted: int = 0
    used: int = 0


class PrefixCache:
    """Holds blocks of prompts and routes in bounded memory; the least recently used are evicted first.

    Args:
      size: bytes of all entries.
      block: tokens of a block.
    """

    def __init__(self, size: int, block: int) -> None:
        self.size, self.block = size, block
        self.counts = CacheCounts()
        self._entries: OrderedDict[bytes, Any] = OrderedDict()

    def find(self, scope: str, prompt: Sequence[int], route_tokens: int, routed: bool) -> KeptPrefix:
        """Return the cached part of a prompt; at least its last token is always left to be computed.

        Args:
          scope: names what keys and values depend on beside tokens, the version of the adapter, and whoever
            may share them.
          route_tokens: leading tokens that the routers read; 0 for all.
          routed: whether the adapter has a router; without its route no block is of use.
        """
        self.counts.queries += len(prompt)
        root, *links = self._chain(scope, prompt, route_tokens, routed)
        route = self._entries.get(root) if routed else None
        if routed and route is None:
            return KeptPrefix()
        found: list[bytes] = []
        for link in links[: (len(prompt) - 1) // self.block]:
            if link not in self._entries:
                break
            found.append(link)
        # The root and the first blocks last: what others are chained to is evicted after them.
        for link in (*reversed(found), *([root] if routed else [])):
            self._entries.move_to_end(link)
        self.counts.hits += len(found) * self.block
        return KeptPrefix(tuple(self._entries[link] for link in found), route)

    def keep(self, scope: str, prompt: Sequence[int], route_tokens: int, kept: KeptPrefix) -> None:
        """Add the results of a prefill.

        Args:
          scope, prompt, route_tokens: as :meth:`find` takes them.
        """
        root, *links = self._chain(scope, prompt, route_tokens, kept.route is not None)
        entries = [*zip(links, kept.blocks, strict=False)]
        for link, entry in [*reversed(entries), *([(root, kept.route)] if kept.route is not None else [])]:
            if link not in self._entries:
                self.counts.used += _bytes(entry)
                self._entries[link] = entry
            self._entries.move_to_end(link)
        while self.counts.used > self.size:
            _, entry = self._entries.popitem(last=False)
            self.counts.used -= _bytes(entry)
            self.counts.evicted += 1

    def clear(self) -> None:
        """Remove all entries and reset the counts."""
        self._entries.clear()
        self.counts = CacheCounts()

    def _chain(self, scope: str, prompt: Sequence[int], route_tokens: int, routed: bool) -> Iterator[bytes]:
        """The keys of the route and of each whole block."""
        ids = np.asarray(prompt, np.int32)
        read = ids[: route_tokens or len(ids)] if routed else ids[:0]
        link = hashlib.sha256(f"{scope}\0{len(read)}\0".encode() + read.tobytes()).digest()
        yield link
        for start in range(0, len(ids) - self.block + 1, self.block):
            link = hashlib.sha256(link + ids[start : start + self.block].tobytes()).digest()
            yield link


def _bytes(entry: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(entry))
