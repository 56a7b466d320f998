"""Adapters of several methods and ranks in one bank: what counts are the tensors, not what is called rank."""

import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.errors import UserError
from milora_jax.generation.bank import Bank, rank_of
from milora_jax.types import GROUPS
from tests.adapted import make_adapter, text
from tests.generation.banks import PATHS, together
from tests.generation.decoding import DECODING, decoded, one_tenant
from tests.models import TINY

RANKS = (1, 12, 16, 33)
MIXED = ("lora", "adalora", "ssp")
"""Methods whose adapters end as LoRA's and may share a bank; pairs of the last two have twice the rank."""


def changes(tenants, slot):
    """What an adapter adds to the outputs of every projection group of the first layer, one after another."""
    adapter, layer = tenants.of_slot(jnp.int32(slot)), DECODING.layers[0]
    rng, found = np.random.default_rng(0), []
    for place, names in enumerate(GROUPS):
        frozen = layer.frozen(place)
        x = jnp.asarray(rng.normal(size=(2, 3, frozen[0].kernel.shape[0])), jnp.float32)
        weights = jnp.asarray(rng.random((2, 1, 7)), jnp.float32) if adapter.method.routes else None
        outputs = tuple(jnp.einsum("BTD,DO->BTO", x, leaves.kernel) for leaves in frozen)
        group = ProjectionGroup(names, x, outputs, frozen, weights, None)
        found += adapter.method.adapt(adapter.params[0], group)
    return found


def alone(adapters):
    """What each adapter changes without a bank, by name."""
    return {name: changes(one_tenant(adapter), 0) for name, adapter in adapters.items()}


def assert_at_home(bank, own):
    """Every adapter changes in its slot what it changes alone."""
    for name, expected in own.items():
        for mine, one in zip(changes(bank.adapters, bank.slot_of(name)), expected, strict=True):
            np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-5)


def bank_of(adapters, path="gathered"):
    """A bank of adapters, wide enough for all."""
    like = next(iter(adapters.values()))
    rank = max(rank_of(DECODING, TINY, adapter) for adapter in adapters.values())
    bank = Bank(DECODING, TINY, like, len(adapters), rank=rank, path=path)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return bank


@pytest.mark.thorough
@pytest.mark.parametrize("rank", RANKS)
def test_methods_that_end_as_lora_share_a_bank_at_any_rank(rank):
    made = {method: make_adapter(seed=i, method=method, rank=rank) for i, method in enumerate(MIXED)}
    assert [rank_of(DECODING, TINY, adapter) for adapter in made.values()] == [rank, 2 * rank, 2 * rank]
    own = alone(made)
    for order in (MIXED, MIXED[::-1], (MIXED[1], MIXED[0])):
        assert_at_home(bank_of({method: made[method] for method in order}), {m: own[m] for m in order})


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [(1, 12), (33, 16)])
@pytest.mark.parametrize("method", ["lora", "adalora", "ssp", "milora", "dora", "midora"])
def test_adapters_of_one_method_may_have_other_ranks_and_scales(method, ranks):
    pair = {
        "first": make_adapter(method=method, rank=ranks[0], alpha=6.0, use_rslora=True),
        "second": make_adapter(seed=5, method=method, rank=ranks[1], dropout=0.1),
    }
    assert_at_home(bank_of(pair), alone(pair))


@pytest.mark.thorough
@pytest.mark.parametrize(("experts", "ranks"), [(1, (1, 33)), (3, (12, 33)), (4, (12, 16)), (8, (16, 8))])
def test_experts_that_share_a_rank_are_filled_up_one_by_one(experts, ranks):
    settings = {"method": "moelora", "num_experts": experts, "top_k": 1}
    pair = {str(rank): make_adapter(seed=rank, rank=rank, **settings) for rank in ranks}
    bank = bank_of(pair)
    assert bank.rank % experts == 0
    assert_at_home(bank, alone(pair))


@pytest.mark.thorough
@pytest.mark.parametrize("method", MIXED)
def test_a_rank_that_does_not_fit_is_refused_by_name_and_changes_nothing(method):
    small = {"here": make_adapter(rank=8, method="lora")}
    bank = bank_of(small)
    wide = make_adapter(rank=16, method=method)
    rank = 16 if method == "lora" else 32
    with pytest.raises(UserError, match=f"^adapter 'wide' has pairs of rank {rank}: expected at most 8$"):
        bank.load("wide", wide, slot=0)
    assert_at_home(bank, alone(small))


def test_tensors_that_are_not_those_of_their_settings_are_refused():
    bank = bank_of({"here": make_adapter()})
    adapter = make_adapter()
    broken = adapter.replace(params=adapter.params.replace(router=make_adapter(top_k=3).params.router))
    assert bank.load("fine", broken, slot=0) == 0
    half = broken.params.router.replace(weight=broken.params.router.weight.astype(jnp.bfloat16))
    broken = adapter.replace(params=adapter.params.replace(router=half))
    with pytest.raises(UserError, match=r"^adapter 'half': .*weight is bfloat16.*, this bank holds float32"):
        bank.load("half", broken, slot=0)


@pytest.mark.thorough
@pytest.mark.parametrize("path", PATHS)
def test_rows_of_several_methods_decode_as_each_alone(path):
    made = {method: make_adapter(seed=i, method=method, rank=16) for i, method in enumerate(MIXED)}
    work = [(text(i, 4 + i), i) for i in range(len(made))]
    for (prompt, _), adapter, tokens in zip(
        work, made.values(), together(bank_of(made, path), work), strict=True
    ):
        assert tokens == decoded(adapter, [prompt], 8, ignore_eos=True)[0]


@pytest.mark.thorough
def test_experts_of_a_rank_that_is_no_power_of_two_decode_as_alone():
    made = {str(seed): make_adapter(seed=seed, method="moelora", rank=12, num_experts=4) for seed in (0, 5)}
    work = [(text(i, 4 + i), i) for i in range(2)]
    for (prompt, _), adapter, tokens in zip(work, made.values(), together(bank_of(made), work), strict=True):
        assert tokens == decoded(adapter, [prompt], 8, ignore_eos=True)[0]
