"""Every family that trains, saved by training, in both engines; then with other weights synced."""

from contextlib import closing

import pytest
import torch
from transformers import AutoTokenizer

from rollout import Request
from runtime import checkpoint, distributed
from runtime.engines import PlainEngine, VllmEngine
from runtime.models import check_numbers
from tests.conftest import finish, needs_vllm, world_of_one
from tests.end_to_end.test_families import FAMILIES, make_model

pytestmark = [pytest.mark.vllm, needs_vllm]
CPU = torch.device("cpu")


def greedy(engine):
    """32 greedy tokens and their log-probs."""
    request = Request("greedy", tuple(range(5, 40)), 32, (), 0, 0.0)
    return finish(engine, [request])["greedy"]


WITHOUT_CODE = ("SmolLM3", "Olmo2", "GPTNeoX")  # vLLM runs them by transformers' classes
# vLLM's CPU build packs experts when it loads them, and puts reloaded ones in unpacked.
RELOADED_WRONG = ("Qwen3Moe", "Mixtral", "Olmoe")


@pytest.fixture
def opened(request, tmp_path):
    """A family's directory as training saves it, and the policy."""
    # vLLM's CPU attention has heads of 32.
    changes = FAMILIES[request.param] | {"hidden_size": 128}
    if "head_dim" in changes:
        changes["head_dim"] = 32
    original, saved = make_model(request.param, changes, tmp_path / "original"), tmp_path / "saved"
    with world_of_one():
        policy = distributed.load_policy(str(original), CPU)
        checkpoint.save_model(policy, AutoTokenizer.from_pretrained(original), saved)
        yield str(saved), policy


@pytest.mark.parametrize(
    "opened", [f for f in FAMILIES if f not in (*WITHOUT_CODE, *RELOADED_WRONG)], indirect=True
)
def test_a_family_speaks_alike_in_both_engines(opened):
    path, policy = opened
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    said = []
    for make in (lambda: PlainEngine(path), lambda: VllmEngine(path, CPU, 160)):
        with closing(make()) as engine:
            loaded = greedy(engine)
            engine.sync_weights(distributed.full_weights(policy), 1)
            said.append((loaded, greedy(engine)))
    for (tokens, logp), (expected, expected_logp) in zip(*said):
        assert tokens == expected
        assert logp == pytest.approx(expected_logp, abs=1e-3)
    assert said[0][0] != said[0][1], "the sync changes what is said"


@pytest.mark.parametrize("opened", RELOADED_WRONG, indirect=True)
def test_weights_that_arrive_wrong_are_refused(opened):
    """Loaded right, hence the start of a run syncs before it compares."""
    path, policy = opened
    with closing(VllmEngine(path, CPU, 160)) as engine:
        check_numbers(engine, policy, 160, CPU)
        engine.sync_weights(distributed.full_weights(policy), 1)
        with pytest.raises(ValueError, match="log-probs of trainer and sampler differ"):
            check_numbers(engine, policy, 160, CPU)


@pytest.mark.parametrize("opened", WITHOUT_CODE, indirect=True)
def test_a_model_without_code_in_vllm_is_refused(opened):
    with pytest.raises(ValueError, match="use --engine plain"):
        VllmEngine(opened[0], CPU, 160)
