"""lm-evaluation-harness against the server: ``local-completions`` scores as the package's own model does."""

import json

import numpy as np
import pytest

from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registered, Registry
from milora_jax.tiny import MODEL_DIR
from tests.evaluation.test_lm_eval import EVALUATE, folder, run
from tests.serving.harness import running, serving
from tests.storage.adapters import run_of

__all__ = ["folder"]
pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'milora-jax[eval]'")
pytest.importorskip("tenacity", reason="lm_eval's clients of servers need lm-eval[api]")

TASKS = "choice,answer"


@pytest.fixture(scope="module")
def served(folder):
    """The address of a server of the base and of a LoRA, and the LoRA's workdir."""
    run_of(folder / "lora", MODEL_DIR, "lora", seed=5)
    registry = Registry(None, {"tuned": Registered(folder / "lora")})
    service = build_service(Offer(str(MODEL_DIR), "base"), registry, Limits(rows=2, context=256))
    with running(service), serving(service, registry, Keyring(open=True)) as address:
        yield address, folder / "lora"


def evaluated(folder, model, arguments):
    made = run(folder, "-c", EVALUATE, folder, model, arguments, TASKS)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout[made.stdout.index("{") :])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["base", "tuned"])
def test_local_completions_scores_as_our_own_model(folder, served, name):
    address, lora = served
    url, tokenizer = f"base_url={address}/v1/completions", f"tokenizer={MODEL_DIR}"
    backend = "tokenizer_backend=huggingface,max_length=256,max_retries=1,batch_size=2"
    theirs = evaluated(folder, "local-completions", f"model={name},{url},{tokenizer},{backend}")
    ours = evaluated(
        folder,
        "milora_jax",
        (f"base={MODEL_DIR}" if name == "base" else f"workdir={lora}") + ",batch_size=4,add_bos_token=False",
    )
    for task in TASKS.split(","):
        assert {k: v for k, v in ours["results"][task].items() if "," in k} == pytest.approx(
            {k: v for k, v in theirs["results"][task].items() if "," in k}
        )
    for mine, other in zip(ours["samples"]["choice"], theirs["samples"]["choice"], strict=True):
        scores = [[float(each[0][0]) for each in sample["resps"]] for sample in (mine, other)]
        np.testing.assert_allclose(*scores, atol=1e-3)
        greedy = [[str(each[0][1]) for each in sample["resps"]] for sample in (mine, other)]
        assert greedy[0] == greedy[1]
    for mine, other in zip(ours["samples"]["answer"], theirs["samples"]["answer"], strict=True):
        assert mine["resps"] == other["resps"]
