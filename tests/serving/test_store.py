"""The adapters of a server: what it holds together, and that it refuses the rest by name when loading."""

import itertools
from concurrent.futures import Executor

import jax
import jax.numpy as jnp
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.errors import UserError
from milora_jax.serving.store import AdapterStore, Model
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import run_of

ADAPTERS = {
    "lora1": ("lora", {"rank": 1}),
    "lora16": ("lora", {"rank": 16}),
    "lora33": ("lora", {"rank": 33}),
    "adalora16": ("adalora", {"rank": 16}),
    "ssp16": ("ssp", {"rank": 16}),
    "milora12": ("milora", {"rank": 12}),
    "milora33": ("milora", {"rank": 33}),
    "moelora12": ("moelora", {"rank": 12}),
    "moelora8": ("moelora", {"rank": 8}),
    "moelora24": ("moelora", {"rank": 24}),
    "moelora5": ("moelora", {"rank": 5, "num_experts": 5}),
    "width6": ("ia3", {}),
    "width7": ("ia3", {"width": 7}),
}


class Now(Executor):
    """Reads at once."""

    def submit(self, what, *given):
        return what(*given)


class Workdirs:
    """Runs of every kind on one model, each made when it is first asked for."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}
        write_hf_directory(folder / "model", TINY, tokenizer=False)
        base, self.config = load_base(folder / "model")
        self.model = Model(decode_layout(base), self.config, folder / "model", "none")

    def path(self, name):
        if name not in self.made:
            method, settings = ADAPTERS[name]
            self.made[name] = run_of(self.folder / name, self.folder / "model", method, **settings)
        return self.folder / name

    def store(self, *names, slots=4, **more):
        return AdapterStore(self.model, {name: self.path(name) for name in names}, slots, Now(), **more)

    def assert_seated(self, store, *names):
        """On the device is what each adapter is, filled up with zeros."""
        for name in names:
            adapter = store.acquire(name)
            slot = store.acquire_slot(adapter)
            mine = jax.tree.leaves(store.bank.adapters.of_slot(jnp.int32(slot)).params)
            own = jax.tree.leaves(adapter_decode_layout(self.made[name], self.model.base).params)
            for found, expected in zip(mine, own, strict=True):
                assert float(abs(found).sum()) == pytest.approx(float(abs(expected).sum()), rel=1e-5)
            store.release_slot(adapter)
            store.release(adapter)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Workdirs(tmp_path_factory.mktemp("runs"))


ORDERS = list(itertools.permutations(("lora16", "adalora16", "ssp16")))


@pytest.mark.thorough
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_server_starts_with_lora_adalora_and_ssp_of_one_rank(runs, order):
    store = runs.store(*order)
    assert store.bank.rank == 32
    runs.assert_seated(store, *order)
    assert store.has_base


TOGETHER = [
    (("lora33",), ("lora1", "adalora16", "ssp16", "lora16"), 64),
    (("milora33",), ("milora12",), 64),
    (("moelora12",), ("moelora8",), 16),
    (("moelora12", "moelora24"), ("moelora8",), 32),
    (("moelora5",), (), 10),
    (("width6",), (), 0),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("first", "later", "rank"), TOGETHER, ids=[f"{'-'.join(first)}-{rank}" for first, _, rank in TOGETHER]
)
def test_what_fits_is_loaded_while_running(runs, first, later, rank):
    store = runs.store(*first)
    assert store.bank.rank == rank
    for name in later:
        store.load(name, runs.path(name))
    runs.assert_seated(store, *first, *later)


REFUSED = [
    ("lora16", "ssp16", "has pairs of rank 32: expected at most 16; .*--max-lora-rank 32"),
    ("lora16", "lora33", "has pairs of rank 33: expected at most 16; .*--max-lora-rank 33"),
    ("milora12", "milora33", "has pairs of rank 33: expected at most 16; .*--max-lora-rank 33"),
    ("lora16", "milora33", "is of method 'milora': this bank holds 'lora'"),
    ("milora12", "ssp16", "is of method 'ssp': this bank holds 'milora'"),
    ("moelora12", "moelora24", "has pairs of rank 24: expected at most 16; .*--max-lora-rank 24"),
    ("moelora12", "moelora5", "has num_experts 5: this bank holds adapters with 4"),
    ("width6", "width7", "has width 7: this bank holds adapters with 6"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("first", "other", "message"), REFUSED, ids=[f"{first}-{other}" for first, other, _ in REFUSED]
)
def test_what_does_not_fit_is_refused_by_name_when_it_is_loaded(runs, first, other, message):
    store = runs.store(first)
    with pytest.raises(UserError, match=f"^adapter '{other}' {message}"):
        store.load(other, runs.path(other))
    assert store.names() == [first]
    runs.assert_seated(store, first)


@pytest.mark.thorough
def test_methods_that_do_not_fit_are_refused_by_name_at_the_start(runs):
    with pytest.raises(UserError, match=r"^adapter 'milora12' is of method 'milora': this bank holds 'lora'"):
        runs.store("lora16", "milora12")


@pytest.mark.thorough
@pytest.mark.parametrize(("first", "rank", "later"), [("lora1", 32, "ssp16"), ("moelora12", 20, "moelora24")])
def test_a_server_can_be_started_for_higher_ranks(runs, first, rank, later):
    store = runs.store(first, rank=rank)
    assert store.bank.rank == 32
    store.load(later, runs.path(later))
    runs.assert_seated(store, first, later)
