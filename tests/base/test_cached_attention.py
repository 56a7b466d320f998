"""Attention over a cache block by block: the same sums as at once, and no row depends on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.cache import READ_BLOCK, READ_WHOLE, KVCache, LayerCache, SlotLayerCache, read_block
from milora_jax.base.ops import Scoring

ROWS, HEADS, KV_HEADS, POSITIONS, WIDTH = 4, 6, 2, 90, 8
SCORING = Scoring(WIDTH**-0.5, None)
ENDED = POSITIONS
"""The length of a row that has ended."""


def values(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layer(rows=ROWS):
    return LayerCache(*(values(seed, rows, KV_HEADS, POSITIONS, WIDTH) for seed in (1, 2)))


def attended(cache, lengths, block, queries=1, window=None):
    cache = KVCache(layers=(cache,), length=jnp.asarray(lengths), block=block)
    q = values(3, len(lengths), queries, HEADS, WIDTH)
    (mine,) = cache.squeezed().layers
    return np.asarray(mine.attend(q, cache.mask(queries, window), SCORING))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("block", [16, 30, 64, 200])
def test_blocks_give_the_attention_of_the_whole(block, window, queries):
    lengths = [0, 17, 63, POSITIONS - queries]
    np.testing.assert_allclose(
        attended(layer(), lengths, block, queries, window),
        attended(layer(), lengths, 0, queries, window),
        atol=2e-6,
    )


@pytest.mark.parametrize("window", [None, 12])
def test_a_single_row_has_no_axis_of_rows(window):
    np.testing.assert_allclose(
        attended(layer(1), [40], 16, 1, window), attended(layer(1), [40], 0, 1, window), atol=2e-6
    )


@pytest.mark.parametrize("window", [None, 12])
def test_no_bit_of_a_row_depends_on_how_much_the_others_read(window):
    found = [
        attended(layer(), [20, *others], 16, 1, window)[0]
        for others in ([1, 2, 3], [89, 30, 5], [50, ENDED, ENDED], [ENDED] * 3)
    ]
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


@pytest.mark.parametrize(
    ("lengths", "window", "blocks"),
    [
        ([3, 20], None, (0, 2)),
        ([3, ENDED], None, (0, 1)),
        ([15], None, (0, 1)),
        ([16], None, (0, 2)),
        ([89], None, (0, 6)),
        ([60, 70], 8, (3, 5)),
        ([60, ENDED], 8, (3, 4)),
        ([ENDED], None, (0, 1)),
        ([ENDED], 8, (0, 1)),
    ],
)
def test_only_blocks_that_a_running_row_sees_are_read(lengths, window, blocks):
    mask = KVCache(layers=layer(len(lengths)), length=jnp.asarray(lengths), block=16).mask(1, window)
    assert (int(mask.first), int(mask.end)) == blocks


def test_a_row_that_sees_nothing_is_finite():
    """It has ended, and its neighbours read blocks before its window."""
    assert np.isfinite(attended(layer(), [3, 4, ENDED, ENDED], 16, 1, 5)).all()


def test_a_slot_writes_into_its_row_alone():
    whole, new = layer(), values(4, 1, 16, KV_HEADS, WIDTH)
    written = SlotLayerCache(whole, jnp.asarray(2)).write(new, 2 * new, jnp.asarray([32])).whole
    np.testing.assert_array_equal(written.k[2, :, 32:48], new[0].swapaxes(0, 1))
    np.testing.assert_array_equal(written.v[2, :, 32:48], 2 * new[0].swapaxes(0, 1))
    others = np.ones((ROWS, POSITIONS), bool)
    others[2, 32:48] = False
    for mine, before in ((written.k, whole.k), (written.v, whole.v)):
        same = (np.asarray(mine) == np.asarray(before)).all((1, 3))
        np.testing.assert_array_equal(same, others)


def test_short_caches_and_those_of_gpus_are_read_at_once():
    assert [read_block(READ_WHOLE + more, "cpu") for more in (0, 1)] == [0, READ_BLOCK]
    assert read_block(READ_WHOLE + 1, "tpu") == READ_BLOCK
    assert read_block(2 * READ_WHOLE, "gpu") == 0
