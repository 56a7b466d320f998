"""Text in, text out: stop strings, streaming, samples, errors of single prompts, merging, the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.commands.generation import main
from milora_jax.config import AdapterSection
from milora_jax.data.tokens import encode_prompt, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.generation import text
from milora_jax.generation.bank import Bank
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.stream import TextStream
from milora_jax.generation.text import generate
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.paths import ROOT, environment

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

PROMPTS = ["Below is a word.", "Write a response that", "an instruction", "task"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What ``generate`` needs."""

    folder: Path
    base: object
    config: object
    tokenizer: object

    def __call__(self, prompts=PROMPTS, **more):
        return generate(self.base, self.config, self.tokenizer, prompts, **more)

    def adapter(self, seed=0, **settings):
        method = build_method(AdapterSection(**{"method": "milora", "rank": 4, **settings}))
        adapter = init_adapter(
            method, jax.random.key(seed), adapter_shape(self.config), frozen_kernels(self.base)
        )
        noisy = [
            leaf + 0.3 * jax.random.normal(jax.random.key(seed + i), leaf.shape)
            for i, leaf in enumerate(jax.tree.leaves(adapter.params))
        ]
        return adapter.replace(params=jax.tree.unflatten(jax.tree.structure(adapter.params), noisy))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, dataclasses.replace(WITH_TOKENIZER, eos_ids=(2,)))
    base, config = load_base(folder)
    return Model(folder, base, config, load_tokenizer(str(folder)))


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(model):
    settings = GenerationSettings(max_new_tokens=30, ignore_eos=True)
    (whole,) = model(PROMPTS[:1], settings=settings)
    assert len(whole.text) > 12
    stop = whole.text[6:9]
    (cut,) = model(PROMPTS[:1], settings=dataclasses.replace(settings, stop=(stop, "never there")))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.samples[0].finish == "stop"
    assert whole.samples[0].finish == "length"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop in model.tokenizer.decode(cut.tokens)
    assert stop not in model.tokenizer.decode(cut.tokens[:-1])


@pytest.mark.thorough
def test_what_is_streamed_is_the_text(model):
    pieces = {}
    settings = GenerationSettings(max_new_tokens=40, num_samples=2, temperature=1.0, stop=("qq",))
    answers = model(
        settings=settings,
        adapter=model.adapter(),
        stream=lambda i, sample, text: pieces.setdefault((i, sample), []).append(text),
    )
    for i, answer in enumerate(answers):
        for sample, continuation in enumerate(answer.samples):
            assert "".join(pieces.get((i, sample), [])) == continuation.text
    assert max(map(len, pieces.values())) > 1, "it came in one piece"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_half_a_character_and_half_a_stop_string_are_held_back():
    stream = TextStream(Bytes(), ("STOP",))
    text = "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n "
    data = (text + "STOCK and STOP here").encode()
    shown = []
    for i, byte in enumerate(data):
        shown.append(stream.add([byte], last=i + 1 == len(data)))
        assert "\N{REPLACEMENT CHARACTER}" not in shown[-1]
        assert not stream.text.endswith(("S", "ST", "STO"))
    assert "".join(shown) == stream.text == text + "STOCK and "
    assert stream.stopped
    assert bytes(stream.tokens).decode().endswith("STOP")


def test_a_long_stream_is_decoded_piece_by_piece_and_equals_the_whole():
    data = ("\N{SNOWMAN} and " * 60).encode()
    stream = TextStream(Bytes())
    shown = "".join(stream.add([byte], last=False) for byte in data)
    assert shown + stream.add([], last=True) == data.decode()


def test_bytes_that_are_no_character_are_not_decoded_again_for_ever():
    class Counting(Bytes):
        longest = 0

        def decode(self, tokens, skip_special_tokens):
            self.longest = max(self.longest, len(tokens))
            return super().decode(tokens, skip_special_tokens)

    tokenizer = Counting()
    data = b"\xff" * 500 + "and \N{SNOWMAN} after".encode() * 20
    stream = TextStream(tokenizer)
    shown = "".join(stream.add([byte], last=False) for byte in data)
    assert shown + stream.add([], last=True) == data.decode(errors="replace")
    assert tokenizer.longest < 64


@pytest.mark.thorough
def test_a_prompt_that_cannot_be_served_has_an_error_and_the_others_are_as_without_it(model):
    settings = [GenerationSettings(max_new_tokens=6)] * 4
    good = model(settings=settings)
    prompts = [PROMPTS[0], "", "long " * 600, PROMPTS[3], PROMPTS[1], PROMPTS[2]]
    mixed = [*settings, dataclasses.replace(settings[0], stop_token_ids=(320,)), settings[0]]
    found = model(prompts, settings=mixed, return_errors=True)
    assert [bool(answer.error) for answer in found] == [False, True, True, False, True, False]
    assert found[1].error == "the prompt is empty"
    assert "expected at most 506 (512 positions less 6 new tokens)" in found[2].error
    assert "stop_token_ids" in found[4].error
    assert [found[0].text, found[3].text, found[5].text] == [good[0].text, good[3].text, good[2].text]
    with pytest.raises(UserError, match=r"^prompt 1: the prompt is empty"):
        model(prompts, settings=mixed)


def test_a_prompt_may_be_token_ids(model):
    ids = [encode_prompt(model.tokenizer, text) for text in PROMPTS]
    found = model([PROMPTS[0], *ids[1:]], max_new_tokens=6)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in model(max_new_tokens=6)]
    wrong = model([[], [5, 320], [-1]], max_new_tokens=6, return_errors=True)
    assert [answer.error for answer in wrong] == [
        "the prompt is empty",
        "the prompt holds token 320: expected 0 to 319",
        "the prompt holds token -1: expected 0 to 319",
    ]


@pytest.mark.thorough
def test_prompts_of_very_different_lengths_answer_as_each_alone(model, monkeypatch):
    """Long ones get a cache of their own; answers, their order, texts as they come and counts stay."""
    made, engine = [], text.Engine
    monkeypatch.setattr(text, "Engine", lambda *given, **more: made.append(more) or engine(*given, **more))
    ids = np.random.default_rng(0).integers(4, 320, 400).tolist()
    prompts = [ids[:9], ids[:400], ids[:20], ids[:60], ids[3:25], ids[:380], ids[5:30], ids[:7]]
    plain = GenerationSettings(max_new_tokens=8, ignore_eos=True, logprobs=1)
    settings = [
        dataclasses.replace(plain, seed=i, temperature=float(samples > 1), num_samples=samples)
        for i, samples in enumerate([1, 2, 1, 1, 3, 1, 1, 2])
    ]
    pieces, counts = {}, []
    found = model(
        prompts,
        settings=settings,
        adapter=model.adapter(),
        batch_size=4,
        stream=lambda i, sample, piece: pieces.setdefault((i, sample), []).append(piece),
        progress=counts.append,
    )
    assert [(each["batch_slots"], each["cache_length"]) for each in made] == [(4, 72), (3, 512)]
    assert sum(counts) == len(prompts)
    for i, answer in enumerate(found):
        (alone,) = model([prompts[i]], settings=settings[i], adapter=model.adapter(), batch_size=4)
        for sample, (mine, its) in enumerate(zip(answer.samples, alone.samples, strict=True)):
            assert (mine.tokens, mine.text, mine.finish) == (its.tokens, its.text, its.finish)
            assert "".join(pieces[i, sample]) == mine.text
            both = [[token.logprob for token in each.logprobs] for each in (mine, its)]
            np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(answer.route, alone.route, atol=1e-6)


@pytest.mark.thorough
def test_tenants_by_name(model):
    adapters = {"one": model.adapter(1), "two": model.adapter(2)}
    bank = Bank(model.base, model.config, adapters["one"], 2)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    names = ["two", "one", "nobody", "two"]
    found = model(bank=bank, tenants=names, max_new_tokens=8, return_errors=True)
    for prompt, name, answer in zip(PROMPTS, names, found, strict=True):
        if name == "nobody":
            assert "no adapter 'nobody' in the bank: expected one of one, two" in answer.error
        else:
            (alone,) = model([prompt], adapter=adapters[name], max_new_tokens=8)
            assert answer.tokens == alone.tokens
            np.testing.assert_allclose(answer.route, alone.route, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", "lora", "adalora"])
def test_merging_gives_the_same_tokens(model, method):
    adapter = model.adapter(method=method)
    settings = GenerationSettings(max_new_tokens=20, ignore_eos=True)
    apart = model(adapter=adapter, settings=settings)
    merged = model(adapter=adapter, settings=settings, merge=True)
    assert [answer.tokens for answer in merged] == [answer.tokens for answer in apart]
    assert apart[0].tokens != model(settings=settings)[0].tokens


@pytest.mark.thorough
@pytest.mark.parametrize("merge", [False, True])
def test_proposals_of_a_text_leave_the_tokens_as_they_are(model, merge):
    given = {"adapter": model.adapter(), "max_new_tokens": 20, "merge": merge}
    plain, looked = model(**given), model(**given, prompt_lookup=32)
    assert [answer.tokens for answer in looked] == [answer.tokens for answer in plain]
    with pytest.raises(UserError, match="prompt_lookup is 33: expected 0 to 32"):
        model(prompt_lookup=33)


@pytest.mark.thorough
def test_what_is_more_than_pairs_is_not_merged(model):
    with pytest.raises(UserError, match="method 'dora' cannot be merged"):
        model(adapter=model.adapter(method="dora"), merge=True)


@pytest.mark.thorough
def test_beams_and_others_in_one_call(model):
    settings = [GenerationSettings(max_new_tokens=6, num_beams=beams) for beams in (1, 3, 3, 1)]
    found = model(adapter=model.adapter(), settings=settings)
    for prompt, mine, answer in zip(PROMPTS, settings, found, strict=True):
        (alone,) = model([prompt], adapter=model.adapter(), settings=mine)
        assert answer.tokens == alone.tokens
        assert answer.route.shape == (model.config.num_layers, 7)


def command(*arguments, given=""):
    return subprocess.run(
        [sys.executable, "-m", "milora_jax.generation", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.thorough
def test_the_command_takes_prompts_files_and_standard_input(model, tmp_path, monkeypatch, capsys):
    def printed(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    limits = ["--base", model.folder, "--max-new-tokens", 5, "--json"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "say a", "input": "b"}) + "\n\n")
    many = printed(*limits, "--prompt", "say x", "--file", rows).splitlines()
    assert [json.loads(line)["prompt"] for line in many] == [0, 1]
    piped = command(*limits, given="say x\n")
    assert piped.returncode == 0, piped.stderr
    first, again = json.loads(many[0]), json.loads(piped.stdout)
    assert first["samples"][0]["tokens"] == again["samples"][0]["tokens"]
    shown = printed("--base", model.folder, "--max-new-tokens", 5, "--prompt", "say x")
    assert shown == again["samples"][0]["text"] + "\n"


@pytest.mark.sweep("nowhere")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --workdir or --base"),
        (["--base", "{folder}", "--temperature", "-1", "--prompt", "x"], "temperature is -1.0"),
        (["--base", "{folder}", "--top-p", "nan", "--prompt", "x"], "top_p is nan"),
        (["--base", "{folder}", "--prompt", " "], "prompt 0: the prompt is empty"),
        (["--base", "{folder}", "--max-new-tokens", "600", "--prompt", "x"], "prompt 0: the prompt has"),
        (["--base", "nowhere", "--prompt", "x"], "nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(model, refused, arguments, message):
    assert message in refused(main, *(argument.format(folder=model.folder) for argument in arguments))
