"""What transformers makes of tokens and prompts, for the tests on a published model."""

import numpy as np


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


def rms(values):
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
