"""A reward function of the user's own: graded in the background; nothing it does stops a run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import train
from runtime.config import parse
from tasks.reward_function import RewardFunction, require_reward
from tests.conftest import ROOT, run_script
from tests.end_to_end.test_train import SMALL, assert_equal_metrics, metrics_of

# The README's example: no ground truth, no mathematics.
EXAMPLE = '''
def even(summary: str, ground_truth, question: str) -> float:
    """1 for an even digit in the box; a tenth less for each word too many."""
    if "\\\\boxed{" not in summary:
        return 0.0
    digit = summary.split("\\\\boxed{")[-1][:1]
    return max(0.0, float(digit in "02468") - 0.1 * summary.count(" "))
'''
FUNCTIONS = (
    EXAMPLE
    + """
import os, time
from concurrent.futures import ThreadPoolExecutor

pool = ThreadPoolExecutor(1)

def odd_jobs(summary, ground_truth, question):
    print("a print is no reply")
    if summary == "raise": raise KeyError("x")
    if summary == "hang":
        while True: pass
    if summary == "die": os._exit(3)
    if summary == "nan": return float("nan")
    if summary == "two": return 2
    if summary == "none": return None
    if summary == "future": return pool.submit(lambda: 0.25)
    return len(question) / 10 if ground_truth is None else float(ground_truth["score"])

def two_arguments(summary, ground_truth): return 1.0
"""
)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scores_come_back_in_place_and_failures_score_0_and_are_counted(functions, capfd):
    with RewardFunction("functions:odd_jobs", num_workers=2, timeout=1.0) as reward:
        asked = [
            ("good", None, "12345"),
            ("hang", None, ""),
            ("die", None, ""),
            ("raise", None, ""),
            ("nan", None, ""),
            ("two", None, ""),
            ("none", None, ""),
            ("future", None, ""),
            ("good", {"score": 0.75}, ""),
            ("good", None, "\n1"),
        ]
        futures = [reward.submit(*a) for a in asked]
        assert [f.result(timeout=30) for f in futures] == [0.5, 0, 0, 0, 0, 0, 0, 0.25, 0.75, 0.2]
        stats = {k: v for k, v in reward.take_stats().items() if v}
        assert stats == {"graded": 10, "timeouts": 1, "deaths": 1, "exceptions": 4}
        assert not any(reward.take_stats().values())
    assert capfd.readouterr().err.count("WARNING --reward functions:odd_jobs: ") == 1


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("functions", "AttributeError"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("functions:missing", "has no attribute 'missing'"),
        ("functions:two_arguments", "too many positional"),
        ("dies:f", "importing it ends the process"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_the_start(functions, name, complaint):
    (functions / "dies.py").write_text("import os; os._exit(1)")
    with pytest.raises(ValueError, match=complaint):
        require_reward(name)
    require_reward("functions:even")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_no_process_outlives_a_killed_parent(functions):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from reward_function import RewardFunction\n"
        "r = RewardFunction('functions:odd_jobs', 1, 60)\n"
        "r.submit('good', None, '').result(); r.submit('hang', None, '')\n"
        "print(r._processes[0].pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.time() + 5
    while os.path.exists(f"/proc/{worker}/cmdline") and time.time() < deadline:
        if open(f"/proc/{worker}/stat").read().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{worker}"), os.kill(worker, signal.SIGKILL)


def test_a_run_on_questions_without_answers(functions, trained_model_path, monkeypatch):
    """The README's example, end to end: one process, then two with the same numbers."""
    rows = [{"problem": f"{n % 10} +{1 + n % 5} -{1 + n // 5 % 5} ?"} for n in range(40)]
    data = functions / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "--model",
        str(trained_model_path),
        "--train-data",
        str(data),
        "--eval-data",
        str(data),
        "--reward",
        "functions:even",
        "--steps",
        "2",
        "--save-every",
        "0",
        *SMALL,
    ]
    with pytest.raises(ValueError, match="no field 'answer'"):
        train.prepare(parse([a.replace("functions:even", "math") for a in args]))
    runs = []
    for name in ("one", "two"):
        out, run_args = functions / name, [*args, "--output-dir", str(functions / name)]
        if name == "one":
            train.train(parse(run_args))
        else:
            run_script("train.py", *run_args, processes=2, cwd=functions)
        runs.append(metrics_of(out))
        counts = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        assert counts["verifier/graded"] > 0 and counts["verifier/exceptions"] == 0
    assert 0.2 < runs[0][0]["anytime_reward"] < 0.9  # about half of the digits are even
    assert_equal_metrics(*runs, 1e-5)
