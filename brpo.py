"""Budget Relative Policy Optimization (arXiv 2505.13438), equation by equation, in plain tensors:
baselines, advantages and the loss.

Nothing here knows about processes, models, files or text, and the file works when copied alone into
an empty folder.

Shapes    B questions, G rollouts per question, M budgets, A summaries per budget, T tokens
    scores    [B, G, M, A]   0/1 verdicts
    rewards   [B, G, M]      r_j = mean of the A scores
    returns   [B, G, M]      R_j = Σ_{k≥j} P_k r_k
    budgets   [M]            b_1 < ... < b_M in thinking tokens, b_0 = 0; any sequence or tensor
    probs     [M]            P_1..P_M, the prior over budgets;            any sequence or tensor

Segment j holds the thinking tokens b_{j-1} < t ≤ b_j.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor


def progress_baseline(rewards: Tensor, probs: Numbers, decay: float = 0.5) -> Tensor:
    """V1: what this rollout's own earlier rewards promise for the budgets still to come.

        V1_j = ( Σ_{k<j} λ^{j-k} r_k / Σ_{k<j} λ^{j-k} ) · Σ_{k≥j} P_k        λ = decay;  V1_1 = 0

    The bracket averages the rewards already seen, recent budgets heaviest; the factor is the prior
    mass of the budgets still ahead. rewards [B, G, M] -> [B, G, M].
    """
    m = rewards.shape[-1]
    j, k = torch.arange(m)[:, None], torch.arange(m)[None, :]
    weight = torch.where(k < j, decay ** (j - k).float(), 0.0).to(rewards)  # [M, M], r_k's in row j
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)  # row 1 stays all zero
    own_past = rewards @ weight.T  # [B, G, M]
    probs = torch.as_tensor(probs, dtype=rewards.dtype, device=rewards.device)
    remaining = probs.flip(0).cumsum(0).flip(0)  # [M], Σ_{k≥j} P_k
    return own_past * remaining


def group_baseline(returns: Tensor) -> Tensor:
    """V2: what a typical rollout of the same question earns from segment j on (GRPO's baseline).

        V2_j = (1/G) Σ_g R_j^{(g)}

    returns [B, G, M] -> [B, G, M], equal along G. The rollout itself is in the mean, as in GRPO.
    """
    return returns.mean(dim=1, keepdim=True).expand_as(returns)


def brpo_baseline(
    rewards: Tensor, returns: Tensor, budgets: Numbers, probs: Numbers, decay: float = 0.5
) -> Tensor:
    """V: the group's mean early in the thinking, the rollout's own progress late.

        V_j = (b_{j-1}/b_M) · V1_j + (1 - b_{j-1}/b_M) · V2_j        b_0 = 0

    At j = 1 a rollout has shown nothing of itself, so V_1 is the group's mean. -> [B, G, M].
    """
    start = segment_starts(budgets)  # [M], b_{j-1}
    share = start.to(returns) / budgets[-1]  # [M], weight of V1
    own, group = progress_baseline(rewards, probs, decay), group_baseline(returns)
    return share * own + (1 - share) * group


def segment_starts(budgets: Numbers) -> Tensor:
    """b_0 .. b_{M-1}, with b_0 = 0: the thinking tokens before each segment. [M]."""
    budgets = torch.as_tensor(budgets)
    return torch.cat([budgets.new_zeros(1), budgets[:-1]])


# Name -> V of all that is known: [B, G, M] and [M]s -> [B, G, M]. A new one needs a line here.
BASELINES = {
    "brpo": brpo_baseline,
    "progress": lambda rewards, returns, b, probs, decay: progress_baseline(rewards, probs, decay),
    "group": lambda rewards, returns, b, probs, decay: group_baseline(returns),
    "none": lambda rewards, returns, b, probs, decay: torch.zeros_like(returns),
}


def thinking_advantages(
    rewards: Tensor,
    returns: Tensor,
    budgets: Numbers,
    probs: Numbers,
    baseline: str = "brpo",
    decay: float = 0.5,
) -> Tensor:
    """The advantage of every thinking token in segment j, over a baseline by its name.

        A_j = R_j - V_j

    Divided neither by the group's standard deviation nor by the sequence's length: both bias the
    gradient (Dr. GRPO). [B, G, M] -> [B, G, M].
    """
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}: use one of {', '.join(BASELINES)}")
    if baseline in ("brpo", "group") and returns.shape[1] < 2:
        raise ValueError(
            f"baseline {baseline!r} compares rollouts of one question and needs "
            f"G >= 2, got G = {returns.shape[1]}: raise num_rollouts, or use progress"
        )
    return returns - BASELINES[baseline](rewards, returns, budgets, probs, decay)


def token_advantages(
    advantages: Tensor, budgets: Numbers, num_tokens: int, pad: bool = False
) -> Tensor:
    """The advantages written out token by token.

        A_t = A_j    for    b_{j-1} < t ≤ b_j        t = 1..num_tokens

    Column t-1 belongs to the t-th thinking token; beyond a trace's own end, mask it. Tokens beyond
    b_M belong to no segment: ValueError, or 0 with `pad`, where rows are wider than any trace. The
    leading dimensions are free: a flat batch [B·G, M] works as well. [..., M] -> [..., num_tokens].
    """
    if num_tokens > budgets[-1] and not pad:
        raise ValueError(
            f"{num_tokens} thinking tokens, but the largest budget is {budgets[-1]}: "
            "tokens beyond it belong to no segment; pad=True gives them advantage 0"
        )
    positions = torch.arange(1, num_tokens + 1)
    segment = torch.bucketize(positions, torch.as_tensor(budgets).cpu())  # j - 1; M beyond b_M
    advantages = torch.nn.functional.pad(advantages, (0, 1))  # [..., M + 1], a 0 for beyond
    return advantages[..., segment.to(advantages.device)]


def summary_advantages(scores: Tensor, cuts: Tensor) -> Tensor:
    """The advantage of every summary: all cuts weigh the same, whatever the thinking's prior.

        A^y_{j,a} = s_{j,a} - mean{ s_{k,a'} : cut_k = cut_j }    A > 1: summaries of that same cut
        A^y_j     = s_j     - mean_g s_j^{(g)}                    A = 1: the group at that budget

    Thinking and summary are optimised as two policies (decoupled): a summary is cheap and has to
    work wherever the thinking is cut, hence the uniform prior. Budgets past the end of the trace
    share one cut and so one baseline: their summaries continue the very same prefix.
    scores [B, G, M, A], cuts [B, G, M] (thinking tokens kept) -> [B, G, M, A].
    """
    if scores.shape[-1] == 1:
        return scores - scores.mean(dim=1, keepdim=True)
    same_cut = (cuts[..., :, None] == cuts[..., None, :]).to(scores)  # [B, G, M, M]
    budget_mean = scores.mean(-1, keepdim=True)  # [B, G, M, 1]
    baseline = same_cut @ budget_mean / same_cut.sum(-1, keepdim=True)  # [B, G, M, 1]
    return scores - baseline


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    clip: float = 0.2,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy gradient, summed over trained tokens and divided by a constant.

        L = -(1/D) Σ_t w_t · min( ρ_t A_t, clip(ρ_t, 1-ε, 1+ε) A_t )
        ρ_t = exp(logp_t - old_logp_t)

    D = sequences × maximum response length, one number for the whole update: dividing by the tokens
    at hand instead would make every token of a short batch weigh more, and make the result depend
    on how rows are split into micro-batches or over processes. w is the detached `sampler_weight`,
    or 1. No KL term, no entropy bonus.

    All tensors [T]. Returns the scalar loss and sums over trained tokens (sums, so that they can be
    added over micro-batches and processes before dividing by `tokens`).
    """
    # Zero the untrained entries before exp: whatever they hold must not become inf · 0 = nan.
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if weight is not None:
        gain = gain * torch.where(mask, weight.detach(), 0.0)
    loss = -gain.sum() / denominator
    with torch.no_grad():
        # The minimum picked the clipped term: this token's gradient has vanished.
        is_clipped = mask & (clipped * advantages < ratio * advantages)
        metrics = {
            "tokens": mask.sum(),
            "clipped": is_clipped.sum(),
            # k3, the low-variance estimate of KL(old || new): e^d - d - 1 ≥ 0
            "kl": (log_ratio.exp() - log_ratio - 1).sum(),
        }
    return loss, metrics


def sampler_weight(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """The truncated importance weight that corrects for sampling with another engine.

        w_t = min( exp(old_logp_t - sampler_logp_t), C )        detached; C = cap; C = 0: w = 1

    The sampler runs the same weights through different kernels; in bfloat16 token probabilities
    differ by a few percent. [T] -> [T].
    """
    if cap == 0:
        return torch.ones_like(old_logp)
    return (old_logp - sampler_logp).exp().clamp(max=cap).detach()


def sampler_gap(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The distance between the sampler's log-probs and the trainer's, over trained tokens.

        gap_t = |old_logp_t - sampler_logp_t|
        outside: exp(old_logp_t - sampler_logp_t) ∉ [0.9, 1.1]

    All tensors [T]. Returns sums, and the largest gap.
    """
    difference = torch.where(mask, old_logp - sampler_logp, 0.0)
    ratio = difference.exp()
    return {
        "gap": difference.abs().sum(),
        "gap_max": difference.abs().max(),
        "gap_outside": ((ratio < 0.9) | (ratio > 1.1)).sum(),
    }


def variance_diagnostics(
    rewards: Tensor,
    returns: Tensor,
    budgets: Numbers,
    probs: Numbers,
    decay: float = 0.5,
    thinking_lengths: Tensor | None = None,
) -> dict[str, Tensor]:
    """The share of the return's variance that each baseline leaves (the paper's variance figure).

        residual_j = Var[R_j - V_j] / Var[R_j]        correlation_j = Corr[V_j, R_j]

    for V in progress (V1), group (V2) and brpo (V), over all B·G rollouts, per segment. With
    `thinking_lengths` |z| [B, G], over the rollouts with tokens in segment j, |z| > b_{j-1}: the
    others have nothing to train there. Returns {"residual/brpo": [M], "correlation/brpo": [M],
    ...}; nan where R_j does not vary.
    """
    chosen = torch.ones_like(returns, dtype=torch.bool)
    if thinking_lengths is not None:
        starts = segment_starts(budgets).to(returns.device)
        chosen = thinking_lengths.to(returns.device)[..., None] > starts  # [B, G, M]
    baselines = {
        "progress": progress_baseline(rewards, probs, decay),
        "group": group_baseline(returns),
        "brpo": brpo_baseline(rewards, returns, budgets, probs, decay),
    }
    out = {}
    for name, value in baselines.items():
        of_segment = zip(*(x.double().unbind(-1) for x in (returns, value)), chosen.unbind(-1))
        columns = [(r[at_j], v[at_j]) for r, v, at_j in of_segment]
        out[f"residual/{name}"] = torch.stack([_variance(r - v) / _variance(r) for r, v in columns])
        out[f"correlation/{name}"] = torch.stack([_correlation(r, v) for r, v in columns])
    return out


def _variance(x: Tensor) -> Tensor:
    return ((x - x.mean()) ** 2).mean()  # nan where x is empty, without torch.var's warning


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Corr[x, y] = Cov[x, y] / √(Var[x] Var[y]); 0/0 = nan when either is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).mean() / ((x * x).mean() * (y * y).mean()).sqrt()
