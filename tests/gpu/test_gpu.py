"""What only a GPU can show: python -m pytest -q -m gpu. docs/gpu.md says how it went."""

import os

import pytest
import torch
from transformers import AutoConfig

from packing import Tree, pack
from runtime import distributed
from runtime.engines import sample_tokens
from scripts import plan, preflight
from tests.conftest import run_script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LIMIT = preflight.LIMIT["cuda"]
MIB = 2**20
# cuBLAS keeps 32 MiB for each handle, which plan.py leaves out and this small model would drown in.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
TOKENS = 32768  # a row that is long for this model


@pytest.fixture(scope="module")
def planned(tiny_model_path):
    """Bytes at the training peak. Before any process group exists: planning makes a fake one."""
    peak = plan.training_peak(AutoConfig.from_pretrained(tiny_model_path), 1, TOKENS)
    return sum(peak.values()) - peak["parameters"]


@pytest.fixture(scope="module")
def policy(planned, tiny_model_path):
    """The tiny model as training has it: bfloat16, FSDP2, FlexAttention."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        device = distributed.start()
        yield distributed.load_policy(str(tiny_model_path), device)
        distributed.stop()


def test_a_tree_equals_separate_sequences(policy):
    assert preflight.tree_against_separate(policy, "cuda") < LIMIT


def test_flex_equals_dense(policy):
    assert preflight.flex_against_dense(policy, "cuda") < LIMIT


def test_flex_gradients_equal_dense_ones(policy):
    """FlexAttention has no backward on a CPU, so this is the first place it can be seen."""
    row = pack([preflight.example(policy.config.vocab_size)], 128).to("cuda")
    gradients = []
    for implementation in ("sdpa", "flex_attention"):
        policy.set_attn_implementation(implementation)
        policy.zero_grad()
        policy.token_logprobs(row, 1.0).sum().backward()
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert 0.95 < gradients[0].norm() / gradients[1].norm() < 1.05


def test_memory_of_an_update_is_as_planned(policy, planned):
    """The allocator's peak against plan.py's."""
    row = pack([Tree([0], [1] * (TOKENS - 1), [])], 128).to("cuda")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for last in (False, True):
            distributed.accumulate(policy, last)
            policy.token_logprobs(row, 1.0).sum().backward()
        plan.step(policy, optimizer)
    measured = torch.cuda.max_memory_allocated()
    assert abs(measured - planned) < 0.15 * planned + 64 * MIB


@pytest.mark.parametrize("processes", sorted({1, torch.cuda.device_count()} - {0}))
@pytest.mark.parametrize("engine", ["plain", "vllm"])
def test_the_preflight_passes(engine, processes, trained_model_path, tmp_path):
    if engine == "vllm":
        pytest.importorskip("vllm")
    text = run_script(
        "scripts/preflight.py",
        "--model",
        trained_model_path,
        "--engine",
        engine,
        "--output-dir",
        tmp_path / "out",
        processes=processes,
    )
    assert "FAIL" not in text and "FlexAttention against dense" in text


def test_a_gpu_draws_the_tokens_of_a_cpu():
    """From the same logits: the hash is the same integers there, and rounding flips one in 1e7."""
    logits = 2 * torch.randn(64, 49_152, generator=torch.Generator().manual_seed(0))
    rows = logits, torch.ones(64, 1), torch.arange(64)
    tokens, logp = sample_tokens(*rows, 5)
    on_gpu, gpu_logp = sample_tokens(*(x.cuda() for x in rows), 5)
    assert torch.equal(on_gpu.cpu(), tokens)
    torch.testing.assert_close(gpu_logp.cpu(), logp, atol=1e-5, rtol=1e-5)
