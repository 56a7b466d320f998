"""The benchmark of prompt look-up measures what it says, on the embedded model; no time is asserted."""

import json

import pytest

from milora_jax.commands.bench import main
from milora_jax.errors import UserError
from milora_jax.tiny import MODEL_DIR, TASKS_DIR

pytest.importorskip("transformers", reason="texts need a tokenizer, which the core does without")


@pytest.mark.thorough
def test_it_reports_what_was_accepted(capsys):
    rows = TASKS_DIR / "word_order" / "test.jsonl"
    sizes = {"rows": rows, "lookup": "0,3", "prompts": 3, "new": 24, "repeats": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    main(["lookup", "--model", str(MODEL_DIR), *options])
    plain, looked = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (plain["lookup"], looked["lookup"]) == (0, 3)
    assert plain["acceptance_rate"] is None
    assert plain["speedup"] == plain["same_texts"] == looked["same_texts"] == 1
    assert 0 < looked["acceptance_rate"] < 1
    assert 0 < looked["accepted_share_of_tokens"] < 1


def test_rows_are_asked_for():
    with pytest.raises(UserError, match="--rows is '': expected a file of records"):
        main(["lookup", "--model", str(MODEL_DIR)])
