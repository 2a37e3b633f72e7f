"""Curves as a figure, as tables in Markdown, and as lines on the terminal.

All take curves as evaluate.py makes them (curves.curve_of); a figure also takes any {"budgets",
"accuracy", "anytime_accuracy", "sets": {name: {"accuracy", "stderr"}}}.
"""

import json
import os
from pathlib import Path

import numpy as np

from runtime.config import Config, Evaluation
from runtime.curves import paired_differences, per_question

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#333333", "#d9d9d9"
# The same colour in every figure; other names take the rest in order.
METHODS = dict(zip(("ar-uniform", "grpo", "ar-linear", "ar-base"), COLOURS), before="#7f7f7f")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "figure.facecolor": "white",  # opaque: the picture reads the same on a dark page
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
QUESTIONS = "shaded: ± 1 standard error over questions (bootstrap)"
# Of the table: column, statistic, decimals.
TABLE = (
    ("anytime accuracy", "anytime_accuracy", 3),
    ("anytime index", "anytime_index", 3),
    ("final accuracy", "final_accuracy", 3),
    ("trace tokens", "thinking_tokens", 1),
    ("tokens to 90 % of final", "tokens_to_90", 1),
    ("closed", "closed", 3),
    ("overthinking", "overthinking", 3),
    ("summary tokens", "summary_tokens", 1),
)
STOPS = (  # of the table of stopping; the last: how the number is written
    ("accuracy", "stopped_accuracy", 3, ""),
    ("thinking tokens", "stopped_thinking_tokens", 1, ""),
    ("all sampled tokens", "stopped_all_tokens", 1, ""),
    ("accuracy, minus to the end", "stopped_difference", 3, "+"),
)


def labels_of(models: tuple[str, ...]) -> dict[str, str]:
    """A short name of each model: its directory's, or its run's where that is just model/."""
    short = {m: Path(m).parent.name if Path(m).name == "model" else Path(m).name for m in models}
    return short if len(set(short.values())) == len(models) else {m: m for m in models}


def colours_of(labels) -> dict[str, str]:
    """A colour of each label."""
    rest = [c for c in COLOURS if c not in [METHODS.get(label) for label in labels]]
    others = [label for label in labels if label not in METHODS]
    return METHODS | {label: rest[n % len(rest)] for n, label in enumerate(others)}


def pyplot():
    """matplotlib.pyplot without a display, imported only where something is drawn."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's shell names one that only a notebook has
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curves(curves: dict[str, dict], path: Path, band: str = QUESTIONS):
    """Accuracy over thinking budget as a PNG, 720 points wide: the mean over sets, then each set.

    `band` says in the picture what "stderr" holds.
    """
    plt = pyplot()
    names = list(dict.fromkeys(name for c in curves.values() for name in c["sets"]))
    small = names if len(names) > 1 else []
    columns = 2 if len(small) in (2, 4) else 3
    rows = -(-len(small) // columns)
    colours = colours_of(curves)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(7.2, 3.9 + 1.9 * rows), layout="constrained")
        # Two parts, so that the labels right of the upper one do not narrow the lower one.
        heights = [3.6, 1.9 * rows][: 1 + bool(small)]
        parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
        axes = parts[0].add_subplot()
        _draw_lines(axes, curves if small else _of_set(curves, names[0]), colours)
        what = f"mean of {len(names)} sets" if small else Path(names[0]).stem
        title = f"Accuracy when thinking is cut short{what and f' ({what})'}"
        band += "; in brackets: questions" if small else ""
        if any("stopping" in c for c in curves.values()):
            band += "\n◇ k: stopped when the answer had stayed the same at k budgets in a row"
        pad = 20 + 11 * band.count("\n")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
        axes.text(0, 1.025, band, transform=axes.transAxes, fontsize=8, color="#666666")
        axes.set_ylabel("accuracy")
        _label_lines(axes, curves, colours)
        for i, name in enumerate(small):
            axes = parts[1].add_subplot(rows, columns, i + 1)
            axes.xaxis.set_major_locator(plt.MaxNLocator(4))
            chosen = _of_set(curves, name)
            _draw_lines(axes, chosen, colours)
            questions = next(iter(chosen.values())).get("questions")
            title = Path(name).stem + (f"  ({questions})" if questions else "")
            axes.set_title(title, loc="left", fontsize=9)
        figure.supxlabel("thinking budget (tokens)", fontsize=9)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _of_set(curves: dict[str, dict], name: str) -> dict[str, dict]:
    """The curves on one set, of those that have it."""
    return {label: {**c, **c["sets"][name]} for label, c in curves.items() if name in c["sets"]}


def _draw_lines(axes, curves: dict[str, dict], colours: dict[str, str]):
    """A line and its band for each curve, and where stopping early comes to."""
    for label, curve in curves.items():
        x, y, colour = curve["budgets"], np.array(curve["accuracy"]), colours[label]
        error = np.array(curve.get("stderr", 0 * y))
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.18, linewidth=0)
        dots = 3.5 if len(y) <= 12 else 0
        axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=dots, clip_on=False)
        for i, (k, agree) in enumerate(zip(*curve.get("stopping", {}).values())):
            if k and agree == 1:  # what follows depends on k most
                point = curve["stopped_thinking_tokens"][i], curve["stopped_accuracy"][i]
                axes.scatter(*point, marker="D", s=26, fc="white", ec=colour, lw=1.2, zorder=3)
                look = {"textcoords": "offset points", "color": colour, "fontsize": 8}
                axes.annotate(k, point, (5, -9), **look)
    axes.set_ylim(0, 1)  # the same for all sets
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _label_lines(axes, curves: dict[str, dict], colours: dict[str, str]):
    """Each line's name at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.12  # two lines of text
    ends = sorted((c["accuracy"][-1], n, label) for n, (label, c) in enumerate(curves.items()))
    heights = []
    for y, _, _ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    # Pushed up only: move the whole stack back so that it stays around its lines.
    shift = sum(h - y for h, (y, _, _) in zip(heights, ends)) / len(ends)
    look = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
    for height, (_, _, label) in zip(heights, ends):
        text = f"{label}\nanytime {curves[label]['anytime_accuracy']:.3f}"
        axes.text(1.01, height - shift, text, color=colours[label], **look)


def table(curves: dict[str, dict], differences: dict[str, dict] | None = None) -> str:
    """The statistics of every model and set as Markdown, value ± standard error, and what each
    model differs from the first by (curves.paired_differences)."""
    columns, rows = [column for column, _, _ in TABLE], []
    for label, curve in curves.items():
        sets = {"mean": curve, **curve["sets"]} if len(curve["sets"]) > 1 else curve["sets"]
        for name, x in sets.items():
            rows.append([label, name, *(cell(x[k], x["errors"][k], n) for _, k, n in TABLE)])
    parts = [markdown(["model", "set", *columns], rows)]
    parts += [stopping_table(curves), variance_table(curves)]
    for label, sets in (differences or {}).items():
        rows = []
        for name, x in sets.items():
            if name != "mean" or len(sets) > 2:
                pairs = [(x[k]["difference"], x[k]["stderr"], n) for _, k, n in TABLE]
                rows.append([label, name, *(cell(*pair, sign="+") for pair in pairs)])
        text = markdown(["", "set", *columns], rows)
        parts.append(f"Paired differences on the same questions:\n\n{text}")
    return "\n\n".join(filter(None, parts)) + "\n"


def stopping_table(curves: dict[str, dict]) -> str:
    """What stopping early comes to, mean over sets; or ""."""
    rows = []
    for label, x in curves.items():
        for i, (k, agree) in enumerate(zip(*x.get("stopping", {}).values())):
            cells = [cell(x[key][i], x["errors"][key][i], *how) for _, key, *how in STOPS]
            votes = f", {agree} votes" if agree > 1 else ""
            rows.append([label, f"{k}{votes}" if k else "to the end", *cells])
    what = "Stopped once the answer had stayed the same at as many budgets in a row"
    text = markdown(["model", "patience", *(column for column, *_ in STOPS)], rows)
    return f"{what}:\n\n{text}" if rows else ""


def variance_table(curves: dict[str, dict]) -> str:
    """Var[R - V] / Var[R] per segment, where it was measured (curves.variance_figure); or ""."""
    rows = []
    for label, figure in ((label, c.get("variance")) for label, c in curves.items()):
        for name in ("brpo", "group", "progress") if figure else ():
            values = figure[f"residual/{name}"]
            rows.append([label, name, *("-" if x is None else f"{x:.2f}" for x in values)])
    head = ["", "Var[R - V] / Var[R]", "segment 1", "2", "3", "4"]
    return markdown(head, rows) if rows else ""


def cell(value: float | None, error: float | None, decimals: int = 3, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{decimals}f} ± {error or 0:.{decimals}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def curve_lines(curves: dict[str, dict], per_line: int = 8) -> str:
    """The accuracies as plain text for a log: at most 100 columns wide, 8 budgets at a time.

    A line for each curve; all have the same budgets.
    """
    labels = {label: label if len(label) <= 24 else f"…{label[-23:]}" for label in curves}
    width, lines = max(8, *(len(text) + 1 for text in labels.values())), []
    budgets = next(iter(curves.values()))["budgets"]
    for start in range(0, len(budgets), per_line):
        part, last = slice(start, start + per_line), start + per_line >= len(budgets)
        head = "".join(f"{b:>8}" for b in budgets[part]) + "   anytime" * last
        lines.append(f"{'budget':{width}}{head}")
        for label, c in curves.items():
            accuracy = "".join(f"{a:8.3f}" for a in c["accuracy"][part])
            anytime = f"{c['anytime_accuracy']:10.3f}" * last
            lines.append(f"{labels[label]:{width}}{accuracy}{anytime}")
    return "\n".join(lines)


def write_results(
    a: Evaluation, c: Config, labels: dict, curves: dict, records: dict, opened: dict
):
    """eval.json, table.md, anytime_curve.png; and the table on the terminal.

    By model: its label, its curve, its records {set: [record]}, its startup.Opened.
    """
    first, *others = a.models
    asked, columns, differences = {}, {}, {}
    for m in a.models:
        asked[m] = {name: [(q.index, q.text) for q in qs] for name, qs in opened[m].sets.items()}
        columns[m] = {name: per_question(of_set) for name, of_set in records[m].items()}
        # Only where both were asked the same: a tokenizer may have dropped other overlong prompts.
        if m != first and asked[m] == asked[first]:
            pair = (columns[first], columns[m])
            differences[m] = paired_differences(*pair, c.evaluation_budgets, c.seed)
    several = {"models": curves, "paired_differences": {"from": first, "to": differences}}
    (a.output / "eval.json").write_text(json.dumps(several if others else curves[first], indent=1))
    labelled = {labels[m]: curve for m, curve in curves.items()}
    text = table(labelled, {f"{labels[m]} - {labels[first]}": d for m, d in differences.items()})
    (a.output / "table.md").write_text(text)
    draw_curves(labelled, a.output / "anytime_curve.png")
    print(curve_lines(labelled))
    if variance := variance_table(labelled):
        print(f"\n{variance}\n")
    for m, by_set in differences.items():
        x = by_set["mean"]["anytime_accuracy"]
        difference = cell(x["difference"], x["stderr"], sign="+")
        print(f"{labels[m]} - {labels[first]}: anytime {difference}")
    if not any(accuracy for curve in curves.values() for accuracy in curve["accuracy"]):
        print(f"WARNING no summary was right: see the example in {a.output}/eval.json")
    print(f"wrote {a.output}/: eval.json, table.md with all statistics, anytime_curve.png")
