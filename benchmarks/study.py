"""The study on the miniature: every experiment and baseline, five paired seeds, one command.

    python benchmarks/study.py                      some two hours on 2 cores; resumes
    python benchmarks/study.py --seeds 0 --jobs 1   a quick look

First the learning rate: the same grid for AR-uniform and for GRPO, on seeds that are used for
nothing else. Then all runs at AR-uniform's rate, and GRPO once more at its own. Within a seed all
runs share the warm-started base, the questions and the random keys, so they are compared in pairs.
What stands in runs/study/ is not run again. Writes the tables and pictures into docs/, beside what
the paper reports.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import miniature  # noqa: E402
from config import EXPERIMENTS, Config  # noqa: E402

RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
TUNING_SEEDS = (5, 6)
TUNED = ("ar-uniform", "grpo")
BASELINES = ("group", "loo", "progress", "none", "fitted")       # besides brpo, in ar-uniform
VARIANTS = {**{name: ("--experiment", name) for name in EXPERIMENTS},
            **{f"ar-uniform, {b}": ("--baseline", b) for b in BASELINES}}
# Five evaluations on the way, for the learning curves.
COMMON = ("--eval-every", "10", "--save-every", "25", "--verifier-workers", "1")


@dataclass(frozen=True)
class Arguments:
    """Run what is missing, then write tables and pictures."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    jobs: int = 2               # Runs at a time, one core each.


def directory(variant: str, seed: int, lr: float) -> Path:
    name = variant.replace(", ", "-")
    return ROOT / "runs" / "study" / f"{name}-lr{lr:g}-seed{seed}"


def train(variant: str, seed: int, lr: float):
    """One run, from where it stands. RuntimeError with its last lines if it fails."""
    out = directory(variant, seed, lr)
    if (out / "model").exists():
        return
    command = [sys.executable, "train.py", *VARIANTS[variant], "--seed", str(seed), "--lr", str(lr),
               *COMMON, "--output-dir", str(out), "--resume", "auto"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n"
                           + done.stderr[-2000:])
    print(f"{out.name}: {done.stdout.splitlines()[-2]}", flush=True)


def run_all(jobs: int, wanted: list[tuple[str, int, float]]):
    """Bases first: two runs of one seed would both make it."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make_base, sorted({seed for _, seed, _ in wanted})))
        list(pool.map(lambda run: train(*run), wanted))


def make_base(seed: int):
    code = f"import pathlib, miniature; miniature.load_or_write_base(pathlib.Path('runs'), {seed})"
    if not miniature.base_path(ROOT / "runs", seed).exists():
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def main(a: Arguments):
    run_all(a.jobs, [(variant, seed, lr) for seed in TUNING_SEEDS for variant in TUNED
                     for lr in RATES])
    run_all(a.jobs, [(variant, seed, Config().lr) for seed in a.seeds for variant in VARIANTS])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
