"""The peer that decoding is compared with: Hugging Face ``generate``, with PEFT's adapters unmerged.

A script for a Python that has torch, transformers and peft; ``peer.py`` starts it, in a process of its
own so that neither framework's threads are in the other's way. It says on standard output which versions
it has, then for every number of tokens on standard input that it has produced them.
"""

# pyright: reportMissingImports=false
# (torch and peft are not ours to install)

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Load, say so, and continue the prompts as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="without weights: random ones")
    parser.add_argument("--method", choices=("hf", "peft-lora", "peft-dora"), required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    for name in ("batch", "prompt", "beams", "tenants", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()

    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    model = load(asked)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": asked.beams, "pad_token_id": 3}
    if asked.method != "hf":
        import peft

        versions["peft"] = peft.__version__
        model = with_adapters(model, asked)
        if asked.tenants > 1:
            settings["adapter_names"] = [f"tenant{i % asked.tenants}" for i in range(asked.batch)]
    model.eval()
    size = (asked.batch, asked.prompt)
    tokens = torch.randint(4, model.config.vocab_size, size, device=asked.device)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        new = int(line)
        with torch.no_grad():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                **settings,
            )
        if asked.device != "cpu":
            torch.cuda.synchronize()
        print(new, flush=True)


def load(asked: argparse.Namespace) -> Any:
    """The model, in its dtype on its device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, asked.dtype)
    if any(asked.model.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).to(asked.device)
    with torch.device(asked.device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked.model), dtype=dtype)


def with_adapters(model: Any, asked: argparse.Namespace) -> Any:
    """The model with one adapter of PEFT per tenant on all seven modules, as after training."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=asked.rank,
        lora_alpha=2 * asked.rank,
        target_modules=MODULES,
        use_dora=asked.method == "peft-dora",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, adapter_name="tenant0")
    for i in range(1, asked.tenants):
        model.add_adapter(f"tenant{i}", config)
    return model


if __name__ == "__main__":
    main()
