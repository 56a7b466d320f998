"""Scores of single test rows, and the routes that replace a prompt's own."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.config import Config, EvalSection, MeshSection
from milora_jax.data.packing import Rows
from milora_jax.data.records import Record
from milora_jax.data.tokens import Example, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.evaluation.likelihood import log_likelihoods
from milora_jax.evaluation.loss import encode_responses, response_loss
from milora_jax.evaluation.routing import route_prompts
from milora_jax.evaluation.study import forced, plans, tuning
from milora_jax.evaluation.study.cells import CellRunner
from milora_jax.evaluation.study.convergence import render_routing, tuning_tables
from milora_jax.evaluation.study.plans import RANDOM_MASK, RANDOM_ROUTER
from milora_jax.evaluation.study.rows import ROUTED, Encoded, RowScores, read_scores, write_scores
from milora_jax.evaluation.study.settings import MIXED, quick
from milora_jax.evaluation.study.tables import Results, mixing
from milora_jax.evaluation.study.tuning import SINGLE, Chosen, Point, choose, keys_of
from milora_jax.parallel.mesh import make_mesh
from milora_jax.training.prepare import Run
from tests.evaluation.study_rows import STUDY
from tests.evaluation.study_rows import rows as rows_of
from tests.models import write_hf_directory
from tests.storage.adapters import noisy_adapter

VARIANTS = ("milora", RANDOM_ROUTER, RANDOM_MASK)

RECORDS = [
    Record(f"{'add ' * (3 * i)}{i}", "", f"It is {'very ' * (i % 3)}{i}" if i != 2 else "", "7")
    for i in range(6)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, of which scoring reads no training rows, and an adapter; the third test row has no output."""
    path = tmp_path_factory.mktemp("model")
    write_hf_directory(path)
    base, model = load_base(path, decode=True)
    stored = noisy_adapter(load_base(path)[0], model, "milora", gate="softmax")
    config = dataclasses.replace(Config(), eval=EvalSection(batch_size=4))
    dev = Rows([Example(np.arange(5, 14), 6 + i, "task" if i % 2 else "other") for i in range(4)], None)
    made = Run(
        config=config,
        model=model,
        base=base,
        tokenizer=load_tokenizer(str(path)),
        mesh=make_mesh(MeshSection(data=1), jax.devices()[:1]),
        train=dev,
        dev=dev,
        tests={},
        data_fingerprint="",
        token_fingerprint="",
        base_fingerprint="",
    )
    return made, adapter_decode_layout(stored, base)


@pytest.mark.thorough
def test_a_row_keeps_its_place_and_their_mean_is_the_loss(made):
    run, adapter = made
    encoded = Encoded(run, RECORDS)
    counts = []
    found = encoded.scores(run, run.base, adapter, None, counts.append)
    assert counts == [4, 1]
    assert found.tokens[2] == found.nll[2] == found.exact[2] == 0
    assert (found.tokens[[0, 1, 3, 4, 5]] > 0).all()
    responses = encode_responses(run.tokenizer, RECORDS, run.model, run.config.data.prompt_format)
    whole = response_loss(run.base, run.model, adapter, responses, 4, advance=lambda _: None)
    assert found.loss == pytest.approx(whole.mean, rel=1e-6)
    alone = Encoded(run, RECORDS[4:5]).scores(run, run.base, adapter, None, counts.append)
    np.testing.assert_allclose(alone.nll, found.nll[4:5], rtol=1e-5)


@pytest.mark.thorough
def test_a_forced_route_is_the_route(made):
    run, adapter = made
    passages = Encoded(run, RECORDS).passages
    prompts = [passage.tokens[: passage.prompt] for passage in passages]
    own = route_prompts(run.base, run.model, adapter, prompts, rows=4).weights

    def found(routes):
        results = {}
        for batch in log_likelihoods(run.base, run.model, adapter, passages, 4, routes=routes):
            results |= batch
        return np.array([results[i].log_probability for i in range(len(passages))])

    np.testing.assert_allclose(found(own), found(None), rtol=1e-6)
    nothing = response_loss(
        run.base,
        run.model,
        None,
        encode_responses(run.tokenizer, RECORDS, run.model, run.config.data.prompt_format),
        4,
        advance=lambda _: None,
    )
    tokens = sum(passage.scored for passage in passages)
    assert -found(np.zeros_like(own)).sum() / tokens == pytest.approx(nothing.mean, rel=1e-5)
    swapped = own[::-1].copy()
    assert (np.abs(found(swapped) - found(own)) > 1e-4).any()


@pytest.mark.thorough
def test_every_replaced_route_is_what_it_says(made):
    run, adapter = made
    rows = {"task": Encoded(run, RECORDS), "other": Encoded(run, RECORDS[:2])}
    own = {
        task: route_prompts(
            run.base, run.model, adapter, [p.tokens[: p.prompt] for p in each.passages]
        ).weights
        for task, each in rows.items()
    }
    found = forced._replaced(run, run.base, adapter, own)
    pool = np.concatenate(list(own.values()))
    for task, mine in own.items():
        assert list(found[task]) == list(forced.FORCED)
        assert all(routes.shape == mine.shape for routes in found[task].values())
        assert len(np.unique(found[task][forced.COMMON], axis=0)) == 1
        randoms = found[task][forced.RANDOM]
        np.testing.assert_allclose(np.sort(randoms, axis=-1), np.sort(mine, axis=-1))
        assert (randoms != mine).any()
    np.testing.assert_array_equal(found["task"][forced.COMMON_ANY][0], found["other"][forced.COMMON_ANY][0])
    together = np.concatenate([found[task][forced.SWAPPED_ANY] for task in own])
    np.testing.assert_allclose(np.sort(together.ravel()), np.sort(pool.ravel()))
    alone = forced._replaced(run, run.base, adapter, {"task": own["task"]})
    assert list(alone["task"]) == [forced.SWAPPED, forced.COMMON, forced.RANDOM]
    scores = forced.forced_scores(run, run.base, adapter, rows, lambda _: None)
    assert list(scores) == list(forced.FORCED)
    assert {len(each.nll) for tasks in scores.values() for each in tasks.values()} == {6, 2}


def test_forced_routes_are_compared_on_the_rows_they_were_scored_on(tmp_path):
    """The rows after the first ``forced_rows`` change nothing in the table of forced routes."""

    def table(last):
        both = [rows_of({v: {"a": [0.5], "b": [0.5]} for v in VARIANTS}, where) for where in (None, MIXED)]
        made = [row for rows in both for row in rows]
        for row in made:
            own = row["scores"][ROUTED]
            row["scores"] = {ROUTED: dataclasses.replace(own, nll=np.append(own.nll[:-1], last))}
            row["scores"] |= {name: own.first(4) for name in forced.FORCED}
        study = dataclasses.replace(STUDY, forced_rows=4)
        return render_routing(Results.of(made), study, tmp_path).split("| trained |")[0]

    text = table(1.5)
    assert text == table(99.0)
    assert f"| {forced.SWAPPED} | 0.750 | +0.000" in text


def test_forced_rows_are_a_number_of_rows():
    with pytest.raises(UserError, match="forced_rows"):
        dataclasses.replace(STUDY, forced_rows=-1)


def test_a_cycle_gives_every_prompt_the_route_of_another_one():
    routes = np.arange(9.0)[:, None, None] * np.ones((9, 2, 7))
    given = forced.next_in_a_cycle(np.random.default_rng(0), routes)
    assert (given != routes).all()
    assert sorted(given[:, 0, 0]) == list(range(9))


def test_scores_survive_the_file(tmp_path):
    diverged = RowScores(np.full(2, np.inf), np.array([3.0, 4.0]), np.zeros(2), np.zeros(2))
    good = RowScores(np.array([0.125, 2.0]), np.array([3.0, 4.0]), np.array([1.0, 0.0]))
    write_scores(tmp_path, {"routed": {"a": diverged, "b": good}})
    found = read_scores(tmp_path)["routed"]
    for one, other in ((found["a"], diverged), (found["b"], good)):
        for field in dataclasses.fields(RowScores):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert diverged.loss is None
    assert good.loss == pytest.approx(2.125 / 7)


def test_the_rate_is_chosen_first_and_then_the_scale_for_tasks_and_mix_apart():
    asked = []

    def losses_of(groups, title):
        asked.append((title, groups))
        losses = []
        for group in groups:
            (rate,) = {cell.config.train.learning_rate for cell in group}
            (scale,) = {cell.config.adapter.alpha / cell.config.adapter.rank for cell in group}
            best = 3e-3 if group[0].trained_on == MIXED else 1e-3
            losses.append(abs(np.log(rate / best)) + abs(scale - 2.0))
        return losses

    keys = [("lora", SINGLE), ("milora", MIXED)]
    rates, scales = (3e-4, 1e-3, 3e-3, 1e-2), (1.0, 0.5, 2.0)
    terms = dataclasses.replace(STUDY.converged, learning_rates=rates, scales=scales)
    chosen = choose(dataclasses.replace(STUDY, converged=terms), [], keys, losses_of)
    assert chosen.points == {("lora", SINGLE): Point(1e-3, 2.0), ("milora", MIXED): Point(3e-3, 2.0)}
    assert [title for title, _ in asked] == ["tuning to convergence", "tuning the scale"]
    cells = [cell for _, groups in asked for group in groups for cell in group]
    assert all(not cell.scored and cell.seed >= STUDY.tuning_seed for cell in cells)
    assert {cell.trained_on for cell in cells if cell.method == "lora"} == set(STUDY.converged.tuned_on)
    assert {cell.trained_on for cell in cells if cell.method == "milora"} == {MIXED}
    assert keys_of(cells) == ([], keys)
    at_one = {cell.name for cell in cells if cell.config.adapter.alpha == cell.config.adapter.rank}
    assert len(at_one) == 2 * 4 + 4, "the chosen rate at scale 1 is trained once"
    assert tuning.at_the_edge(2.0, chosen.scale_losses["lora", SINGLE])
    assert not tuning.at_the_edge(1e-3, chosen.converged_rate_losses["lora", SINGLE])


def test_tasks_of_the_mix_need_not_be_trained_on_alone():
    terms = dataclasses.replace(STUDY.converged, alone=("word_order",), tuned_on=())
    study = dataclasses.replace(STUDY, converged=terms)
    for plan in (plans.converged, plans.routing):
        assert {cell.trained_on for cell in plan(study, 1, Chosen.nothing(STUDY))} == {"word_order", MIXED}
    assert {cell.trained_on for cell in plans.table1(study, 1, Chosen.nothing(STUDY))} == set(STUDY.tasks)
    found = rows_of({"lora": {"a": [0.5], "b": [0.5]}}, MIXED) + rows_of({"lora": {"b": [0.2]}})
    assert Results.of(found).both_ways() == ([(MIXED, "b")], [("b", "b")])
    assert "| lora | 20.0 | 50.0 | +30.0 " in mixing(Results.of(found))


def test_shares_of_experts_need_answers():
    with pytest.raises(UserError, match="study generate is False: expected True, for figure2"):
        plans.figure2(dataclasses.replace(STUDY, generate=False), 1, Chosen.nothing(STUDY))


def test_a_grid_of_one_value_is_that_value_without_a_run():
    terms = dataclasses.replace(STUDY.converged, learning_rates=(2e-3,), scales=(1.0,))
    study = dataclasses.replace(STUDY, converged=terms, learning_rates=(4e-3,))
    key = ("lora", SINGLE)
    chosen = choose(study, ["lora"], [key], lambda groups, title: pytest.fail("nothing is to be chosen"))
    assert (chosen.rates, chosen.points) == ({"lora": 4e-3}, {key: Point(2e-3, 1.0)})
    cell = plans.converged(study, 1, Chosen.nothing(study))[0]
    assert tuning_tables([cell], study, chosen)[0] == "Chosen:"


@pytest.mark.thorough
def test_rows_that_are_not_answered_are_right_where_decoding_would_write_the_output(tmp_path):
    study = quick(dataclasses.replace(STUDY, generate=False))
    rows_of_a_batch = dataclasses.replace(study.base.eval, batch_size=24)  # over eight devices
    study = dataclasses.replace(study, base=dataclasses.replace(study.base, eval=rows_of_a_batch))
    cell = plans.converged(study, 1, Chosen.nothing(study))[0]
    runner = CellRunner(tmp_path, lambda line: None)
    (tmp_path / cell.name).mkdir()
    runner.run(cell, lambda: False)
    found, scores = runner.result(cell), read_scores(tmp_path / cell.name)[ROUTED]
    for task, each in scores.items():
        np.testing.assert_array_equal(each.correct, each.exact)
        assert found["accuracy"][task] == each.exact.mean()
    assert dataclasses.replace(cell, generate=True).name != cell.name


def test_a_method_that_diverges_everywhere_is_refused():
    with pytest.raises(UserError, match="'lora' diverged at every one of"):
        choose(STUDY, ["lora"], [], lambda groups, title: [float("inf")] * len(groups))


def test_the_rows_of_the_study_lie_where_it_says():
    for source in STUDY.base.data.test.split(","):
        assert Path(source.split("=", 1)[1]).is_file()
