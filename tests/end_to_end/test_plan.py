"""The planned memory: against arithmetic, against real processes; what it says when short.

Run as a script (by a test below), this file is the real process.
"""

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from packing import Tree, pack
from runtime import distributed
from runtime.config import PRESETS, Config
from scripts import plan
from scripts.gpu_report import REAL
from tests.conftest import run_script

SHAPE = {
    **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    **{"vocab_size": 20000, "tie_word_embeddings": False},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
}
TOKENS = 256
# Of the peak: PyTorch's CPU kernels keep workspaces of their own, and attention there is another.
TOLERANCE = 0.05


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_peak_of_a_real_process(peaks, tmp_path, monkeypatch):
    """A real update of the same shapes on two processes, its resident memory against the plan."""
    # Large blocks straight from the system and back: resident memory follows the tensors.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    run_script("tests/end_to_end/test_plan.py", tmp_path / "peak.json", processes=2, timeout=600)
    measured = json.loads((tmp_path / "peak.json").read_text())
    planned = sum(peaks[2].values()) - peaks[2]["parameters"]
    print(f"MiB: planned {planned >> 20}, measured {measured >> 20}")
    assert measured == pytest.approx(planned, rel=TOLERANCE)


def test_a_plan_that_does_not_fit_says_what_to_lower(monkeypatch):
    sizes = {"parameters": 0, "weights": 70 * plan.GIB}
    monkeypatch.setattr(plan, "training_peak", lambda *_: dict(sizes))
    c, machine = Config(**PRESETS["paper-8k"]), plan.Machine(gpus=(1, 8), gpu_memory=80)
    text = plan.describe(c, None, machine)
    assert "8 GPU(s): does NOT fit: 23.0 GiB too much" in text and "--max-tokens-per-row" in text
    sizes["weights"] = 50 * plan.GIB
    assert "lower --kv-cache-gb to 21" in plan.describe(c, None, machine)
    sizes["weights"] = 40 * plan.GIB
    assert "8 GPU(s): fits" in plan.describe(c, None, machine)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_other_families_have_a_plan(family, tmp_path, capsys):
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    config.save_pretrained(tmp_path)
    plan.main(["--model", str(tmp_path), "--gpus", "1"])
    text = capsys.readouterr().out
    assert text.startswith("small · ar-uniform") and "1 GPU(s): fits" in text


def test_a_model_without_a_config_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        plan.main(["--preset", "paper-8k"])
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "\n" not in error
    assert error.startswith("error: --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")


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
            for last in (False, True) if update else (True,):
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
