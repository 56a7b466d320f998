"""Many tenants: every path gives each row what its own adapter gives, and no neighbour changes a bit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import choose_path
from milora_jax.generation.decode import decode_chunk
from milora_jax.generation.kernel import row_products, visits
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.slot_pairs import SlotPairs, reference_products
from tests.adapted import make_adapter, text
from tests.generation.banks import PATHS, SLOTS, make_bank, together
from tests.generation.decoding import decoded, make_engine


@pytest.mark.thorough
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_every_path_gives_each_row_its_own_adapter(path, method):
    bank, adapters = make_bank(path, method)
    work = [(text(i, 4 + i), i % SLOTS) for i in range(5)]
    found = together(bank, work)
    for (prompt, slot), tokens in zip(work, found, strict=True):
        assert tokens == decoded(adapters[slot], [prompt], 8, ignore_eos=True)[0]
    assert len({tuple(tokens) for tokens in together(bank, [(text(0, 6), i) for i in range(SLOTS)])}) == SLOTS


@pytest.mark.thorough
@pytest.mark.parametrize(
    "method",
    [
        *("dora", "ia3", "parallel_adapter", "iapt", "p_tuning_v2"),
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("midora", "moelora")),
    ],
)
def test_methods_that_are_not_pairs_have_tenants_too(method):
    bank, adapters = make_bank(method=method)
    work = [(text(i, 4 + i), i % SLOTS) for i in range(4)]
    for (prompt, slot), tokens in zip(work, together(bank, work), strict=True):
        assert tokens == decoded(adapters[slot], [prompt], 8, ignore_eos=True)[0]


@pytest.mark.thorough
@pytest.mark.parametrize("count", [40, 200])
def test_a_row_is_bit_for_bit_the_same_in_any_batch(count):
    """Random mixes of prompts, tenants, places and settings: every row's tokens and log-probabilities
    are those it has alone in a batch of the same size."""
    bank, _ = make_bank()
    rng = np.random.default_rng(0)
    pool = []
    for i in range(12):
        sampled = i % 3 == 2
        pool.append(
            (
                text(100 + i, int(rng.integers(2, 14))).tolist(),
                int(rng.integers(SLOTS)),
                GenerationSettings(
                    max_new_tokens=int(rng.integers(2, 7)),
                    ignore_eos=True,
                    logprobs=2,
                    temperature=0.9 if sampled else 0.0,
                    top_p=0.8 if sampled else 1.0,
                    repetition_penalty=1.3 if i % 4 == 1 else 1.0,
                    seed=i,
                ),
            )
        )
    engine = make_engine(bank.adapters, rows=4, slots=32, chunk=4)

    def run(numbers):
        made = [engine.submit(pool[n][0], pool[n][2], pool[n][1]) for n in numbers]
        engine.run()
        return [(request.tokens[0], request.logprobs[0]) for request in made]

    alone = {n: run([n])[0] for n in range(len(pool))}
    for _ in range(count):
        numbers = rng.choice(len(pool), size=int(rng.integers(2, 7)), replace=False).tolist()
        for n, found in zip(numbers, run(numbers), strict=True):
            assert found == alone[n], f"row {n} differs in the mix {numbers}"


@pytest.mark.thorough
def test_loading_an_adapter_compiles_nothing_and_changes_one_slot():
    bank, adapters = make_bank()
    work = [(text(i, 5), i) for i in range(SLOTS)]
    before = together(bank, work)
    programs = decode_chunk._cache_size()
    newcomer = make_adapter(seed=77)
    assert bank.load("newcomer", newcomer, slot=1) == 1
    after = together(bank, work)
    assert decode_chunk._cache_size() == programs
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1] == decoded(newcomer, [work[1][0]], 8, ignore_eos=True)[0]
    assert after[1] != before[1]
    assert bank.names == {"tenant 0": 0, "tenant 2": 2, "newcomer": 1}
    del adapters


@pytest.mark.thorough
def test_adapters_that_do_not_belong_are_refused_and_nothing_changes():
    bank, _ = make_bank(slots=2)
    before = together(bank, [(text(0, 5), 0)])
    other_base = make_adapter().replace(shape=make_adapter().shape.__class__(((("q", (1, 1)),) * 7), 4, 32))
    for adapter, message in (
        (make_adapter(method="lora"), "is of method 'lora': this bank holds 'milora'"),
        (make_adapter(top_k=5), "has top_k 5: this bank holds adapters with 3"),
        (make_adapter(rank=9), "has pairs of rank 9: expected at most 8"),
        (other_base, "fits a base of"),
        (make_adapter(seed=3), "no slot is free"),
    ):
        with pytest.raises(UserError, match=message):
            bank.load("other", adapter)
    with pytest.raises(UserError, match="no adapter 'nobody' in the bank"):
        bank.slot_of("nobody")
    assert together(bank, [(text(0, 5), 0)]) == before


def test_the_path_follows_from_bank_and_machine():
    milora, dora = make_adapter().method, make_adapter(method="dora").method
    assert choose_path(milora, 4, "tpu", lambda: "tpu") == "one_hot"
    assert choose_path(milora, 5, "tpu", lambda: "tpu") == "tpu"
    assert choose_path(milora, 64, "gpu", lambda: "mosaic") == "mosaic"
    assert choose_path(milora, 64, "cpu", lambda: "tpu") == "gathered"
    assert choose_path(dora, 64, "gpu", lambda: "mosaic") == "gathered"


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("platform", ["tpu interpreted", "triton interpreted"])
def test_the_kernel_equals_its_reference(seed, platform):
    """Random routes, ranks, tenants and shapes."""
    rng = np.random.default_rng(seed)
    rows, slots, rank = int(rng.integers(1, 10)), int(rng.integers(1, 7)), int(rng.choice([8, 16, 32]))
    d_in, width = int(rng.choice([24, 64, 96])), int(rng.choice([16, 40, 128]))
    tiles = [(4, 1, 1), (1,), (1, 1), (1, 1, 1)][seed % 4]

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pairs = SlotPairs(draw(slots, len(tiles), rank, d_in), draw(slots, sum(tiles), rank, width), tiles)
    x, slot = draw(rows, d_in), jnp.asarray(rng.integers(0, slots, rows), jnp.int32)
    share = draw(rows, len(tiles)) * jnp.asarray(rng.random((rows, len(tiles))) < (seed % 3) / 2, jnp.float32)
    expected = reference_products(x, pairs, slot, share)
    found = row_products(x, pairs, slot, share, platform)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * rank)


@pytest.mark.parametrize("platform", ["tpu interpreted", "triton interpreted"])
def test_what_no_row_chose_is_neither_read_nor_multiplied(platform):
    """Every matrix that no row chose is not a number: one that was touched would spoil the result."""
    rng = np.random.default_rng(0)
    rows, slots, rank, d_in, width, tiles = 5, 6, 8, 32, 48, (2, 1, 1)
    slot, share = rng.integers(0, slots, rows), rng.random((rows, 3)) * (rng.random((rows, 3)) < 0.4)
    share[0, 0] = 0.5
    a = np.full((slots, 3, rank, d_in), np.nan, np.float32)
    b = np.full((slots, 4, rank, width), np.nan, np.float32)
    for row in range(rows):
        for module in np.flatnonzero(share[row]):
            a[slot[row], module] = rng.normal(size=(rank, d_in))
            for tile in [t for t, m in enumerate((0, 0, 1, 2)) if m == module]:
                b[slot[row], tile] = rng.normal(size=(rank, width))
    pairs = SlotPairs(jnp.asarray(a), jnp.asarray(b), tiles)
    x = jnp.asarray(rng.normal(size=(rows, d_in)), jnp.float32)
    arguments = x, pairs, jnp.asarray(slot, jnp.int32), jnp.asarray(share, jnp.float32)
    assert not np.isnan(row_products(*arguments, platform)).any()
    assert np.isnan(reference_products(*arguments)).any()


def test_a_step_without_a_share_asks_for_the_block_that_is_already_there():
    share = jnp.array([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    where, active = visits(jnp.array([4, 5, 6]), share, (2, 1))
    assert active.tolist() == [0, 0, 1, 0, 0, 0, 1, 1, 0]
    assert where.tolist() == [[4, 1, 2]] * 6 + [[6, 0, 0], [6, 0, 1], [6, 0, 1]]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # JAX 0.11
@pytest.mark.parametrize("kernel", ["tpu", "triton", "mosaic"])
def test_the_kernel_lowers_for_accelerators(kernel):
    """Compiled as far as a machine without one can."""
    platform = "tpu" if kernel == "tpu" else "cuda"
    pairs = SlotPairs(
        jax.ShapeDtypeStruct((16, 3, 32, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((16, 3, 32, 4096), jnp.bfloat16),
        (1, 1, 1),
    )
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    slot, share = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8, 3), jnp.float32)
    run = jax.jit(lambda *arguments: row_products(*arguments, kernel))
    # From JAX 0.12 on Triton's lowering asks which GPU it is for.
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        lowered = run.trace(x, pairs, slot, share).lower(lowering_platforms=(platform,))
    calls = {"tpu": "tpu_custom_call", "triton": "xla.gpu.triton", "mosaic": "mosaic_gpu"}
    assert calls[kernel] in lowered.as_text()
