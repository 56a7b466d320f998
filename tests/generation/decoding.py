"""Small decodings for the tests: an engine on the small random model."""

from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import BASE
from tests.models import TINY

DECODING = decode_layout(BASE)


def one_tenant(adapter):
    """A stacked adapter, or none, as decoding takes it."""
    return None if adapter is None else AdapterStack.single(adapter_decode_layout(adapter, BASE))


def make_engine(adapter=None, config=TINY, rows=2, slots=64, **more):
    """An engine with one adapter, or with the tenants of a bank."""
    tenants = adapter if isinstance(adapter, AdapterStack) else one_tenant(adapter)
    return Engine(DECODING, config, tenants, batch_slots=rows, cache_length=slots, **more)


def decoded(adapter, prompts, new, config=TINY, **settings):
    """Greedy continuations, a list of tokens per prompt."""
    engine = make_engine(adapter, config, rows=len(prompts))
    made = [
        engine.submit([int(t) for t in prompt], GenerationSettings(max_new_tokens=new, **settings))
        for prompt in prompts
    ]
    engine.run()
    return [request.tokens[0] for request in made]
