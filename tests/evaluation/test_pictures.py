"""No picture clips what is written on it, whatever its number of tasks and layers."""

import json
from unittest import mock
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib.figure import Figure

from milora_jax.evaluation import routing_plots
from milora_jax.evaluation.report import plot_health, plot_routing
from milora_jax.evaluation.routing import Routes, TaskRouting
from milora_jax.evaluation.score import TaskScore
from milora_jax.evaluation.study import plots
from milora_jax.evaluation.study.tables import Results

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge")
FEW = [(1, 4), (1, 32), (2, 4)]
OTHERS = [
    (tasks, layers) for tasks in (1, 2, 3, 5, 7) for layers in (4, 12, 30, 32) if (tasks, layers) not in FEW
]
RNG = np.random.default_rng(0)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, laid out."""
    figures = []

    def save(figure, path, dpi):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def boxes(figure):
    """What is written and drawn: the title, the caption, and every panel with its labels and ticks."""
    renderer = figure.canvas.get_renderer()
    texts = [text for text in (figure._suptitle, figure._supxlabel) if text is not None]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    return [text.get_window_extent(renderer) for text in texts], [p.get_tightbbox(renderer) for p in panels]


def assert_whole(figure):
    texts, panels = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    assert panels
    for box in (*texts, *panels):
        assert box.x0 >= -0.5, figure.get_size_inches()
        assert box.y0 >= -0.5, figure.get_size_inches()
        assert box.x1 <= width + 0.5, figure.get_size_inches()
        assert box.y1 <= height + 0.5, figure.get_size_inches()
    for text in texts:
        assert not any(text.overlaps(panel) for panel in panels), "written over a panel"


def share(layers):
    return RNG.dirichlet(np.ones(7), layers)


def score_of(task, share):
    return Mock(spec=TaskScore, task=task, expert_share=share, predictions=[None] * 9999)


def draw_tasks(tmp_path, tasks, layers):
    """Every picture whose size depends on tasks and layers."""
    names = TASKS[:tasks]
    assert plot_routing(tmp_path / "routing.png", [score_of(task, share(layers)) for task in names])
    found = [TaskRouting(task, 9999, 3, share(layers), *RNG.random((3, layers))) for task in names]
    routing_plots.plot_shares(tmp_path / "shares.png", found)
    routing_plots.plot_decisions(tmp_path / "decisions.png", found)
    probs = RNG.random((tasks, layers, 7))
    routes = {task: Routes(weights=1.0 * (probs > 0.95), probs=probs) for task in names}
    with mock.patch.object(routing_plots, "STRIPS", 2):
        routing_plots.plot_strips(tmp_path / "strips.png", routes)
    routing_plots.plot_distances(tmp_path / "distances.png", names, RNG.random((tasks, tasks)))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "shapes", [FEW, pytest.param(OTHERS, marks=pytest.mark.thorough)], ids=["few", "others"]
)
def test_titles_captions_and_labels_lie_inside(drawn, tmp_path, shapes):
    for tasks, layers in shapes:
        draw_tasks(tmp_path, tasks, layers)
    assert len(drawn) == 5 * len(shapes)
    for figure in drawn:
        assert_whole(figure)


def test_a_bar_has_the_unit_of_the_cells(drawn, tmp_path):
    assert plot_routing(tmp_path / "routing.png", [score_of("boolq", np.full((4, 7), 0.5))])
    panel, bar = drawn[0].axes
    assert [text.get_text() for text in panel.texts] == ["50"] * 28
    assert panel.images[0].get_array().max() == 50
    assert bar.get_ylim() == (0, 100)
    assert bar.get_ylabel().startswith("percent")


@pytest.mark.sweep("4")
@pytest.mark.parametrize("layers", [4, 32])
def test_the_picture_of_routing_health_is_whole(drawn, tmp_path, layers):
    path = tmp_path / "metrics.jsonl"
    line = {
        "step": 50,
        "route_entropy": [1.0] * layers,
        "expert_first": share(layers).tolist(),
        "route_margin": [0.1] * layers,
        "route_changed": None,
        "route_common": RNG.random(layers).tolist(),
        "pooler_share": RNG.random(layers).tolist(),
    }
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "step": 100, "route_changed": 0.5}))
    assert plot_health(tmp_path / "health.png", path)
    assert_whole(drawn[0])


@pytest.mark.sweep("2")
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_the_pictures_of_a_study_are_whole(drawn, tmp_path, tasks):
    places = [("mix", task) for task in TASKS[:tasks]]
    variants = ["milora", "milora without its load-balance loss"]
    row = {"expert_share": share(32).tolist(), "accuracy": 0.5}
    results = Results({variant: {place: [row] for place in places} for variant in variants})
    plots.plot_bars(tmp_path / "bars.png", results, places, "every method, " * 8)
    lines = {variant: [(str(k), variant) for k in range(1, 8)] for variant in variants}
    plots.plot_lines(tmp_path / "lines.png", results, places, lines, "k, experts of a layer in force")
    plots.plot_shares(tmp_path / "figure2.png", results, "milora", places, 3)
    for figure in drawn:
        assert_whole(figure)
        assert figure.get_figwidth() < 14
