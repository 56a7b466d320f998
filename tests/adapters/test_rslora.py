"""The scale of low-rank pairs: alpha over the rank, or with ``use_rslora`` over its root."""

import math

import numpy as np
import pytest

from milora_jax.adapters.registry import build_method, stored_settings
from milora_jax.config import AdapterSection
from tests.adapted import make_adapter, row_batch, run, stack, text

SCALED_RANKS = {"milora": 4, "midora": 4, "lora": 4, "dora": 4, "moelora": 8, "adalora": 8, "ssp": 8}
"""The rank of a module's pair while it is trained, with the settings of ``tests.models.SMALL``."""


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "rank"), SCALED_RANKS.items())
def test_alpha_is_divided_by_the_root_of_the_rank_of_the_pairs(method, rank):
    plain = make_adapter(method=method, alpha=6.0)
    stabilised = make_adapter(method=method, alpha=6.0, use_rslora=True)
    assert plain.method.scale == 6.0 / rank
    assert stabilised.method.scale == 6.0 / math.sqrt(rank)


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "rank"), SCALED_RANKS.items())
def test_it_is_the_same_method_at_a_larger_alpha(method, rank):
    batch = stack(row_batch(text(0, 7), text(1, 5)))
    stabilised = run(make_adapter(method=method, alpha=6.0, use_rslora=True), batch).hidden
    larger = run(make_adapter(method=method, alpha=6.0 * math.sqrt(rank)), batch).hidden
    np.testing.assert_allclose(stabilised, larger, rtol=1e-5, atol=1e-5)
    plain = run(make_adapter(method=method, alpha=6.0), batch).hidden
    assert float(np.abs(stabilised - plain).max()) > 1e-3


@pytest.mark.parametrize("method", SCALED_RANKS)
def test_adapters_from_before_the_setting_have_alpha_over_rank(method):
    found = stored_settings({"method": method, "rank": 16, "alpha": 8.0})
    assert found.use_rslora is False
    assert build_method(AdapterSection(method=method, rank=16, alpha=8.0)).scale == build_method(found).scale
