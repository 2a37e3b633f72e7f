"""How do the curves look? One figure, and tables in Markdown.

Both take curves as evaluate.py makes them (curves.summarise, with "budgets"); a figure also takes
any {"budgets", "accuracy", "anytime_accuracy", "sets": {name: {"accuracy", "stderr"}}}.
"""

import json
from pathlib import Path

from runtime.config import Config, Evaluation
from runtime.curves import paired_differences, per_question

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#333333", "#d9d9d9"
QUESTIONS = "shaded: ± 1 standard error over questions (bootstrap)"
# Of the table: column, statistic, decimals.
TABLE = (
    ("anytime accuracy", "anytime_accuracy", 3),
    ("final accuracy", "final_accuracy", 3),
    ("trace tokens", "thinking_tokens", 1),
    ("tokens to 90 % of final", "tokens_to_90", 1),
    ("closed", "closed", 3),
    ("overthinking", "overthinking", 3),
    ("summary tokens", "summary_tokens", 1),
)


def labels_of(models: tuple[str, ...]) -> dict[str, str]:
    """A short name of each model: its directory's, or its run's where that is just model/."""
    short = {m: Path(m).parent.name if Path(m).name == "model" else Path(m).name for m in models}
    return short if len(set(short.values())) == len(models) else {m: m for m in models}


def draw_curves(curves: dict[str, dict], path: Path, title: str = "", band: str = QUESTIONS):
    """Accuracy over thinking budget as a PNG, 720 points wide: the mean over sets, then each set.

    `band` says in the picture what "stderr" holds. The face is opaque white, so that the picture
    reads the same on a dark page.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for c in curves.values() for name in c["sets"]))
    small = names if len(names) > 1 else []
    rows = -(-len(small) // 3)
    settings = {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",
    }
    with plt.rc_context(settings):
        figure = plt.figure(figsize=(7.2, 3.9 + 1.9 * rows), layout="constrained")
        # Two parts, so that the labels right of the upper one do not narrow the lower one.
        upper, *lower = figure.subfigures(
            1 + bool(small), height_ratios=[3.6, 1.9 * rows][: 1 + bool(small)], squeeze=False
        )[:, 0]
        main = upper.add_subplot()
        what = f"mean of {len(names)} sets" if small else "".join(names)
        _panel(main, curves, None if small else names[0])
        main.set_title(
            title or f"Accuracy when thinking is cut short{what and f' ({what})'}",
            loc="left",
            fontsize=11,
            fontweight="bold",
            pad=20,
        )
        if small:
            band += "; in brackets: questions"
        main.text(0, 1.025, band, transform=main.transAxes, fontsize=8, color="#666666")
        main.set_ylabel("accuracy")
        _label_lines(main, curves)
        for i, name in enumerate(small):
            axes = lower[0].add_subplot(rows, 3, i + 1)
            axes.xaxis.set_major_locator(plt.MaxNLocator(4))
            _panel(
                axes,
                {label: c for label, c in curves.items() if name in c["sets"]},
                name,
                {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(curves)},
            )
            questions = next(iter(curves.values()))["sets"].get(name, {}).get("questions")
            axes.set_title(name + (f"  ({questions})" if questions else ""), loc="left", fontsize=9)
        figure.supxlabel("thinking budget (tokens)", fontsize=9)
        figure.savefig(path, dpi=200, facecolor="white")
        plt.close(figure)


def _panel(axes, curves: dict[str, dict], name: str | None, colours: dict | None = None):
    """The lines and bands of one set, or (None) of the mean."""
    lows, highs = [], []
    for n, (label, curve) in enumerate(curves.items()):
        of = curve if name is None else curve["sets"][name]
        colour = (colours or {}).get(label, COLOURS[n % len(COLOURS)])
        y = of.get("accuracy", curve["accuracy"])
        error = of.get("stderr") or [0.0] * len(y)
        low, high = [a - e for a, e in zip(y, error)], [a + e for a, e in zip(y, error)]
        axes.fill_between(curve["budgets"], low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            curve["budgets"],
            y,
            color=colour,
            linewidth=1.8,
            marker="o",
            markersize=3.5 if len(y) <= 12 else 0,
            clip_on=False,
        )
        lows.append(min(low))
        highs.append(max(high))
    bottom, top = min(lows), max(highs)
    margin = max(0.06 * (top - bottom), 0.01)
    axes.set_ylim(max(bottom - margin, 0), min(top + margin, 1))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _label_lines(axes, curves: dict[str, dict]):
    """Each line's name at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.12  # two lines of text
    ends = sorted((c["accuracy"][-1], n, label) for n, (label, c) in enumerate(curves.items()))
    heights = []
    for y, _, _ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    # Pushed up only: move the whole stack back so that it stays around its lines.
    shift = sum(h - y for h, (y, _, _) in zip(heights, ends)) / len(ends)
    for height, (_, n, label) in zip(heights, ends):
        text = f"{label}\nanytime {curves[label]['anytime_accuracy']:.3f}"
        axes.annotate(
            text,
            (1.01, height - shift),
            xycoords=("axes fraction", "data"),
            color=COLOURS[n % len(COLOURS)],
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def table(curves: dict[str, dict], differences: dict[str, dict] | None = None) -> str:
    """The statistics of every model and set as Markdown, value ± standard error, and what each
    model differs from the first by (curves.paired_differences)."""
    head = ["model", "set", *(column for column, _, _ in TABLE)]
    lines = [head, ["---"] * 2 + ["---:"] * len(TABLE)]
    for label, curve in curves.items():
        rows = {"mean": curve, **curve["sets"]} if len(curve["sets"]) > 1 else curve["sets"]
        for name, row in rows.items():
            lines.append([label, name, *(_cell(row[k], row["errors"][k], n) for _, k, n in TABLE)])
    parts = [markdown(lines)]
    for label, of in (differences or {}).items():
        rows = of if len(of) > 2 else {k: v for k, v in of.items() if k != "mean"}
        lines = [["", "set", *head[2:]], ["---"] * 2 + ["---:"] * len(TABLE)]
        for name, row in rows.items():
            cells = (_cell(row[k]["difference"], row[k]["stderr"], n, "+") for _, k, n in TABLE)
            lines.append([label, name, *cells])
        parts.append("Paired differences on the same questions:\n\n" + markdown(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None, error: float | None, decimals: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{decimals}f} ± {error or 0:.{decimals}f}"


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(
    a: Evaluation,
    c: Config,
    labels: dict[str, str],
    curves: dict[str, dict],
    records: dict[str, dict],
    opened: dict,
):
    """eval.json, table.md, anytime_curve.png; and the table on the terminal."""
    first, *others = a.models
    texts = {
        m: {name: [(q.index, q.text) for q in of] for name, of in opened[m].sets.items()}
        for m in a.models
    }
    columns = {m: {name: per_question(of) for name, of in records[m].items()} for m in a.models}
    # Only where both were asked the same: a tokenizer may have dropped other prompts as overlong.
    differences = {
        m: paired_differences(columns[first], columns[m], c.evaluation_budgets, c.seed)
        for m in others
        if texts[m] == texts[first]
    }
    # One model: its curve is the file's content; several: one entry each.
    content = (
        curves[first]
        if not others
        else {"models": curves, "paired_differences": {"from": first, "to": differences}}
    )
    (a.output / "eval.json").write_text(json.dumps(content, indent=1))
    text = table(
        {labels[m]: curve for m, curve in curves.items()},
        {f"{labels[m]} - {labels[first]}": of for m, of in differences.items()},
    )
    (a.output / "table.md").write_text(text)
    draw_curves({labels[m]: curve for m, curve in curves.items()}, a.output / "anytime_curve.png")
    for m, curve in curves.items():
        print(
            f"{labels[m]}\n  accuracy "
            + "  ".join(f"@{b} {x:.3f}" for b, x in zip(curve["budgets"], curve["accuracy"]))
        )
    print(f"\n{text}\nwrote {a.output}/: eval.json, table.md, anytime_curve.png")
