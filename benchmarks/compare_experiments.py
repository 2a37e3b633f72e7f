"""Experiments against each other on the miniature: same base, steps and questions within a seed.

    python benchmarks/compare_experiments.py --picture docs/anytime_curve.png       the README's
    python benchmarks/compare_experiments.py --experiments ar-uniform grpo-decouple --seeds 0 1

Trains what is not in runs/ yet, one run at a time, then prints accuracy at every budget, mean ±
standard deviation over seeds, and in how many seeds the first experiment is ahead at each budget.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from evaluate import draw_curves  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    experiments: tuple[str, ...] = ("ar-uniform", "grpo")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    picture: str = ""
    """Draw the mean curves here, bars: standard deviation over seeds."""


def result(experiment: str, seed: int) -> dict:
    """The eval.json of a finished run, trained now if it is not there."""
    out = ROOT / "runs" / f"miniature-{experiment}-seed{seed}"
    if not (out / "model").exists():
        subprocess.run(
            [
                sys.executable,
                "train.py",
                "--experiment",
                experiment,
                "--seed",
                str(seed),
                "--resume",
                "auto",
            ],
            cwd=ROOT,
            check=True,
        )
    return json.loads((out / "eval.json").read_text())


def row(name: str, curves: list[list[float]]) -> str:
    cells = [
        f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}"
        for c in zip(*curves)
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def mean_curve(curves: list[dict]) -> dict:
    """What draw_curves draws: the mean over seeds, bars of one standard deviation over seeds."""
    columns = list(zip(*(c["accuracy"] for c in curves)))
    return {
        "budgets": curves[0]["budgets"],
        "accuracy": [statistics.mean(c) for c in columns],
        "anytime_accuracy": statistics.mean(c["anytime_accuracy"] for c in curves),
        "sets": {"": {"stderr": [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]}},
    }


def residuals(experiment: str, seeds: tuple[int, ...], key: str, steps: int = 20) -> str:
    """Var[R-V]/Var[R] per segment, mean over the first steps of all seeds (where it exists)."""
    lines = [
        json.loads(line)
        for seed in seeds
        for line in (ROOT / "runs" / f"miniature-{experiment}-seed{seed}" / "metrics.jsonl")
        .read_text()
        .splitlines()[:steps]
    ]
    columns = [
        [x for x in column if x is not None] for column in zip(*(line[key] for line in lines))
    ]
    return " ".join(f"{statistics.mean(c):.2f}" if c else "-" for c in columns)


def main(a: Arguments):
    results = {e: [] for e in a.experiments}
    for seed in a.seeds:  # seed by seed, so that an interrupted comparison is still a fair one
        for e in a.experiments:
            results[e].append(result(e, seed))
    budgets = results[a.experiments[0]][0]["budgets"]
    print(f"\n| accuracy at budget | {' | '.join(map(str, budgets))} | anytime |")
    print("|---" * (len(budgets) + 2) + "|")
    before = [r["before"] for r in results[a.experiments[0]]]
    for name, rs in (("before", before), *results.items()):
        print(row(name, [[*r["accuracy"], r["anytime_accuracy"]] for r in rs]))
    if a.picture:
        draw_curves(
            {"before": mean_curve(before), **{e: mean_curve(rs) for e, rs in results.items()}},
            Path(a.picture),
            band="shaded: ± 1 standard deviation over seeds",
        )
    first = results[a.experiments[0]]
    print(
        f"\nrise of anytime accuracy, {a.experiments[0]}, per seed: "
        + " ".join(
            f"{r['anytime_accuracy'] - b['anytime_accuracy']:.3f}" for r, b in zip(first, before)
        )
    )
    print(f"\nVar[R-V]/Var[R] per segment, {a.experiments[0]}, mean of the first 20 steps")
    for key in ("variance", "variance_trained"):
        for v in ("brpo", "group", "progress"):
            print(f"{key:17} {v:9} {residuals(a.experiments[0], a.seeds, f'{key}/residual/{v}')}")
    for e in a.experiments[1:]:
        wins = [
            sum(x["accuracy"][j] > y["accuracy"][j] for x, y in zip(first, results[e]))
            for j in range(len(budgets))
        ]
        print(
            f"seeds of {len(a.seeds)} in which {a.experiments[0]} is above {e}, per budget: {wins}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
