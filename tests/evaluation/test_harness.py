"""The model that lm-evaluation-harness sees, without lm-evaluation-harness."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from milora_jax.base.transformer import forward, unembed
from milora_jax.data.chat import Message, encode_chat
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_example, encode_prompt
from milora_jax.errors import UserError
from milora_jax.evaluation.harness import Harness, generation_settings
from milora_jax.evaluation.likelihood import Passage, log_likelihoods, rolling_passages
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.storage.export import export_milora
from milora_jax.storage.files import json_bytes
from milora_jax.types import Batch
from tests.models import write_hf_directory
from tests.serving.harness import TEMPLATE
from tests.storage.adapters import run_of

pytest.importorskip("transformers", reason="text needs a tokenizer")


class Noted:
    """In place of lm_eval's cache."""

    def __init__(self):
        self.found = []

    def add_partial(self, kind, arguments, result):
        self.found.append((kind, arguments, result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness")
    write_hf_directory(path / "model")
    settings = path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    run_of(path / "run", path / "model", "milora")
    return path


@pytest.fixture(scope="module")
def harness(folder):
    model = Harness(workdir=str(folder / "run"), batch_size=4)
    model.cache_hook = Noted()
    return model


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def scored(model, *passages):
    found = {}
    tuned = model.tuned
    for results in log_likelihoods(tuned.base, tuned.config, tuned.adapter, passages, 4):
        found.update(results)
    return [tuple(found[i]) for i in range(len(passages))]


@pytest.mark.thorough
def test_a_context_is_tokenised_as_by_the_tokenizer_itself(folder, harness):
    tokenizer = harness.tokenizer
    text = "Write a </s> response"
    assert harness.tok_encode(text) == tokenizer(text).input_ids
    assert harness.prefix_token_id == tokenizer.bos_token_id not in harness.tok_encode(text)
    begun = Harness(workdir=str(folder / "run"), add_bos_token=True)
    assert begun.tok_encode(text) == [tokenizer.bos_token_id, *harness.tok_encode(text)]
    assert begun.tok_encode(f"<s>{text}") == begun.tok_encode(text)
    assert begun.tok_encode(text, add_special_tokens=False) == harness.tok_encode(text)
    context, continuation = harness._encode_pair("Write a ", "response")
    assert context == harness.tok_encode("Write a")
    assert context + continuation == harness.tok_encode("Write a response")
    assert harness._encode_pair(" ", "a")[0] == [harness.prefix_token_id]


@pytest.mark.thorough
def test_a_continuation_that_merges_with_its_context_is_scored_alone(harness):
    """It would be certain otherwise, and the best of all choices."""
    context, continuation = harness._encode_pair("answ", "er: true")
    assert context == harness.tok_encode("answ")
    assert continuation == harness.tok_encode("er: true", add_special_tokens=False) != []


def test_cached_requests_are_of_no_other_model(harness):
    """lm_eval's cache of requests forgets which contexts were chats."""
    assert harness.tokenizer_name != harness.tokenizer_name


def test_the_prompt_of_a_request_is_its_context(harness):
    context, ours, other = (1, 40, 41, 42), (50, 51), (60, 61, 62)
    noted = Noted()
    harness.cache_hook = noted
    asked = [(("c", "a"), context, ours), (("c", "b"), context, other), (("c", ""), context, ())]
    found = harness._loglikelihood_tokens([(pair, list(a), list(b)) for pair, a, b in asked])
    assert found[:2] == scored(harness, Passage(context + ours, 4, 2), Passage(context + other, 4, 3))
    assert found[2] == (0.0, True), "nothing is certain to follow"
    assert noted.found == [("loglikelihood", asked[i][0], found[i]) for i in range(3)]


def test_what_is_too_long_is_cut_on_the_left(folder, harness, caplog):
    short = Harness(workdir=str(folder / "run"), batch_size=4, max_length=8)
    short.cache_hook = Noted()
    tokens = tuple(range(20, 40))
    found = short._loglikelihood_tokens([(None, list(tokens[:17]), list(tokens[17:]))])
    assert found == scored(harness, Passage(tokens[-9:], 6, 3))
    assert "1 requests are longer than max_length 8: cut on the left" in caplog.text
    with pytest.raises(UserError, match="a continuation is '9 tokens long': expected at most max_length 8"):
        short._loglikelihood_tokens([(None, [1], list(tokens[:9]))])
    with pytest.raises(UserError, match="max_gen_toks is 8: expected fewer than max_length 8"):
        short.generate_until(requests(("text", {"max_gen_toks": 8})))


@pytest.mark.thorough
def test_a_whole_text_has_the_route_of_the_prefix_token(folder, harness):
    """Equal to passes that are given that route: there is no router in them."""
    model = Harness(workdir=str(folder / "run"), batch_size=4, max_length=16)
    model.cache_hook = Noted()
    text = "Below is an instruction that describes a task, for the quick brown fox and the dog."
    (found,) = model.loglikelihood_rolling(requests((text,)))
    tuned, prefix = harness.tuned, harness.prefix_token_id
    windows = rolling_passages(model.tok_encode(text), prefix, 16, led=True)
    assert len(windows) > 2
    start = Batch.unpadded(jnp.full((1, 1), prefix, jnp.int32)).replace(prompt_mask=jnp.ones((1, 1), bool))
    route = forward(tuned.base, tuned.config, start, adapter=tuned.adapter).route
    weights = tuple(route.weights)
    expected = sum(_under_route(tuned, window, weights) for window in windows)
    assert abs(found - expected) <= 1e-3
    assert model.cache_hook.found == [("loglikelihood_rolling", (text,), found)]


def _under_route(tuned, window, weights):
    tokens = jnp.asarray(window.tokens, jnp.int32)[None]
    logs = _logs_under_route(tuned.base, tuned.adapter, tokens[:, :-1], weights, tuned.config)
    return sum(float(logs[i, window.tokens[i]]) for i in range(-window.scored, 0))


@functools.partial(jax.jit, static_argnames="config")
def _logs_under_route(base, adapter, tokens, weights, config):
    hidden = forward(base, config, Batch.unpadded(tokens), adapter=adapter, route=weights).hidden
    return jax.nn.log_softmax(unembed(base, config, hidden)[0])


@pytest.mark.thorough
def test_texts_are_continued_up_to_a_stop_string(harness):
    tuned, noted = harness.tuned, Noted()
    harness.cache_hook = noted
    contexts = ["Below is a word.", "task"]
    prompts = [encode_prompt(harness.tokenizer, text) for text in contexts]
    plain = GenerationSettings(max_new_tokens=12)
    given = tuned.base, tuned.config, harness.tokenizer, prompts
    texts = [answer.text for answer in generate(*given, adapter=tuned.adapter, settings=plain)]
    stop = texts[0][3:5]
    asked = {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    found = harness.generate_until(requests(*((text, asked) for text in contexts)))
    assert found == [text.split(stop)[0] for text in texts]
    assert ("generate_until", (contexts[0], asked), found[0]) in noted.found


def test_what_tasks_ask_of_a_generation():
    plain = GenerationSettings(max_new_tokens=256, seed=3)
    for asked, expected in [
        ({}, {}),
        ({"until": "\n", "max_new_tokens": 5}, {"stop": ("\n",), "max_new_tokens": 5}),
        (
            {"until": ["a", "b", "a"], "max_gen_toks": 7, "max_tokens": 9},
            {"stop": ("a", "b"), "max_new_tokens": 7},
        ),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 40}, {"temperature": 1.0, "top_k": 40}),
        ({"num_beams": 3}, {"num_beams": 3}),
    ]:
        found = generation_settings(asked, 256, 3)
        assert found == GenerationSettings(**{"max_new_tokens": 256, "seed": 3, **expected}), asked
    assert plain == generation_settings({}, 256, 3)
    with pytest.raises(UserError, match=r"of generation_kwargs is 'top_kk': .* \(did you mean 'top_k'\?\)"):
        generation_settings({"top_kk": 1}, 256, 0)


def test_a_chat_is_the_prompt_of_training(folder, harness):
    tokenizer, question = harness.tokenizer, "What is 3 * 7?"
    text = harness.apply_chat_template([{"role": "user", "content": question}])
    record = Record(question, "", "It is 21.", "")
    example = encode_example(tokenizer, record, [2], 512, harness.tuned.prompt_format)
    assert text == prompt_text(record)
    context, continuation = harness._encode_pair(text, "It is 21.")
    assert [*context, *continuation, 2] == example.tokens.tolist()
    assert len(context) == example.prompt_length
    begun = harness.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": "It is"}], False
    )
    assert harness.tok_encode(begun) == context + encode_prompt(tokenizer, "It is", "none")
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(UserError, match="--fewshot_as_multiturn False"):
        harness.apply_chat_template(turns)


def test_a_chat_of_a_base_is_in_its_own_template(folder):
    model = Harness(base=str(folder / "model"))
    assert model.chat_template(True) == TEMPLATE
    turns = [("system", "Be short."), ("user", "one"), ("assistant", "two"), ("user", "thr</s>ee")]
    text = model.apply_chat_template([{"role": role, "content": content} for role, content in turns])
    assert text.endswith("user: thr</s>ee\nassistant:")
    expected = encode_chat(model.tokenizer, [Message(*turn) for turn in turns])
    assert model.tok_encode(text) == expected
    context, continuation = model._encode_pair(text, " four")
    assert context == expected
    assert model.tokenizer.decode(continuation) == " four"


def test_the_arguments_of_lm_eval(folder):
    given = {"batch_size": "2", "max_batch_size": None, "device": "cuda:0"}
    model = Harness.create_from_arg_obj({"base": str(folder / "model")}, given)
    assert (model.batch_size, model.max_length, model.tuned.adapter) == (2, 512, None)
    assert (
        Harness.create_from_arg_obj({"base": str(folder / "model"), "batch_size": 3}, given).batch_size == 3
    )
    for arguments, line in [
        ({"workdr": "x"}, r"an argument of the model is 'workdr': .*did you mean 'workdir'\?"),
        ({"workdir": str(folder / "no")}, "is no workdir"),
        ({}, "there is no base: expected a workdir, or a base and perhaps an adapter on it"),
        ({"workdir": str(folder / "run"), "base": "x"}, "'x': no such directory"),
        ({"workdir": str(folder / "run"), "adapter": "x"}, "expected a workdir or an adapter, not both"),
        ({"base": str(folder / "model"), "batch_size": "auto"}, "batch_size is 'auto': expected a whole"),
        ({"base": str(folder / "model"), "seed": "x"}, "seed is 'x': expected a whole number from 0"),
        ({"base": str(folder / "model"), "add_bos_token": "no"}, "add_bos_token is 'no': expected True or"),
        ({"base": str(folder / "model"), "template": "chta"}, r"did you mean 'chat'\?"),
        (
            {"base": str(folder / "model"), "max_length": 513},
            "max_length is 513: expected 2 to the model's 512",
        ),
    ]:
        with pytest.raises(UserError, match=line):
            Harness.create_from_arg_obj(arguments)


def test_a_run_says_how_it_words_a_chat(folder, tmp_path):
    (tmp_path / "best").symlink_to(folder / "run" / "best")
    values = json.loads((folder / "run" / "config.json").read_text())
    values["data"]["template"] = "chat"
    (tmp_path / "config.json").write_bytes(json_bytes(values))
    base = str(folder / "model")

    def template(**named):
        return read_subject(named_subject(**named)).prompt_format.template

    assert Harness(workdir=str(tmp_path)).tuned.prompt_format.template == "chat"
    assert template(adapter=tmp_path, base=base, otherwise="alpaca") == "chat"
    assert template(adapter=folder / "run", base=base) == "alpaca"
    assert template(base=base) == "chat"
    assert template(base=base, otherwise="alpaca") == "alpaca"
    assert template(workdir=folder / "run", template="chat") == "chat"
    export_milora(folder / "run", tmp_path / "export")
    assert template(adapter=tmp_path / "export", base=base) == "alpaca"
