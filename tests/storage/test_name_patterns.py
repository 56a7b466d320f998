"""Regular expressions of foreign files match as ``re`` does, in bounded time, or are refused."""

import random
import re

import pytest

from milora_jax.errors import UserError
from milora_jax.storage import name_patterns
from milora_jax.storage.name_patterns import LARGEST_PATTERN, Pattern

NAMES = [
    f"model.layers.{layer}.{path}"
    for layer in (0, 1, 10, 31)
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
] + ["", "q_proj", "lm_head", "model.embed_tokens"]
WRITTEN = [
    "q_proj",
    "^model.layers.1.self_attn.q.proj",
    r".*\.(q|up)_proj",
    r"model\.layers\.(?:[0-9]|1\d)\..*",
    r"(?P<all>.*)[^a-n]_proj$",
    r".*?\bself_attn\b.*?(?:q|k)_proj",
    r"(model\.)?layers\.\d{1,2}\.\w+\.up_proj|lm_head",
    r"((a*)*)*|.*_(proj)?",
    r"(.*\.){2,3}q_proj",
    r"(.*\.){,4}[\w]+",
    r"\Amodel.+[]x_]proj\Z",
    r"(?:|q_proj|.*head)",
]
REFUSED = {
    r".*(?=q_proj)": "'(?=' is not supported",
    r"(?i)q_proj": "'(?i' is not supported",
    r"(q)\1": r"\1 is not supported",
    r"(q": "missing ), unterminated group",
    r"q)": "unbalanced parenthesis",
    r"*q": "nothing to repeat",
    r"^*q": "nothing to repeat",
    r"q**": "multiple repeat",
    r"q*+": "a possessive quantifier is not supported",
    r"q{9999}": "over 1000 repeats are not supported",
    r"q{3,2}": "ends before it begins",
    r"[q": "unterminated character set",
    r"[z-a]": "bad character range",
    r"[[q]": "is not supported",
    "(" * 60 + ")" * 60: "over 50 groups within groups",
    "q" * (LARGEST_PATTERN + 1): f"expected at most {LARGEST_PATTERN}",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_it_fits_what_re_fits(text):
    pattern = Pattern(text, "here")
    for name in NAMES:
        assert pattern.fits(name) == bool(re.fullmatch(text, name)), name
        assert pattern.fits_tail(name) == bool(re.match(rf"(.*\.)?({text})$", name)), name


def drawn(rng, depth=2):
    """A random expression over a and b."""
    kind = rng.choice("crrgns" if depth else "c")
    if kind == "c":
        return rng.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", r"\b", "^", "$"])
    inner = drawn(rng, depth - 1)
    if kind == "r":
        return f"(?:{inner}){rng.choice(['*', '+', '?', '*?', '{2}', '{1,3}', '{,2}', '{2,}'])}"
    if kind == "g":
        return f"({inner}|{drawn(rng, depth - 1)})"
    return inner + drawn(rng, depth - 1)


def test_random_expressions_fit_what_re_fits():
    rng = random.Random(0)
    words = ["".join(rng.choice("ab.") for _ in range(length)) for length in range(7)]
    fitting = 0
    for _ in range(25):
        text = drawn(rng)
        pattern = Pattern(text, "here")
        for word in words:
            expected = bool(re.fullmatch(text, word))
            assert pattern.fits(word) == expected, (text, word)
            fitting += expected
    assert fitting > 10


@pytest.mark.parametrize("text", [r"(a+)+b", r"((a|a)*)*b", r"(.*)*(.*)*(.*)*x", r"(a?){99}(a?){99}b"])
def test_what_would_keep_re_busy_for_years_is_answered(text):
    assert not Pattern(text, "here").fits("a" * 30)


@pytest.mark.parametrize("text", [".*" * 10, "(.*)*" * 5])
def test_what_would_take_long_here_too_is_refused(text, monkeypatch):
    assert not Pattern(text, "here").fits("aaaaaa\n")
    monkeypatch.setattr(name_patterns, "MOST_STEPS", 40)
    with pytest.raises(UserError, match="too much work for 'aaaaaa"):
        Pattern(text, "here").fits("aaaaaa\n")


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_refused_with_its_place(text):
    with pytest.raises(UserError) as caught:
        Pattern(text, "here: target_modules")
    assert str(caught.value).startswith("here: target_modules: ")
    assert REFUSED[text] in str(caught.value)
