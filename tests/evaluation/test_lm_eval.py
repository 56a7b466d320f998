"""lm-evaluation-harness itself, offline, on tasks that the tests write."""

import json
import subprocess
import sys

import numpy as np
import pytest

from milora_jax.tiny import MODEL_DIR, TASKS_DIR
from tests.paths import ROOT, environment
from tests.storage.adapters import run_of

pytest.importorskip("transformers", reason="lm_eval is given texts, which need a tokenizer")
pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'milora-jax[eval]'")

CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{instruction}}"
doc_to_choice: [answer1, answer2, answer3, answer4]
doc_to_target: "{{['answer1', 'answer2', 'answer3', 'answer4'].index(answer)}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""

ANSWER = """\
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answer.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{instruction}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""

TEXT = """\
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answer.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{instruction}}"
metric_list: [{metric: word_perplexity}]
"""

ROWS = 6

EVALUATE = """\
import json, sys

class Without:
    \"\"\"Finds what another finder does, but for torch.\"\"\"

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
folder, model, arguments, tasks = sys.argv[1:]
from milora_jax.evaluation.harness import harness_class
harness_class()
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model=model, model_args=arguments, tasks=tasks.split(","),
    task_manager=TaskManager(include_path=folder, include_defaults=False),
)
assert "torch" not in sys.modules
json.dump({"results": found["results"], "samples": found["samples"]}, sys.stdout, default=str)
"""


IN_TURN = """\
import json, sys
from milora_jax.commands.command_line import run_command
from milora_jax.commands.evaluation import main
for arguments in json.loads(sys.argv[1]):
    try:
        run_command(lambda: main(arguments))
    except SystemExit as ended:
        print("exit code", ended.code, file=sys.stderr, flush=True)
"""
"""Command lines one after the other in a process, which reads lm_eval once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    for name, source, text in (("choice", "multiple_choice", CHOICE), ("answer", "arithmetic", ANSWER)):
        lines = (TASKS_DIR / source / "test.jsonl").read_text().splitlines()[:ROWS]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        (path / f"{name}.yaml").write_text(text.replace("FOLDER", str(path)))
    (path / "text.yaml").write_text(TEXT.replace("FOLDER", str(path)))
    run_of(path / "run", MODEL_DIR, "milora")
    return path


def run(folder, *command):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(**offline),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.thorough
def test_it_evaluates_a_run_offline_and_without_torch(folder):
    arguments = f"workdir={folder / 'run'},batch_size=4"
    made = run(folder, "-c", EVALUATE, folder, "milora_jax", arguments, "choice,answer,text")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout[made.stdout.index("{") :])
    samples = found["samples"]["choice"]
    assert len(samples) == ROWS
    assert {tuple(len(sample["resps"]) for sample in samples)} == {(4,) * ROWS}
    best = [
        np.argmax([float(each[0][0]) for each in sample["resps"]]) == int(sample["target"])
        for sample in samples
    ]
    assert found["results"]["choice"]["acc,none"] == np.mean(best)
    assert all("\n\n" not in sample["resps"][0][0] for sample in found["samples"]["answer"])
    assert float(found["results"]["text"]["word_perplexity,none"]) > 1


@pytest.mark.thorough
def test_the_command_hands_over_and_says_in_one_line_what_is_wrong(folder):
    command = ("lm-eval", "--include_path", str(folder))
    given = (*command, "--model_args", f"workdir={folder / 'run'},batch_size=4")
    made = run(folder, "-m", "milora_jax.evaluation", *given, "--tasks", "choice", "--limit", "2")
    assert made.returncode == 0, made.stderr
    assert "|choice|" in made.stdout.replace(" ", "")
    mistakes = [
        ((*given, "--tasks", "chioce"), "error: lm_eval ended: ValueError: Tasks not found: chioce"),
        (
            (*command, "--model_args", "workdir=nowhere", "--tasks", "choice"),
            "error: 'nowhere' is no workdir",
        ),
        ((*given, "--tasks", "arc_easy"), "a task's data comes from the Hub, run where it can be reached"),
    ]
    said = run(
        folder, "-c", IN_TURN, json.dumps([arguments for arguments, _ in mistakes])
    ).stderr.splitlines()
    ends = [place for place, line in enumerate(said) if line == "exit code 2"]
    assert len(ends) == len(mistakes), said
    for (_, line), end in zip(mistakes, ends, strict=True):
        assert line in said[end - 1]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_are_those_of_its_hf_model(folder, tmp_path):
    """On a plain base whose tokenizer puts a beginning-of-sequence token before every text, as LLaMA's."""
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs: pip install 'lm_eval[hf]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from milora_jax.evaluation.harness import harness_class

    harness_class()
    base = with_leading_token(tmp_path / "base")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluated(model, **arguments):
        return lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=["choice", "answer", "text"], task_manager=manager
        )

    theirs = evaluated("hf", pretrained=str(base), dtype="float32", device="cpu", batch_size=3, max_length=40)
    ours = evaluated("milora_jax", base=str(base), batch_size=4, max_length=40)
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert abs(ours["results"][task][name] - value) <= 1e-3 * max(1, abs(value)), (task, name)
    for task in ("choice", "text"):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (found,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                if task == "text":
                    assert abs(found - expected) <= 1e-3
                else:
                    assert abs(found[0] - expected[0]) <= 1e-3
                    assert found[1] == expected[1], "is_greedy"
    texts = [[sample["resps"] for sample in each["samples"]["answer"]] for each in (ours, theirs)]
    assert texts[0] == texts[1]


def with_leading_token(path):
    """A copy of the package's model, whose tokenizer begins every text with one token."""
    import shutil

    from tokenizers import Tokenizer, processors

    shutil.copytree(MODEL_DIR, path)
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    bos = json.loads((path / "tokenizer_config.json").read_text())["bos_token"]
    single = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=single)
    tokenizer.save(str(file))
    return path
