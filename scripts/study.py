"""The study on the miniature: every experiment and baseline, five paired seeds, one command.

    python scripts/study.py                      some three hours on 2 cores; resumes
    python scripts/study.py --seeds 0 --jobs 1   a quick look

First the learning rate: the same grid for AR-uniform and for GRPO, on seeds that are used for
nothing else. Then all runs at AR-uniform's rate, and GRPO at its own as well. Within a seed all
runs share the warm-started base, the questions and the random keys, so they are compared in pairs.
What stands in runs/study/ is not run again. Writes the tables at the top of docs/study.md,
docs/study.png and docs/anytime_curve.png.
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
from runtime.config import EXPERIMENTS
from runtime.plots import COLOURS, INK, METHODS, STYLE, cell, draw_curves, markdown, pyplot
from tasks import arithmetic

RATES = (3e-4, 6e-4, 1.2e-3)
TUNING_SEEDS = (5, 6)
TIED = 0.01  # anytime accuracy; two seeds do not tell less apart
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
    flags = ["--seed", str(seed), "--lr", str(lr), "--output-dir", str(out), "--resume", "auto"]
    command = [sys.executable, "train.py", *VARIANTS[variant], *COMMON, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        error = done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{error}")
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


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tuning(variant: str, lr: float) -> float:
    """Anytime accuracy at a learning rate, mean over the tuning seeds."""
    files = [directory(variant, seed, lr) / "eval.json" for seed in TUNING_SEEDS]
    return statistics.mean(json.loads(file.read_text())["anytime_accuracy"] for file in files)


def best_rate(variant: str) -> float:
    """The smallest of the rates that are within TIED of the best."""
    accuracy = {lr: tuning(variant, lr) for lr in RATES}
    best = max(accuracy.values())
    return min(lr for lr in RATES if accuracy[lr] > best - TIED)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(values: list[float], decimals: int = 3) -> str:
    return cell(*mean_and_spread(values), decimals)


# Two-sided 95 % quantiles of Student's t, by the number of pairs.
NOISE = " (noise)"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def paired(values: list[float]) -> str:
    """A mean difference ± its standard error over seeds, and whether it is beyond noise."""
    mean, spread = mean_and_spread(values)
    error = spread / len(values) ** 0.5
    clear = len(values) > 1 and abs(mean) > T_95.get(len(values), 2.26) * error
    return cell(mean, error, sign="+") + ("" if clear else NOISE)


def tuning_table() -> str:
    rows = [[f"`{v}`", *(f"{tuning(v, lr):.3f}" for lr in RATES)] for v in TUNED]
    return markdown(["anytime accuracy at lr", *(f"{lr:g}" for lr in RATES)], rows)


def results_table(results: dict[str, list[dict]]) -> str:
    """A row per variant, mean ± standard deviation over seeds; the last column is paired."""
    first = results["ar-uniform"]
    budgets = first[0]["budgets"]
    shown = [j for j, b in enumerate(budgets) if b in (8, 16, 32, 64)]

    def row(name, runs, difference):
        anytime = over_seeds([r["anytime_accuracy"] for r in runs])
        tokens = over_seeds([r["thinking_tokens"] for r in runs], 1)
        curve = [over_seeds([r["accuracy"][j] for r in runs]) for j in shown]
        return [name, *curve, anytime, tokens, difference]

    rows = [row("before", [r["before"] for r in first], "")]
    for name, runs in results.items():
        pairs = [r["anytime_accuracy"] - f["anytime_accuracy"] for r, f in zip(runs, first)]
        rows.append(row(f"`{name}`", runs, paired(pairs) if runs is not first else ""))
    columns = [*(f"@{budgets[j]}" for j in shown), "anytime", "trace tokens"]
    return markdown(["", *columns, "anytime, minus `ar-uniform`"], rows)


def comparison_table(results: dict[str, list[dict]]) -> str:
    """What the paper reports, and the same difference here, paired within seeds."""
    results, shared = {"grpo at ar's rate": results["grpo"], **results}, "grpo at ar's rate"

    def difference(a, b, value=lambda run: run["anytime_accuracy"]):
        return paired([value(x) - value(y) for x, y in zip(results[a], results[b])])

    def by_budget(a, b):
        found = {"above at": [], "below at": [], "within noise at": []}
        for j, budget in enumerate(results[a][0]["budgets"]):
            text = difference(a, b, lambda run, j=j: run["accuracy"][j])
            clear = "above at" if text[0] == "+" else "below at"
            kind = "within noise at" if NOISE in text else clear
            found[kind].append(f"{budget} ({text.removesuffix(NOISE)})")
        return "; ".join(f"{kind} {', '.join(at)}" for kind, at in found.items() if at)

    anytime = difference("ar-uniform", "grpo")
    final = difference("ar-uniform", "grpo", lambda run: run["final_accuracy"])
    rows = [
        ["`ar-uniform` above `grpo` in anytime accuracy: 46.0 against 43.0 %", anytime],
        ["and in final accuracy (AIME 2024: 32.7 against 28.9 %)", final],
    ]
    for name in ("ar-uniform", "ar-linear", "ar-base"):
        claim = f"`{name}` above `grpo` at every budget from 1000 to 8000"
        rows.append([claim, by_budget(name, "grpo")])
    parts = "parts of the method added to `grpo`: dense rewards (`grpo-linear`)"
    decoupled = "BRPO's baseline with decoupled summaries (`ar-base` against `grpo-decouple`)"
    dense = "BRPO's baseline under dense rewards (`ar-uniform` against its `group`)"
    rows += [
        [parts, difference("grpo-linear", shared)],
        ["decoupled summaries (`grpo-decouple`)", difference("grpo-decouple", shared)],
        ["BRPO's baseline (`grpo-vr`)", difference("grpo-vr", shared)],
        [decoupled, difference("ar-base", "grpo-decouple")],
        [dense, difference("ar-uniform", "ar-uniform, group")],
    ]
    return markdown(["the paper", "here: difference ± standard error over seeds"], rows)


def residuals(runs: list[Path], baseline: str) -> list[float]:
    """Var[R - V] / Var[R] per segment, mean over the first steps of all runs, over the rollouts
    that have tokens in the segment."""
    key = f"variance_trained/residual/{baseline}"
    lines = [line[key] for run in runs for line in read_lines(run / "metrics.jsonl")[:EARLY]]
    return [statistics.mean(x for x in column if x is not None) for column in zip(*lines)]


def variance_table(runs: list[Path]) -> str:
    columns = {name: residuals(runs, name) for name in ("brpo", "group", "progress")}
    rows = [[f"`{name}`", *(f"{x:.2f}" for x in values)] for name, values in columns.items()]
    return markdown(["baseline", "segment 1", "2", "3", "4"], rows)


def stopping_table(results: dict[str, list[dict]]) -> str:
    """What stopping early comes to (runtime/stopping.py) before training and after two methods.

    The last two columns are paired within seeds: with thinking to the end, and with GRPO's full
    length.
    """
    full = [r["stopped_accuracy"][0] for r in results["grpo"]]
    shown = {"before": [r["before"] for r in results["ar-uniform"]]}
    shown |= {f"`{name}`": results[name] for name in ("grpo", "ar-uniform")}
    rows = []
    for name, runs in shown.items():
        for i, k in enumerate(runs[0]["stopping"]["patience"]):
            accuracy = [r["stopped_accuracy"][i] for r in runs]
            thinking, tokens = (
                over_seeds([r[f"stopped_{kind}_tokens"][i] for r in runs], 1)
                for kind in ("thinking", "all")
            )
            difference = paired([r["stopped_difference"][i] for r in runs]) if k else ""
            to_grpo = paired([a - b for a, b in zip(accuracy, full)])
            cells = [over_seeds(accuracy), thinking, tokens, difference, to_grpo]
            rows.append([name, str(k or "to the end"), *cells])
    columns = ["patience k", "accuracy", "thinking tokens", "all tokens", "minus to the end"]
    return markdown(["", *columns, "minus `grpo` to the end"], rows)


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
    plt = pyplot()

    def band(axes, x, columns, label, colour):
        mean, spread = zip(*map(mean_and_spread, columns))
        low, high = [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)]
        axes.plot(x, mean, color=colour, label=label, linewidth=1.6)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)

    with plt.rc_context(STYLE | {"font.size": 8}):
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.4), layout="constrained")
        (learning, curve), (length, variance) = axes
        for name in ("ar-uniform", "ar-linear", "ar-base", "grpo"):
            colour = METHODS[name]
            evals = [read_lines(run / "evals.jsonl") for run in runs[name]]
            steps = [e["step"] for e in evals[0]]
            for part, key in ((learning, "anytime_accuracy"), (length, "thinking_tokens")):
                band(part, steps, zip(*([e[key] for e in run] for run in evals)), name, colour)
            accuracies = zip(*(run[-1]["accuracy"] for run in evals))
            band(curve, evals[0][-1]["budgets"], accuracies, name, colour)
        # Baselines are no methods, and get the colours that no method has.
        for name, colour in zip(("brpo", "group", "progress"), (INK, *COLOURS[4:])):
            y = residuals(runs["ar-uniform"], name)
            x = range(1, len(y) + 1)
            variance.plot(x, y, "o-", markersize=3, label=name, color=colour, linewidth=1.6)
        variance.set_xticks(x)
        for part, title, x in (
            (learning, "Anytime accuracy while training", "step"),
            (curve, "Accuracy after training", "thinking budget (tokens)"),
            (length, "Thinking tokens of a trace", "step"),
            (variance, f"Var[R - V] / Var[R], first {EARLY} steps", "segment"),
        ):
            part.set_title(title, loc="left", fontweight="bold", fontsize=9)
            part.set_xlabel(x)
            part.legend(frameon=False, fontsize=7)
        for part in (learning, curve):
            part.set_ylim(0, 1)
        what = f"shaded: ± 1 standard deviation over {len(runs['ar-uniform'])} seeds"
        figure.suptitle(what, x=0.01, ha="left", fontsize=8, color="#666666")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def write_results(seeds: tuple[int, ...], rates: dict[str, float], docs: Path = ROOT / "docs"):
    at = dict.fromkeys(VARIANTS, rates["ar-uniform"]) | {"grpo": rates["grpo"]}
    runs = {name: [directory(name, seed, at[name]) for seed in seeds] for name in VARIANTS}
    if rates["grpo"] != rates["ar-uniform"]:
        runs["grpo at ar's rate"] = [directory("grpo", seed, rates["ar-uniform"]) for seed in seeds]
    results = {
        name: [json.loads((run / "eval.json").read_text()) for run in paths]
        for name, paths in runs.items()
    }
    draw_study(runs, docs / "study.png")
    curves = {"before": mean_curve([r["before"] for r in results["ar-uniform"]])}
    curves |= {name: mean_curve(results[name]) for name in ("ar-uniform", "grpo")}
    what = f"shaded: ± 1 standard deviation over {len(seeds)} seeds"
    draw_curves(curves, docs / "anytime_curve.png", what)
    text = f"""# The study on the miniature

Written by `python scripts/study.py`, seeds {" ".join(map(str, seeds))}; the learning rate was
chosen on seeds {" ".join(map(str, TUNING_SEEDS))}. 256 test questions × 4 traces, temperature 1.0;
± is one standard deviation over seeds, for paired differences one standard error. "(noise)": the
paired difference is not significant at 95 % (Student's t).

{tuning_table()}

{results_table(results)}

{comparison_table(results)}

Thinking that stops once the answer has stayed the same at k of the 8 budgets in a row, one summary
at each; "all tokens" are those of the thinking and of every summary up to there:

{stopping_table(results)}

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
    run_all(a.jobs, [(v, seed, lr) for seed in TUNING_SEEDS for v in TUNED for lr in RATES])
    rates = {variant: best_rate(variant) for variant in TUNED}
    print(f"learning rates: {rates}", flush=True)
    shared = rates["ar-uniform"]
    rates_of = {v: sorted({shared, rates.get(v, shared)}) for v in VARIANTS}
    wanted = [(v, seed, lr) for seed in a.seeds for v in VARIANTS for lr in rates_of[v]]
    run_all(a.jobs, wanted)
    write_results(a.seeds, rates)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
