"""Options made from a dataclass of settings."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from milora_jax.commands.command_line import Parser
from milora_jax.commands.options import add_options, attribute_docs, parse_settings, settings_of
from milora_jax.errors import UserError


@dataclass(frozen=True)
class Base:
    """What both have.

    Attributes:
      into: where to.
      kinds: of things; ``a`` is
        100 % of them.
    """

    into: Path
    kinds: tuple[str, ...] = field(default=("a",), metadata={"choices": ("a", "b")})


@dataclass(frozen=True)
class Settings(Base):
    """Some of every type.

    Attributes:
      sizes, rate: in turns.
      fast_only: or not.
    """

    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.0
    fast_only: bool = False


def test_a_field_is_an_option_with_its_default_and_its_docs():
    assert attribute_docs(Settings)["kinds"] == "of things; ``a`` is 100 % of them."
    parser = Parser(prog="x")
    add_options(parser, Settings, skip=("rate",))
    told = " ".join(parser.format_help().split())
    assert "--into INTO where to " in told
    assert "--kinds KINDS of things; a is 100 % of them: of a, b (default: a)" in told
    assert "--sizes SIZES in turns (default: 1,2)" in told
    assert "--rate" not in told
    found = settings_of(Settings, parser.parse_args(["--into", "here", "--fast-only"]), rate=0.5)
    assert found == Settings(Path("here"), fast_only=True, rate=0.5)


def test_values_are_of_the_types_of_the_fields():
    found = parse_settings(Settings, "x", None, "--into=i --kinds=a,b --sizes=3,4 --rate=2".split())
    assert found == Settings(Path("i"), ("a", "b"), (3, 4), 2.0)
    for given, message in (
        ([], "the following arguments are required: --into"),
        (["--into=i", "--sizes=3,x"], "--sizes: invalid numbers value: '3,x'"),
        (["--into=i", "--rate=x"], "--rate: invalid float value: 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_settings(Settings, "x", None, given)
