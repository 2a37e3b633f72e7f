"""Pictures and tables hold every curve, and say what they show."""

import matplotlib.figure
import pytest

from runtime.curves import paired_differences, summarise
from runtime.plots import (
    COLOURS,
    METHODS,
    colours_of,
    draw_curves,
    labels_of,
    table,
    variance_table,
)
from tests.runtime.test_curves import BUDGETS, random_columns


def curve(sets, seed=0):
    columns = {name: random_columns(12, seed + i) for i, name in enumerate(sets)}
    return {"budgets": list(BUDGETS), **summarise(columns, BUDGETS, 0)}, columns


@pytest.mark.parametrize("sets", [["a"], ["a", "b", "c", "d", "e"]])
def test_a_picture_shows_the_mean_and_every_set_with_labels(sets, tmp_path, monkeypatch):
    seen = []
    save = matplotlib.figure.Figure.savefig

    def spy(figure, *args, **kwargs):
        for axes in figure.axes:
            seen.append(
                (
                    axes.get_title("left"),
                    len(axes.lines),
                    len(axes.collections),
                    [t.get_text() for t in axes.texts],
                )
            )
        assert all(axes.get_ylim() == (0, 1) for axes in figure.axes)  # the same for all sets
        assert figure.get_figwidth() * 100 == 720 and figure.get_facecolor() == (1, 1, 1, 1)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    draw_curves({"before": curve(sets)[0], "after": curve(sets, 5)[0]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert len(seen) == (1 if len(sets) == 1 else 6)
    assert all((lines, bands) == (2, 2) for _, lines, bands, _ in seen)
    title, _, _, texts = seen[0]
    assert ("(a)" if len(sets) == 1 else "mean of 5 sets") in title
    assert any("before" in t for t in texts) and any("after" in t for t in texts)
    assert any("standard error over questions" in t for t in texts)


def test_points_stand_where_stopping_comes_to(tmp_path, monkeypatch):
    """In the figure for k' = 1; a row of the table for each, and for thinking to the end."""
    described, seen = curve(["a"])[0], []
    stopping = {"patience": [0, 1, 1, 2], "agree": [1, 1, 2, 1]}
    numbers = {"accuracy": [0.2, 0.3, 0.4, 0.5], "thinking_tokens": [10, 11, 12, 13]}
    numbers |= {"all_tokens": [50, 51, 52, 53], "difference": [0, 0.1, 0.2, 0.3]}
    for x in (described, described["sets"]["a"]):
        x |= {"stopping": stopping} | {f"stopped_{k}": v for k, v in numbers.items()}
        x["errors"] |= {f"stopped_{k}": [0.01] * 4 for k in numbers}

    def spy(figure, *args, **kwargs):
        (axes,) = figure.axes
        seen.extend(x.get_offsets().tolist()[0] for x in axes.collections[1:])  # after the band
        assert [t.get_text() for t in axes.texts][:2] == ["1", "2"]

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    draw_curves({"x": described}, tmp_path / "curve.png")
    assert seen == [pytest.approx([11, 0.3]), pytest.approx([13, 0.5])]
    rows = [line for line in table({"x": described}).splitlines() if line.startswith("| x | ")]
    assert rows[1].startswith("| x | to the end | 0.200 ± 0.010 | 10.0 ± 0.0 | 50.0 ± 0.0 |")
    assert rows[2].endswith("| 0.300 ± 0.010 | 11.0 ± 0.0 | 51.0 ± 0.0 | +0.100 ± 0.010 |")
    assert [row.split(" | ")[1] for row in rows[1:]] == ["to the end", "1", "1, 2 votes", "2"]


def test_the_variance_of_each_baseline_is_a_table_where_it_was_measured():
    figure = {
        f"residual/{name}": [0.5, 0.25, 1 / 3, None] for name in ("brpo", "group", "progress")
    }
    lines = variance_table({"x": {"variance": figure}, "y": {"variance": None}}).splitlines()
    assert lines[2] == "| x | brpo | 0.50 | 0.25 | 0.33 | - |" and len(lines) == 5
    assert variance_table({"y": {}}) == ""


def test_a_method_has_one_colour_in_every_figure():
    first, second = colours_of(["before", "grpo", "mine"]), colours_of(["ar-uniform", "x", "grpo"])
    assert first["grpo"] == second["grpo"] == METHODS["grpo"]
    assert len(set(colours_of([*METHODS, "x", "y"]).values())) == len(METHODS) + 2
    assert list(colours_of(["x", "y"]).values())[-2:] == list(COLOURS[:2])


def test_a_curve_needs_no_more_than_accuracies(tmp_path):
    """What the comparison over seeds draws: no errors but its own."""
    plain = {
        "budgets": [1, 2],
        "accuracy": [0.1, 0.9],
        "anytime_accuracy": 0.5,
        "sets": {"": {"stderr": [0.1, 0.1]}},
    }
    draw_curves({"x": plain}, tmp_path / "curve.png", band="shaded: ± 1 standard deviation")
    assert (tmp_path / "curve.png").exists()


def test_the_table_has_every_number_with_its_error_and_the_differences():
    (first, a), (second, b) = curve(["a", "b"]), curve(["a", "b"], 5)
    differences = paired_differences(a, b, BUDGETS, 0)
    text = table({"x": first, "y": second}, {"y - x": differences})
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line]
    lines = [[cell.strip() for cell in line] for line in lines]
    assert [line[:2] for line in lines[2:8]] == [
        ["x", "mean"],
        ["x", "a"],
        ["x", "b"],
        ["y", "mean"],
        ["y", "a"],
        ["y", "b"],
    ]
    value, error = first["sets"]["a"]["anytime_accuracy"], first["sets"]["a"]["errors"]
    assert lines[3][2] == f"{value:.3f} ± {error['anytime_accuracy']:.3f}"
    of = differences["mean"]["final_accuracy"]
    assert lines[11][4] == f"{of['difference']:+.3f} ± {of['stderr']:.3f}"
    assert len({len(line) for line in lines if len(line) > 1}) == 1


def test_short_labels_only_where_they_tell_models_apart():
    assert labels_of(("runs/a/model", "runs/b/model")) == {"runs/a/model": "a", "runs/b/model": "b"}
    assert labels_of(("x/a/model", "y/a/model"))["x/a/model"] == "x/a/model"
