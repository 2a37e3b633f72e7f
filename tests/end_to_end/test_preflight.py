"""The preflight's CPU form on a small model, and that each of its verdicts can fail."""

import re
import subprocess
import sys
from types import MethodType

import pytest
from transformers import AutoModelForCausalLM

import packing
from scripts import preflight
from tests.conftest import ROOT, run_script

PARTS = [
    "updates without a gradient",
    "sampler against trainer",
    "the same after a weight sync",
    "the same after a resume",
    "the resumed step repeats itself",
    "a tree against separate sequences",
]
# A sampler that keeps its first weights, whatever it is given.
STALE = """
import sys, engines, preflight
def ignore(self, weights, version):
    for _ in weights: pass
    self.version = version
engines.PlainEngine.sync_weights = ignore
sys.exit(not preflight.main(sys.argv[1:]))
"""


def verdicts(text: str) -> dict[str, str]:
    """part -> "ok" or "FAIL"."""
    return {part: verdict for verdict, part in re.findall(r"^(ok|FAIL) +(.*?)(?::|  )", text, re.M)}


@pytest.mark.parametrize("processes", [0, 2])
def test_every_part_passes(processes, trained_model_path, tmp_path):
    text = run_script(
        "scripts/preflight.py",
        "--model",
        trained_model_path,
        "--output-dir",
        tmp_path / "out",
        processes=processes,
    )
    assert verdicts(text) == dict.fromkeys(PARTS, "ok"), text[-3000:]
    assert "FlexAttention against dense" in text and "memory" in text


def test_a_sampler_that_misses_its_sync_fails(trained_model_path, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STALE,
            "--model",
            str(trained_model_path),
            "--output-dir",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    found = verdicts(done.stdout)
    assert done.returncode == 1, done.stderr[-3000:]
    assert found.get("sampler against trainer") == "ok", done.stdout + done.stderr[-3000:]
    assert found["the same after a weight sync"] == "FAIL"
    assert found["the same after a resume"] == "FAIL"


def test_a_wrong_mask_fails(tiny_model_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="sdpa")
    model.token_logprobs = MethodType(packing.token_logprobs, model)
    assert preflight.tree_against_separate(model, "cpu") < preflight.LIMIT["cpu"]
    # A branch that sees its whole trunk, beyond the cut too.
    monkeypatch.setattr(
        packing,
        "is_visible",
        lambda q, k, branch, trunk, trunk_end: (
            (k <= q) & ((branch[k] == branch[q]) | (branch[k] == trunk[q]))
        ),
    )
    assert preflight.tree_against_separate(model, "cpu") > 10 * preflight.LIMIT["cpu"]


def test_flags_given_by_hand_win(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    c = preflight.small(["--preset", "paper-8k", "--max-budget", "64"])
    assert c.max_budget == 64 and c.num_rollouts == 4 and c.preset == "paper-8k"
    assert c.questions_per_step == 6 and c.eval_data == ("deepscaler",)
    assert preflight.small([]).max_budget == 48
