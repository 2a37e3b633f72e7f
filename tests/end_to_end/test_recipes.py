"""The README's recipes, as printed: only sizes are added to a command, and MODEL is a directory."""

import json
import re
import runpy
import shlex
import shutil

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import ROOT, run_script
from tests.end_to_end.test_families import TINY
from tests.runtime.test_tokenizers import r1_tokenizer

README = (ROOT / "README.md").read_text()
SIZES = (
    "--steps 1 --save-every 0 --questions-per-step 4 --num-rollouts 4 --num-summaries 2 "
    "--eval-questions 2 --eval-samples 1 --verifier-workers 1 --eval-budgets 16 24"
)


def command(beginning: str) -> list[str]:
    """The arguments of a printed command that begins so, without the script."""
    lines = re.findall(rf"^python {re.escape(beginning)}.*$", README, re.M)
    assert len(lines) == 1, lines
    return shlex.split(lines[0], comments=True)[2:]


def recipe(file: str) -> str:
    return README.split(f"<!-- recipe: {file} -->\n```python\n")[1].split("```")[0]


def metrics_of(directory) -> dict:
    (line,) = (directory / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_a_baseline_and_a_reward_of_ones_own(trained_model_path, tmp_path):
    """In a copy of the project that is changed as the README says."""
    for folder in ("tasks", "runtime"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "brpo.py").open("a") as file:
        file.write("\n\n" + recipe("brpo.py"))
    (tmp_path / "my_reward.py").write_text(recipe("my_reward.py"))
    flags = command("train.py --baseline") + command("train.py --reward")
    flags += ["--model", trained_model_path, *SIZES.split()]
    text = run_script(tmp_path / "train.py", *flags, cwd=tmp_path)
    assert "baseline leave_one_out" in text
    (directory,) = (tmp_path / "runs").glob("*-baseline-leave_one_out-*-reward-my_reward-*")
    metrics = metrics_of(directory)
    assert metrics["trained_tokens"] > 0
    assert metrics["verifier/graded"] > 0 == metrics["verifier/exceptions"]

    baseline, reward = (
        runpy.run_path(tmp_path / "brpo.py"),
        runpy.run_path(tmp_path / "my_reward.py"),
    )
    returns = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1)
    found = baseline["BASELINES"]["leave_one_out"](None, returns, None, None, None)
    assert found.flatten().tolist() == [0.75, 0.5, 0.25]
    assert reward["short"]("\\boxed{4}", "4", "2 +2 ?", 32) == 0.75
    assert reward["short"]("\\boxed{5}", "4", "2 +2 ?", 32) == 0


@pytest.mark.slow
def test_ones_own_model_and_data_trained_and_measured(tmp_path):
    """The preset small, of which only the sizes of a step are lowered; the evaluation is whole."""
    tokenizer = r1_tokenizer()
    config = Qwen2Config(
        **TINY | {"vocab_size": len(tokenizer) + 9, "max_position_embeddings": 4096}
    )
    torch.manual_seed(0)
    for part in (Qwen2ForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "MODEL")
    for name in ("train", "test"):
        rows = [{"problem": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = command("train.py --model MODEL")
    text = run_script(ROOT / "train.py", *flags, *SIZES.split(), "--max-budget", 24, cwd=tmp_path)
    assert "small · ar-uniform" in text and "WARNING step 0: no summary was right" in text
    (directory,) = (tmp_path / "runs").glob("small-ar-uniform-*")
    assert metrics_of(directory)["trained_tokens"] > 0 and (directory / "model").is_dir()

    flags = command("evaluate.py MODEL")
    run_script(ROOT / "evaluate.py", *flags, cwd=tmp_path)
    result = json.loads((tmp_path / "runs/evaluation/MODEL/eval.json").read_text())
    assert result["budgets"] == [250, 500, 1000, 2000] and len(result["accuracy"]) == 4
