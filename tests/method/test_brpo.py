"""One displayed equation, one function, one test: by hand, by brute force, or by an identity."""

import json

import pytest
import torch

import brpo
from rewards import cumulative_returns, mean_rewards
from tests.conftest import SHARED

BUDGETS = torch.tensor([10, 30, 60, 100])  # uneven, so that an even-spacing shortcut would show
PROBS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.fixture
def scores():
    return torch.randint(
        0, 2, (3, 5, 4, 2), generator=torch.Generator().manual_seed(0)
    ).double()  # [B, G, M, A]


@pytest.fixture
def rewards(scores):
    return mean_rewards(scores)


@pytest.fixture
def returns(rewards):
    return cumulative_returns(rewards, PROBS)


def test_progress_baseline_by_hand():
    # j = 3: weights λ² and λ on r_1 = 1, r_2 = 0: (0.25 · 1 + 0.5 · 0) / 0.75 = 1/3, times P_3 =
    # 0.5
    v1 = brpo.progress_baseline(torch.tensor([[[1.0, 0.0, 1.0]]]), torch.tensor([0.2, 0.3, 0.5]))
    assert v1.flatten().tolist() == pytest.approx([0.0, 1.0 * 0.8, 1 / 3 * 0.5])


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_progress_baseline_by_brute_force(rewards, decay):
    v1 = brpo.progress_baseline(rewards, PROBS, decay)
    for b in range(3):
        for g in range(5):
            for j in range(4):
                weights = [decay ** (j - k) for k in range(j)]
                past = (
                    sum(w * rewards[b, g, k].item() for k, w in enumerate(weights)) / sum(weights)
                    if j
                    else 0.0
                )
                assert v1[b, g, j].item() == pytest.approx(past * PROBS[j:].sum().item())


def test_progress_baseline_never_looks_at_its_own_or_later_rewards(rewards):
    later = rewards.clone()
    later[..., 2:] = 1 - later[..., 2:]
    assert torch.equal(
        brpo.progress_baseline(rewards, PROBS)[..., :3],
        brpo.progress_baseline(later, PROBS)[..., :3],
    )


def test_group_baseline_is_the_mean_over_rollouts(returns):
    v2 = brpo.group_baseline(returns)
    for b in range(3):
        for j in range(4):
            assert v2[b, :, j].tolist() == pytest.approx(
                [sum(returns[b, g, j].item() for g in range(5)) / 5] * 5
            )


def test_brpo_baseline_mixes_by_the_start_of_the_segment(rewards, returns):
    v = brpo.brpo_baseline(rewards, returns, BUDGETS, PROBS)
    v1, v2 = brpo.progress_baseline(rewards, PROBS), brpo.group_baseline(returns)
    for j, share in enumerate([0.0, 0.1, 0.3, 0.6]):  # b_{j-1} / b_M
        assert torch.allclose(v[..., j], share * v1[..., j] + (1 - share) * v2[..., j])


def test_brpo_trusts_only_the_group_in_the_first_segment(rewards, returns):
    assert torch.allclose(
        brpo.brpo_baseline(rewards, returns, BUDGETS, PROBS)[..., 0],
        brpo.group_baseline(returns)[..., 0],
    )


def test_advantages_are_return_minus_the_named_baseline(rewards, returns):
    expected = {
        "brpo": brpo.brpo_baseline(rewards, returns, BUDGETS, PROBS),
        "progress": brpo.progress_baseline(rewards, PROBS),
        "group": brpo.group_baseline(returns),
        "none": torch.zeros_like(returns),
    }
    assert set(expected) == set(brpo.BASELINES)
    for name, value in expected.items():
        assert torch.allclose(
            brpo.thinking_advantages(rewards, returns, BUDGETS, PROBS, name), returns - value
        )


def test_token_advantages_by_brute_force():
    budgets, advantages = (2, 5, 6), torch.randn(4, 3)
    for num_tokens in (1, 4, 6):
        tokens = brpo.token_advantages(advantages, budgets, num_tokens)
        assert tokens.shape == (4, num_tokens)
        for t in range(1, num_tokens + 1):
            j = next(j for j, b in enumerate(budgets) if t <= b)
            assert torch.equal(tokens[:, t - 1], advantages[:, j])
    assert brpo.token_advantages(advantages.reshape(2, 2, 3), torch.tensor(budgets), 6).shape == (
        2,
        2,
        6,
    )
    with pytest.raises(ValueError, match="largest budget is 6"):
        brpo.token_advantages(advantages, budgets, 7)
    padded = brpo.token_advantages(advantages, budgets, 8, pad=True)  # rows wider than b_M
    assert torch.equal(padded[:, :6], tokens) and not padded[:, 6:].any()


def test_budgets_and_probs_may_be_any_sequence(rewards, returns):
    as_tensors = brpo.thinking_advantages(rewards, returns, BUDGETS, PROBS)
    for kind in (tuple, list):
        assert torch.equal(
            brpo.thinking_advantages(
                rewards, returns, kind(BUDGETS.tolist()), kind(PROBS.tolist())
            ),
            as_tensors,
        )


def test_group_advantages_sum_to_zero_over_the_group(rewards, returns):
    assert (
        brpo.thinking_advantages(rewards, returns, BUDGETS, PROBS, "group").sum(1).abs().max()
        < 1e-12
    )


def test_bad_baselines_are_refused(rewards, returns):
    with pytest.raises(ValueError, match="unknown baseline"):
        brpo.thinking_advantages(rewards, returns, BUDGETS, PROBS, "critic")
    for name in ("brpo", "group"):
        with pytest.raises(ValueError, match="G >= 2"):
            brpo.thinking_advantages(rewards[:, :1], returns[:, :1], BUDGETS, PROBS, name)


def test_summary_advantages_by_brute_force(scores):
    # Cuts with ties, as traces of 25, 5, 100, 60 and 31 tokens give them at these budgets.
    lengths = torch.tensor([25, 5, 100, 60, 31])
    cuts = torch.minimum(lengths[None, :, None], BUDGETS).expand(3, 5, 4)
    advantages = brpo.summary_advantages(scores, cuts)
    for b in range(3):
        for g in range(5):
            for j in range(4):
                same = [
                    scores[b, g, k, a].item()
                    for k in range(4)
                    for a in range(2)
                    if cuts[b, g, k] == cuts[b, g, j]
                ]
                for a in range(2):
                    assert advantages[b, g, j, a].item() == pytest.approx(
                        scores[b, g, j, a].item() - sum(same) / len(same)
                    )


def test_summary_advantages_of_one_cut_sum_to_zero(scores):
    cuts = torch.full((3, 5, 4), 7)
    assert brpo.summary_advantages(scores, cuts).sum((-1, -2)).abs().max() < 1e-12


def test_single_summaries_compare_with_the_group_at_that_budget(scores):
    single = scores[..., :1]
    cuts = torch.zeros(3, 5, 4)
    assert torch.allclose(
        brpo.summary_advantages(single, cuts), single - single.mean(1, keepdim=True)
    )


def loss_by_loop(logp, old, advantages, mask, denominator, clip):
    total = 0.0
    for lp, o, a, m in zip(logp.tolist(), old.tolist(), advantages.tolist(), mask.tolist()):
        if m:
            ratio = torch.exp(torch.tensor(lp - o)).item()
            total -= min(ratio * a, max(min(ratio, 1 + clip), 1 - clip) * a)
    return total / denominator


def test_policy_loss_by_brute_force_with_a_constant_denominator():
    g = torch.Generator().manual_seed(1)
    logp, old, advantages = (torch.randn(50, generator=g) for _ in range(3))
    mask = torch.rand(50, generator=g) < 0.6
    loss, metrics = brpo.policy_loss(logp, old, advantages, mask, 1234.0)
    assert loss.item() == pytest.approx(
        loss_by_loop(logp, old, advantages, mask, 1234.0, 0.2), rel=1e-5
    )
    assert metrics["tokens"] == mask.sum()


def test_policy_loss_by_hand_and_its_gradient():
    # ratios 1, 1.5 (clipped, A > 0), 1.5 (not clipped, A < 0), 0.5 (not clipped, A > 0), 0.5
    # (clipped, A < 0)
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    logp = ratio.log().requires_grad_()
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    loss, metrics = brpo.policy_loss(
        logp, torch.zeros(5), advantages, torch.ones(5, dtype=torch.bool), 10.0
    )
    assert loss.item() == pytest.approx(-(2.0 + 1.2 - 1.5 + 0.5 - 0.8) / 10)
    assert metrics["clipped"] == 2
    loss.backward()
    assert logp.grad.tolist() == pytest.approx(
        [-0.2, 0.0, 0.15, -0.05, 0.0]
    )  # -ρ A / D where not clipped


def test_the_gradient_at_the_old_policy_is_plain_reinforce():
    logp = torch.randn(9).requires_grad_()
    advantages = torch.randn(9)
    brpo.policy_loss(logp, logp.detach(), advantages, torch.ones(9, dtype=torch.bool), 9.0)[
        0
    ].backward()
    assert torch.allclose(logp.grad, -advantages / 9)


def test_untrained_tokens_touch_nothing_whatever_stands_there():
    logp = torch.tensor([0.0, -1e30, 3.0]).requires_grad_()
    mask = torch.tensor([True, False, False])
    loss, _ = brpo.policy_loss(
        logp,
        torch.tensor([0.0, 1e30, -200.0]),
        torch.tensor([1.0, float("nan"), 1.0]),
        mask,
        1.0,
        weight=torch.tensor([1.0, float("nan"), float("inf")]),
    )
    loss.backward()
    assert loss.item() == -1.0 and logp.grad.tolist() == [-1.0, 0.0, 0.0]


def test_loss_adds_up_over_micro_batches():
    logp, old, advantages = torch.randn(3, 20)
    mask = torch.rand(20) < 0.7
    whole = brpo.policy_loss(logp, old, advantages, mask, 77.0)[0]
    parts = sum(
        brpo.policy_loss(logp[s], old[s], advantages[s], mask[s], 77.0)[0]
        for s in (slice(0, 3), slice(3, 20))
    )
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)


def test_sampler_weight_by_hand():
    old, sampler = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.0])
    assert brpo.sampler_weight(old, sampler, 2.0).tolist() == pytest.approx(
        [0.6065, 2.0, 1.0], abs=1e-4
    )
    assert brpo.sampler_weight(old, torch.full((3,), float("nan")), 0).tolist() == [
        1.0,
        1.0,
        1.0,
    ]  # off


def test_sampler_weight_scales_the_loss_but_is_not_differentiated():
    logp = torch.zeros(2).requires_grad_()
    weight = brpo.sampler_weight(logp, torch.tensor([0.5, 0.5]), 2.0)
    brpo.policy_loss(
        logp, logp.detach(), torch.ones(2), torch.ones(2, dtype=torch.bool), 1.0, weight=weight
    )[0].backward()
    assert logp.grad.tolist() == pytest.approx([-0.6065, -0.6065], abs=1e-4)


def test_sampler_gap_by_hand():
    old = torch.tensor([0.0, 0.2, -0.05, 9.0])
    gap = brpo.sampler_gap(
        old, torch.tensor([0.0, 0.0, 0.0, float("nan")]), torch.tensor([True, True, True, False])
    )
    assert (
        gap["gap"].item() == pytest.approx(0.25)
        and gap["gap_max"].item() == pytest.approx(0.2)
        and gap["gap_outside"] == 1
    )


def test_variance_diagnostics_against_numpy(rewards, returns):
    import numpy as np

    lengths = torch.tensor([10, 11, 31, 61, 100]).expand(
        3, 5
    )  # at, and one beyond, the ends of segments
    has_tokens = (
        torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
        .bool()
        .expand(3, 5, 4)
    )
    out = brpo.variance_diagnostics(rewards, returns, BUDGETS, PROBS, thinking_lengths=lengths)
    v = brpo.brpo_baseline(rewards, returns, BUDGETS, PROBS)
    for j in range(4):
        r, b = returns[..., j][has_tokens[..., j]].numpy(), v[..., j][has_tokens[..., j]].numpy()
        assert out["residual/brpo"][j].item() == pytest.approx(np.var(r - b) / np.var(r))
        assert out["correlation/brpo"][j].item() == pytest.approx(np.corrcoef(r, b)[0, 1])


def test_a_perfect_baseline_explains_everything():
    # If all rollouts of a question agree and questions differ, the group's mean leaves no variance.
    rewards = torch.tensor([0.0, 1.0, 0.5])[:, None, None].expand(3, 4, 4).double()
    out = brpo.variance_diagnostics(rewards, cumulative_returns(rewards, PROBS), BUDGETS, PROBS)
    assert (
        out["residual/group"].abs().max() < 1e-12
        and (out["correlation/group"] - 1).abs().max() < 1e-9
    )


GOLDEN = SHARED / "golden" / "advantages.json"


@pytest.mark.skipif(
    not GOLDEN.exists(), reason="the reference advantages are not beside this checkout"
)
def test_the_authors_advantages():
    """Advantages computed by the authors' public code on random scores: ours must be the same
    numbers."""
    names = {"brpo": "brpo", "v1only": "progress", "v2only": "group", "none": "none"}
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) >= 20
    for case in cases:
        shape = (case["B"], case["G"], case["S"])
        scores = torch.tensor(case["scores"], dtype=torch.float64).reshape(*shape, case["A"])
        budgets, probs = (
            torch.tensor(case["budgets"]),
            torch.tensor(case["probs"], dtype=torch.float64),
        )
        rewards = mean_rewards(scores)
        returns = cumulative_returns(rewards, probs)
        exists = torch.tensor(case["segment_exists"]).reshape(shape).bool()

        def same(ours, theirs, where):
            theirs = torch.tensor(theirs, dtype=torch.float64).reshape(ours.shape)
            assert (ours - theirs)[where].abs().max() < 1e-5

        same(returns, case["ret"], exists)
        same(brpo.progress_baseline(rewards, probs), case["v1"], exists)
        same(brpo.group_baseline(returns), case["v2"], exists)
        same(
            brpo.thinking_advantages(rewards, returns, budgets, probs, names[case["baseline"]]),
            case["thinking_advantage"],
            exists,
        )
        # `last_segment`: where the thinking ends; budgets behind it share its cut.
        last = torch.tensor(case["last_segment"]).reshape(shape[:2])
        cuts = torch.minimum(torch.arange(case["S"]), last[..., None])
        ours = brpo.summary_advantages(scores, cuts)
        if case["summary"] == "grpo":  # only the last budget's summary is trained
            ours[:, :, :-1] = 0
        same(ours, case["summary_advantage"], slice(None))
