"""The benchmark of prefill measures what it says, on the embedded model; no time is asserted."""

import json

import pytest

from milora_jax.commands.bench import main
from milora_jax.errors import UserError
from milora_jax.tiny import MODEL_DIR


@pytest.mark.thorough
def test_every_case_reports_what_it_measured(capsys):
    sizes = {"prompt": 130, "budget": "0,64", "streams": 2, "repeats": 1, "turns": 3, "turn": 50, "new": 30}
    sizes |= {"short": 20, "shorts": 3}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    main(["prefill", "--model", str(MODEL_DIR), "--rank", "4", *options])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["case"] for each in found] == ["streams", "streams", "turns", "turns", "lengths"]
    assert [each.get("budget") for each in found[:2]] == [0, 64]
    for each in found[:2]:
        assert each["gap_p99_steps"] >= each["gap_p50_steps"] > 0
        assert each["first_token_s"] > 0
    without, with_cache, lengths = found[2:]
    assert (without["prefix_cache"], with_cache["prefix_cache"]) == (False, True)
    assert without["cached_tokens"] == [0, 0, 0]
    # Of the second turn's 130 tokens the first 50 were prefilled before, and of the third's 210 all of these.
    assert with_cache["cached_tokens"] == [0, 0, 128]
    assert all(len(each["first_token_s"]) == 3 for each in found[2:4])
    assert set(lengths["seconds"]) == {"short", "long", "together"}
    assert lengths["together_over_parts"] > 0


@pytest.mark.thorough
def test_a_prompt_beyond_the_model_is_refused():
    with pytest.raises(UserError, match="positions"):
        main(["prefill", "--model", str(MODEL_DIR), "--prompt", "100000", "--repeats", "1"])
