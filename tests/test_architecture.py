"""The house stays in order: imports go downwards, the core needs little, files stay readable."""

import ast
import os
import subprocess
import sys
import textwrap

import pytest

from tests.models import write_hf_directory
from tests.paths import PACKAGE, ROOT

FLOORS = (
    ("errors", "shapes"),
    ("addresses", "columns"),
    ("types", "model_config", "prompt_format", "config", "config_file", "cluster", "console", "preemption"),
    ("adapters",),
    ("base",),
    ("parallel",),
    ("storage", "data"),
    ("training", "generation"),
    ("evaluation", "tiny", "bench", "scaling"),
    ("serving", "doctor", "run"),
    ("commands",),
)
"""From the cellar to the roof; a room imports from floors below its own, and from itself."""

SIDEWAYS = {("model_config", "types"), ("config", "prompt_format")}
"""The imports within a floor."""

HEAVY = (
    *("torch", "transformers", "tokenizers", "datasets", "ml_collections", "absl", "matplotlib", "tqdm"),
    *("tensorboardX", "wandb", "sacrebleu", "rouge_score", "openai", "tensorstore"),
)
"""Libraries that are imported inside the functions that need them."""

TORCH_IN = ("peer_worker.py", "torch_reference.py")
"""The peer of the benchmark, a script for another Python; and the reader for people who stay in torch."""

CORE = ("types", "config", "adapters", "base", "training", "generation", "bench")


SHIM = """
from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

    from milora_jax.commands.command_line import run_command
    from milora_jax.commands.{name} import main

    run_command(main)
"""
"""All that a ``__main__.py`` holds: ``python -m`` finds a command line where one looks for it."""


def room_of(path):
    """The package or the module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def sources():
    """Every file but the package's own and the shims of command lines."""
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py" and path.name != "__main__.py"
    )


def imported(tree):
    """(module, at top level) of every import."""
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, node in top
            if node.module == "milora_jax":
                yield from ((f"milora_jax.{alias.name}", node in top) for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    room = room_of(path)
    for module, at_top in imported(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] == "milora_jax" and len(parts) > 1:
            other = parts[1]
            assert parts[-1] != "__main__", "a shim is no library"
            allowed = other == room or (room, other) in SIDEWAYS or floor_of(other) < floor_of(room)
            assert allowed, f"{path.name}: {room} must not import {module}"
        assert parts[0] != "torch" or path.name in TORCH_IN, "torch is for tests, the peer and the reader"
        if at_top:
            assert parts[0] not in HEAVY, f"{path.name} imports {parts[0]} before it is needed"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__main__.py")), ids=lambda p: p.parent.name)
def test_a_command_line_of_a_room_is_a_shim(path):
    name = "index" if path.parent == PACKAGE else path.parent.name
    _docstring, *statements = ast.parse(path.read_text()).body
    *imports, run = statements[-1].body[1:]
    imports.sort(key=lambda each: each.module != "milora_jax.commands.command_line")
    statements[-1].body[1:] = [*imports, run]
    assert [ast.dump(each) for each in statements] == [
        ast.dump(each) for each in ast.parse(SHIM.format(name=name)).body
    ]


def test_what_does_not_know_what():
    """The maths knows no adapters, the router no Transformer, the Transformer no method."""
    for name, forbidden in {
        "base/ops.py": ("milora_jax.adapters",),
        "adapters/router.py": ("milora_jax.base",),
        "base/transformer.py": tuple(
            f"milora_jax.adapters.{path.stem}"
            for path in (PACKAGE / "adapters").glob("*.py")
            if path.stem not in ("__init__", "protocol", "inputs")
        ),
    }.items():
        modules = [module for module, _ in imported(ast.parse((PACKAGE / name).read_text()))]
        assert not [m for m in modules if m.startswith(forbidden)], name


def test_files_are_one_screen_of_thought():
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.name not in ("utils.py", "helpers.py", "misc.py")


def run_python(code, *arguments):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**kept, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


CORE_ALONE = """
    import sys

    ALLOWED = {"jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "milora_jax", "ml_dtypes"}
    BLOCKED = {BLOCKED}

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED:
                raise ImportError(f"{name} is not installed here")

    # What jax, flax and optax need for themselves they may have; nothing of ours adds to it.
    import flax.nnx, flax.struct, jax, optax, safetensors.numpy
    for name in list(sys.modules):
        if name.split(".")[0] in BLOCKED:
            del sys.modules[name]
    sys.meta_path.insert(0, Blocker())

    import importlib, pkgutil
    for room in {CORE}:
        module = importlib.import_module(f"milora_jax.{room}")
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"milora_jax.{room}."):
            if not found.name.endswith(".__main__"):  # a shim of a command line
                importlib.import_module(found.name)

    import jax.numpy as jnp
    import numpy as np
    from milora_jax.adapters.protocol import init_adapter
    from milora_jax.adapters.registry import adapter_shape, build_method
    from milora_jax.base.load import load_base, logits
    from milora_jax.base.modules import decode_layout, frozen_kernels
    from milora_jax.base.transformer import adapter_decode_layout
    from milora_jax.config import AdapterSection, TrainSection
    from milora_jax.generation.adapter_stack import AdapterStack
    from milora_jax.generation.engine import Engine
    from milora_jax.generation.settings import GenerationSettings
    from milora_jax.training.step import init_state, make_steps
    from milora_jax.types import Batch

    base, config = load_base(sys.argv[1])
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) + 5
    ones = jnp.ones_like(tokens)
    prompt = jnp.broadcast_to(jnp.arange(12)[None, :] < 8, tokens.shape)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None, :], tokens.shape)
    batch = Batch(tokens, ones, positions, prompt, ~prompt)
    method, settings = build_method(AdapterSection(rank=2)), TrainSection(learning_rate=1e-2)
    adapter = init_adapter(method, jax.random.key(0), adapter_shape(config), frozen_kernels(base))
    state = init_state(adapter, jax.random.key(1), settings, 3)
    steps = make_steps(config, settings, 3)
    losses = []
    for _ in range(3):
        state, metrics = steps.train(state, base, batch)
        losses.append(float(metrics.loss))
    assert losses[2] < losses[0], losses
    tenants = AdapterStack.single(adapter_decode_layout(state.adapter, base))
    engine = Engine(decode_layout(base), config, tenants, batch_slots=2, cache_length=16)
    made = engine.submit([5, 6, 7], GenerationSettings(max_new_tokens=3, ignore_eos=True))
    engine.run()
    assert len(made.tokens[0]) == 3 and made.route.shape == (config.num_layers, 7)
    assert logits(base, config, tokens).shape == (2, 12, config.vocab_size)
    print("ok")
"""


@pytest.mark.slow
def test_the_core_runs_with_jax_flax_optax_numpy_and_safetensors_alone(tmp_path):
    write_hf_directory(tmp_path / "model", tokenizer=False)
    blocked = {*HEAVY, "orbax", "tensorstore", "jaxtyping", "beartype", "jinja2", "pandas", "pyarrow", "peft"}
    code = CORE_ALONE.replace("{BLOCKED}", repr(blocked)).replace("{CORE}", repr(CORE))
    result = run_python(code, tmp_path / "model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ok"


def test_importing_the_package_reads_no_module_of_it_and_starts_no_device():
    result = run_python(
        """
        import sys
        import jax
        from jax._src import xla_bridge
        before = set(sys.modules)
        import milora_jax
        names = [name for name in milora_jax.__all__ if name in dir(milora_jax)]
        assert len(names) == 5, names
        assert not xla_bridge._backends, "a device was started"
        assert set(sys.modules) - before <= {"milora_jax"}, set(sys.modules) - before
        from milora_jax import generate, load_adapter, load_base, logits, train
        assert not xla_bridge._backends, "a device was started by the verbs' modules"
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.thorough
def test_it_runs_the_same_without_flax_graph_mode(tmp_path):
    write_hf_directory(tmp_path / "model", tokenizer=False)
    code = """
        import os, sys
        os.environ["NNX_GRAPH_MODE"] = sys.argv[2]
        import jax.numpy as jnp
        from milora_jax import load_base, logits
        base, config = load_base(sys.argv[1])
        print(logits(base, config, jnp.arange(8, dtype=jnp.int32)[None]).sum().item())
    """
    sums = {mode: run_python(code, tmp_path / "model", mode) for mode in ("true", "false")}
    assert all(result.returncode == 0 for result in sums.values()), sums
    assert sums["true"].stdout == sums["false"].stdout != ""


def test_every_sweep_has_a_case_for_each_of_its_words(idle_words):
    """A renamed case would leave the default tests unnoticed."""
    assert idle_words == []
