"""Chats in the published model's own template: trained as Hugging Face words them, served as it answers."""

import json

import httpx
import pytest

from milora_jax.config import AdapterSection
from milora_jax.data.batches import batch_rows
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registry
from milora_jax.training import prepare
from tests.real.conftest import STEPS, config_of
from tests.real.reference import text_of, their_answer, their_loss
from tests.serving.harness import running, serving
from tests.training.short_runs import fit, silent

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

PART = "chats"
NEW = 24
CHATS = (
    [("user", "What is the capital of France?")],
    [("system", "You answer in one word."), ("user", "Is water wet?")],
    [("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another one, please.")],
)


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizer(run):
    if not run.tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    return run.tokenizer


def rendered(tokenizer, messages, **more):
    """Hugging Face's token ids of a chat."""
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more)
    return list(found)


def test_a_run_on_chats_trains_on_hugging_faces_tokens(folder, run, tokenizer, one_device, tmp_path):
    """Of each assistant's turn what the template writes for it, up to the token that ends it."""
    chats = [messages_of([*turns, ("assistant", f"Answer {i}.")]) for i, turns in enumerate(CHATS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = config_of(folder, tmp_path / "rows.jsonl", "chat", dev=str(tmp_path / "rows.jsonl"))
    chatting = prepare.with_rows(run, config, silent)
    expected = set()
    for chat in chats:
        for i, message in enumerate(chat):
            if message["role"] == "assistant":
                prompt = rendered(tokenizer, chat[:i], add_generation_prompt=True)
                whole = rendered(tokenizer, chat[: i + 1])
                end = max(place for place, token in enumerate(whole) if token in run.model.eos_ids)
                expected.add((len(prompt), *whole[: end + 1]))
    found = {(example.prompt_length, *example.tokens.tolist()) for (example,) in chatting.train}
    assert found == expected


def test_its_losses_are_those_of_torch_and_fall(folder, run, tokenizer, theirs, tmp_path, record):
    rows = [messages_of([("user", f"Say {i}."), ("assistant", f"{i}, as you wish.")]) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows))
    config = config_of(folder, tmp_path / "rows.jsonl", "chat")
    config = type(config).from_dict({**config.to_dict(), "adapter": vars(AdapterSection("lora", rank=4))})
    chatting = prepare.with_rows(run, config, silent)
    fit(chatting, None, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["cross_entropy"] for line in lines if "loss" in line]
    rows = batch_rows(config.train.seed, 0, len(chatting.train), config.train.batch_size)
    # Their float32 differs from their float64 by as much as the tolerance on some CPUs.
    expected = their_loss(theirs.double(), [chatting.train[i] for i in rows])
    theirs.float()
    record(PART, "loss of the first step, of torch on the same rows", expected)
    record(PART, "loss of the first step: difference from torch", abs(losses[0] - expected), "< 2e-5")
    record(PART, f"loss of step {STEPS}", losses[-1], "below the first step's")
    assert abs(losses[0] - expected) < 2e-5
    assert losses[-1] < losses[0]


def test_the_server_answers_chats_as_generate_does(folder, tokenizer, theirs, tmp_path, record):
    registry = Registry(None, {})
    limits = Limits(rows=2, samples=1, context=128, chunk=4)
    service = build_service(Offer(str(folder), "model"), registry, limits)
    same = 0
    with running(service), serving(service, registry, Keyring(open=True)) as address:
        for turns in CHATS:
            messages = messages_of(turns)
            ids = rendered(tokenizer, messages, add_generation_prompt=True)
            asked = {"model": "model", "messages": messages, "max_tokens": NEW, "temperature": 0}
            answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=120).json()
            assert answer["usage"]["prompt_tokens"] == len(ids)
            expected = text_of(tokenizer, their_answer(theirs, tokenizer, ids, NEW))
            assert answer["choices"][0]["message"]["content"] == expected
            same += 1
    record(PART, "served chats answered as generate does, greedily", f"{same} of {len(CHATS)}", "all")
