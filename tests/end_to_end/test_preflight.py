"""The preflight's CPU form on a small model, and that each of its verdicts can fail."""

import re
from types import MethodType

import pytest
from transformers import AutoModelForCausalLM

import packing
from runtime.engines import PlainEngine
from scripts import preflight
from tests.conftest import run_script

PARTS = [
    "updates without a gradient",
    "sampler against trainer",
    "the same after a weight sync",
    "the same after a resume",
    "the resumed step repeats itself",
    "a tree against separate sequences",
]
FEW = "--num-rollouts 2 --num-summaries 1 --eval-questions 1".split()


def verdicts(text: str) -> dict[str, str]:
    """part -> "ok" or "FAIL"."""
    return {part: verdict for verdict, part in re.findall(r"^(ok|FAIL) +(.*?)(?::|  )", text, re.M)}


@pytest.mark.slow
def test_every_part_passes_on_two_processes(trained_model_path, tmp_path):
    """On one process: tests/end_to_end/test_gpu_report.py."""
    args = ("--model", trained_model_path, "--output-dir", tmp_path / "out")
    text = run_script("scripts/preflight.py", *args, processes=2)
    assert verdicts(text) == dict.fromkeys(PARTS, "ok"), text[-3000:]
    assert "FlexAttention against dense" in text and "memory" in text


def test_a_sampler_that_misses_its_sync_fails_and_what_does_not_depend_on_it_passes(
    trained_model_path, tmp_path, monkeypatch, capfd
):
    sync = PlainEngine.sync_weights

    def sync_once(self, weights, version):  # a run that fails to at its start is refused
        if not hasattr(self, "synced"):
            sync(self, weights, version)
        self.synced, self.version = True, version

    monkeypatch.setattr(PlainEngine, "sync_weights", sync_once)
    args = ["--model", str(trained_model_path), "--output-dir", str(tmp_path / "out"), *FEW]
    assert not preflight.main(args)
    failed = {"the same after a weight sync", "the resumed step repeats itself"}
    expected = {part: "FAIL" if part in failed else "ok" for part in PARTS}
    assert verdicts(capfd.readouterr().out) == expected
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "metrics.jsonl" in left and not left & {"checkpoints", "model"}


def test_a_wrong_mask_fails(tiny_model_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="sdpa")
    model.token_logprobs = MethodType(packing.token_logprobs, model)
    assert preflight.tree_against_separate(model, "cpu") < preflight.LIMIT["cpu"]

    def sees_its_whole_trunk(q, k, branch, trunk, trunk_end):  # beyond the cut too
        return (k <= q) & ((branch[k] == branch[q]) | (branch[k] == trunk[q]))

    monkeypatch.setattr(packing, "is_visible", sees_its_whole_trunk)
    assert preflight.tree_against_separate(model, "cpu") > 10 * preflight.LIMIT["cpu"]


def test_flags_given_by_hand_win(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    c = preflight.small(["--preset", "paper-8k", "--max-budget", "64"])
    assert c.max_budget == 64 and c.num_rollouts == 4 and c.preset == "paper-8k"
    assert c.questions_per_step == 6 and c.eval_data == ("deepscaler",)
    assert preflight.small([]).max_budget == 48
