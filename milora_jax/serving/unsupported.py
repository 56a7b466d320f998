"""Fields of OpenAI's and vLLM's APIs that this server knows and does not support.

Clients and frameworks send them with ``null`` or their defaults, which have no effect: such a value is
accepted. Any other would change the response, and is refused by the field's name. ``docs/serving.md`` has the
tables; the OpenAPI document has the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

Unsupported = Mapping[str, tuple[Any, ...]]
"""By field, the values beside ``null`` that are accepted: those that have no effect."""

UNSUPPORTED = "unsupported_parameter"
"""Type of the validation error that refuses a field; its context has ``field``."""

GENERATION: Unsupported = {
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
"""Fields of completions and of chat completions."""

COMPLETION: Unsupported = {
    **GENERATION,
    # OpenAI's
    "best_of": (1,),
    "suffix": ("",),
    # vLLM's
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}

CHAT: Unsupported = {
    **GENERATION,
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

MESSAGE: Unsupported = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""Fields of a message: clients send the message of a response back as a part of the chat."""

STREAM_OPTIONS: Unsupported = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

ADAPTER: Unsupported = {"lora_path": (), "lora_int_id": (), "base_model_name": ()}


def without_unsupported(values: dict[str, Any], table: Unsupported) -> dict[str, Any]:
    """The fields of a body that are supported.

    Raises:
      PydanticCustomError: a field that is not has a value that would have an effect.
    """
    supported = {}
    for name, value in values.items():
        if name not in table:
            supported[name] = value
        elif value is not None and not any(_same(value, each) for each in table[name]):
            context = {"field": name, "expected": " or ".join(["null", *map(json.dumps, table[name])])}
            raise PydanticCustomError(UNSUPPORTED, "{field} is not supported: expected {expected}", context)
    return supported


def describe(schema: dict[str, Any], table: Unsupported) -> None:
    """Add the fields of a table to the JSON schema of a body."""
    for name, values in table.items():
        schema.setdefault("properties", {})[name] = {
            "description": "Not supported: only values that have no effect are accepted.",
            "enum": [None, *values],
        }


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 0 is 0.0, and neither is false."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
