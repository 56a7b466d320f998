"""Gemma-2 2B on GSM8K: the paper's budget (sections 4.2 and 4.3), our router.

    python train.py --config configs/gemma2_2b_math.py --config.model.path=DIR --workdir runs/gemma2-2b

DIR is a Hugging Face directory of google/gemma-2-2b; the default data is the Hub's openai/gsm8k.
The base in bfloat16 takes 5.2 GB and lies whole on every device; the rows of a step are divided among
them. The settings are those of ``llama32_1b_math.py``. Whether a step fits your chips:

    python -m milora_jax.parallel aot --config configs/gemma2_2b_math.py \
        --model gemma2-2b --topology v5e:1x1

The paper has no GSM8K figure for this model, and this run has not been repeated by us on the real weights.
"""

from configs.llama32_1b_math import get_config

__all__ = ["get_config"]
