"""Bodies and heads of requests that a server has to survive: every field with every kind of wrong value."""

import json

from hypothesis import strategies as st

from milora_jax.serving.requests import ChatRequest, CompletionRequest
from milora_jax.serving.responses_api import ResponsesRequest
from milora_jax.serving.tokenization import DetokenizeRequest, TokenizeRequest

EDGES = (31, 32, 53, 63, 64, 128)

NUMBERS = (
    *("0", "-0", "1", "-1", "2", "4", "5", "16", "17", "64", "0.0", "-0.0", "0.5", "1.0", "2.0", "1e-9"),
    *("1e308", "1e309", "-1e309", "1e-400", "NaN", "Infinity", "-Infinity"),
    *("0.1e1", "01", "+1", "0x10", "1_000"),
    *(str(sign * 2**power + more) for power in EDGES for sign in (1, -1) for more in (-1, 0)),
    "1" + "0" * 400,
    "9" * 5000,
)
"""As they stand in JSON, and as they stand in what is no JSON."""

TEXTS = (
    "",
    "x",
    "What is 3 * 7?",
    "\x00",
    "a\x00b",
    "\ud800",
    "\udfff\ud800",
    "\U0010ffff",
    "e\u0301" * 40,
    "\u202e\u2066",
    "</s><s><pad>",
    "{{ 7 * 7 }}{% for i in range(9) %}",
    "../../etc/passwd",
    "%00%2e%2e%2f",
    "math\n",
    "\r\nHTTP/1.1 200 OK\r\n",
    "data: [DONE]\n\n",
    "x" * 300,
    "\u4e2d" * 200,
)

JUNK = (
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[[]]",
    '[""]',
    '{"": 0}',
    "[" * 200 + "]" * 200,
    '{"a":' * 200 + "1" + "}" * 200,
    "[" * 20000,
    "[0,]",
    "'x'",
    '"\\ud800"',
    '"\\x"',
    '"\n"',
    "",
    "undefined",
    "[1, 2, 3]",
    "[-1]",
    "[99999]",
    "[1.5]",
    "[true]",
    "[" + ",".join(["5"] * 500) + "]",
    '[{"role": "user", "content": "x"}]',
    '[{"role": "system"}]',
    '[{"role": "tool", "content": "x"}]',
    '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]',
    '[{"role": "user", "content": null}]',
    '{"type": "json_object"}',
    '{"include_usage": true}',
    '{"include_usage": 1}',
    '{"return_route": true}',
    '{"return_route": "yes"}',
    '{"5": 100}',
    '{"05": 1, "5": 1}',
    '{"5": 1e999}',
    '["a", "b"]',
    "[[5, 6], [7]]",
    '["a", 5]',
    '[{"role": "developer", "content": [{"type": "text", "text": "x"}]}]',
    '[{"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_image"}]}]',
    '[{"type": "function_call_output", "output": "x"}]',
    '{"format": {"type": "text"}}',
    '{"format": {"type": "json_schema", "schema": {}}}',
)

GENERATIONS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
OTHERS = {"/v1/responses": ResponsesRequest, "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
STRANGE = {"lora_path", "__class__", "temprature"}
FIELDS = {
    path: sorted({name for kind in kinds for name in (*kind.model_fields, *kind.unsupported)} | STRANGE)
    for path, kinds in {
        **{path: [*GENERATIONS.values()] for path in GENERATIONS},
        **{path: [kind] for path, kind in OTHERS.items()},
    }.items()
}
"""By path those that there are, and some that other servers have."""

MODEL, TOKENS = {"model": '"math"'}, {"max_tokens": "2"}
TEXT, CHAT = '"What is 3 * 7?"', '[{"role": "user", "content": "x"}]'
GOOD = {
    "/v1/completions": {**MODEL, "prompt": TEXT, **TOKENS},
    "/v1/chat/completions": {**MODEL, "messages": CHAT, **TOKENS},
    "/v1/responses": {**MODEL, "input": CHAT, "max_output_tokens": "2"},
    "/tokenize": {**MODEL, "prompt": TEXT},
    "/detokenize": {**MODEL, "tokens": "[5, 6]"},
}

values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from([json.dumps(text) for text in TEXTS]),
    st.sampled_from(JUNK),
    st.text(max_size=40).map(json.dumps),
    st.floats(width=64).map(repr),
    st.integers().map(str),
)
"""Of a field, as text."""

paths = st.sampled_from([*GENERATIONS, *GENERATIONS, *OTHERS])


@st.composite
def bodies(draw, path):
    """A body for a path: a good one with some fields changed, doubled or left out; or none at all."""
    fields = list(GOOD[path].items())
    for name in draw(st.lists(st.sampled_from(FIELDS[path]), max_size=3)):
        text = draw(values)
        if draw(st.integers(0, 9)):
            fields = [pair for pair in fields if pair[0] != name]
        fields.append((name, text))
    if not draw(st.integers(0, 19)):
        fields = fields[1:]
    text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"
    raw = text.encode("utf-8", "surrogatepass")
    kind = draw(st.integers(0, 29))
    if kind == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif kind == 1:
        raw = draw(st.binary(max_size=60))
    elif kind == 2:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    elif kind == 3:
        raw = text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "latin-1"])), "replace")
    return raw


@st.composite
def requests(draw):
    """Path, headers and body."""
    path = draw(paths)
    kind = draw(st.integers(0, 29))
    types = ["text/plain", "", "application/json; charset=utf-16", "application/x-www-form-urlencoded"]
    headers = [("content-type", draw(st.sampled_from(types)) if kind == 0 else "application/json")]
    if kind == 1:
        headers.append(("content-encoding", draw(st.sampled_from(["gzip", "deflate", "identity", "br"]))))
    if kind == 2:
        name = draw(st.sampled_from(["x-forwarded-for", "accept", "range", "expect", "transfer-encoding"]))
        headers.append(
            (name, draw(st.sampled_from(["", "100-continue", "chunked", "bytes=0-", "\xff" * 50])))
        )
    return path, headers, draw(bodies(path))
