"""The study: equal terms, honest statistics, readable tables, one clear line for a mistake."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import METHODS, build_method, full_settings
from milora_jax.commands.evaluation import main
from milora_jax.config import AdapterSection, Config, ModelSection, TrainSection
from milora_jax.errors import UserError
from milora_jax.evaluation.study import plans
from milora_jax.evaluation.study.identity import changed_settings, claim_study
from milora_jax.evaluation.study.plots import plot_bars, plot_lines, plot_shares
from milora_jax.evaluation.study.reports import COMPARISONS
from milora_jax.evaluation.study.rows import ROUTED, RowScores
from milora_jax.evaluation.study.runner import require_equal_budgets
from milora_jax.evaluation.study.settings import MIXED, Budget, narrowed, quick
from milora_jax.evaluation.study.tables import Results, comparison, mixing, routes, tuned
from milora_jax.evaluation.study.tuning import SINGLE, Chosen, Point
from tests.evaluation.study_rows import STUDY, rows
from tests.paths import ROOT

RATES = dict.fromkeys(STUDY.methods, 1e-3)
CHOSEN = Chosen(
    rates=RATES, points={(label, where): Point(1e-3, 1.0) for label in RATES for where in (SINGLE, MIXED)}
)


def test_the_tiny_study_has_every_method_on_one_budget():
    from milora_jax.adapters.registry import adapter_shape
    from milora_jax.base.hf_config import read_model_config

    assert sorted(STUDY.methods) == sorted([*METHODS, "milora_letter"])
    counts = require_equal_budgets(STUDY, adapter_shape(read_model_config(Path(STUDY.base.model.path))))
    assert max(counts.values()) / min(counts.values()) < 1.03
    wide = dataclasses.replace(
        STUDY, methods={**STUDY.methods, "ia3": AdapterSection(method="ia3", width=400)}
    )
    with pytest.raises(
        UserError, match=r"tunable parameters of study method 'ia3' is .*: expected within 3%"
    ):
        require_equal_budgets(wide, adapter_shape(read_model_config(Path(STUDY.base.model.path))))


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMPARISONS)
def test_cells_differ_in_what_they_compare_and_in_nothing_else(name):
    cells = COMPARISONS[name].plan(STUDY, 2, CHOSEN)
    chooses, made = name == "defaults", {cell.variant for cell in COMPARISONS[name].plan(STUDY, 1, CHOSEN)}
    assert {cell.seed for cell in cells} == ({1000, 1001} if chooses else {0, 1})
    assert all(cell.scored != chooses for cell in cells), "what chooses must not see the test rows"
    for cell in cells:
        same = dataclasses.replace(cell.config, adapter=STUDY.base.adapter, data=STUDY.base.data)
        steps = STUDY.mixed_steps if cell.trained_on == MIXED else STUDY.base.train.max_steps
        rate = cell.config.train.learning_rate
        assert rate == 1e-3 or name == "defaults"
        train = dataclasses.replace(
            STUDY.base.train,
            coefficient_every=STUDY.coefficient_every.get(cell.method, STUDY.base.train.coefficient_every),
            seed=cell.seed,
            learning_rate=rate,
            coefficient_learning_rate=STUDY.coefficient_ratio * rate,
            max_steps=steps,
            router_rate=cell.config.train.router_rate,
        )
        if COMPARISONS[name].converged:
            train = STUDY.converged.budget(cell.trained_on).applied(train)
        assert same == dataclasses.replace(STUDY.base, train=train)
        assert cell.config.data == STUDY.data_of(cell.trained_on)
    if name == "table1":
        assert len({cell.name for cell in cells}) == len(cells) == 14 * 5 * 2
    if name in ("converged", "routing"):
        assert len({cell.name for cell in cells}) == len(cells) == len(made) * 6 * 2
        assert {cell.forced for cell in cells if cell.variant == "milora"} == {True}
        assert not any(cell.forced for cell in cells if cell.variant != "milora")


@pytest.mark.thorough
def test_equal_runs_of_two_tables_are_one_cell():
    by_table = {name: {c.name for c in made.plan(STUDY, 1, CHOSEN)} for name, made in COMPARISONS.items()}
    assert by_table["figure2"] <= by_table["table2"]
    assert len(by_table["table1"] & by_table["table2"]) == 5 * 5
    assert len(by_table["converged"] & by_table["routing"]) == 6, "the subject is trained once"
    assert not by_table["converged"] & by_table["table2"], "another budget is another cell"
    for name in ("table5", "figure3", "figure4", "figure5"):
        assert len(by_table["table1"] & by_table[name]) >= 2, name


def test_the_same_run_at_another_rate_or_seed_is_another_cell():
    def names(seeds, rate):
        cells = plans.figure2(STUDY, seeds, Chosen(rates={**RATES, "milora": rate}))
        return {cell.name for cell in cells}

    assert len(names(3, 1e-3)) == 3
    assert not names(3, 1e-3) & names(3, 2e-3)


@pytest.mark.thorough
def test_cells_and_studies_are_known_by_content_not_by_place(tmp_path):
    """A clone that moves keeps its finished cells; other rows under the old name are another study."""
    data = STUDY.base.data
    home = Path(data.train.split(",")[0].split("=")[1]).parents[1]
    shutil.copytree(home, tmp_path / "tasks")
    texts = {
        s: getattr(data, s).replace(str(home), str(tmp_path / "tasks")) for s in ("train", "dev", "test")
    }
    base = dataclasses.replace(STUDY.base, data=dataclasses.replace(data, **texts))
    moved = dataclasses.replace(STUDY, base=base)
    for one, other in zip(plans.table2(STUDY, 1, CHOSEN), plans.table2(moved, 1, CHOSEN), strict=True):
        assert one.name == other.name
        assert one.config != other.config
    claim_study(tmp_path / "study", STUDY)
    claim_study(tmp_path / "study", moved)
    with (tmp_path / "tasks" / "word_order" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "x", "output": "y", "answer": "y"}) + "\n")
    with pytest.raises(UserError, match=r"rows_fingerprint.test is '\w+' there"):
        claim_study(tmp_path / "study", moved)


@pytest.mark.thorough
def test_compiled_programs_make_room_before_a_process_has_too_many(monkeypatch, tmp_path):
    from milora_jax.evaluation.study import cells

    maps = tmp_path / "maps"
    monkeypatch.setattr(cells, "MAPS", maps)
    assert cells.memory_maps() == 0
    compiled = jax.jit(lambda x: x + 1)
    compiled(1.0)
    runner = cells.CellRunner(tmp_path, print)
    runner._steps["anything"] = None
    maps.write_text("a map\n" * cells.MOST_MAPS)
    runner._make_room()
    assert runner._steps
    assert compiled._cache_size() == 1
    maps.write_text("a map\n" * (cells.MOST_MAPS + 1))
    runner._make_room()
    assert not runner._steps
    assert compiled._cache_size() == 0


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what a process maps")
def test_forgetting_programs_gives_their_memory_maps_back(monkeypatch, tmp_path):
    from milora_jax.evaluation.study import cells

    programs = [jax.jit(lambda x, i=i: jax.numpy.sin(x @ x + i).sum()) for i in range(20)]
    jax.jit(lambda x: jax.numpy.sin(x @ x).sum())(np.ones((7, 7), np.float32))  # the compiler's own maps
    before = cells.memory_maps()
    for i, program in enumerate(programs):
        program(np.ones((8 + i, 8 + i), np.float32))
    held = cells.memory_maps()
    # Three maps each, but the kernel joins some that happen to be neighbours.
    assert held > before + 2 * len(programs)
    programs.clear()
    monkeypatch.setattr(cells, "MOST_MAPS", 0)
    cells.CellRunner(tmp_path, print)._make_room()
    assert cells.memory_maps() < before + (held - before) / 2


def test_a_curve_is_compared_with_the_studys_own_setting(tmp_path):
    subject = STUDY.methods["milora"]
    names = {
        "figure3": [f"k={k}" for k in (1, 3, 7)],
        "figure4": ["lambda=0", "lambda=0.01"],
        "figure5": ["milora r=9", f"milora r={subject.rank}", "lora r=9"],
    }
    own = {"figure3": "k=3", "figure4": "lambda=0", "figure5": f"milora r={subject.rank}"}
    for name, variants in names.items():
        found = Results.of(rows({variant: {"a": [0.1, 0.2]} for variant in variants}))
        assert f"| {own[name]} leads by |" in COMPARISONS[name].render(found, STUDY, tmp_path)


def test_rows_of_a_mixed_run_come_in_the_order_of_the_tasks():
    from milora_jax.evaluation.study.runner import _rows

    cell = plans.figure2(STUDY, 1, CHOSEN)[0]
    result = {"accuracy": dict.fromkeys(sorted(STUDY.tasks), 0.5)}
    assert [row["task"] for row in _rows(cell, result)] == list(STUDY.tasks)
    assert list(STUDY.tasks) != sorted(STUDY.tasks)


def test_data_of_a_task_is_that_task():
    data = STUDY.data_of("completion")
    for split in (data.train, data.dev, data.test):
        assert split.startswith("completion=")
        assert "," not in split
    assert STUDY.data_of(MIXED) == STUDY.base.data


def test_a_study_of_some_tasks_has_the_columns_of_those():
    columns = 'input=input,true_false:output=output,completion:system="x"'
    data = dataclasses.replace(STUDY.base.data, columns=columns)
    study = dataclasses.replace(STUDY, base=dataclasses.replace(STUDY.base, data=data))
    assert study.data_of("completion").columns == 'input=input,completion:system="x"'
    assert study.data_of(MIXED).columns == columns
    base = dataclasses.replace(STUDY.base, data=dataclasses.replace(data, columns="x:input=a"))
    with pytest.raises(UserError, match="there is no source 'x'"):
        dataclasses.replace(study, base=base)


def test_some_tasks_and_methods():
    some = narrowed(STUDY, "completion, true_false", "lora,milora")
    assert some.tasks == ("true_false", "completion")
    assert list(some.methods) == ["lora", "milora"]
    assert some.mixed_methods == ("lora", "milora")
    assert some.varied_tasks == ("completion", "true_false"), "none of its own is left"
    assert some.converged.methods == ("lora", "milora")
    assert some.converged.tuned_on == ()
    assert narrowed(STUDY, "", "") == STUDY
    assert narrowed(STUDY, "completion", "").varied_tasks == ("completion",)
    rehearsal = quick(STUDY)
    assert len(rehearsal.tasks) == 2
    assert rehearsal.base.train.max_steps < STUDY.base.train.max_steps
    assert rehearsal.methods == STUDY.methods


MISTAKES = {
    "method": (["table1", "--methods", "lora,miLora"], "--methods is 'miLora': expected one of"),
    "task": (["table1", "--tasks", "true_fals"], "did you mean 'true_false'?"),
    "needed method": (["table1", "--methods", "dora"], "expected a list with 'lora', which others need"),
    "seeds": (["table1", "--seeds", "0"], "--seeds is 0: expected at least 1"),
    "config": (["table1"], "has no get_study()"),
    "table": (["table9"], "command line: argument name: invalid choice: 'table9'"),
    "many seeds": (["table1", "--seeds", "2000"], "expected at most the study's tuning_seed 1000"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, refused):
    arguments, message = MISTAKES[name]
    config = ROOT / ("configs/tiny.py" if name == "config" else "configs/study_tiny.py")
    assert message in refused(main, "study", *arguments, "--config", config, "--workdir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_at_their_defaults_do_not_name_a_cell():
    assert changed_settings(Config()) == {}
    written_out = full_settings(build_method(AdapterSection(method="milora", top_k=5)))
    config = Config(adapter=written_out, train=TrainSection(seed=3), model=ModelSection(path="elsewhere"))
    assert changed_settings(config) == {"adapter.top_k": 5, "train.seed": 3}


@pytest.mark.thorough
def test_a_study_from_before_a_setting_is_continued_while_the_setting_is_at_its_default(tmp_path):
    claim_study(tmp_path, STUDY)
    path = tmp_path / "study.json"
    older = json.loads(path.read_text())
    del older["base"]["train"]["weight_decay"], older["methods"]["milora"]["features"]
    del older["forced_rows"], older["converged"]["alone"]
    path.write_text(json.dumps(older))
    claim_study(tmp_path, STUDY)
    train = dataclasses.replace(STUDY.base.train, weight_decay=0.1)
    decayed = dataclasses.replace(STUDY, base=dataclasses.replace(STUDY.base, train=train))
    with pytest.raises(UserError, match=r"base.train.weight_decay is 0.0 there and 0.1 now"):
        claim_study(tmp_path, decayed)
    assert json.loads(path.read_text()) == older


@pytest.mark.thorough
def test_a_directory_of_another_study_is_refused_and_kept(tmp_path):
    claim_study(tmp_path, STUDY)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "result.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    claim_study(tmp_path, STUDY)
    other = dataclasses.replace(STUDY, mixed_steps=7)
    with pytest.raises(UserError, match=r"another config: mixed_steps is 300 there and 7 now"):
        claim_study(tmp_path, other)
    methods = {**STUDY.methods, "lora": AdapterSection(method="lora", rank=36, alpha=72.0)}
    with pytest.raises(UserError, match=r"methods.lora.alpha is 0.0 there and 72.0 now"):
        claim_study(tmp_path, dataclasses.replace(STUDY, methods=methods))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


CONVERGED = STUDY.converged
assert CONVERGED is not None


def test_a_budget_that_no_run_can_stop_early_in_is_refused():
    with pytest.raises(UserError, match="max_steps is 200: expected at least 220"):
        Budget(max_steps=200, batch_size=8, eval_every=20, patience=10)
    with pytest.raises(UserError, match="1 first: the learning rate is chosen at it"):
        dataclasses.replace(CONVERGED, scales=(0.5, 1.0))


def test_a_study_that_makes_no_sense_is_refused():
    for change, message in (
        ({"reference": "lara"}, "did you mean 'lora'"),
        ({"varied_tasks": ("nothing",)}, "study task is 'nothing'"),
        ({"learning_rates": ()}, "learning_rates"),
        ({"mixed_steps": -1}, "mixed_steps"),
        ({"mixed_methods": ("lora",)}, "expected a list with 'milora'"),
        ({"coefficient_every": {"spp": 1}}, "did you mean 'ssp'"),
        ({"choices": {"k": {"topk": 1}}}, "a setting of study choice 'k' is 'topk'.*did you mean 'top_k'"),
        ({"converged": dataclasses.replace(CONVERGED, methods=("lora",))}, "expected a list with 'milora'"),
        ({"converged": dataclasses.replace(CONVERGED, methods=("lara",))}, "did you mean 'lora'"),
        ({"converged": dataclasses.replace(CONVERGED, tuned_on=("x",))}, "study converged tuned_on is 'x'"),
        ({"converged": dataclasses.replace(CONVERGED, alone=("x",))}, "study converged alone is 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(STUDY, **change)
    data = dataclasses.replace(STUDY.base.data, dev="other=x.json")
    with pytest.raises(UserError, match="sources of the same tasks"):
        dataclasses.replace(STUDY, base=dataclasses.replace(STUDY.base, data=data))


SINGLE = {
    "lora": {"a": [0.5, 0.6, 0.9], "b": [0.2, 0.2, 0.2]},
    "milora": {"a": [0.6, 0.7, 1.0], "b": [0.4, 0.4, 0.4]},
}
MIX = {**SINGLE, "lora": {"a": [0.4, 0.5, 0.8], "b": [0.2, 0.2, 0.2]}}


def test_tables_by_hand():
    results = Results.of([*rows(SINGLE), *rows(MIX, MIXED)])
    table = comparison(results, "milora", results.places(mixed=False), counts=True).splitlines()
    assert table[0] == (
        "| variant | tunable | active | rate | a | b | mean | milora leads by | test loss "
        "| that of milora is higher by | in percent | dev loss | scored |"
    )
    # The same lead in every seed, though not in every row.
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:7] == ["lora", "1,000", "400", "0.001", "60.0", "20.0", "40.0"]
    assert cells[7].startswith("+15.0 [")
    assert cells[8:10] == ["0.783", "-0.075 [-0.075, -0.075]"]
    assert cells[10].startswith("-9.6 [")
    assert cells[11:] == ["0.693", "6"]
    mixed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in mixing(results).splitlines()[2:]]
    assert mixed[0][:3] == ["lora", "40.0", "35.0"]
    assert mixed[0][3].startswith("-5.0 [")
    assert mixed[0][4:6] == ["0.783", "0.808"]
    assert mixed[1] == ["milora", "55.0", "55.0", "+0.0 [0.0, 0.0]", "0.708", "0.708", "+0.0 [0.0, 0.0]"]


def test_counts_are_those_of_the_rows_a_table_shows():
    mixed = rows(MIX, MIXED, active_parameters=999.0)
    results = Results.of([*rows(SINGLE), *mixed])
    for is_mixed, active in ((False, "400"), (True, "999")):
        table = comparison(results, "milora", results.places(mixed=is_mixed), counts=True)
        assert all(f"| 1,000 | {active} |" in line for line in table.splitlines()[2:])


def test_rows_are_paired_by_seed_in_whatever_order_they_come():
    shuffled = rows(SINGLE)
    np.random.default_rng(0).shuffle(shuffled)
    places = [("a", "a"), ("b", "b")]
    assert Results.of(shuffled).lead("milora", "lora", places) == Results.of(rows(SINGLE)).lead(
        "milora", "lora", places
    )


def test_a_diverged_run_counts_as_nothing_right():
    nothing = {ROUTED: RowScores(np.full(10, np.inf), np.full(10, 2.0), np.zeros(10), np.zeros(10))}
    bad = rows({"lora": {"a": [0.0]}}, dev_perplexity=None, loss=None, scores=nothing, diverged="why")
    results = Results.of([*bad, *rows({"milora": {"a": [0.5]}})])
    assert results.dev_loss("lora", [("a", "a")]) == np.inf
    line = comparison(results, "milora", results.places(), counts=False).splitlines()[2]
    assert line.endswith("| inf | diverged | diverged | inf | 1 (1 diverged) |")
    assert "| +50.0 [" in line


def test_the_routers_of_a_table_are_told_of():
    seen = {"common": 0.5, "agree": 0.75, "blind": 0.0, "spread": 1.25, "largest": 3.0}
    routed = [{**row, "routing": seen} for row in rows({"milora": {"a": [0.5], "b": [0.5]}})]
    table = routes(Results.of([*rows({"lora": {"a": [0.5]}}), *routed])).splitlines()
    assert table[2:] == ["| milora | single tasks | 50% | 75% |  | 0% |  | 1.25 | 3.0 |"]
    assert routes(Results.of(rows(SINGLE))) == ""


def test_the_chosen_rate_is_bold():
    table = tuned({"lora": {rate: rate for rate in STUDY.learning_rates}}, STUDY.learning_rates)
    assert table.splitlines()[2].startswith("| lora | **0.001** | 0.003 |")


def test_plots_are_drawn(tmp_path):
    results = Results.of(rows(SINGLE))
    places = results.places()
    plot_bars(tmp_path / "bars.png", results, places, "title")
    plot_lines(tmp_path / "lines.png", results, places, {"": [("1", "lora"), ("2", "milora")]}, "k")
    plot_shares(tmp_path / "shares.png", results, "milora", places, 3)
    for name in ("bars", "lines", "shares"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
