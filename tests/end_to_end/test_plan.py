"""The planned memory: against arithmetic, against real processes; what it says when short.

Run as a script (by the test below), this file is the real process.
"""

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from packing import Tree, pack
from runtime import distributed
from runtime.config import PRESETS, Config
from scripts import plan
from tests.conftest import run_script

SHAPE = dict(
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=1024,
    vocab_size=20000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
# DeepSeek-R1-Distill-Qwen-1.5B, as its config.json states it.
REAL = dict(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
TOKENS = 1024
# Of the peak: PyTorch's CPU kernels keep workspaces of their own, and attention there is another.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def peaks():
    distributed.stop()  # a test before may have ended with its group of processes
    config = Qwen2Config(**SHAPE)
    return {world: plan.training_peak(config, world, TOKENS) for world in (1, 2)}


def test_weights_and_moments_by_hand(peaks):
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        real = Qwen2ForCausalLM(Qwen2Config(**REAL))
    count = sum(p.numel() for p in model.parameters())
    for world, peak in peaks.items():
        assert peak["parameters"] == count
        assert peak["weights, float32, sharded"] == pytest.approx(4 * count / world, rel=1e-3)
        assert peak["two moments of AdamW, sharded"] == pytest.approx(8 * count / world, rel=1e-3)
        assert min(peak.values()) >= 0, "a line that is counted twice"
    assert sum(p.numel() for p in real.parameters()) == 1_777_088_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(
            1,
            marks=pytest.mark.skipif(
                os.environ.get("RUN_SLOW") != "1", reason="RUN_SLOW=1: two processes check the same"
            ),
        ),
        2,
    ],
)
def test_the_peak_of_a_real_process(peaks, processes, tmp_path):
    """A real update of the same shapes, its resident memory against the planned bytes."""
    # Large blocks straight from the system and back: resident memory follows the tensors.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        run_script("tests/end_to_end/test_plan.py", tmp_path / "peak.json", processes=processes)
    measured = json.loads((tmp_path / "peak.json").read_text())
    planned = sum(peaks[processes].values()) - peaks[processes]["parameters"]
    print(
        f"{processes} process(es): planned {planned / 2**20:.0f} MiB, "
        f"measured {measured / 2**20:.0f} MiB"
    )
    assert measured == pytest.approx(planned, rel=TOLERANCE)


def test_a_plan_that_does_not_fit_says_what_to_lower(monkeypatch):
    sizes = {"parameters": 0, "weights": 70 * plan.GIB}
    monkeypatch.setattr(plan, "training_peak", lambda *_: dict(sizes))
    c = Config(**PRESETS["paper-8k"])
    said = plan.report(c, None, plan.Machine(gpus=(1, 8), gpu_memory=80))
    assert "8 GPU(s): does NOT fit: 23.0 GiB too much" in said and "--max-tokens-per-row" in said
    sizes["weights"] = 50 * plan.GIB
    said = plan.report(c, None, plan.Machine(gpus=(8,), gpu_memory=80))
    assert "lower --kv-cache-gb to 21" in said
    sizes["weights"] = 40 * plan.GIB
    assert "8 GPU(s): fits" in plan.report(c, None, plan.Machine(gpus=(8,), gpu_memory=80))


def test_a_model_without_a_config_ends_with_one_line():
    text = run_script("scripts/plan.py", "--preset", "paper-8k", expect=2)
    assert "error: --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in text
    assert "Traceback" not in text


def rss(key: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(path: Path):
    """One update of two rows as train.py does it on GPUs: bfloat16, recomputation, FSDP2."""
    device = distributed.start()
    for shape, tokens in ((SHAPE | {"vocab_size": 100, "hidden_size": 64}, 128), (SHAPE, TOKENS)):
        before = rss("VmRSS")  # the first, small pass loads libraries and starts threads
        model = Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation="sdpa"))
        distributed.make_trainable(model, gpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        row = pack([Tree([1], [1] * (tokens - 1), [])]).to(device)
        for update in range(2):
            if update:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            for last in (False, True):
                distributed.accumulate(model, last)
                model.token_logprobs(row, 1.0).sum().backward()
            plan.step(model, optimizer)
        peak = rss("VmHWM") - before
        del model, optimizer
    if distributed.rank() == 0:
        path.write_text(json.dumps(peak))
    distributed.stop()


if __name__ == "__main__":
    assert os.environ["MALLOC_MMAP_THRESHOLD_"]
    measure(Path(sys.argv[1]))
