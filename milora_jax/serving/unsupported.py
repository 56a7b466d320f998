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
"""Accepted values by field, other than ``null``: those that have no effect."""

UNSUPPORTED = "unsupported_parameter"
"""Type of the validation error that refuses a field; its context has ``field``."""


def fields(names: str, *values: Any) -> Unsupported:
    """Return several fields with the values that are accepted in them."""
    return dict.fromkeys(names.split(), values)


GENERATION: Unsupported = {
    **fields("min_tokens priority", 0),
    **fields("length_penalty", 1),
    **fields("kv_transfer_params vllm_xargs", {}),
    **fields("bad_words documents logits_processors", []),
    **fields("service_tier", "auto", "default"),
    **fields("include_stop_str_in_output return_token_ids return_tokens_as_token_ids", False),
    **fields("store use_beam_search", False),
    **fields("skip_special_tokens spaces_between_special_tokens", True),
    **fields("allowed_token_ids guided_decoding_backend guided_whitespace_pattern prompt_logprobs"),
    **fields("request_id structural_tag truncate_prompt_tokens"),
}
"""Fields of completions and of chat completions."""

COMPLETION: Unsupported = {
    **GENERATION,
    **fields("best_of", 1),
    **fields("suffix", ""),
    **fields("add_special_tokens", True),
    **fields("prompt_embeds"),
}

CHAT: Unsupported = {
    **GENERATION,
    **fields("functions", []),
    **fields("function_call", "none", "auto"),
    **fields("modalities", ["text"]),
    **fields("verbosity", "medium"),
    **fields("prompt_cache_retention", "in_memory"),
    **fields("add_generation_prompt include_reasoning", True),
    **fields("add_special_tokens continue_final_message echo", False),
    **fields("chat_template_kwargs media_io_kwargs mm_processor_kwargs", {}),
    **fields("audio chat_template moderation prediction prompt_cache_options reasoning_effort"),
    **fields("web_search_options"),
}

MESSAGE: Unsupported = {
    **fields("annotations", []),
    **fields("audio function_call reasoning reasoning_content refusal"),
}
"""Fields of a message: clients send the message of a response back as a part of the chat."""

TEXT_PART: Unsupported = {**fields("annotations", []), **fields("cache_control")}

TOKENIZE: Unsupported = {
    **fields("tools", []),
    **fields("continue_final_message", False),
    **fields("chat_template_kwargs mm_processor_kwargs", {}),
    **fields("chat_template"),
}

RESPONSES: Unsupported = {
    **fields("background store", False),
    **fields("include tools", []),
    **fields("tool_choice", "none", "auto"),
    **fields("parallel_tool_calls", True, False),
    **fields("prompt_cache_retention", "in_memory"),
    **fields("reasoning", {}),
    **fields("service_tier", "auto", "default"),
    **fields("stream_options", {}, {"include_obfuscation": False}),
    **fields("top_logprobs", 0),
    **fields("truncation", "disabled"),
    **fields("access_programs background_options context_management conversation image max_tool_calls"),
    **fields("moderation previous_response_id prompt prompt_cache_options"),
}
"""Fields of responses: they have no state, no tools and no reasoning of their own."""

RESPONSES_TEXT = fields("verbosity", "medium")

RESPONSES_ITEM: Unsupported = {
    **fields("status", "completed", "incomplete"),
    **fields("phase", "final_answer"),
}
"""Fields of a message of an input: clients send the output of a response back as a part of the next input."""

RESPONSES_PART: Unsupported = {**fields("annotations logprobs", [])}

STREAM_OPTIONS = fields("continuous_usage_stats include_obfuscation", False)

ADAPTER = fields("base_model_name lora_int_id lora_path")


def without_unsupported(values: dict[str, Any], table: Unsupported) -> dict[str, Any]:
    """Return the fields of a body that are supported.

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
