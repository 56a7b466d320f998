"""Fields of OpenAI's and vLLM's APIs that this server knows and does not serve.

Clients and frameworks send them with ``null`` or their defaults, which ask for nothing: such a value is
accepted. Any other would change the answer, and is refused by the field's name. ``docs/serving.md`` has the
tables; the OpenAPI document has the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

Unserved = Mapping[str, tuple[Any, ...]]
"""Values beside ``null`` that ask for nothing, by field."""

NOT_SERVED = "not_served"
"""Type of the error that refuses a field; its context has ``field``."""

SAMPLED: Unserved = {
    # OpenAI's
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "metadata": ({},),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "echo": (False,),
}
"""Of both kinds of requests."""

COMPLETION: Unserved = {
    **SAMPLED,
    # OpenAI's
    "best_of": (1,),
    "suffix": ("",),
    # vLLM's
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}

CHAT: Unserved = {
    **SAMPLED,
    # OpenAI's
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

MESSAGE: Unserved = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""Of a message: an answer of a server's that is sent back as a part of the chat has them."""

STREAM_OPTIONS: Unserved = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

NAMED_ADAPTER: Unserved = {"lora_path": (), "lora_int_id": (), "base_model_name": ()}


def without_unserved(values: dict[str, Any], table: Unserved) -> dict[str, Any]:
    """The fields of a body that are served.

    Raises:
      PydanticCustomError: one that is not asks for something.
    """
    served = {}
    for name, value in values.items():
        if name not in table:
            served[name] = value
        elif value is not None and not any(_same(value, each) for each in table[name]):
            said = {"field": name, "expected": " or ".join(["null", *map(json.dumps, table[name])])}
            raise PydanticCustomError(NOT_SERVED, "{field} is not supported: expected {expected}", said)
    return served


def describe(schema: dict[str, Any], table: Unserved) -> None:
    """Add the fields of a table to the JSON schema of a body."""
    for name, values in table.items():
        schema.setdefault("properties", {})[name] = {
            "description": "Not supported: only values that ask for nothing are accepted.",
            "enum": [None, *values],
        }


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 0 is 0.0, and neither is false."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
