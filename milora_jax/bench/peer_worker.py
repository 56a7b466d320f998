"""The peer of the benchmarks: Hugging Face with PEFT's adapters, unmerged, and TRL for preferences.

This script is for a Python with torch, transformers and peft, for preferences also with trl and datasets.
``peer.py`` starts it in a process of its own, so that the threads of the two frameworks do not disturb each
other. It prints its versions; then, for every number on standard input, it generates that many tokens or
takes that many training steps and prints the most memory it has used, in bytes.
"""

# pyright: reportMissingImports=false
# (torch and peft are not dependencies)

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Load, print the versions, and run for every line of input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("decode", "train"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="without weights: random ones")
    parser.add_argument("--method", choices=("hf", "peft-lora", "peft-dora"), required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    for name in ("batch", "prompt", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("beams", "tenants"):
        parser.add_argument(f"--{name}", type=int, default=1)
    asked = parser.parse_args()

    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    model = load(asked)
    if asked.method != "hf":
        import peft

        versions["peft"] = peft.__version__
    if asked.objective == "dpo":
        import trl

        versions["trl"] = trl.__version__
        run = preferring(model, asked)
    else:
        model = model if asked.method == "hf" else with_adapters(model, asked)
        size = (asked.batch, asked.prompt)
        tokens = torch.randint(4, model.config.vocab_size, size, device=asked.device)
        run = training(model, tokens) if asked.what == "train" else decoding(model, tokens, asked)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        run(int(line))
        if asked.device != "cpu":
            torch.cuda.synchronize()
            print(torch.cuda.max_memory_allocated(), flush=True)
        else:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def training(model: Any, tokens: Any) -> Callable[[int], None]:
    """Make a function that takes a number of AdamW steps on the adapter."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run(count: int) -> None:
        for _ in range(count):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def preferring(model: Any, asked: argparse.Namespace) -> Callable[[int], None]:
    """Make a function that takes a number of AdamW steps of TRL's DPO on a fresh adapter.

    A pair has as many tokens as a row of supervised training: two sequences of half as many, of which the
    first half is their prompt. The reference model is the base without the adapter, in every step.
    """
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    # The trainer reads rows of text, of which none is used.
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=asked.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=asked.batch,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * asked.batch),
        processing_class=tokenizer,
        peft_config=lora_config(asked),
    )
    half, quarter = asked.prompt // 2, asked.prompt // 4
    ids = torch.randint(4, model.config.vocab_size, (2 * asked.batch, half), device=asked.device)
    ids[asked.batch :, :quarter] = ids[: asked.batch, :quarter]
    here = torch.ones_like(ids)
    completion = here.clone()
    completion[:, :quarter] = 0
    inputs = {"input_ids": ids, "attention_mask": here, "completion_mask": completion}
    trained = trainer.model
    trained.train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def run(count: int) -> None:
        for _ in range(count):
            trainer.compute_loss(trained, dict(inputs)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def decoding(model: Any, tokens: Any, asked: argparse.Namespace) -> Callable[[int], None]:
    """Make a function that continues the prompts by a number of tokens."""
    import torch

    model.eval()
    settings: dict[str, Any] = {"do_sample": False, "num_beams": asked.beams, "pad_token_id": 3}
    if asked.method != "hf" and asked.tenants > 1:
        settings["adapter_names"] = [f"tenant{i % asked.tenants}" for i in range(asked.batch)]

    def run(new: int) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                **settings,
            )

    return run


def load(asked: argparse.Namespace) -> Any:
    """Load the model in its dtype on its device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, asked.dtype)
    if any(asked.model.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).to(asked.device)
    with torch.device(asked.device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked.model), dtype=dtype)


def with_adapters(model: Any, asked: argparse.Namespace) -> Any:
    """Add one adapter of PEFT per tenant to all seven modules: fresh for training, else random as after
    training."""
    from peft import get_peft_model

    config = lora_config(asked)
    model = get_peft_model(model, config, adapter_name="tenant0")
    for i in range(1, asked.tenants):
        model.add_adapter(f"tenant{i}", config)
    return model


def lora_config(asked: argparse.Namespace) -> Any:
    """The adapter of PEFT that was asked for."""
    from peft import LoraConfig

    return LoraConfig(
        r=asked.rank,
        lora_alpha=2 * asked.rank,
        target_modules=MODULES,
        use_dora=asked.method == "peft-dora",
        init_lora_weights=asked.what == "train",
        task_type="CAUSAL_LM",
    )


if __name__ == "__main__":
    main()
