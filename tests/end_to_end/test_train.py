"""The loop, run as a user runs it: its files, its errors, 1 and 2 processes, and kills in the
middle."""

import importlib.util
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from runtime import distributed
from runtime.config import parse
from runtime.startup import expensive_evaluation
from scripts.ranks import lines_that_repeat
from tests.conftest import run_script

SMALL = [
    *("--questions-per-step", "4", "--num-rollouts", "4", "--num-summaries", "2"),
    *("--eval-questions", "6", "--eval-samples", "1", "--eval-budgets", "16", "64"),
    *("--max-tokens-per-row", "600", "--lr-schedule", "constant"),
]


def metrics_of(directory) -> list[dict]:
    """The metrics that must repeat."""
    return lines_that_repeat(directory / "metrics.jsonl")


def assert_equal_metrics(a: list[dict], b: list[dict], tolerance: float, rel: float = 1e-3):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x:
            left, right = (v if isinstance(v, list) else [v] for v in (x[k], y[k]))
            assert [v is None for v in left] == [v is None for v in right], k
            assert [v for v in left if v is not None] == pytest.approx(
                [v for v in right if v is not None], abs=tolerance, rel=rel
            ), k


def on_ranks(*args):
    """What run_ranks runs: train.py with these flags."""
    return lambda _: distributed.main(lambda: train.train(parse([str(a) for a in args])))


def four_steps(model, out, *more) -> list[str]:
    """The flags of a run of 4 steps with a checkpoint after every second one."""
    flags = ["--model", model, "--output-dir", out, *"--steps 4 --save-every 2".split(), *SMALL]
    return [str(x) for x in (*flags, *more)]


@pytest.fixture(scope="module")
def unbroken(trained_model_path, tmp_path_factory, run_ranks):
    """One unbroken run of 4 steps on one process, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run_ranks(on_ranks(*four_steps(trained_model_path, out)), 1)


def checkpoints_of(out) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())


def test_a_run_leaves_everything_it_promises(unbroken, trained_model_path):
    out, text = unbroken
    config = json.loads((out / "config.json").read_text())
    assert config["max_budget"] == 64 and config["experiment"] == "ar-uniform"
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert any(m["loss"] != 0 for m in metrics)
    for m in metrics:
        assert m["sampler_gap_max"] < 1e-4
        assert m["anytime_reward"] == pytest.approx(sum(m["reward"]) / 4)
        assert m["closed"] + m["eos"] + m["length"] == pytest.approx(1)
    result = json.loads((out / "eval.json").read_text())
    assert result["step"] == 4 and result["before"]["step"] == 0 and result["budgets"] == [16, 64]
    assert result["anytime_accuracy"] == pytest.approx(sum(result["accuracy"]) / 2)
    assert result["final_accuracy"] == result["accuracy"][-1]
    assert (out / "anytime_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert checkpoints_of(out) == [2, 4]
    assert "step    3" in text and "16 thinking traces of up to 64 tokens" in text

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(trained_model_path)
    moved = max((p - q).abs().max().item() for p, q in zip(model.parameters(), base.parameters()))
    assert 0 < moved < 0.1 and tokenizer.encode("</think>") == [4]


def test_two_processes_give_the_same_numbers(unbroken, trained_model_path, tmp_path):
    """Under torchrun, as a user starts them: every other test forks its ranks."""
    out, two = unbroken[0], tmp_path / "two"
    flags = ["--model", trained_model_path, "--steps", 2, "--output-dir", two, *SMALL]
    run_script("train.py", *flags, processes=2)
    assert abs(metrics_of(out)[0]["loss"] - metrics_of(two)[0]["loss"]) < 1e-5
    assert_equal_metrics(metrics_of(out)[:2], metrics_of(two), 1e-5)
    first = [(d / "evals.jsonl").read_text().splitlines()[0] for d in (out, two)]
    assert json.loads(first[0]) == json.loads(first[1])


def test_a_process_without_a_trace_and_an_untied_head(trained_model_path, tmp_path, run_ranks):
    """One trace an update on two processes: one of them runs its backward without the head."""
    model = AutoModelForCausalLM.from_pretrained(trained_model_path)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(trained_model_path).save_pretrained(tmp_path / "untied")
    flags = [*SMALL, "--model", tmp_path / "untied", *"--baseline progress --steps 2".split()]
    flags += "--questions-per-step 2 --num-rollouts 1".split()  # the last one counts
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(on_ranks(*flags, "--output-dir", one), 1)
    run_ranks(on_ranks(*flags, "--output-dir", two), 2)
    assert_equal_metrics(metrics_of(one), metrics_of(two), 1e-5)


def signal_in_step(monkeypatch, step: int, number: int):
    """Send a signal to the first process before it samples the rollouts of a step."""
    rollouts_of_step = train.rollouts_of_step

    def signalled(c, run, engine, current):
        if current == step and distributed.rank() == 0:
            os.kill(os.getpid(), number)
        return rollouts_of_step(c, run, engine, current)

    monkeypatch.setattr(train, "rollouts_of_step", signalled)


def test_a_run_killed_on_two_processes_goes_on_on_one(
    unbroken, trained_model_path, tmp_path, run_ranks, monkeypatch
):
    args = four_steps(trained_model_path, out := tmp_path / "broken")
    signal_in_step(monkeypatch, 3, signal.SIGKILL)
    with pytest.raises(AssertionError, match=r"exit codes \[-9, "):
        run_ranks(on_ranks(*args))
    assert [m["step"] for m in metrics_of(out)] == [0, 1, 2] and checkpoints_of(out) == [2]
    assert not (out / "model").exists()
    monkeypatch.undo()
    text = run_ranks(on_ranks(*args, "--resume", "auto"), 1)
    assert "4 steps from 2 (resuming " in text
    assert_equal_metrics(metrics_of(unbroken[0]), metrics_of(out), 1e-4)  # sums in another order
    assert json.loads((out / "eval.json").read_text())["step"] == 4


def test_sigterm_finishes_the_step_saves_and_a_resume_is_equal_to_the_bit(
    unbroken, trained_model_path, tmp_path, run_ranks, monkeypatch
):
    args = four_steps(trained_model_path, out := tmp_path / "out", "--save-every", 20)
    signal_in_step(monkeypatch, 2, signal.SIGTERM)
    text = run_ranks(on_ranks(*args), 1, codes=[143])
    assert "stopped by SIGTERM before step 3: go on with --resume auto" in text
    assert checkpoints_of(out) == [3] and not (out / "model").exists()
    monkeypatch.undo()
    run_ranks(on_ranks(*args, "--resume", "auto"), 1)
    assert_same_run(unbroken[0], out)


def assert_same_run(one, two):
    """To the bit."""
    assert metrics_of(one) == metrics_of(two)
    models = [(out / "model" / "model.safetensors").read_bytes() for out in (one, two)]
    assert models[0] == models[1]


def test_a_resume_elsewhere_brings_the_history_along_and_compares_only_what_agrees(
    unbroken, trained_model_path, tmp_path, run_ranks
):
    more = ["--resume", unbroken[0] / "checkpoints" / "step-00000002", "--eval-budgets", 24, 64]
    args = four_steps(trained_model_path, out := tmp_path / "new", *more)
    text = run_ranks(on_ranks(*args), 1)
    lines = [json.loads(x) for x in (out / "evals.jsonl").read_text().splitlines()]
    assert [(e["step"], e["budgets"]) for e in lines] == [(0, [16, 64]), (4, [24, 64])]
    assert "evaluations before step 4 had other settings: not compared" in text
    assert json.loads((out / "eval.json").read_text())["before"]["step"] == 4
    assert_same_run(unbroken[0], out)


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--budgets", "24", "12"], "not increasing"),
        (["--budgets", "48", "400"], "context of 256"),
        (["--probs", "0.5", "0.5", "0.5", "0.5"], "sum to 2"),
        (["--baseline", "group", "--num-rollouts", "1"], "--num-rollouts must be at least 2"),
        (["--train-data", "BAD"], "bad.jsonl, line 2: not JSON"),
        (["--questions-per-step", "4096", "--max-budget", "8"], "--questions-per-step 4096"),
        (["--output-dir", "TAKEN"], "holds another run"),
        (["--resume", "nowhere"], "no complete checkpoint"),
        (["--engine", "vllm"], "vLLM is not installed"),
        (
            ["--preset", "paper-8k", "--engine", "plain"],
            "4,096,000 thinking tokens, and no GPU is vis",
        ),
        (
            ["--baseline", "critic"],
            "--baseline critic: brpo.BASELINES has brpo, progress, group, none",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_paid_for(
    args, complaint, tmp_path, unbroken, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "bad.jsonl").write_text('{"problem": "1 +1 ?", "answer": "2"}\n{"problem"\n')
    args = [str({"BAD": tmp_path / "bad.jsonl", "TAKEN": unbroken[0]}.get(a, a)) for a in args]
    if "--output-dir" not in args:
        args += ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=complaint):
        train.prepare(parse(args))
    names = {p.name for p in (tmp_path / "out").glob("*")}
    assert names <= {"lock", "owner"}  # so that the corrected command is taken


def test_an_evaluation_that_costs_more_than_training_is_announced():
    """8 questions × 2 traces × (64 + 2 · 7 tokens); a step: 2 × 2 traces × (64 + 16 · 7)."""
    flags = "--questions-per-step 2 --num-rollouts 2 --eval-samples 2 --eval-budgets 32 64"
    c = parse([*flags.split(), "--eval-every", "1"])
    (line,) = expensive_evaluation(c, {"a": [None] * 8})
    assert "up to 1,248 tokens, the 1 training steps between two up to 704:" in line
    assert expensive_evaluation(replace(c, eval_every=2), {"a": [None] * 8}) == []


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node 1"):
        train.prepare(parse(["--output-dir", str(tmp_path / "out")]))


def test_an_error_is_one_line_with_code_2_and_nobody_hangs(tmp_path, run_ranks):
    flags = ["--output-dir", tmp_path / "out"]
    text = run_ranks(on_ranks("--experiment", "critic", *flags), 1, codes=[2])
    assert "critic" in text and "Traceback" not in text
    flags += "--questions-per-step 15 --updates-per-step 1".split()
    text = run_ranks(on_ranks(*flags), 2, codes=[2, 2])
    assert text.count("error: ") == 1 and "does not divide over 2" in text
    assert "Traceback" not in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["grpo", "grpo-linear", "grpo-vr", "ar-base"])
def test_every_kind_of_experiment_trains(experiment, trained_model_path, tmp_path):
    small = [a for a in SMALL if a not in ("--num-summaries", "2")]
    flags = ["--model", trained_model_path, "--experiment", experiment, "--output-dir", tmp_path]
    args = [*flags, *"--steps 1 --save-every 0".split(), *small]
    train.train(parse([str(a) for a in args]))
    (metrics,) = metrics_of(tmp_path)
    assert metrics["trained_tokens"] > 0
    assert len(metrics["reward"]) == (1 if experiment == "grpo" else 4)
    assert not (tmp_path / "checkpoints").exists()
