"""LLaMA-2 7B on Alpaca: the paper's budget (section 4.2), our router, for MT-Bench, MMLU and BBH (Table 3).

    python train.py --config configs/llama7b_alpaca.py --config.model.path=DIR --workdir runs/alpaca

DIR is a Hugging Face directory of meta-llama/Llama-2-7b-hf; the default data is the Hub's tatsu-lab/alpaca,
which has 52,002 rows, where the paper says 50k. Everything else is set as in ``llama7b_commonsense.py``. The
run has no test files; what it is good for is measured afterwards:

    python -m milora_jax.evaluation mt-bench answer --workdir runs/alpaca --questions question.jsonl \
        --out runs/alpaca/answers.jsonl
    python -m milora_jax.evaluation lm-eval --model milora_jax --model_args workdir=runs/alpaca,batch_size=8 \
        --tasks mmlu,bbh

docs/mt_bench.md and docs/lm_eval.md say more. The paper reports 7.21 on MT-Bench, 49.7 % on MMLU and 37.3 %
on BBH; this run has not been repeated by us on the real weights.
"""

from configs import llama7b_commonsense


def get_config():
    """The settings of the run."""
    config = llama7b_commonsense.get_config()
    config.data.train, config.data.test = "alpaca=hf:tatsu-lab/alpaca", ""
    config.eval.max_new_tokens = 1024
    return config
