"""What transformers makes of tokens and prompts, for the tests on a published model."""

from contextlib import contextmanager

import numpy as np

from milora_jax.base.quantized import NF4_VALUES
from milora_jax.base.specs import MODULE_PATHS


def their_answer(model, tokenizer, ids, new, **settings):
    """Token ids that transformers' ``generate`` adds to a prompt, greedily unless told otherwise."""
    import torch

    given = torch.tensor([ids])
    with torch.no_grad():
        whole = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            **{"do_sample": False, "pad_token_id": tokenizer.eos_token_id, **settings},
        )
    return whole[0, len(ids) :].tolist()


def text_of(tokenizer, ids):
    """The text of an answer, as a reader sees it."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def their_loss(model, rows):
    """Mean cross entropy in nats over the responses of encoded rows, one record a row."""
    import torch

    total, count = 0.0, 0
    for (example,) in rows:
        tokens = torch.from_numpy(np.asarray(example.tokens, np.int64))[None]
        with torch.no_grad():
            logits = model(tokens).logits[0, example.prompt_length - 1 : -1]
        wanted = tokens[0, example.prompt_length :]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return total / count


def their_perplexity(model, ids):
    """Of the tokens of a text after the first."""
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    return float(torch.exp(loss))


@contextmanager
def rounded(model, scheme):
    """The model with its seven modules rounded as a scheme does, in torch and written apart from ours.

    int8 has a scale per output, NF4 a scale per 64 inputs (arXiv 2305.14314, Appendix E).
    """
    import torch

    kept = []
    for layer in model.model.layers:
        for path in MODULE_PATHS.values():
            weight = layer.get_submodule(path).weight.data
            kept.append((weight, weight.clone()))
            if scheme == "int8":
                scales = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scales).round() * scales)
            else:
                table = torch.tensor(NF4_VALUES)
                blocks = weight.reshape(len(weight), -1, 64)
                scales = blocks.abs().amax(dim=-1, keepdim=True).bfloat16().float()
                nearest = torch.bucketize(blocks / scales, (table[1:] + table[:-1]) / 2)
                weight.copy_((table[nearest] * scales).reshape(weight.shape))
    try:
        yield
    finally:
        for weight, values in kept:
            weight.copy_(values)


def rms(values):
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
