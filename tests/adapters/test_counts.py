"""Exact parameter counts on LLaMA-2 7B, against the paper's numbers."""

import jax
import pytest

from milora_jax.adapters.protocol import active_parameters, tunable_parameters
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.config import LLAMA2_7B, AdapterSection
from milora_jax.types import EXPERTS

SHAPE = adapter_shape(LLAMA2_7B)
EXPERT_PARAMETERS, ROUTERS, POOLERS, COEFFICIENTS = 79_953_920, 917_504, 131_072, 384


def test_lora_counts_as_in_table_1():
    method = build_method(AdapterSection(method="lora"))
    assert tunable_parameters(method, SHAPE) == EXPERT_PARAMETERS


@pytest.mark.parametrize(
    ("settings", "beside_experts"),
    [
        ({}, ROUTERS + POOLERS + COEFFICIENTS),
        ({"pooler": "mean"}, ROUTERS + COEFFICIENTS),
        ({"activation": "gelu"}, ROUTERS + POOLERS),
        ({"pooler": "last", "activation": "relu-gelu"}, ROUTERS),
    ],
)
def test_milora_counts(settings, beside_experts):
    method = build_method(AdapterSection(**settings))
    assert tunable_parameters(method, SHAPE) == EXPERT_PARAMETERS + beside_experts


def test_counts_by_part():
    method = build_method(AdapterSection())
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), SHAPE))
    count = {name: leaf.size for name, leaf in vars(params.router).items()}
    assert count["weight"] == ROUTERS
    assert count["pool"] == POOLERS
    assert count["numerator"] + count["denominator"] == COEFFICIENTS
    assert sum(leaf.size for leaf in jax.tree.leaves(params.experts)) == EXPERT_PARAMETERS


def test_active_parameters_of_one_and_three_experts():
    sizes = build_method(AdapterSection()).expert_sizes(SHAPE)
    one_of_seven = active_parameters(sizes, dict.fromkeys(EXPERTS, 1 / 7))
    assert round(one_of_seven) == 11_421_989
    assert max(sizes.values()) == 15_466_496
    ordered = sorted(sizes.values())
    assert sum(ordered[:3]) == 25_165_824
    assert sum(ordered[-3:]) == 46_399_488
    assert active_parameters(sizes, dict.fromkeys(EXPERTS, 1.0)) == EXPERT_PARAMETERS
