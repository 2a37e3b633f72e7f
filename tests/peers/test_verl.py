"""The README's estimator in verl: registered with its decorator, called by its compute_advantage.

    pip install -r requirements.txt && pip install --no-deps verl==0.9.1
    pip install ray omegaconf tensordict codetiming orjson torchdata peft cachetools fastapi uvicorn

verl's own requirements pin an older transformers; the modules imported here run without them.
"""

import pytest
import torch

import brpo
import rewards
from budgets import cut_lengths
from tests.test_house import example

pytestmark = pytest.mark.peers
BUDGETS, PROBS, WIDTH = [50, 100, 150, 200], [0.1, 0.2, 0.3, 0.4], 240
B, G, M, A = 3, 4, 4, 2


@pytest.fixture(scope="module")
def compute_advantage():
    pytest.importorskip("verl")
    from verl.trainer.ppo.ray_trainer import compute_advantage

    exec(example("brpo rewards"), {})
    return compute_advantage


def batch(scores, lengths, order):
    """verl's batch: a row per trace and per summary, in any order; scores at a summary's end."""
    from verl import DataProto

    uids, rows, ends = [], [], []
    for q in range(B):
        for g in range(G):
            uids.append(f"q{q}/{g}")
            rows.append(lengths[q, g].item())
            ends.append(0.0)
            for j in range(M):
                for a in range(A):
                    uids.append(f"q{q}/{g}/{j}/{a}")
                    rows.append(7 + j + a)
                    ends.append(scores[q, g, j, a].item())
    rows, ends = torch.tensor(rows)[order], torch.tensor(ends)[order]
    mask = (torch.arange(WIDTH) < rows[:, None]).long()
    token_level = torch.zeros(mask.shape)
    token_level[torch.arange(len(rows)), rows - 1] = ends
    return DataProto.from_dict(
        tensors={"token_level_rewards": token_level, "response_mask": mask},
        non_tensors={"uid": [uids[i] for i in order]},
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_estimator_equals_brpo_on_a_shuffled_batch_of_unequal_lengths(compute_advantage, seed):
    from omegaconf import OmegaConf

    torch.manual_seed(seed)
    scores = torch.randint(0, 2, (B, G, M, A)).float()
    lengths = torch.randint(20, BUDGETS[-1] + 1, (B, G))
    order = torch.randperm(B * G * (1 + M * A))
    data = batch(scores, lengths, order)
    settings = OmegaConf.create({"budgets": BUDGETS, "probs": PROBS, "num_summaries": A})
    found = compute_advantage(data, "brpo", config=settings).batch["advantages"]
    found = found[order.argsort()].view(B, G, 1 + M * A, WIDTH)

    r = rewards.mean_rewards(scores)
    R = rewards.cumulative_returns(r, PROBS)
    thinking = brpo.thinking_advantages(r, R, BUDGETS, PROBS)
    cuts = torch.tensor([[cut_lengths(n, BUDGETS) for n in group] for group in lengths.tolist()])
    summaries = brpo.summary_advantages(scores, cuts).flatten(2) / (M * A)
    for q in range(B):
        for g in range(G):
            n = lengths[q, g]
            expected = brpo.token_advantages(thinking[q, g], BUDGETS, n)
            assert torch.equal(found[q, g, 0, :n], expected) and not found[q, g, 0, n:].any()
            for i in range(M * A):
                row, end = found[q, g, 1 + i], 7 + i // A + i % A
                assert torch.equal(row[:end], summaries[q, g, i].expand(end))
                assert not row[end:].any()


def test_groups_of_unequal_size_are_refused(compute_advantage):
    from omegaconf import OmegaConf

    scores, lengths = torch.ones(B, G, M, A), torch.full((B, G), 30)
    data = batch(scores, lengths, torch.arange((B * G - 1) * (1 + M * A)))  # one trace less
    settings = OmegaConf.create({"budgets": BUDGETS, "probs": PROBS, "num_summaries": A})
    with pytest.raises(ValueError, match="G traces of every question"):
        compute_advantage(data, "brpo", config=settings)
