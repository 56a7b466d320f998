"""Banks of adapters of several tenants, and an engine that serves them together."""

from milora_jax.generation.bank import Bank
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import make_adapter
from tests.generation.decoding import DECODING, make_engine
from tests.models import TINY

PATHS = ("gathered", "one_hot", "tpu interpreted", "triton interpreted")


SLOTS = 3


def make_bank(path="gathered", method="milora", slots=SLOTS, **more):
    adapters = [make_adapter(seed=10 * i, method=method) for i in range(slots)]
    bank = Bank(DECODING, TINY, adapters[0], slots, path=path, **more)
    for i, adapter in enumerate(adapters):
        bank.load(f"tenant {i}", adapter)
    return bank, adapters


def together(bank, work, rows=4, new=8):
    """Tokens of ``(prompt, slot)`` pairs decoded in one batch."""
    engine = make_engine(bank.adapters, rows=rows)
    settings = GenerationSettings(max_new_tokens=new, ignore_eos=True)
    made = [engine.submit(prompt.tolist(), settings, slot) for prompt, slot in work]
    engine.run()
    return [request.tokens[0] for request in made]
