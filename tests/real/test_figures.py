"""The page of figures can be made again from the figures."""

import pytest

from tests.real.figures import BEGIN, END, PAGE, Figure, read_figures, with_figures

FIGURES = [Figure("texts", "a difference", 1.25e-4, "< 1e-3"), Figure("speed", "tokens per second", 81.0)]


def test_the_last_of_several_measurements_counts_and_is_shown():
    lines = [figure.to_json() for figure in [Figure("texts", "a difference", 7.0), *FIGURES]]
    assert read_figures(lines) == FIGURES
    made = with_figures(f"before\n{BEGIN}\nold\n{END}\nafter\n", FIGURES)
    assert made.splitlines() == [
        "before",
        BEGIN,
        "| part | figure | value | required |",
        "|---|---|---|---|",
        "| texts | a difference | 0.000125 | < 1e-3 |",
        "| speed | tokens per second | 81 |  |",
        END,
        "after",
    ]


def test_the_page_has_a_place_for_them():
    assert with_figures(PAGE.read_text(), FIGURES) != PAGE.read_text()
    with pytest.raises(ValueError, match="no <!-- figures -->"):
        with_figures("nothing", FIGURES)
