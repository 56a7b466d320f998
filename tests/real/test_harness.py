"""lm-evaluation-harness gives the published model the figures of its own ``hf`` model, by default."""

import json
import re

import pytest

from milora_jax.evaluation.harness import harness_class

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

PART = "lm-evaluation-harness"
ROWS = 10

ARC = """\
task: arc_rows
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/arc.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""

TEXT = """\
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""

ANSWER = """\
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "x"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""

TASKS = {"arc_rows": ARC, "texts": TEXT, "answers": ANSWER}
SHAPE = re.compile(
    r"correct answer to the question: (?P<question>.*?)\n\nAnswer1: (?P<one>.*?) Answer2: (?P<two>.*?) "
    r"Answer3: (?P<three>.*?) Answer4: (?P<four>.*?)\n\nAnswer format: answer1/answer2/answer3/answer4$",
    re.DOTALL,
)


def arc_rows(path, count):
    """Questions, choices and golds of the first rows of four choices in LLM-Adapters' file."""
    rows = []
    for row in json.loads(path.read_text()):
        found = SHAPE.search(row["instruction"])
        if found is not None:
            question, *choices = found.groups()
            rows.append({"question": question, "choices": choices, "gold": int(row["answer"][-1]) - 1})
        if len(rows) == count:
            return rows
    raise AssertionError(f"fewer than {count} rows of four choices")


@pytest.fixture(scope="module")
def evaluated(folder, shared_data, tmp_path_factory):
    """What our model and lm_eval's own make of some of the tasks, in this order."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs: pip install 'lm_eval[hf]'")
    from lm_eval.tasks import TaskManager

    tasks = tmp_path_factory.mktemp("tasks")
    rows = arc_rows(shared_data / "llm_adapters" / "ARC-Easy" / "test.json", ROWS)
    for name, chosen in (("arc", rows), ("texts", rows[:3])):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.replace("FOLDER", str(tasks)))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    harness_class()
    models = {
        "milora_jax": {"base": str(folder)},
        "hf": {"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
    }

    def of_both(*names):
        return [
            lm_eval.simple_evaluate(
                model=model,
                model_args={**arguments, "batch_size": 4},
                tasks=list(names),
                task_manager=manager,
            )
            for model, arguments in models.items()
        ]

    return of_both


def test_log_likelihoods_and_accuracy_are_those_of_the_hf_model(evaluated, record):
    results = evaluated("arc_rows")
    ours, theirs = (found["samples"]["arc_rows"] for found in results)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["arguments"] == other["arguments"]
        for (found,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
            worst = max(worst, abs(float(found[0]) - float(expected[0])))
            assert found[1] == expected[1], "is_greedy"
    accuracies = [found["results"]["arc_rows"]["acc,none"] for found in results]
    record(PART, f"largest difference of {4 * ROWS} log-likelihoods of ARC-Easy, nats", worst, "< 1e-3")
    record(PART, f"accuracy of {ROWS} rows, hf model", accuracies[1])
    record(PART, f"accuracy of {ROWS} rows, ours", accuracies[0], "the hf model's")
    assert worst < 1e-3
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_rolling_log_likelihoods_and_texts_are_those_of_the_hf_model(evaluated, record):
    ours, theirs = (found["samples"] for found in evaluated("texts", "answers"))
    pairs = zip(ours["texts"], theirs["texts"], strict=True)
    worst = max(abs(float(mine["resps"][0][0]) - float(other["resps"][0][0])) for mine, other in pairs)
    record(PART, "largest difference of rolling log-likelihoods of 3 texts, nats", worst, "< 1e-3")
    assert worst < 1e-3
    texts = [[sample["resps"] for sample in found["answers"]] for found in (ours, theirs)]
    record(PART, "greedy texts of 3 rows", "the same" if texts[0] == texts[1] else "others", "the same")
    assert texts[0] == texts[1]
