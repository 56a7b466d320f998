"""The pages say all there is: every setting and every command line is in them, every link leads somewhere."""

import dataclasses
import importlib.util
import json
import re
import typing

import pytest

from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.columns import parse_columns
from milora_jax.commands import bench, parallel
from milora_jax.config import AdapterSection, Config
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.serving.limits import Limits
from milora_jax.serving.unsupported import ADAPTER, CHAT, COMPLETION, GENERATION, MESSAGE, STREAM_OPTIONS
from tests.paths import PACKAGE, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections():
    hints = typing.get_type_hints(Config)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(Config)]


def test_every_setting_of_a_run_is_described(generated):
    text = generated.settings_markdown()
    for name, cls in sections():
        for row in generated.described(cls):
            assert f"| `{name}.{row.name}` |" in text, "no row in the table"
            assert cls is AdapterSection or len(row.meaning) > 10, f"say what {name}.{row.name} means"


@pytest.mark.parametrize("method", METHOD_CLASSES)
def test_every_setting_of_a_method_is_described(generated, method):
    for row in generated.described(METHOD_CLASSES[method]):
        assert len(row.meaning) > 5, f"say in {METHOD_CLASSES[method].__name__} what {row.name} means"


def test_every_unsupported_field_is_in_the_page():
    page = (DOCS / "serving.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    for table, where in (
        (GENERATION, "both"),
        ({name: COMPLETION[name] for name in COMPLETION.keys() - GENERATION.keys()}, "completions"),
        ({name: CHAT[name] for name in CHAT.keys() - GENERATION.keys()}, "chats"),
        (MESSAGE, "messages"),
        (STREAM_OPTIONS, "stream_options"),
        (ADAPTER, "loading"),
    ):
        for name, values in table.items():
            (values_of,) = [row[2] for row in rows if f"`{name}`" in row[0] and where in row[1]]
            for value in values:
                assert f"`{json.dumps(value)}`" in values_of, name


def test_every_limit_of_a_server_is_described(generated):
    rows = generated.described(Limits)
    assert all(len(row.meaning) > 5 and row.allowed for row in rows)
    table = generated.limits_markdown()
    assert all(f"| `--{row.name.replace('_', '-')}` |" in table for row in rows)


def test_a_setting_is_told_as_the_program_has_it(generated):
    rows = {row.name: row for row in generated.described(dict(sections())["train"])}
    assert rows["remat"][1:4] == ("str", "'products'", "one of none, products, full")
    assert rows["batch_size"][1:4] == ("int", "16", "at least 1")
    of_methods = [row for row in generated.method_rows() if row[0] == "`adapter.top_k`"]
    assert [row[1] for row in of_methods] == ["milora, midora (`3`)", "moelora (`4`)"]


def test_every_command_line_is_told(generated):
    told = {part for command in generated.COMMANDS for part in command}
    for path in PACKAGE.rglob("__main__.py"):
        module = ".".join(path.parent.relative_to(ROOT).parts)
        assert module in told, f"add {module} to COMMANDS of docs/generated.py"
    for name, commands in (("bench", bench.BENCHMARKS), ("parallel", parallel.COMMANDS)):
        for what in commands:
            assert ("-m", f"milora_jax.{name}", what) in generated.COMMANDS, f"add {name} {what}"
    for name in ("train.py", "serve.py"):
        assert (name,) in generated.COMMANDS


def test_a_command_is_asked_for_its_help(generated):
    text = generated.help_text(("-m", "milora_jax.serving"))
    assert text.startswith("usage: python -m milora_jax.serving")
    with pytest.raises(RuntimeError, match="exit code 2"):
        generated.help_text(("-m", "milora_jax.serving", "nothing"))


def test_the_tables_of_the_page_are_those_of_the_program(generated):
    """Otherwise: python docs/generated.py."""
    page = generated.PAGE.read_text()
    assert generated.with_tables(page) == page
    assert "| `train.remat` |" in page
    stale = page.replace("| `train.remat` |", "| `train.rmat` |")
    assert generated.with_tables(stale) == page
    with pytest.raises(ValueError, match="no <!-- limits -->"):
        generated.with_tables(page.replace("<!-- end of limits -->", ""))


def test_the_commands_have_their_place(generated):
    text = "\n".join(page.read_text() for page in PAGES)
    assert text.count(generated.COMMANDS_MARKER) == 1
    assert generated.on_page_markdown("as it is", None, None, None) == "as it is"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    """As GitHub reads them; the site's build looks at its own."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target or target.startswith("#"):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.is_file(), f"{page.name}: {target}"
        # The site has no files from outside docs/.
        assert page.name == "README.md" or DOCS in path.parents, f"{page.name}: {target}"


def test_the_rows_of_the_data_page_are_rows(tmp_path):
    """Its example is a file that can be read, and every schema is in it."""
    blocks = re.findall(r"```\n(.*?)```", (DOCS / "data.md").read_text(), flags=re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(next(block for block in blocks if block.startswith("{")))
    records = read_records(Source("rows", str(tmp_path / "rows.jsonl")))
    answers = ["true", "7", "Hi.", "Bye.", "Hi.", "Salut.", "This is Alimentum."]
    assert [record.answer for record in records] == answers
    assert [len(record.messages) for record in records] == [0, 0, 2, 4, 1, 2, 0]
    assert len(records[-1].references) == 2


def test_the_columns_of_the_data_page_are_columns():
    text = (DOCS / "data.md").read_text()
    written = re.findall(r"--config\.data\.columns=(?:'([^']*)'|(\S+))", text)
    assert [len(parse_columns(quoted or plain)) for quoted, plain in written] == [2, 3]
