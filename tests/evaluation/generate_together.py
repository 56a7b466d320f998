"""A script for every process of a cluster: prompts with stop strings, beams, samples and the rest, as JSON.

python -m tests.evaluation.generate_together RUN MESH [--coordinator ...]
"""

import argparse
import json

from milora_jax.cluster import Cluster
from milora_jax.commands.options import add_options, settings_of
from milora_jax.evaluation.score import prefill_rows
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.parallel.processes import is_first, together

KINDS = (
    {"stop": (" ", "e")},
    {"num_beams": 3},
    {"num_beams": 3, "stop": ("a",)},
    {"temperature": 0.8, "seed": 3, "top_k": 20},
    {"repetition_penalty": 1.3, "logprobs": 2},
)


def answers(model):
    # Few lengths and few kinds of beams: every other one is a program more for two cores to compile.
    each = [GenerationSettings(max_new_tokens=20, **KINDS[i % len(KINDS)]) for i in range(15)]
    found = generate(
        model.base,
        model.config,
        model.tokenizer,
        [f"say {'very ' * (i % 3)}{i}" for i in range(15)],
        adapter=model.adapter,
        settings=each,
        batch_size=8,
        prefill_rows=prefill_rows(model.layout),
        layout=model.layout,
    )
    return [
        {
            "text": answer.text,
            "tokens": answer.tokens,
            "finish": answer.samples[0].finish,
            "logprobs": [token.logprob for token in answer.samples[0].logprobs],
            "route": answer.route.round(6).tolist(),
        }
        for answer in found
    ]


def main():
    parser = argparse.ArgumentParser()
    for name in ("run", "mesh"):
        parser.add_argument(name)
    add_options(parser, Cluster)
    asked = parser.parse_args()
    with together(settings_of(Cluster, asked)):
        subject = read_subject(named_subject(workdir=asked.run))
        found = answers(subject.load(subject.mesh("" if asked.mesh == "-" else asked.mesh, 8)))
        if is_first():
            print(json.dumps(found))


if __name__ == "__main__":
    main()
