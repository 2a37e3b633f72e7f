"""The loop, run as a user runs it: its files, its errors, 1 and 2 processes, and a kill in the
middle."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import train
from runtime import checkpoint, rundir
from runtime.config import parse
from tests.conftest import ROOT, alone, run_script

SMALL = [
    *("--questions-per-step", "4", "--num-rollouts", "4", "--num-summaries", "2"),
    *("--eval-questions", "6", "--eval-samples", "1", "--eval-budgets", "16", "64"),
    *("--max-tokens-per-row", "600", "--lr-schedule", "constant"),
]


def metrics_of(directory) -> list[dict]:
    """The metrics that must repeat: not the clock, nor how often the verifier's cache was hit."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "verifier/"))}
        for line in lines
    ]


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


def four_steps(model, out) -> list:
    """The flags of a run of 4 steps with a checkpoint after every second one."""
    return ["--model", model, "--steps", 4, "--save-every", 2, "--output-dir", out, *SMALL]


@pytest.fixture(scope="module")
def unbroken(trained_model_path, tmp_path_factory):
    """One unbroken run of 4 steps, one process, a checkpoint after every second step."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = run_script(
        "train.py",
        *four_steps(trained_model_path, out),
    )
    return out, text


def test_a_run_leaves_everything_it_promises(unbroken, trained_model_path):
    out, text = unbroken
    config = json.loads((out / "config.json").read_text())
    assert (
        config["budgets"] == []
        and config["max_budget"] == 64
        and config["experiment"] == "ar-uniform"
    )
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert any(m["loss"] != 0 for m in metrics) and all(
        m["sampler_gap_max"] < 1e-4 for m in metrics
    )
    for m in metrics:
        assert m["anytime_reward"] == pytest.approx(sum(m["reward"]) / 4)
        assert m["closed"] + m["eos"] + m["length"] == pytest.approx(1)
    result = json.loads((out / "eval.json").read_text())
    assert result["step"] == 4 and result["before"]["step"] == 0 and result["budgets"] == [16, 64]
    assert (
        result["anytime_accuracy"] == pytest.approx(sum(result["accuracy"]) / 2)
        and result["final_accuracy"] == result["accuracy"][-1]
    )
    assert (out / "anytime_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "step    3" in text and "16 thinking traces of up to 64 tokens" in text

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    base = AutoModelForCausalLM.from_pretrained(trained_model_path)
    moved = max((p - q).abs().max().item() for p, q in zip(model.parameters(), base.parameters()))
    assert 0 < moved < 0.1 and tokenizer.encode("</think>") == [4]


def test_two_processes_give_the_same_numbers(unbroken, trained_model_path, tmp_path):
    out, _ = unbroken
    run_script(
        "train.py",
        "--model",
        trained_model_path,
        "--steps",
        2,
        "--output-dir",
        tmp_path / "two",
        *SMALL,
        processes=2,
    )
    one, two = metrics_of(out)[:2], metrics_of(tmp_path / "two")
    assert abs(one[0]["loss"] - two[0]["loss"]) < 1e-5
    assert_equal_metrics(one, two, 1e-5)
    evaluations = [
        json.loads((d / "evals.jsonl").read_text().splitlines()[0]) for d in (out, tmp_path / "two")
    ]
    assert evaluations[0] == evaluations[1]


def test_a_process_without_a_trace_and_an_untied_head(trained_model_path, tmp_path):
    """One trace an update on two processes: one of them runs its backward without the head."""
    model = AutoModelForCausalLM.from_pretrained(trained_model_path)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(trained_model_path).save_pretrained(tmp_path / "untied")
    few = {"--questions-per-step": "2", "--num-rollouts": "1"}
    args = [few.get(before, a) for before, a in zip(["", *SMALL], SMALL)]
    args += ["--model", str(tmp_path / "untied"), "--baseline", "progress", "--steps", "2"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train.train(parse([*args, "--output-dir", one]))
    run_script("train.py", *args, "--output-dir", two, processes=2)
    assert_equal_metrics(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), 1e-5)


@pytest.mark.parametrize("hidden, asked", [(64, [1]), (1024, [])])
def test_only_a_tiny_model_is_held_to_one_cpu_thread(tmp_path, monkeypatch, hidden, asked):
    """By its parameters, counted from the config alone; else torch's choice stands."""
    Qwen2Config(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, vocab_size=99
    ).save_pretrained(tmp_path)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train.distributed.limit_threads(str(tmp_path))
    assert threads == asked


def kill_in_step(args, out, step: int, processes: int):
    """Start a run and kill -9 all its processes while it is inside `step`, after the checkpoint
    before it is complete."""
    start = (
        [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
        if processes > 1
        else []
    )
    process = subprocess.Popen(
        [sys.executable, *start, str(ROOT / "train.py"), *map(str, args)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=alone(),
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(
            (out / "metrics.jsonl").read_text().splitlines()
        ) >= step:
            break
        time.sleep(0.02)
    time.sleep(0.1)  # into the sampling of the next step
    subprocess.run(
        ["pkill", "-9", "-f", str(out)], check=False
    )  # by its output directory: torchrun's workers have groups of their own
    process.wait()
    assert process.returncode == -signal.SIGKILL, (
        f"the run ended by itself ({process.returncode}) before it could be killed"
    )


@pytest.mark.parametrize("processes, then", [(1, 1), (2, 2), (2, 1)])
def test_a_killed_run_resumes_to_the_same_metrics(
    unbroken, trained_model_path, tmp_path, processes, then
):
    """Also on another number of processes than it was killed on."""
    out = tmp_path / "broken"
    args = four_steps(trained_model_path, out)
    kill_in_step(args, out, 3, processes)
    assert not (out / "model").exists()
    text = run_script("train.py", *args, "--resume", "auto", processes=then if then > 1 else 0)
    assert "4 steps from 2" in text
    # In one process the same machine repeats itself; across process counts sums are in another
    # order.
    assert_equal_metrics(metrics_of(unbroken[0]), metrics_of(out), 1e-6 if processes == 1 else 1e-4)
    assert json.loads((out / "eval.json").read_text())["step"] == 4


def test_rollouts_already_sampled_are_trained_on_not_sampled_again(
    unbroken, trained_model_path, tmp_path, monkeypatch
):
    """Kept from the newest checkpoint on; the resumed step reads them, and other runs' are
    ignored."""
    out, _ = unbroken
    assert (
        sorted(p.name for p in (out / "rollouts").iterdir()) == []
    )  # the last checkpoint covers everything
    broken = tmp_path / "broken"
    args = [
        "--model",
        str(trained_model_path),
        "--save-every",
        "20",
        "--output-dir",
        str(broken),
        *SMALL,
    ]
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_checkpoint", lambda *_: None)
        train.train(parse([*args, "--steps", "2"]))
    assert sorted(p.name for p in (broken / "rollouts").iterdir()) == [
        "step-00000000.json",
        "step-00000001.json",
    ]
    before = metrics_of(broken)

    def refuse(*_, **__):
        raise AssertionError("sampled again")

    with monkeypatch.context() as m:
        m.setattr(train, "sample_rollouts", refuse)
        m.setattr(checkpoint, "save_checkpoint", lambda *_: None)
        m.setattr(train, "evaluate", lambda *_: None)
        m.setattr(train, "report", lambda *_: None)
        train.train(parse([*args, "--steps", "2", "--resume", "auto"]))
        assert_equal_metrics(before, metrics_of(broken), 1e-6)
        with pytest.raises(AssertionError, match="sampled again"):
            train.train(parse([*args, "--steps", "2", "--resume", "auto", "--seed", "5"]))
    train.distributed.stop()


def test_checkpoints_are_complete_bounded_and_of_this_run(unbroken, tmp_path):
    out, _ = unbroken
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    identity = json.loads((out / "checkpoints" / "step-00000004" / "run.json").read_text())
    assert identity.pop("step") == 4
    start = checkpoint.check_checkpoint(out / "checkpoints" / "step-00000004", identity)
    assert start.step == 4 and start.trajectory == identity["trajectory"]
    with pytest.raises(ValueError, match="of another run: lr"):
        checkpoint.check_checkpoint(out / "checkpoints" / "step-00000004", {**identity, "lr": 1.0})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.check_checkpoint(tmp_path, identity)


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--budgets", "24", "12"], "not increasing"),
        (["--budgets", "48", "400"], "context of 256"),
        (["--probs", "0.5", "0.5", "0.5", "0.5"], "sum to 2"),
        (["--baseline", "group", "--num-rollouts", "1"], "--num-rollouts must be at least 2"),
        (["--train-data", "BAD"], "bad.jsonl, line 2: not JSON"),
        (["--questions-per-step", "4096"], "--questions-per-step 4096"),
        (["--output-dir", "TAKEN"], "holds another run"),
        (["--resume", "nowhere"], "no complete checkpoint"),
        (["--engine", "vllm"], "vLLM is not installed"),
        (["--preset", "paper-8k"], "needs GPUs and none is visible"),
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
    left = (tmp_path / "out").glob("*")
    assert {p.name for p in left} <= {"lock"}  # so that the corrected command is taken


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node 1"):
        train.prepare(parse(["--output-dir", str(tmp_path / "out")]))


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_is_one_line_with_code_2_and_nobody_hangs(processes, tmp_path):
    text = run_script(
        "train.py",
        "--questions-per-step",
        "15",
        "--updates-per-step",
        "1",
        "--baseline",
        "critic" if not processes else "brpo",
        "--output-dir",
        tmp_path / "out",
        processes=processes,
        expect=2,
    )
    if processes:
        assert text.count("error: ") == 1 and "does not divide over 2" in text
    assert 'train.py", line' not in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["grpo", "grpo-linear", "grpo-vr", "ar-base"])
def test_every_kind_of_experiment_trains(experiment, trained_model_path, tmp_path):
    small = [a for a in SMALL if a not in ("--num-summaries", "2")]
    train.train(
        parse(
            [
                "--model",
                str(trained_model_path),
                "--experiment",
                experiment,
                "--steps",
                "1",
                "--save-every",
                "0",
                "--output-dir",
                str(tmp_path / "o"),
                *small,
            ]
        )
    )
    (metrics,) = metrics_of(tmp_path / "o")
    assert metrics["trained_tokens"] > 0 and len(metrics["reward"]) == (
        1 if experiment == "grpo" else 4
    )
    assert not (tmp_path / "o" / "checkpoints").exists()


def test_a_resumed_run_does_the_logs_behind_its_checkpoint_again(tmp_path):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(4))
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        (tmp_path / name).write_text(lines + '{"step": 4, "torn')
    rundir.begin(tmp_path, tmp_path / "checkpoints" / "step-00000002", first_step=2)
    kept = {p.name: len(p.read_text().splitlines()) for p in tmp_path.glob("*.jsonl")}
    assert kept == {"metrics.jsonl": 2, "samples.jsonl": 2, "evals.jsonl": 3}
