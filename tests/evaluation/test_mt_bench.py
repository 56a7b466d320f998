"""MT-Bench: answers of two turns, resumed; judgments, and judges that fail."""

import json

import pytest

from milora_jax.commands import mt_bench as command
from milora_jax.data.chat import Message, encode_chat
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_prompt
from milora_jax.errors import UserError
from milora_jax.evaluation import mt_bench
from milora_jax.evaluation.judge import pair_tasks, summary, verdict
from milora_jax.evaluation.judge_client import JudgeClient
from milora_jax.evaluation.mt_bench import read_answers, read_questions, turn_prompt
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.prompt_format import PromptFormat
from tests.evaluation.judges import Judge, Silence
from tests.models import write_hf_directory
from tests.serving.harness import TEMPLATE
from tests.storage.adapters import run_of

pytest.importorskip("transformers", reason="text needs a tokenizer")
pytest.importorskip("openai", reason="it asks the judge")

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a word.", "Write another."]},
    {
        "question_id": 101,
        "category": "math",
        "turns": ["What is 3 * 7?", "Less 1?"],
        "reference": ["21", "20"],
    },
    {"question_id": 121, "category": "coding", "turns": ["Print a."]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mt_bench")
    write_hf_directory(path / "model")
    run_of(path / "run", path / "model", "milora")
    write(path / "questions.jsonl", QUESTIONS)
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(path, model_id, said="yes"):
    rows = [
        {
            "question_id": row["question_id"],
            "category": row["category"],
            "questions": row["turns"],
            "reference": row.get("reference", []),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": [f"{said} {turn}" for turn in row["turns"]]}],
        }
        for row in QUESTIONS
    ]
    return write(path, rows)


def answer(folder, out, *more):
    given = ("--workdir", folder / "run", "--questions", folder / "questions.jsonl", "--out", out)
    command.main(["answer", *map(str, (*given, "--max-new-tokens", 12, *more))])


def judged(*more):
    command.main(["judge", "--judge-model", "judge", "--wait", "0.01", *map(str, more)])


@pytest.mark.thorough
def test_questions_are_answered_turn_by_turn_and_once(folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    answer(folder, out)
    lines = out.read_text().splitlines()
    found = read_answers(out)
    assert [each.question.question_id for each in found] == [81, 101, 121]
    assert [len(each.answers) for each in found] == [2, 2, 1]
    assert {each.model_id for each in found} == {"run"}
    out.write_text(lines[0] + "\n")
    answer(folder, out)
    assert out.read_text().splitlines() == lines, "it went on"
    with pytest.raises(UserError, match="another model or with other settings, give another --out"):
        answer(folder, out, "--seed", 1)


@pytest.fixture
def spoken(monkeypatch):
    """Answers without a model: the turns themselves."""

    def answers(model, group, asked, batch_size):
        return [[f"to {turn}\u2028" for turn in question.turns] for question in group]

    monkeypatch.setattr(mt_bench, "_answers", answers)


@pytest.mark.thorough
def test_answers_of_another_model_under_the_same_name_are_refused(folder, tmp_path, spoken):
    out = tmp_path / "answers.jsonl"
    named = ("--model-id", "mine")
    answer(folder, out, *named)
    kept = out.read_bytes()
    base = ("--workdir", "", "--base", folder / "model")
    run_of(tmp_path / "other", folder / "model", "milora", seed=5)
    for other in (base, (*base, "--adapter", tmp_path / "other"), ("--dtype", "bfloat16")):
        with pytest.raises(UserError, match=r"answers.jsonl:1: an answer of another model"):
            answer(folder, out, *named, *other)
    assert out.read_bytes() == kept


@pytest.mark.thorough
def test_answers_to_other_questions_stay_and_other_words_are_refused(folder, tmp_path, spoken):
    out = tmp_path / "answers.jsonl"
    for rows in (QUESTIONS[:2], QUESTIONS[1:]):
        answer(folder, out, "--questions", write(tmp_path / "questions.jsonl", rows))
    assert sorted(each.question.question_id for each in read_answers(out)) == [81, 101, 121]
    assert read_answers(out)[0].answers[0].endswith("\u2028"), "a separator that JSON may hold"
    changed = [{**QUESTIONS[0], "turns": ["Write a sentence.", "Write another."]}]
    with pytest.raises(UserError, match="question 81 has other words than now, give another --out"):
        answer(folder, out, "--questions", write(tmp_path / "questions.jsonl", changed))
    assert len(read_answers(out)) == 3
    with pytest.raises(UserError, match="--max-new-tokens is 0: expected at least 1"):
        answer(folder, out, "--max-new-tokens", 0)


@pytest.mark.thorough
def test_a_question_without_room_leaves_the_others(folder, tmp_path):
    rows = [{"question_id": "long", "category": "", "turns": ["word " * 600]}, QUESTIONS[2]]
    questions, out = write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"
    with pytest.raises(
        UserError, match=r"1 of 2 questions have no answer \(question long: turn 1: the prompt"
    ):
        answer(folder, out, "--questions", questions)
    assert [each.question.question_id for each in read_answers(out)] == [121]


def test_the_second_prompt_holds_the_first_answer(folder, tmp_path):
    tuned = read_subject(named_subject(folder / "run")).load()
    first = encode_prompt(tuned.tokenizer, prompt_text(Record("one", "", "", "")))
    assert turn_prompt(tuned, ["one"], []).ids == first
    second = turn_prompt(tuned, ["one", "three"], ["two"]).ids
    text = prompt_text(Record("one", "", "", "")) + "two\n\n### Instruction:\nthree\n\n### Response:\n"
    assert second == encode_prompt(tuned.tokenizer, text)
    tuned.tokenizer.chat_template = TEMPLATE
    object.__setattr__(tuned, "prompt_format", PromptFormat("chat"))
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    assert turn_prompt(tuned, ["one", "three"], ["two"]).ids == encode_chat(tuned.tokenizer, messages)


def test_answers_are_graded(tmp_path, capsys, monkeypatch):
    answers, out = answers_of(tmp_path / "answers.jsonl", "mine"), tmp_path / "judgments.jsonl"
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge("Good. [[8]]", "Bad. [[3]]", "[[9]]", "I cannot say", "[[4]]")
    given = ("--answers", answers, "--out", out, "--parallel", 1, "--key-variable", "JUDGE_KEY")
    with judge.serving() as url:
        judged(*given, "--judge-url", url)
        asked = len(judge.asked)
        judged(*given, "--judge-url", url)
        assert len(judge.asked) == asked == 5, "finished judgments are kept"
    lines = capsys.readouterr()
    found = [json.loads(line) for line in lines.out.splitlines()]
    assert found[0] == found[1]
    assert found[0] == {
        "mode": "single",
        "score": 6.0,
        "by_turn": {"1": 7.0, "2": 3.0},
        "unreadable": 1,
    }
    assert "1 judgments have no verdict" in lines.err
    path, key, body = judge.asked[3]
    assert (path, key, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "judge",
        0,
    )
    text = body["messages"][1]["content"]
    for part in ("21\n\n20", "[user]\nLess 1?", "[assistant]\nyes Less 1?", "What is 3 * 7?"):
        assert part in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == [8.0, 3.0, 9.0, None, 4.0]
    assert "secret" not in out.read_text() + lines.out + lines.err


def test_pairs_are_shown_in_both_orders(tmp_path, capsys):
    ours = answers_of(tmp_path / "ours.jsonl", "mine")
    theirs = answers_of(tmp_path / "theirs.jsonl", "other", said="no")
    # Won in both orders; A both times, which is a tie; lost; tied; won in one and tied in the other.
    judge = Judge(*(f"[[{name}]]" for name in "ABAABACCAC"))
    with judge.serving() as url:
        given = ("--judge-url", url, "--parallel", 1, "--out", tmp_path / "out.jsonl")
        judged("--answers", ours, "--against", theirs, *given)
        with pytest.raises(UserError, match="judgments of other answers or of another judge"):
            judged("--answers", ours, *given)
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "mode": "pair",
        "model_id": "mine",
        "won": 1,
        "lost": 1,
        "tied": 3,
        "win_rate": 0.5,
        "unreadable": 0,
    }
    first, second = (body["messages"][1]["content"] for _, _, body in judge.asked[:2])
    assert first.index("yes Write a word.") < first.index("no Write a word.")
    assert second.index("no Write a word.") < second.index("yes Write a word.")


@pytest.mark.parametrize("place", ["A", "B"])
def test_equal_answers_are_a_tie_whatever_place_the_judge_favours(tmp_path, capsys, place):
    ours = answers_of(tmp_path / "ours.jsonl", "mine")
    theirs = answers_of(tmp_path / "theirs.jsonl", "other")
    judge = Judge(f"[[{place}]]")
    with judge.serving() as url:
        judged("--answers", ours, "--against", theirs, "--judge-url", url, "--out", tmp_path / "out.jsonl")
    found = json.loads(capsys.readouterr().out)
    assert (found["won"], found["lost"], found["tied"]) == (0, 0, 5)


def test_what_a_judge_says_is_kept_however_odd(tmp_path, capsys):
    """Nothing at all, a separator of lines that JSON may hold, half of a surrogate pair."""
    answers, out = answers_of(tmp_path / "answers.jsonl", "mine"), tmp_path / "out.jsonl"
    odd = Silence(), "[[5]] \u2028 fine", "\ud83d [[6]]", "[[7]]"
    given = ("--answers", answers, "--out", out, "--parallel", 1)
    for judge in (Judge(*odd), Judge("[[1]]")):
        with judge.serving() as url:
            judged(*given, "--judge-url", url)
    assert judge.asked == [], "all are there"
    rows = [row for row, _ in mt_bench.read_rows(out)]
    assert [row["verdict"] for row in rows] == [None, 5, 6, 7, 7]
    assert [row["judgment"] for row in rows[:3]] == ["", *odd[1:3]]


def test_a_judge_that_is_busy_is_asked_again(tmp_path, capsys):
    answers = answers_of(tmp_path / "answers.jsonl", "mine")
    judge = Judge(429, 500, "[[5]]")
    with judge.serving() as url:
        judged("--answers", answers, "--judge-url", url, "--out", tmp_path / "out.jsonl", "--parallel", 1)
    assert json.loads(capsys.readouterr().out)["score"] == 5
    assert len(judge.asked) == 7


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("reply", "line", "count"),
    [
        (500, r"does not answer after 2 attempts: status 500 \(busy\); finished judgments are kept", 2),
        (None, r"does not answer after 2 attempts: no answer within 1\.5 s", 2),
        (401, r"the judge at http.* refuses: status 401 \(busy\)", 1),
        (302, r"refuses: status 302", 1),
    ],
)
def test_a_judge_that_fails_ends_in_one_line_and_finished_work_is_kept(tmp_path, capsys, reply, line, count):
    answers, out = answers_of(tmp_path / "answers.jsonl", "mine"), tmp_path / "out.jsonl"
    judge = Judge("[[5]]", "[[6]]", reply)
    seconds = 60 if reply else 1.5
    given = ("--answers", answers, "--out", out, "--parallel", 1, "--timeout", seconds, "--attempts", 2)
    with judge.serving() as url:
        with pytest.raises(UserError, match=line):
            judged(*given, "--judge-url", url)
        assert len(judge.asked) == 2 + count
    assert [json.loads(row)["verdict"] for row in out.read_text().splitlines()] == [5, 6]
    again = Judge("[[7]]")
    with again.serving() as url:
        judged(*given, "--judge-url", url)
    assert len(again.asked) == 3, "it went on"
    assert json.loads(capsys.readouterr().out)["score"] == 6.4


def test_nobody_at_the_address(tmp_path):
    client = JudgeClient("http://127.0.0.1:9/v1", "judge", attempts=2, wait=0.01)
    with pytest.raises(UserError, match=r"does not answer after 2 attempts: .*refused"):
        client.ask([])
    answers, out = answers_of(tmp_path / "answers.jsonl", "mine"), tmp_path / "out.jsonl"
    for more, line in [
        (("--judge-url", "127.0.0.1:9"), "--judge-url is '127.0.0.1:9': expected http://HOST:PORT/v1"),
        (("--judge-url", "http://[::1/v1"), "expected http://HOST:PORT/v1"),
        (("--judge-url", "http://a/v1", "--key-variable", "NO_SUCH"), "--key-variable NO_SUCH is ''"),
        (("--judge-url", "http://a/v1", "--against", tmp_path / "no.jsonl"), "no such file or directory"),
        (("--judge-url", "http://a/v1", "--out", tmp_path / "no" / "out"), "--out .* no such directory"),
    ]:
        with pytest.raises(UserError, match=line):
            judged("--answers", answers, "--out", out, *more)
    assert not out.exists()


def test_verdicts_and_what_they_sum_to():
    assert [verdict("single", text) for text in ("[[10]]", "[[0]]", "[[11]]", "[[7.5]]", "[[A]]", "[5]")] == [
        10.0,
        None,
        None,
        7.5,
        None,
        None,
    ]
    assert [verdict("pair", text) for text in ("[[C]]", "[[ A ]]", "[[7]]", "")] == ["C", "A", None, None]
    row = {"mode": "pair", "question_id": 1, "turn": 1}
    rows = [{**row, "order": "given", "verdict": None}, {**row, "order": "reversed", "verdict": "B"}]
    assert summary(rows, "mine")["tied"] == 1, "one order says nothing"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "holds no question"),
        ("{", r":1: not JSON"),
        ('{"question_id": 1}', r":1: expected question_id, category and the turns"),
        ('{"question_id": 1, "turns": ["a"]}\n' * 2, "a question_id is there twice"),
        ('{"question_id": 1, "turns": ["\\ud83d"]}\n', ":1: a text with a null or half a surrogate pair"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, text, line):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        read_questions(path)


def test_files_that_hold_other_answers(tmp_path):
    ours = read_answers(answers_of(tmp_path / "a.jsonl", "mine"))
    with pytest.raises(UserError, match="--against holds answers to other questions than --answers, 81"):
        pair_tasks(ours, ours[1:])
    path = tmp_path / "b.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows[0]["choices"][0]["turns"].pop()
    with pytest.raises(UserError, match=r"b.jsonl:1: expected model_id, and choices"):
        read_answers(write(path, rows))
