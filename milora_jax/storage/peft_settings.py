"""The ``adapter_config.json`` of Hugging Face PEFT: which modules have a pair, of which rank and scale.

Modules are chosen as PEFT chooses them (0.21, ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key``). A setting that changes the function in another way is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from milora_jax.adapters.low_rank import LARGEST_ALPHA, SMALLEST_ALPHA
from milora_jax.base.json_files import parse_json_object
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.storage.files import read_bytes
from milora_jax.storage.name_patterns import Pattern
from milora_jax.types import EXPERTS

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"

LARGEST_CONFIG = 2**20
"""Bytes of the largest ``adapter_config.json``; a regular one has about a thousand, or ten thousand where it
names every module of every layer."""

LARGEST_RANK = 2**16

MOST_PATTERNS, MOST_EXPRESSIONS = 2**12, 2**5
"""Entries of the largest ``rank_pattern`` or ``alpha_pattern``, more than most bases have modules; and how
many of them may be more than a name."""

PICKLES = (".bin", ".pt", ".pth")

BESIDE = "new_embeddings"
"""The name of a file with embeddings of new tokens, which vLLM and others read beside the adapter."""

PREFIX = "model."
"""What stands before ``layers.0`` in the names of a language model's modules."""

ALL = "all-linear"

OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_ia3_weights": (True, False),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
"""Settings and values that leave ``W + s B A`` unchanged. Other ways to initialise change the base's own
weights, and a loader does so again: PEFT's ``LoraLayer.update_layer``."""

HINTS = {
    "init_lora_weights": (
        "; this start changes the base's own weights: save the adapter for the unchanged base, with PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=...)"
    )
}

READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)

WITHOUT_EFFECT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
)
"""Settings about the origin of an adapter, or that act only together with a setting that is refused."""

Names = str | tuple[str, ...]
"""Names of modules: a regular expression, or names and ends of names."""


class Target(NamedTuple):
    """A module of one layer that has a pair.

    Attributes:
      rank: of its pair; 0 without pairs, as in (IA)3.
      alpha: numerator of its scale.
    """

    rank: int
    alpha: float


Plan = dict[tuple[int, str], Target]
"""The modules that an adapter changes, by layer and our name of the module."""


@dataclass(frozen=True)
class PeftSettings:
    """The content of an ``adapter_config.json``.

    Attributes:
      where: path of the file, for errors.
      kind: lora, dora or ia3.
      targets: the changed modules; a regular expression, :data:`ALL`, or ends of names.
      excluded: modules that are not changed all the same.
      layers: the only layers that are changed; None for all.
      lists: names of the list of layers that ``layers`` counts; empty for any.
      rank: R of the pairs that ``ranks`` does not name.
      alpha: numerator of the scale of pairs that ``alphas`` does not name.
      use_rslora: whether alpha is divided by the root of the rank (arXiv 2312.03732), not by the rank.
      dropout: dropout of its training.
      ranks, alphas: values of the modules that a pattern fits, the first of which counts.
    """

    where: str
    kind: str
    targets: Names
    excluded: Names = ()
    layers: tuple[int, ...] | None = None
    lists: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    dropout: float = 0.0
    ranks: tuple[tuple[Pattern, int], ...] = ()
    alphas: tuple[tuple[Pattern, float], ...] = ()

    def plan(self, num_layers: int, prefix: str = PREFIX) -> Plan:
        """The modules with a pair, in a base with so many layers.

        Args:
          prefix: what stands before ``layers.0`` in the names of the model that it was trained on.

        Raises:
          UserError: ``target_modules`` names a module that is none of the seven, or no module is left.
        """
        chosen = _Chosen(self.targets, f"{self.where}: target_modules", self.targets == ALL)
        spared = _Chosen(self.excluded, f"{self.where}: exclude_modules")
        plan, seen = {}, set()
        for layer in range(num_layers):
            for module in EXPERTS:
                name = f"{prefix}layers.{layer}.{MODULE_PATHS[module]}"
                found = chosen.fit(name)
                seen.update(found)
                if found and not spared.fit(name) and (name in found or self._in_layers(layer, prefix)):
                    plan[layer, module] = self._target(name)
        unknown = sorted(set(self.targets) - seen) if isinstance(self.targets, tuple) else []
        if unknown:
            known = ", ".join(suffix(module) for module in EXPERTS)
            raise UserError(
                f"{self.where}: target_modules names {unknown[0]!r}, expected some of {known} "
                f"in {num_layers} layers"
            )
        for outside in ("lm_head", f"{prefix}embed_tokens"):
            if self.targets != ALL and chosen.fit(outside) and not spared.fit(outside):
                raise UserError(
                    f"{self.where}: target_modules fits {outside!r}, which no adapter here changes"
                )
        if not plan:
            raise UserError(
                f"{self.where}: target_modules is {self.targets!r:.200}, and with exclude_modules and "
                "layers_to_transform no module of the base is left"
            )
        return plan

    def _in_layers(self, layer: int, prefix: str) -> bool:
        """Whether ``layers_to_transform`` has a layer."""
        if self.layers is None:
            return True
        path = f".{prefix}layers"
        return layer in self.layers and (not self.lists or any(path.endswith(f".{n}") for n in self.lists))

    def _target(self, name: str) -> Target:
        rank = next((value for pattern, value in self.ranks if pattern.fits_tail(name)), self.rank)
        return Target(rank, next((value for p, value in self.alphas if p.fits_tail(name)), self.alpha))

    def alpha_at(self, rank: int, target: Target) -> float:
        """The alpha of a pair of ``rank`` that has the scale of a target."""
        # In this order a target of this very rank keeps its alpha to the bit.
        ratio = rank / target.rank
        return target.alpha * (math.sqrt(ratio) if self.use_rslora else ratio)


class _Chosen:
    """Names or a regular expression, ready to be compared with many names."""

    def __init__(self, names: Names, where: str, everything: bool = False) -> None:
        self._names = frozenset(names) if isinstance(names, tuple) else frozenset()
        self._all = everything
        self._pattern = Pattern(names, where) if isinstance(names, str) and not everything else None

    def fit(self, name: str) -> tuple[str, ...]:
        """What fits a name: entries, or the name itself for an expression."""
        if self._all or (self._pattern is not None and self._pattern.fits(name)):
            return (name,)
        parts = name.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        return tuple(end for end in ends if end in self._names)


def suffix(module: str) -> str:
    """PEFT's short name of a module."""
    return MODULE_PATHS[module].split(".")[-1]


def require_one(directory: Path) -> None:
    """Refuse a directory that holds adapters of PEFT in its folders, and none itself.

    Raises:
      UserError: it is such; the error names them.
    """
    names = peft_names(directory)
    if names and not (directory / PEFT_CONFIG).exists():
        expected = " or ".join(str(directory / name) for name in names[:8])
        raise UserError(
            f"{str(directory)!r} holds {len(names)} PEFT adapters in its folders: expected one, {expected}"
        )


def peft_names(directory: Path) -> list[str]:
    """The adapters that PEFT saved in folders of a directory, as it does with all but the default one."""
    return sorted(path.parent.name for path in directory.glob(f"*/{PEFT_CONFIG}") if path.is_file())


def read_peft_settings(directory: Path) -> PeftSettings:
    """Read and check the ``adapter_config.json`` of a directory.

    Raises:
      UserError: a setting is missing, ill-typed or changes the function in an unsupported way, and is named
        in the error; or the weights are a pickle; or embeddings lie beside them.
    """
    where = str(directory / PEFT_CONFIG)
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r}: no such directory, expected a PEFT adapter")
    require_one(directory)
    pickles = sorted(path.name for path in directory.glob("adapter_model.*") if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{directory}: found {pickles[0]}, but pickles are never loaded; expected {PEFT_TENSORS}"
        )
    for path in sorted(directory.glob(f"{BESIDE}.*")):
        raise UserError(f"{directory}: found {path.name}, but embeddings of new tokens are not supported")
    values = parse_json_object(read_bytes(directory / PEFT_CONFIG, LARGEST_CONFIG), where)
    _refuse_other(values, where)
    names = _names(values.get("target_modules"), f"{where}: target_modules")
    if not names:
        raise _ill_typed(f"{where}: target_modules", values.get("target_modules"), NAMES)
    if isinstance(names, str) and names.lower() == ALL:
        names = ALL
    if values["peft_type"] == "IA3":
        return PeftSettings(where, "ia3", names)
    layers, lists = _layers(values, where)
    if isinstance(names, str) and layers is not None:
        raise UserError(f"{where}: layers_to_transform needs a list of target_modules, as in PEFT")
    dropout = values.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{where}: lora_dropout is {dropout!r}, expected a number from 0 to below 1")
    return PeftSettings(
        where=where,
        kind="dora" if values.get("use_dora") else "lora",
        targets=names,
        excluded=_names(values.get("exclude_modules"), f"{where}: exclude_modules"),
        layers=layers,
        lists=lists,
        rank=_rank(values.get("r"), f"{where}: r"),
        alpha=_alpha(values.get("lora_alpha"), f"{where}: lora_alpha"),
        use_rslora=bool(values.get("use_rslora")),
        dropout=float(dropout),
        ranks=tuple((p, _rank(value, at)) for p, value, at in _patterns(values, "rank_pattern", where)),
        alphas=tuple((p, _alpha(value, at)) for p, value, at in _patterns(values, "alpha_pattern", where)),
    )


NAMES = "a list of names of modules, a regular expression or 'all-linear'"


def _ill_typed(what: str, value: Any, expected: str) -> UserError:
    return UserError(f"{what} is {value!r:.200}, expected {expected}")


def _refuse_other(values: dict[str, Any], where: str) -> None:
    """Refuse other kinds of adapters, and every setting that changes the function in an unsupported way."""
    kind = values.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(f"{where}: peft_type is {kind!r}, expected 'LORA'")
    for name, value in sorted(values.items()):
        if name in ("use_rslora", "use_dora") and value not in (True, False, None):
            raise UserError(f"{where}: {name} is {value!r}, expected true or false")
        allowed = OFF.get(name, ())
        empty = value is None or value is False or value in ("", [], {})
        if not (empty or name in READ or name in WITHOUT_EFFECT or value in allowed):
            expected = " or ".join(map(repr, allowed)) or "unset: not supported"
            raise UserError(f"{where}: {name} is {value!r:.200}, expected {expected}{HINTS.get(name, '')}")


def _names(value: Any, what: str) -> Names:
    """Names of modules as a setting gives them."""
    if value is None or value in ("", []):
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or any(not isinstance(name, str) or not name for name in value):
        raise _ill_typed(what, value, NAMES)
    return tuple(value)


def _layers(values: Mapping[str, Any], where: str) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The numbers of the layers that are changed, and the names of the lists they count."""
    given = values.get("layers_to_transform")
    numbers = [given] if type(given) is int else given
    if numbers is not None and (
        not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers)
    ):
        raise _ill_typed(f"{where}: layers_to_transform", given, "numbers of layers")
    lists = values.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else lists
    if not isinstance(lists, list) or any(not _is_path(name) for name in lists):
        raise _ill_typed(
            f"{where}: layers_pattern", values["layers_pattern"], "names of lists of layers, without patterns"
        )
    if lists and numbers is None:
        raise UserError(f"{where}: layers_pattern needs layers_to_transform, as in PEFT")
    return (tuple(numbers) if numbers else None), tuple(lists)


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _patterns(values: Mapping[str, Any], name: str, where: str) -> list[tuple[Pattern, Any, str]]:
    """The entries of a ``rank_pattern`` or ``alpha_pattern``, in order: pattern, value, place."""
    found = values.get(name) or {}
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        raise _ill_typed(f"{where}: {name}", found, f"an object of at most {MOST_PATTERNS} patterns")
    places = {pattern: f"{where}: {name}[{pattern[:200]!r}]" for pattern in found}
    read = [(Pattern(pattern, places[pattern]), found[pattern], places[pattern]) for pattern in found]
    if sum(not pattern.plain for pattern, _, _ in read) > MOST_EXPRESSIONS:
        raise UserError(f"{where}: {name} has over {MOST_EXPRESSIONS} regular expressions: not supported")
    return read


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST_RANK:
        raise UserError(f"{what} is {value!r:.80}, expected a whole number from 1 to {LARGEST_RANK}")
    return value


def _alpha(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not SMALLEST_ALPHA <= value <= LARGEST_ALPHA:
        expected = f"a number from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g} (0 changes nothing)"
        raise UserError(f"{what} is {value!r:.80}, expected {expected}")
    return float(value)
