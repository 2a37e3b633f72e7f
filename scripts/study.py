"""The study on the miniature: every experiment and baseline, five paired seeds, one command.

    python scripts/study.py                      some two hours on 2 cores; resumes
    python scripts/study.py --seeds 0 --jobs 1   a quick look

First the learning rate: the same grid for AR-uniform and for GRPO, on seeds that are used for
nothing else. Then all runs at AR-uniform's best rate, and GRPO at its own best as well. Within a
seed all runs share the warm-started base, the questions and the random keys, so they are compared
in pairs. What stands in runs/study/ is not run again. Writes the tables at the top of
docs/study.md, docs/study.png and docs/anytime_curve.png.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runtime import plots
from runtime.config import EXPERIMENTS
from runtime.plots import COLOURS, INK, draw_curves
from tasks import arithmetic

RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
TUNING_SEEDS = (5, 6)
TUNED = ("ar-uniform", "grpo")
BASELINES = ("group", "progress", "none")  # besides brpo, in ar-uniform
# The paper's grpo-vr-decouple is its ar-base by another name: all its settings are the same.
VARIANTS = {
    **{e: ("--experiment", e) for e in EXPERIMENTS if e != "grpo-vr-decouple"},
    **{f"ar-uniform, {b}": ("--baseline", b) for b in BASELINES},
}
EARLY = 5  # steps of the variance table: later there is little variance left to reduce
# Five evaluations on the way, for the learning curves.
COMMON = ("--eval-every", "10", "--save-every", "25", "--verifier-workers", "1")


@dataclass(frozen=True)
class Arguments:
    """Run what is missing, then write tables and pictures."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    jobs: int = 2  # Runs at a time, one core each.


def directory(variant: str, seed: int, lr: float) -> Path:
    name = variant.replace(", ", "-")
    return ROOT / "runs" / "study" / f"{name}-lr{lr:g}-seed{seed}"


def train(variant: str, seed: int, lr: float):
    """One run, from where it stands. RuntimeError with its last lines if it fails."""
    out = directory(variant, seed, lr)
    if (out / "model").exists():
        return
    command = [
        sys.executable,
        "train.py",
        *VARIANTS[variant],
        "--seed",
        str(seed),
        "--lr",
        str(lr),
        *COMMON,
        "--output-dir",
        str(out),
        "--resume",
        "auto",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n" + done.stderr[-2000:]
        )
    print(f"{out.name}: {done.stdout.splitlines()[-2]}", flush=True)


def run_all(jobs: int, wanted: list[tuple[str, int, float]]):
    """Bases first: two runs of one seed would both make it."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make_base, sorted({seed for _, seed, _ in wanted})))
        list(pool.map(lambda run: train(*run), wanted))


def make_base(seed: int):
    code = (
        "from pathlib import Path; from tasks import arithmetic; "
        f"arithmetic.load_or_write_base(Path('runs'), {seed})"
    )
    if not arithmetic.base_path(ROOT / "runs", seed).exists():
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ------------------------------------------------------------------------------------- what it says


def result(variant: str, seed: int, lr: float) -> dict:
    return json.loads((directory(variant, seed, lr) / "eval.json").read_text())


def best_rate(variant: str) -> float:
    """The rate with the highest anytime accuracy, mean over the tuning seeds."""
    return max(
        RATES,
        key=lambda lr: statistics.mean(
            result(variant, seed, lr)["anytime_accuracy"] for seed in TUNING_SEEDS
        ),
    )


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: list[float], decimals: int = 3, sign: str = "") -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.{decimals}f} ± {spread:.{decimals}f}"


# Two-sided 95 % quantiles of Student's t, by the number of pairs.
NOISE = " (noise)"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def paired(values: list[float]) -> str:
    """A mean difference ± its standard error over seeds, and whether it is beyond noise."""
    mean, spread = mean_and_spread(values)
    error = spread / len(values) ** 0.5
    clear = len(values) > 1 and abs(mean) > T_95.get(len(values), 2.26) * error
    return f"{mean:+.3f} ± {error:.3f}{'' if clear else NOISE}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return plots.markdown([head, ["---"] * len(head), *rows])


def tuning_table() -> str:
    rows = []
    for variant in TUNED:
        columns = [
            [result(variant, seed, lr)["anytime_accuracy"] for seed in TUNING_SEEDS] for lr in RATES
        ]
        rows.append([f"`{variant}`", *(f"{statistics.mean(c):.3f}" for c in columns)])
    return markdown(["anytime accuracy at lr", *(f"{lr:g}" for lr in RATES)], rows)


def results_table(results: dict[str, list[dict]]) -> str:
    """A row per variant, mean ± standard deviation over seeds; the last column is paired."""
    first = results["ar-uniform"]
    budgets = first[0]["budgets"]
    shown = [j for j, b in enumerate(budgets) if b in (8, 16, 32, 64)]
    rows = [
        [
            "before",
            *(cell([r["before"]["accuracy"][j] for r in first]) for j in shown),
            cell([r["before"]["anytime_accuracy"] for r in first]),
            cell([r["before"]["thinking_tokens"] for r in first], 1),
            "",
        ]
    ]
    for name, of in results.items():
        difference = [r["anytime_accuracy"] - f["anytime_accuracy"] for r, f in zip(of, first)]
        rows.append(
            [
                f"`{name}`",
                *(cell([r["accuracy"][j] for r in of]) for j in shown),
                cell([r["anytime_accuracy"] for r in of]),
                cell([r["thinking_tokens"] for r in of], 1),
                paired(difference) if name != "ar-uniform" else "",
            ]
        )
    return markdown(
        [
            "",
            *(f"@{budgets[j]}" for j in shown),
            "anytime",
            "trace tokens",
            "anytime, minus `ar-uniform`",
        ],
        rows,
    )


def comparison_table(results: dict[str, list[dict]]) -> str:
    """What the paper reports, and the same difference here, paired within seeds."""
    budgets = results["ar-uniform"][0]["budgets"]
    shared = "grpo at ar's rate" if "grpo at ar's rate" in results else "grpo"

    def difference(a, b, key="anytime_accuracy"):
        return paired([x[key] - y[key] for x, y in zip(results[a], results[b])])

    def by_budget(a, b):
        found = {"above at": [], "below at": [], "within noise at": []}
        for j, budget in enumerate(budgets):
            text = paired(
                [x["accuracy"][j] - y["accuracy"][j] for x, y in zip(results[a], results[b])]
            )
            kind = (
                "within noise at" if NOISE in text else "above at" if text[0] == "+" else "below at"
            )
            found[kind].append(f"{budget} ({text.removesuffix(NOISE)})")
        return "; ".join(f"{kind} {', '.join(at)}" for kind, at in found.items() if at)

    rows = [
        [
            "`ar-uniform` above `grpo` in anytime accuracy: 46.0 against 43.0 %",
            difference("ar-uniform", "grpo"),
        ],
        [
            "and in final accuracy (AIME 2024: 32.7 against 28.9 %)",
            difference("ar-uniform", "grpo", "final_accuracy"),
        ],
        *(
            [f"`{name}` above `grpo` at every budget from 1000 to 8000", by_budget(name, "grpo")]
            for name in ("ar-uniform", "ar-linear", "ar-base")
        ),
        [
            "parts of the method added to `grpo`: dense rewards (`grpo-linear`)",
            difference("grpo-linear", shared),
        ],
        ["decoupled summaries (`grpo-decouple`)", difference("grpo-decouple", shared)],
        ["BRPO's baseline (`grpo-vr`)", difference("grpo-vr", shared)],
        [
            "BRPO's baseline with decoupled summaries (`ar-base` against `grpo-decouple`)",
            difference("ar-base", "grpo-decouple"),
        ],
        [
            "BRPO's baseline under dense rewards (`ar-uniform` against its `group`)",
            difference("ar-uniform", "ar-uniform, group"),
        ],
    ]
    return markdown(["the paper", "here: difference ± standard error over seeds"], rows)


def residuals(results_at: list[Path], baseline: str) -> list[float]:
    """Var[R - V] / Var[R] per segment, mean over the first steps of all runs, over the rollouts
    that have tokens in the segment."""
    key, lines = f"variance_trained/residual/{baseline}", []
    for path in results_at:
        lines += [json.loads(x)[key] for x in (path / "metrics.jsonl").read_text().splitlines()][
            :EARLY
        ]
    return [statistics.mean(x for x in column if x is not None) for column in zip(*lines)]


def variance_table(paths: list[Path]) -> str:
    rows = [
        [f"`{b}`", *(f"{x:.2f}" for x in residuals(paths, b))]
        for b in ("brpo", "group", "progress")
    ]
    return markdown(["baseline", "segment 1", "2", "3", "4"], rows)


def mean_curve(curves: list[dict]) -> dict:
    """What draw_curves draws: the mean over seeds, and one standard deviation."""
    columns = list(zip(*(c["accuracy"] for c in curves)))
    return {
        "budgets": curves[0]["budgets"],
        "accuracy": [statistics.mean(c) for c in columns],
        "anytime_accuracy": statistics.mean(c["anytime_accuracy"] for c in curves),
        "sets": {"": {"stderr": [mean_and_spread(c)[1] for c in columns]}},
    }


def draw_study(runs: dict[str, list[Path]], path: Path):
    """Learning, accuracy, trace length and variance: mean over seeds, band of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def band(axes, x, columns, label, colour):
        mean, spread = zip(*map(mean_and_spread, columns))
        axes.plot(x, mean, color=colour, label=label, linewidth=1.6)
        axes.fill_between(
            x,
            [m - s for m, s in zip(mean, spread)],
            [m + s for m, s in zip(mean, spread)],
            color=colour,
            alpha=0.15,
            lw=0,
        )

    shown = dict(zip(("ar-uniform", "ar-linear", "ar-base", "grpo"), COLOURS))
    with plt.rc_context(
        {
            "font.size": 8,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure, ((learning, curve), (length, variance)) = plt.subplots(
            2, 2, figsize=(7.2, 5.4), layout="constrained"
        )
        for name, colour in shown.items():
            evals = [
                [json.loads(x) for x in (d / "evals.jsonl").read_text().splitlines()]
                for d in runs[name]
            ]
            steps = [e["step"] for e in evals[0]]
            for axes, key in ((learning, "anytime_accuracy"), (length, "thinking_tokens")):
                band(axes, steps, zip(*([e[key] for e in run] for run in evals)), name, colour)
            band(
                curve,
                evals[0][-1]["budgets"],
                zip(*(run[-1]["accuracy"] for run in evals)),
                name,
                colour,
            )
        for name, colour in zip(("brpo", "group", "progress"), COLOURS):
            values = residuals(runs["ar-uniform"], name)
            variance.plot(
                range(1, len(values) + 1),
                values,
                marker="o",
                markersize=3,
                label=name,
                color=colour,
                linewidth=1.6,
            )
        variance.set_xticks(range(1, len(values) + 1))
        for axes, title, x in (
            (learning, "Anytime accuracy while training", "step"),
            (curve, "Accuracy after training", "thinking budget (tokens)"),
            (length, "Thinking tokens of a trace", "step"),
            (variance, f"Var[R - V] / Var[R], first {EARLY} steps", "segment"),
        ):
            axes.set_title(title, loc="left", fontweight="bold", fontsize=9)
            axes.set_xlabel(x)
            axes.legend(frameon=False, fontsize=7)
        curve.set_ylim(top=1.0)
        seeds = len(runs["ar-uniform"])
        figure.suptitle(
            f"shaded: ± 1 standard deviation over {seeds} seeds",
            x=0.01,
            ha="left",
            fontsize=8,
            color="#666666",
        )
        figure.savefig(path, dpi=200, facecolor="white")
        plt.close(figure)


def write_results(seeds: tuple[int, ...], rates: dict[str, float], docs: Path = ROOT / "docs"):
    at = dict.fromkeys(VARIANTS, rates["ar-uniform"]) | {"grpo": rates["grpo"]}
    runs = {name: [directory(name, seed, at[name]) for seed in seeds] for name in VARIANTS}
    if rates["grpo"] != rates["ar-uniform"]:
        runs["grpo at ar's rate"] = [directory("grpo", seed, rates["ar-uniform"]) for seed in seeds]
    results = {
        name: [json.loads((d / "eval.json").read_text()) for d in of] for name, of in runs.items()
    }
    draw_study(runs, docs / "study.png")
    draw_curves(
        {
            "before": mean_curve([r["before"] for r in results["ar-uniform"]]),
            **{name: mean_curve(results[name]) for name in ("ar-uniform", "grpo")},
        },
        docs / "anytime_curve.png",
        band=f"shaded: ± 1 standard deviation over {len(seeds)} seeds",
    )
    text = f"""# The study on the miniature

Written by `python scripts/study.py`, seeds {" ".join(map(str, seeds))}; the learning rate was
chosen on seeds {" ".join(map(str, TUNING_SEEDS))}. 256 test questions × 4 traces, temperature 1.0;
± is one standard deviation over seeds, for paired differences one standard error. "(noise)": the
paired difference is not significant at 95 % (Student's t).

{tuning_table()}

{results_table(results)}

{comparison_table(results)}

Var[R - V] / Var[R] in the runs of `ar-uniform`, mean of the first {EARLY} steps, over rollouts with
tokens in the segment (training data, T = 1: not the quantity of the paper's figure, which reports
0.33-0.45 for BRPO against 0.61-0.82 for the group's mean in the last segment):

{variance_table(runs["ar-uniform"])}
"""
    path = docs / "study.md"  # what follows its first heading was written by hand: it stays
    _, heading, by_hand = (path.read_text() if path.exists() else "").partition("\n## ")
    path.write_text(text + heading + by_hand)
    print(text)


def main(a: Arguments):
    run_all(
        a.jobs, [(variant, seed, lr) for seed in TUNING_SEEDS for variant in TUNED for lr in RATES]
    )
    rates = {variant: best_rate(variant) for variant in TUNED}
    print(f"learning rates: {rates}", flush=True)
    run_all(
        a.jobs,
        [
            (variant, seed, lr)
            for seed in a.seeds
            for variant in VARIANTS
            for lr in sorted({rates["ar-uniform"], rates.get(variant, 0)} - {0})
        ],
    )
    write_results(a.seeds, rates)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
