"""What compiled programs hold."""

import os
import re

import numpy as np

from tests.adapted import BASE, forward_program
from tests.training.steps import MODEL


def compiled(lowered, options=()):
    """The program with the fusions that users get, which are not those of the other tests (see conftest.py).

    ``options`` are further options of the compiler, by name.
    """
    changed = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"].split()
    return lowered.compile({**dict(options), **({"xla_cpu_use_fusion_emitters": True} if changed else {})})


def compiled_for_users(lowered):
    """The program that users run, to the bit: at the compiler's own optimisation levels."""
    levels = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return compiled(lowered, levels)


def run_as_users(adapter, batch):
    """``tests.adapted.run`` by that program, which rounds otherwise than the tests' own."""
    given = (BASE, batch, adapter, {})
    return compiled(forward_program.lower(*given))(*given)


def frozen_shaped_dots(program):
    """Dots of a compiled program whose result has the shape of a frozen matrix or its transpose."""
    frozen = {*MODEL.module_dims.values(), (MODEL.vocab_size, MODEL.hidden_size)}
    shapes = [f"= f32[{a},{b}]" for a, b in frozen | {(b, a) for a, b in frozen}]
    dots = [line for line in program.splitlines() if " dot(" in line or "custom-call(" in line]
    assert len(dots) > 20
    return [line for line in dots if any(shape in line for shape in shapes)]


def largest_floats(program):
    """Elements of the largest floating array of a compiled program."""
    shapes = re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(side) for side in shape.split(",")])) for shape in shapes)
