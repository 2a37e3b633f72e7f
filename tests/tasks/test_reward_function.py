"""A reward function of the user's own: graded in the background; nothing it does stops a run."""

import json

import pytest

import train
from runtime.config import parse
from runtime.startup import SummaryVerifier
from tasks.reward_function import RewardFunction, require_reward

FUNCTIONS = """
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

def even(summary, ground_truth, question):  # tokens, so that a random model's score varies
    digits = [c for c in summary if c.isdigit()]
    return sum(c in "02468" for c in digits) / max(len(digits), 1)

def two_arguments(summary, ground_truth): return 1.0
def a_tuple(summary, ground_truth, question): return (1.0, "why")
def nothing(summary, ground_truth, question): summary == ground_truth
def an_array(summary, ground_truth, question): return [1.0]
def strict(summary, ground_truth, question): raise ValueError(summary)
async def asynchronous(summary, ground_truth, question): return 1.0
def generator(summary, ground_truth, question): yield 1.0
class Judge: pass
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scores_come_back_in_place_and_failures_score_0_and_are_counted(functions, capfd):
    failures = [(name, None, "") for name in "hang die raise nan two none".split()]
    good = [("future", None, ""), ("good", {"score": 0.75}, ""), ("good", None, "\n1")]
    with RewardFunction("functions:odd_jobs", num_workers=2, timeout=1.0) as reward:
        calls = [("good", None, "12345"), *failures, *good]
        futures = [reward.submit(*call) for call in calls]
        assert [f.result(timeout=30) for f in futures] == [0.5, *[0] * 6, 0.25, 0.75, 0.2]
        stats = {k: v for k, v in reward.take_stats().items() if v}
        assert stats == {"graded": 10, "timeouts": 1, "deaths": 1, "exceptions": 4}
        assert not any(reward.take_stats().values())
    assert capfd.readouterr().err.count("WARNING --reward functions:odd_jobs: ") == 1


def test_a_function_that_cannot_be_called_is_refused_at_the_start(functions):
    (functions / "dies.py").write_text("import os; os._exit(1)")
    for name, complaint in [
        ("functions", "AttributeError"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("functions:missing", "has no attribute 'missing'"),
        ("functions:two_arguments", "too many positional"),
        ("dies:f", "importing it ends the process"),
        ("functions:a_tuple", "it returned .1.0, 'why'., a tuple, which is not a number"),
        ("functions:nothing", "it returned None, a NoneType"),
        ("functions:an_array", "it returned .1.0., a list"),
        ("functions:asynchronous", "it is async or a generator"),
        ("functions:generator", "it is async or a generator"),
        ("functions:Judge", "it is a type, not a function"),
    ]:
        with pytest.raises(ValueError, match=f"--reward {name}: .*{complaint}"):
            require_reward(name)
    for name in ("even", "strict"):
        require_reward(f"functions:{name}", "4", "2 +2 ?")


def test_the_users_modules_may_be_called_like_the_projects(functions):
    """And torch, which takes seconds to import, is in no worker."""
    (functions / "tasks").mkdir()
    (functions / "rewards.py").write_text("HALF = 0.5")
    (functions / "tasks" / "verifier.py").write_text(
        "import sys, rewards\n"
        "def f(summary, truth, question): return rewards.HALF + ('torch' in sys.modules)"
    )
    require_reward("tasks.verifier:f")
    with RewardFunction("tasks.verifier:f", num_workers=1) as reward:
        assert reward.submit("", None, "").result(timeout=30) == 0.5


def test_the_example_of_the_readme(functions):
    """even(summary, ground_truth, question), as the README calls it: an even digit in the box."""
    (functions / "my_reward.py").write_text(
        "def even(summary, ground_truth, question):\n"
        "    return any(f'\\\\boxed{{{digit}}}' in summary for digit in '02468')"
    )
    with RewardFunction("my_reward:even", num_workers=1) as reward:
        texts = ["\\boxed{4}", "so \\boxed{4}", "\\boxed{5}", "4"]
        futures = [reward.submit(text, None, "") for text in texts]
        assert [future.result(timeout=30) for future in futures] == [1.0, 1.0, 0.0, 0.0]


def test_the_math_verifier_reads_the_first_paragraph_only():
    with SummaryVerifier(num_workers=1) as verifier:
        summary = "\n\n\\boxed{4}.\n\nWait, no: \\boxed{5}"
        scores = [verifier.submit(summary, truth, "2 + 2?").result() for truth in ("4", "5")]
    assert scores == [1.0, 0.0]


def test_a_run_on_questions_without_answers(functions, tiny_model_path):
    rows = [{"problem": f"{n % 10} +{1 + n % 5} -{1 + n // 5 % 5} ?"} for n in range(20)]
    data = functions / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--model", str(tiny_model_path), *"--output-dir out --steps 1 --save-every 0".split()]
    args += ["--train-data", str(data), "--eval-data", str(data)]
    args += "--questions-per-step 4 --num-rollouts 4 --num-summaries 2".split()
    args += "--eval-questions 2 --eval-samples 1 --eval-budgets 16 64 --reward".split()
    with pytest.raises(ValueError, match="no field 'answer'"):
        train.prepare(parse([*args, "math"]))
    train.train(parse([*args, "functions:even"]))
    (metrics,) = map(json.loads, (functions / "out" / "metrics.jsonl").open())
    assert metrics["verifier/graded"] > 0 and metrics["verifier/exceptions"] == 0
    assert 0.1 < metrics["anytime_reward"] < 0.9  # about half of the digits are even
    assert metrics["loss"] != 0 and (functions / "out" / "model").is_dir()
