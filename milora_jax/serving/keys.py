"""API keys, kept as SHA-256 digests and compared in constant time.

A file of keys is one JSON object::

    {"tenants": [{"name": "acme", "sha256": "9f86...", "adapters": ["math", "law"],
                  "concurrency": 8, "tokens_per_minute": 60000}],
     "admin": ["ab12..."], "monitor": ["cd34..."]}

``"adapters": "*"`` allows all adapters. ``python -m milora_jax.serving hash-key`` prints the digest of a key
that it reads from standard input. No file and no argument of the server holds a key itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeInt
from pydantic_core import PydanticCustomError

from milora_jax.errors import UserError, require
from milora_jax.serving.json_models import FileModel, Name, read_model

KEY_VARIABLE, ADMIN_VARIABLE = "MILORA_API_KEY", "MILORA_ADMIN_KEY"
"""Environment variables for the key of a tenant that may use all adapters, and for the administrator's."""

SHORTEST_KEY = 16
"""Characters of a key; a shorter one can be guessed."""


@dataclass(frozen=True)
class Tenant:
    """A customer of the server.

    Attributes:
      adapters: names of the adapters that it may use; None for all, and the base alone.
      concurrency: active requests that it may have; 0 for no limit but the server's own.
      tokens_per_minute: limit on prompts and continuations together; 0 for no limit.
      alone: whether the server has no other tenant.
    """

    name: str
    adapters: frozenset[str] | None = None
    concurrency: int = 32
    tokens_per_minute: int = 0
    alone: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether the tenant may use an adapter."""
        return self.adapters is None or adapter in self.adapters


LOCAL = Tenant("local", concurrency=0, alone=True)
"""The tenant of a server without keys, which listens to its own machine only."""


def _digest_of_hex(value: object) -> bytes:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return bytes.fromhex(value)
    hint = "expected the 64 digits 0-9a-f of a SHA-256; see python -m milora_jax.serving hash-key"
    raise PydanticCustomError("digest", hint)


Digest = Annotated[bytes, BeforeValidator(_digest_of_hex)]


class TenantEntry(FileModel):
    """A tenant in a file of keys."""

    name: Name
    sha256: Digest
    adapters: Literal["*"] | frozenset[str] = "*"
    concurrency: NonNegativeInt = Tenant.concurrency
    tokens_per_minute: NonNegativeInt = Tenant.tokens_per_minute

    def tenant(self) -> Tenant:
        """Return the tenant."""
        adapters = self.adapters if isinstance(self.adapters, frozenset) else None
        return Tenant(self.name, adapters, self.concurrency, self.tokens_per_minute)


class KeysFile(FileModel):
    """A file of keys."""

    tenants: tuple[TenantEntry, ...] = ()
    admin: tuple[Digest, ...] = ()
    monitor: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class Keyring:
    """The keys of a server.

    Attributes:
      tenants: digest of the key and tenant.
      admins: digests of the keys that may load and unload adapters; without any, these calls are refused.
      monitors: digests of the keys that may read the metrics and nothing else.
      open: whether no key is needed, and every client is :data:`LOCAL`.
    """

    tenants: tuple[tuple[bytes, Tenant], ...] = ()
    admins: tuple[bytes, ...] = ()
    monitors: tuple[bytes, ...] = ()
    open: bool = False

    def tenant_of(self, key: bytes | None) -> Tenant | None:
        """Return the tenant of a key; None if no tenant has it."""
        if self.open:
            return LOCAL
        found = None
        digest = _digest(key or b"")
        for known, tenant in self.tenants:  # no early exit, so that the time does not depend on the key
            if hmac.compare_digest(known, digest):
                found = tenant
        return None if key is None else found

    def is_admin(self, key: bytes | None) -> bool:
        """Whether this is the key of an administrator."""
        return _is_among(self.admins, key)

    def is_monitor(self, key: bytes | None) -> bool:
        """Whether this is the key of a monitor."""
        return _is_among(self.monitors, key)

    def may_read_metrics(self, key: bytes | None) -> bool:
        """Whether a key may read the metrics, which name all tenants and their usage.

        The keys of monitors and administrators may, and that of the only tenant.
        """
        alone = len(self.tenants) == 1 and self.tenant_of(key) is not None
        return self.is_monitor(key) | self.is_admin(key) | alone | self.open

    @classmethod
    def of(cls, path: Path | None, environment: Mapping[str, str] = os.environ) -> Keyring:
        """Return the keys of a file and of the environment; open if neither has a key of a tenant.

        Raises:
          UserError: the file is not as described above, or a key of the environment is too short.
        """
        file = KeysFile() if path is None else read_model(path, KeysFile)
        tenants = [(each.sha256, each.tenant()) for each in file.tenants]
        admins = list(file.admin)
        for variable in (KEY_VARIABLE, ADMIN_VARIABLE):
            key = environment.get(variable)
            if key is None:
                continue
            if len(key) < SHORTEST_KEY:
                raise UserError(f"{variable} has {len(key)} characters: expected at least {SHORTEST_KEY}")
            if variable == KEY_VARIABLE:
                tenants.append((_digest(key.encode()), Tenant("default", concurrency=0)))
            else:
                admins.append(_digest(key.encode()))
        _require_distinct((tenant.name for _, tenant in tenants), "tenant")
        digests = (*(digest for digest, _ in tenants), *admins, *file.monitor)
        _require_distinct(map(bytes.hex, digests), "key")
        if len(tenants) == 1:
            tenants = [(digest, dataclasses.replace(tenant, alone=True)) for digest, tenant in tenants]
        return cls(tuple(tenants), tuple(admins), file.monitor, open=not tenants)


def digest_of(key: str) -> str:
    """Return the digest of a key, as a file of keys holds it.

    Raises:
      UserError: the key is too short.
    """
    require(len(key) >= SHORTEST_KEY, "a key's length", len(key), f"at least {SHORTEST_KEY}")
    return _digest(key.encode()).hex()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_among(digests: Iterable[bytes], key: bytes | None) -> bool:
    digest = _digest(key or b"")
    found = False
    for known in digests:  # no early exit, so that the time does not depend on the key
        found |= hmac.compare_digest(known, digest)
    return found and key is not None


def _require_distinct(values: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise UserError(f"a {what} is given twice" + (f": {value!r}" if what == "tenant" else ""))
        seen.add(value)
