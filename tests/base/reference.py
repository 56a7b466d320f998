"""Hugging Face's values of the same pieces, by torch. ``python -m tests.base.reference`` writes golden/."""

import tempfile
from pathlib import Path

import numpy as np

from milora_jax.model_config import ModelConfig
from tests.base.pieces import CONFIGS, LENGTH, ROWS, inputs
from tests.models import write_hf_directory

GOLDEN = Path(__file__).parent / "golden"


def reference(config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """Every piece of the model in ``folder`` as transformers computes it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    given = {name: torch.from_numpy(value) for name, value in inputs(config).items()}
    hidden, layer = given["hidden"], model.model.layers[0]
    positions = torch.arange(LENGTH)[None, :].expand(ROWS, LENGTH)
    cos, sin = model.model.rotary_emb(hidden, positions)
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        query = given["query"].transpose(1, 2)
        rotated, _ = apply_rotary_pos_emb(query, query, cos, sin)
        attended = layer.self_attn(hidden, position_embeddings=(cos, sin), attention_mask=mask)[0]
        block_out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=(cos, sin))
        values = {
            "norm": layer.input_layernorm(hidden),
            "rope": rotated.transpose(1, 2),
            "attention": attended,
            "block": block_out[0] if isinstance(block_out, tuple) else block_out,
            "logits": model(given["tokens"]).logits,
        }
    return {name: value.numpy() for name, value in values.items()}


def main() -> None:
    """Write one small file per config."""
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_hf_directory(Path(folder), config, tokenizer=False)
            np.savez_compressed(GOLDEN / f"{name}.npz", **reference(config, Path(folder)))


if __name__ == "__main__":
    main()
