"""scripts/trl_anytime.py on the released TRL, from the base model of the default run.

pip install -r requirements.txt && pip install trl==1.16.0
"""

import math
import sys

import pytest
import torch

from budgets import BudgetPrior
from packing import Branch
from rewards import ANSWER_HEADER, CUT_TEXT
from tasks import arithmetic
from tests.conftest import ROOT
from tests.test_house import example

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from scripts import bench_peers
from scripts.bench_peers import as_batch, sequences
from scripts.trl_anytime import AnytimeTrainer, main

pytestmark = pytest.mark.peers
PRIOR, A = BudgetPrior.make("uniform", 64, 4), 2


@pytest.fixture(scope="module")
def accuracy_reward():
    """The README's."""
    sys.path.insert(0, str(ROOT / "tasks"))  # as if verifier.py were copied beside it
    names = {}
    exec(example("verifier"), names)
    yield names["accuracy_reward"]
    names["verifier"].close()
    sys.path.remove(str(ROOT / "tasks"))


def make_trainer(path, reward, folder, prompt=None, **settings):
    rows = [
        {"prompt": prompt(q) if prompt else q + "<think>", "ground_truth": a}
        for q, a in arithmetic.make_rows("train", 64)
    ]
    settings = dict(per_device_train_batch_size=8, num_generations=4, max_steps=1) | settings
    return AnytimeTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        reward,
        GRPOConfig(
            str(folder), report_to=[], use_cpu=True, bf16=False, loss_type="dr_grpo", **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        prior=PRIOR,
        num_summaries=A,
        max_summary=7,
    )


def test_it_trains(trained_model_path, tmp_path):
    log = [line for line in main(2, str(tmp_path), str(trained_model_path)) if "loss" in line]
    assert len(log) == 2
    for line in log:
        assert math.isfinite(float(line["loss"])) and float(line["grad_norm"]) > 0
        at = [float(line[f"reward@{b}"]) for b in PRIOR.budgets]
        assert float(line["reward"]) == pytest.approx(sum(at) / 4, abs=1e-3) and 0 < sum(at) < 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_packed_row_has_the_gradient_of_trls_loss_on_separate_rows(
    trained_model_path, tmp_path, accuracy_reward, temperature
):
    torch.manual_seed(0)
    trainer = make_trainer(trained_model_path, accuracy_reward, tmp_path, temperature=temperature)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(list(trainer.train_dataset.select([0] * 4 + [1] * 4)))
    assert any(any(t.advantages) for t in inputs["trees"])

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    packed = gradient(trainer._compute_loss(model, inputs))
    rows = as_batch([row for tree in inputs["trees"] for row in sequences(tree)])
    # TRL divides by rows × longest completion, the packed row by traces × b_M.
    scale = len(rows["advantages"]) * trainer.max_completion_length / (8 * PRIOR.budgets[-1])
    separate = gradient(GRPOTrainer._compute_loss(trainer, model, rows) * scale)
    assert packed.norm() > 1e-4
    assert (packed - separate).norm() / packed.norm() < 1e-5


def test_reward_functions_get_the_cut_text_and_an_end_of_text_is_not_asked(
    trained_model_path, tmp_path
):
    """Three traces: closed after 3 tokens, never closed, ended by end-of-text after 20."""
    seen = []

    def reward(completions, prompts, **kwargs):
        seen.extend(completions)
        return [1.0 for c in completions]

    def chat(question):
        return [{"role": "user", "content": question}]

    trainer = make_trainer(
        trained_model_path, reward, tmp_path, chat, num_generations=2, per_device_train_batch_size=4
    )
    encode = trainer._tokenizer.encode
    digit, end, eos = encode("5")[0], encode("</think>")[0], trainer._tokenizer.eos_token_id
    traces = [[digit] * 2 + [end], [digit] * 64, [digit] * 19 + [eos], [digit] * 63 + [end]]
    answers = []

    def sample(prompts, max_tokens, stop):
        if not answers:
            assert max_tokens == 64 and set(stop) == {end, eos}
            answers.append(True)
            return [list(z) for z in traces]
        assert max_tokens == 7 and stop == [eos] and len(prompts) == 4 * 4 * A
        return [[*encode("\\boxed{5}"), eos] for _ in prompts]

    trainer.sample = sample
    trees = trainer._generate_and_score_completions(
        list(trainer.train_dataset.select([0, 0, 1, 1]))
    )["trees"]
    texts = [c[0]["content"] for c in seen]
    closed, cut = ANSWER_HEADER + "\\boxed{5}", CUT_TEXT + ANSWER_HEADER + "\\boxed{5}"
    expected = ["55</think>" + closed] * 4 * A
    expected += ["5" * n + cut for n in (16, 32, 48, 64) for _ in range(A)]
    expected += ["5" * 16 + cut] * A + ["5" * 19] * 3 * A
    expected += ["5" * n + cut for n in (16, 32, 48) for _ in range(A)]
    expected += ["5" * 63 + "</think>" + closed] * A
    assert texts == expected
    over = trees[2].branches[A:]
    assert [(b.cut, b.appended, b.summary) for b in over] == [(20, [], [])] * 3 * A
    # Both rollouts of the first question earn 1 everywhere. Of the second, one earns 1/4 in all and
    # the other 1: the first segment's return minus the group's mean, V2.
    assert not any(trees[0].advantages) and not any(trees[1].advantages)
    assert trees[2].advantages[:16] == [-0.375] * 16 and trees[3].advantages[:16] == [0.375] * 16
    assert all(isinstance(b, Branch) and b.advantage == 0 for t in trees for b in t.branches)


@pytest.mark.parametrize(
    "settings",
    [{"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 1}],
)
def test_more_than_one_update_on_a_batch_is_refused(trained_model_path, tmp_path, settings):
    with pytest.raises(ValueError, match="one update a batch"):
        make_trainer(trained_model_path, lambda completions, **_: [], tmp_path, **settings)


def test_the_benchmark_runs_in_small(capsys):
    """It measures the same update on all sides: their gradients are equal."""
    bench_peers.bench_anytime(1, (32,))
    bench_peers.bench_generation(1, traces=2, thinking=16, summary=4)
    assert "packed row" in capsys.readouterr().out
    for model, sides in (bench_peers.anytime_sides(32), bench_peers.plain_sides(16, 3, 100)):
        assert bench_peers.largest_gap(model, sides) < 1e-5
