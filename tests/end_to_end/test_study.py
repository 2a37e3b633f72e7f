"""The study's tables, on made-up runs: what is compared with what, and when it counts. And what a
reader's first run promises."""

import json

import pytest

import train
from runtime.config import parse
from scripts import study
from tests.conftest import ROOT


def test_a_paired_difference_counts_beyond_its_noise():
    # mean 0.1, standard deviation 0.1, so t = 0.1 / (0.1 / sqrt 3) = 1.73 < 4.30
    assert study.paired([0.0, 0.1, 0.2]) == "+0.100 ± 0.058 (noise)"
    # t = 0.1 / (0.01 / sqrt 3) = 17.3
    assert study.paired([0.09, 0.1, 0.11]) == "+0.100 ± 0.006"
    assert study.paired([0.3]) == "+0.300 ± 0.000 (noise)"  # one pair says nothing


def test_the_tables_read_the_right_runs(tmp_path, monkeypatch):
    """Every run's accuracy is its own number, so that a mixed-up column would show."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    budgets, known = [8, 16, 32, 64], {}

    def write(variant, seed, lr):
        value = known.setdefault((variant, seed, lr), round(0.2 + 0.003 * len(known), 3))
        out = study.directory(variant, seed, lr)
        out.mkdir(parents=True, exist_ok=True)
        entry = {"step": 50, "budgets": budgets, "accuracy": [value] * 4, "thinking_tokens": 40.0}
        entry |= {"anytime_accuracy": value, "final_accuracy": value}
        entry["stopping"] = {"patience": [0, 2], "agree": [1, 1]}
        entry |= {"stopped_accuracy": [value, value + 0.1], "stopped_difference": [0, 0.1]}
        entry |= {"stopped_thinking_tokens": [40.0, 20.0], "stopped_all_tokens": [44.0, 50.0]}
        before = entry | {"step": 0, "accuracy": [0.1] * 4, "anytime_accuracy": 0.1}
        (out / "eval.json").write_text(json.dumps(entry | {"before": before}))
        (out / "evals.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (before, entry)))
        residuals = {
            f"variance_trained/residual/{b}": [1.0, 0.9, None, value]
            for b in ("brpo", "group", "progress")
        }
        lines = [residuals, residuals | {k: [0.5, 0.5, 0.5, value] for k in residuals}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    for seed in (0, 1):
        for variant in study.VARIANTS:
            write(variant, seed, 6e-4)
        write("grpo", seed, 3e-4)
    for seed in study.TUNING_SEEDS:
        for variant in study.TUNED:
            for lr in study.RATES:
                write(variant, seed, lr)
    assert study.best_rate("grpo") == study.RATES[0]  # the last is the highest, by 0.006: a tie
    monkeypatch.setattr(study, "TIED", 0.005)
    assert study.best_rate("grpo") == study.RATES[1]
    (tmp_path / "study.md").write_text("# old tables\n\n## By hand\n\nkept\n")
    study.write_results((0, 1), {"ar-uniform": 6e-4, "grpo": 3e-4}, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "old tables" not in text and text.endswith("\n\n## By hand\n\nkept\n")
    results = text[text.index("|  | @8") :]
    for variant, lr in (("grpo-vr", 6e-4), ("grpo", 3e-4), ("ar-uniform, group", 6e-4)):
        mean = (known[variant, 0, lr] + known[variant, 1, lr]) / 2
        row = next(line for line in results.splitlines() if line.startswith(f"| `{variant}` |"))
        assert f" {mean:.3f} ± " in row
    gap = sum(known["ar-uniform", s, 6e-4] - known["grpo", s, 3e-4] for s in (0, 1)) / 2
    row = next(line for line in text.splitlines() if "46.0 against 43.0" in line)
    assert f"{gap:+.3f} ± " in row
    stopped = [known["ar-uniform", s, 6e-4] + 0.1 for s in (0, 1)]
    row = next(x for x in text.splitlines() if x.startswith("| `ar-uniform` | 2 |"))
    assert f"| {sum(stopped) / 2:.3f} ± " in row and "| 20.0 ± 0.0 | 50.0 ± 0.0 | +0.100 ±" in row
    assert row.split(" | ")[6].startswith(f"{gap + 0.1:+.3f} ± ")  # against GRPO's full length
    assert "| `brpo` | 0.75 | 0.70 | 0.50 |" in text  # null is left out of the mean
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert (tmp_path / "anytime_curve.png").exists()


@pytest.mark.slow
def test_the_default_run_learns(tmp_path, monkeypatch):
    """Ten of the 50 steps of `python train.py` bring most of what it learns."""
    monkeypatch.chdir(ROOT)  # the base is kept in runs/
    train.train(parse(["--steps", "10", "--eval-questions", "64", "--output-dir", str(tmp_path)]))
    after = json.loads((tmp_path / "eval.json").read_text())
    assert after["anytime_accuracy"] - after["before"]["anytime_accuracy"] >= 0.25
