"""What a segment of thinking earns. (SPEC section 3)"""


def has_one_think_end(thinking: str, appended: str, summary: str, think_end: str = "</think>") -> bool:
    """SPEC 3, the format rule: the text holds exactly one </think>, the thinking's own or the appended one."""
    return (thinking + appended + summary).count(think_end) == 1


def mean_rewards(scores):
    """SPEC 3: r_j = mean over the A summaries at budget j.   [B, G, M, A] -> [B, G, M]"""
    return scores.mean(dim=-1)


def cumulative_returns(rewards, probs):
    """SPEC 3: R_j = Σ_{k≥j} P_k r_k.   rewards [B, G, M], probs [M] -> [B, G, M]"""
    weighted = rewards * rewards.new_tensor([float(prob) for prob in probs])
    return weighted.flip(-1).cumsum(-1).flip(-1)
