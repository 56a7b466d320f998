"""The portable form of an adapter: a sealed directory of safetensors files with plain names.

``milora_config.json`` holds the method's settings, the shape and the fingerprint of the base, and what a
reader in another language needs to compute the route. ``experts.safetensors`` holds the pairs under PEFT's
names; ``router.safetensors``, for a method that routes, the routers; ``manifest.json`` the hashes of all
files. The experts' file does not have PEFT's name, and there is no ``adapter_config.json``: PEFT would load
all seven experts, always active, and silently compute another function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milora_jax.adapters.hooks import abstract_params
from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.records import Parts
from milora_jax.adapters.registry import (
    METHOD_CLASSES,
    before_features,
    build_method,
    full_settings,
    stored_settings,
)
from milora_jax.adapters.router import NORMALIZE_EPS
from milora_jax.base.json_files import parse_json_object
from milora_jax.config import QUANTIZE
from milora_jax.errors import UserError
from milora_jax.prompt_format import stored_prompt_format
from milora_jax.storage.adapter_tensors import parse_tensors, write_tensors
from milora_jax.storage.files import json_bytes
from milora_jax.storage.manifest import DamagedError, manifest_errors, read_verified, write_manifest
from milora_jax.storage.pair_tensors import (
    NOTHING,
    Shapes,
    changes_nothing,
    differences,
    pair_shapes,
    pair_tensors,
    require_change,
    router_shapes,
    router_tensors,
    stacked_pairs,
    stacked_router,
)
from milora_jax.types import EXPERTS

CONFIG_FILE = "milora_config.json"
EXPERTS_FILE = "experts.safetensors"
ROUTER_FILE = "router.safetensors"
FILES = (CONFIG_FILE, EXPERTS_FILE, ROUTER_FILE)

FORMAT = 4
"""Version of the directory's layout that is written. Version 1 has no ``prompt_format``; version 2 has
routers with ``normalize`` in place of ``features`` and the settings that came with them; version 3 has no
``route_on``. All are read; an older reader, which would compute another route, refuses version 4."""

READ = (1, 2, 3, 4)

PORTABLE = tuple(name for name, cls in METHOD_CLASSES.items() if cls.portable)
"""The methods that have the portable form."""

MOST_LAYERS, LARGEST_WIDTH = 10_000, 2**24
"""Bounds of the shape of a base: tables of names are made from it before any file is read."""


def is_exported(directory: Path) -> bool:
    """Whether a directory declares this form."""
    return (directory / CONFIG_FILE).is_file()


def write_exported(directory: Path, adapter: Adapter, metadata: dict[str, Any]) -> None:
    """Write an adapter into an empty directory and seal it.

    Args:
      adapter: in the stacked layout.
      metadata: see ``storage.adapters.adapter_metadata``; further fields that a run stored are dropped.

    Raises:
      UserError: the method has no such form.
    """
    method = adapter.method
    if not method.portable:
        raise UserError(
            f"method {method.name!r} has no portable form: expected one of {', '.join(PORTABLE)}; "
            "format 'orbax' takes any method"
        )
    experts, router = method.parts(adapter.params)
    if router is not None:
        write_tensors(directory / ROUTER_FILE, router_tensors(router))
    tensors = pair_tensors(experts)
    require_change(tensors, f"the adapter of method {method.name!r}")
    write_tensors(directory / EXPERTS_FILE, tensors)
    kept = {name: metadata[name] for name in ("base_fingerprint", "adapter", "shape")}
    quantize = metadata.get("quantize", "none")  # older adapters lack it
    config = {
        "format": FORMAT,
        "normalize_eps": NORMALIZE_EPS,
        "quantize": quantize,
        "prompt_format": adapter.prompt_format.to_dict(),
        **kept,
    }
    (directory / CONFIG_FILE).write_bytes(json_bytes(config))
    write_manifest(directory)


def read_exported(directory: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read an adapter in this form, with every byte checked, and its metadata.

    Raises:
      UserError: something is damaged, missing, unexpected, misshapen or not finite; the error names it.
    """
    contents = read_verified(directory, FILES)
    method, shape, metadata = parse_config(_config_of(directory, contents), str(directory / CONFIG_FILE))
    for error in _file_errors(directory, contents, method):
        raise error
    tensors = {}
    for name, expected in _files(method, shape).items():
        where = str(directory / name)
        tensors[name] = parse_tensors(contents[name], where)
        for line in differences(tensors[name], expected):
            raise UserError(f"{where}: {line}")
    require_change(tensors[EXPERTS_FILE], str(directory / EXPERTS_FILE))
    abstract = method.parts(abstract_params(method, shape))
    experts = stacked_pairs(tensors[EXPERTS_FILE], shape, _record(method), _modules(abstract))
    router = None if abstract.router is None else stacked_router(tensors[ROUTER_FILE], abstract.router)
    params = method.from_parts(Parts(experts, router))
    prompt_format = stored_prompt_format(metadata.get("prompt_format"), str(directory / CONFIG_FILE))
    return Adapter(params, method, shape, prompt_format), metadata


def read_exported_metadata(directory: Path) -> dict[str, Any]:
    """Read and check ``milora_config.json``, without the other files."""
    contents = read_verified(directory, FILES, wanted=(CONFIG_FILE,))
    return parse_config(_config_of(directory, contents), str(directory / CONFIG_FILE))[2]


def exported_findings(directory: Path) -> Iterator[str]:
    """Yield one line for every fault of a directory of this form."""
    damaged = False
    for error in manifest_errors(directory):
        damaged = True
        yield f"{error.file}: {error.reason}"
    if damaged:
        return
    try:
        contents = read_verified(directory, FILES)
        method, shape, _ = parse_config(_config_of(directory, contents), CONFIG_FILE)
    except DamagedError as error:
        yield f"{error.file}: {error.reason}"
        return
    except UserError as error:
        yield str(error)
        return
    for problem in _file_errors(directory, contents, method):
        yield f"{problem.file}: {problem.reason}"
    for name, expected in _files(method, shape).items():
        try:
            found = parse_tensors(contents[name], name) if name in contents else None
        except UserError as error:
            yield str(error)
            continue
        for line in () if found is None else differences(found, expected):
            yield f"{name}: {line}"
        if name == EXPERTS_FILE and found is not None and changes_nothing(found):
            yield f"{name}: {NOTHING}"


def parse_config(values: dict[str, Any], where: str) -> tuple[Method, Shape, dict[str, Any]]:
    """Parse method, shape and metadata of ``milora_config.json``.

    Raises:
      UserError: a field is missing, unknown or out of range; the error names it.
    """
    if values.get("format") not in READ:
        named = " or ".join(map(str, READ))
        raise UserError(f"{where}: format is {values.get('format')!r}, this version reads {named}")
    fields = {"format", "normalize_eps", "base_fingerprint", "quantize", "adapter", "shape"}
    if values["format"] > 1:
        fields.add("prompt_format")
    for name in sorted(fields ^ values.keys()):
        raise UserError(f"{where}: {name!r} is {'missing' if name in fields else 'unknown'}")
    if values["normalize_eps"] != NORMALIZE_EPS:
        raise UserError(f"{where}: normalize_eps is {values['normalize_eps']!r}, expected {NORMALIZE_EPS}")
    if not isinstance(values["base_fingerprint"], str) or values["quantize"] not in QUANTIZE:
        raise UserError(f"{where}: base_fingerprint or quantize is ill-typed")
    if values["format"] > 1 and values["prompt_format"] is None:
        raise UserError(f"{where}: prompt_format is null")
    stored_prompt_format(values.get("prompt_format"), where)
    method = read_method(values["adapter"], where, values["format"])
    return method, read_shape(values["shape"], where), values


def read_method(values: Any, where: str, form: int = FORMAT) -> Method:
    """Parse the method of an exported file of a format; all of its settings must be written out."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: adapter is {values!r}, expected an object")
    try:
        settings = stored_settings(values)
        method = build_method(settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not method.portable:
        raise UserError(f"{where}: method is {method.name!r}, expected one of {', '.join(PORTABLE)}")
    stored = values.get("route_on") is not None
    if before_features(values) != (form < 3 and method.routes) or stored != (form > 3 and method.routes):
        raise UserError(f"{where}: the settings of method {method.name!r} are not those of format {form}")
    if full_settings(method) != settings:
        raise UserError(f"{where}: the settings of method {method.name!r} are not complete")
    return method


def read_shape(values: Any, where: str) -> Shape:
    """Parse the shape of the base that an adapter was stored for."""

    def whole(value: Any, most: int) -> bool:
        return type(value) is int and 1 <= value <= most

    fields = {"modules", "num_layers", "hidden_size"}
    if not isinstance(values, dict) or values.keys() != fields:
        raise UserError(f"{where}: shape is no object with {', '.join(sorted(fields))}")
    modules = values["modules"]
    if not isinstance(modules, dict) or modules.keys() != set(EXPERTS):
        raise UserError(f"{where}: shape.modules is no object with {', '.join(EXPERTS)}")
    for name, dims in modules.items():
        if not isinstance(dims, list) or len(dims) != 2 or not all(whole(d, LARGEST_WIDTH) for d in dims):
            raise UserError(f"{where}: shape.modules.{name} is not two widths from 1 to {LARGEST_WIDTH}")
    for name, most in (("num_layers", MOST_LAYERS), ("hidden_size", LARGEST_WIDTH)):
        if not whole(values[name], most):
            raise UserError(f"{where}: shape.{name} is {values[name]!r}, expected 1 to {most}")
    dims = {name: (d_in, d_out) for name, (d_in, d_out) in modules.items()}
    return Shape.of(dims, values["num_layers"], values["hidden_size"])


def shape_values(shape: Shape) -> dict[str, Any]:
    """The values that :func:`read_shape` parses."""
    return {**dataclasses.asdict(shape), "modules": {name: list(dims) for name, dims in shape.modules}}


def _config_of(directory: Path, contents: dict[str, bytes]) -> dict[str, Any]:
    if CONFIG_FILE not in contents:
        raise DamagedError(directory, CONFIG_FILE, "missing")
    return parse_json_object(contents[CONFIG_FILE], str(directory / CONFIG_FILE))


def _record(method: Method) -> type:
    """The record of each expert of a portable method."""
    if method.record is None:
        raise AssertionError(f"method {method.name!r} is portable and has no record")
    return method.record


def _files(method: Method, shape: Shape) -> dict[str, Shapes]:
    """The tensors of each file, by name."""
    parts = method.parts(abstract_params(method, shape))
    modules, router = _modules(parts), parts.router
    rank = parts.records[modules[0]].a.shape[-1]
    files = {EXPERTS_FILE: pair_shapes(shape, rank, _record(method), modules)}
    return files if router is None else {**files, ROUTER_FILE: router_shapes(router)}


def _modules(parts: Parts) -> tuple[str, ...]:
    """The modules that a method changes."""
    return tuple(name for name in EXPERTS if name in parts.records)


def _file_errors(directory: Path, contents: dict[str, bytes], method: Method) -> Iterator[DamagedError]:
    """Yield an error for every file that is missing or not expected."""
    expected = {CONFIG_FILE, EXPERTS_FILE} | ({ROUTER_FILE} if method.routes else set())
    for name in sorted(expected ^ contents.keys()):
        yield DamagedError(directory, name, "missing" if name in expected else "not expected here")
