"""DPO, IPO, ORPO and KTO equal TRL's trainers with PEFT on the same token ids: losses, rewards, gradients.

TRL is no dependency of the tests: ``pip install --no-deps --target DIR trl`` and ``PYTHONPATH=DIR``.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.config import TrainSection
from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows
from milora_jax.data.tokens import Example
from milora_jax.training.preference import preference_figures, preference_loss
from tests.adapters.peft_files import read_adapter, stacked
from tests.models import WITH_TOKENIZER, tame_base, write_hf_directory

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-5
BETA = 0.3
LENGTHS = [(4, 3, 5), (6, 2, 1), (2, 5, 4), (5, 1, 3)]
LABELS = [True, False, True, True]
DUMMY = {
    "kto": [{"prompt": "a", "completion": "b", "label": i == 0} for i in range(4)],
    "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4,
}


def make_examples(judged):
    """Two answers to each prompt; those of kto are one answer and that of the row before, as TRL rotates."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(10, 90, lengths[0]) for lengths in LENGTHS]
    answers = [[rng.integers(10, 90, length) for length in lengths[1:]] for lengths in LENGTHS]
    if judged:
        answers = [[own, answers[i - 1][0]] for i, (own, _) in enumerate(answers)]
    return [
        Example(np.concatenate([prompt, answer]).astype(np.int32), len(prompt), label=LABELS[i])
        for i, prompt in enumerate(prompts)
        for answer in answers[i]
    ]


def trainer_of(objective, folder):
    """TRL's trainer of an objective around a random model with a random LoRA on all seven modules."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl = pytest.importorskip("trl")
    orpo = pytest.importorskip("trl.experimental.orpo")
    kinds = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "sigmoid"}),
        "ipo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}),
    }
    kind, config, more = kinds[objective]
    torch.manual_seed(0)
    write_hf_directory(folder / "base", WITH_TOKENIZER, base=tame_base(WITH_TOKENIZER))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.pad_token = tokenizer.eos_token
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=config(
            output_dir=str(folder / "out"),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=4,
            **more,
        ),
        train_dataset=Dataset.from_list(DUMMY["kto" if objective == "kto" else "pairs"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=modules),
    )
    with torch.no_grad():
        for p in trained(trainer.model).values():
            p.normal_(0.0, 0.1)
    trainer.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return trainer


def trained(model):
    """The named parameters that PEFT trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def padded(examples):
    """Ids, attention mask and completion mask in torch, padded on the right."""
    import torch

    length = max(len(example.tokens) for example in examples)
    ids, here, answer = (np.zeros((len(examples), length), np.int64) for _ in range(3))
    for row, example in enumerate(examples):
        ids[row, : len(example.tokens)] = example.tokens
        here[row, : len(example.tokens)] = 1
        answer[row, example.prompt_length : len(example.tokens)] = 1
    return [torch.from_numpy(array) for array in (ids, here, answer)]


def their_loss(objective, trainer, examples):
    """TRL's loss of the rows, and its figures where it returns them."""
    first, second = examples[::2], examples[1::2]
    if objective == "orpo":
        inputs = {}
        for name, some in (("chosen", first), ("rejected", second)):
            ids, here, answer = padded(some)
            labels = ids.masked_fill(answer == 0, -100)
            inputs |= {f"{name}_input_ids": ids, f"{name}_attention_mask": here, f"{name}_labels": labels}
        return trainer.get_batch_loss_metrics(trainer.model, inputs)
    if objective == "kto":
        import torch

        inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), padded(first), strict=True))
        names = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
        inputs |= dict(zip(names, padded(second), strict=True))
        inputs["label"] = torch.tensor([example.label for example in first])
    else:
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs = dict(zip(names, padded([*first, *second]), strict=True))
    return trainer.compute_loss(trainer.model, inputs), {
        name: values[-1] for name, values in trainer._metrics["train"].items() if values
    }


def near(found, expected, what):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = np.abs(expected).max()
    assert size > 0, f"{what} says nothing"
    assert np.abs(found - expected).max() / size <= TOLERANCE, (what, found, expected)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "kto"])
def test_losses_figures_and_gradients_equal_those_of_trl(objective, tmp_path):
    trainer = trainer_of(objective, tmp_path)
    examples = make_examples(objective == "kto")
    trainer.model.train()
    loss, figures = their_loss(objective, trainer, examples)
    loss.backward()
    case = SimpleNamespace(adapter=read_adapter(tmp_path / "adapter", WITH_TOKENIZER))
    base, _ = load_base(tmp_path / "base")
    settings = TrainSection(objective=objective, beta=BETA, loss_chunk=16)
    rows = Rows(examples, None, 2)
    batch = jax.tree.map(jnp.asarray, collate(rows, 24, len(rows), rows.prompts, answers=2))

    def ours(params):
        new = case.adapter.replace(params=params)
        return preference_loss(new, base, WITH_TOKENIZER, batch, settings=settings, key=None)

    (value, parts), found = jax.jit(jax.value_and_grad(ours, has_aux=True))(case.adapter.params)
    near(value, loss.item(), "loss")
    shown = preference_figures(parts.preference, objective)
    compared = {name: float(figures[name]) for name in shown if name in figures}
    assert compared, sorted(figures)
    for name, expected in compared.items():
        if expected or name != "kl":
            np.testing.assert_allclose(shown[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)
    grads = {name: p.grad.numpy() for name, p in trained(trainer.model).items()}
    jax.tree_util.tree_map_with_path(
        lambda path, mine, trl: near(mine, trl, jax.tree_util.keystr(path)),
        found,
        stacked(case.adapter.method, WITH_TOKENIZER, grads),
    )
