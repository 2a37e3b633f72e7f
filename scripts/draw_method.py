"""Draw docs/method.png: a thinking trace, its cuts and summaries, what each segment earns and is
compared with, and the attention mask of the packed row. All numbers come from the project's own
functions.

    python scripts/draw_method.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import brpo
from budgets import BudgetPrior, cut_lengths
from packing import Branch, Tree, dense_mask, pack
from rewards import cumulative_returns, mean_rewards

PROMPT = ["2", "+2", "*7", "-3", "?"]
THINKING = ["=2", "+2", "=4", "*7", "=8", "-3", "=5", "</think>"]
ANSWERS = [["2", "4"], ["4", "8"], ["8", "5"], ["5", "5"]]  # A = 2 summaries per budget
GROUND_TRUTH = "5"
OTHERS = [[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]]  # rewards r_j of the question's other traces
PRIOR = BudgetPrior.make("uniform", max_budget=8, num_budgets=4)
INK, GREY, BLUE, ORANGE = "#222222", "#c9ced6", "#4c78a8", "#f2a541"
GREEN, RED = "#3f9b5c", "#c44e52"
TINT = {"prompt": "#e4e7ec", "thinking": "#cfe0f1", "summary": "#fbe3bd"}


def box(axes, x, y, text, colour, width=0.92, height=0.72, size=10, edge="none", ink=INK):
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            lw=1.2,
            boxstyle="round,pad=0,rounding_size=0.12",
            fc=colour,
            ec=edge,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)


def draw_trace(axes):
    """The trace from left to right; under each cut its summaries, r_j, and R_j of the segment."""
    scores = torch.tensor([[[[float(a == GROUND_TRUTH) for a in pair] for pair in ANSWERS]]])
    rewards = mean_rewards(scores)  # [1, 1, M]
    group = torch.cat([rewards, torch.tensor([OTHERS])], dim=1)  # [1, G, M]
    of_group = cumulative_returns(group, PRIOR.probs)
    returns = of_group[0, 0].tolist()  # [M]
    advantages = brpo.thinking_advantages(group, of_group, PRIOR.budgets, PRIOR.probs)
    baselines = [
        ("own progress $V^1_j$, from $r_k$, $k<j$", brpo.progress_baseline(group, PRIOR.probs)),
        ("group's mean $V^2_j$, G = 3", brpo.group_baseline(of_group).expand_as(of_group)),
        (
            r"baseline $V_j=\frac{b_{j-1}}{b_M}V^1_j+(1-\frac{b_{j-1}}{b_M})V^2_j$",
            of_group - advantages,
        ),
        ("advantage $A_j=R_j-V_j$", advantages),
    ]
    first = len(PROMPT)
    for i, token in enumerate(PROMPT):
        box(axes, i * 0.72, 0, token, TINT["prompt"], width=0.64)
    start = first * 0.72 + 0.25
    for t, token in enumerate(THINKING):
        wide = t == len(THINKING) - 1
        box(
            axes,
            start + t + 0.2 * wide,
            0,
            token,
            TINT["thinking"],
            width=0.92 + 0.4 * wide,
            size=9 if wide else 10,
        )
    axes.text(1.4, 0.75, "question x", ha="center", color=INK, fontsize=10)
    axes.text(
        start + 3.6,
        1.98,
        "thinking trace z, cut at the budgets $b_j$",
        ha="center",
        color=INK,
        fontsize=11,
    )
    previous = start - 0.5
    for j, cut in enumerate(cut_lengths(len(THINKING), PRIOR.budgets)):
        x = start + cut - 0.5 + 0.42 * (j == 3)
        axes.plot([x, x], [-0.62, 0.62], color=BLUE, lw=1.6)
        axes.text(x, 0.72, f"$b_{j + 1}={cut}$", ha="center", color=BLUE, fontsize=10)
        axes.annotate(
            "",
            (x - 0.04, 1.25),
            (previous + 0.04, 1.25),
            arrowprops={"arrowstyle": "|-|,widthA=.25,widthB=.25", "color": INK, "lw": 1},
        )
        axes.text(
            (x + previous) / 2,
            1.4,
            f"$R_{j + 1}={returns[j]:.3g}$",
            ha="center",
            color=INK,
            fontsize=10.5,
        )
        axes.annotate("", (x, -1.12), (x, -0.62), arrowprops={"arrowstyle": "-|>", "color": GREY})
        for a, answer in enumerate(ANSWERS[j]):
            right = answer == GROUND_TRUTH
            verdict, edge = ("✓", GREEN) if right else ("✗", RED)
            box(
                axes,
                x - 0.02,
                -1.5 - 0.72 * a,
                f"$y_{{{j + 1},{a + 1}}}$: {answer} {verdict}",
                TINT["summary"],
                width=1.42,
                height=0.6,
                edge=edge,
            )
        axes.text(
            x, -3.12, f"$r_{j + 1}={rewards[0, 0, j]:.3g}$", ha="center", fontsize=10.5, color=INK
        )
        for i, (_, values) in enumerate(baselines):
            value, middle = values[0, 0, j].item(), (x + previous) / 2
            last = i == len(baselines) - 1
            colour = (GREEN if value > 0 else RED) if last else INK
            text = f"{value:+.2f}" if last else f"{value:.2f}"
            axes.text(middle, -4.2 - 0.68 * i, text, ha="center", fontsize=10.5, color=colour)
        previous = x
    for i, (label, _) in enumerate(baselines):
        axes.text(-0.35, -4.2 - 0.68 * i, label, fontsize=10, color=INK)
    axes.plot([-0.35, start + 8.6], [-3.55, -3.55], color=GREY, lw=0.8)
    axes.text(
        -0.35,
        -1.86,
        "A = 2 summaries per cut,\nright ✓ or wrong ✗ by the\nground truth 5",
        va="center",
        fontsize=10,
        color=INK,
    )
    axes.text(-0.35, -3.12, r"reward $r_j$: mean of the scores", fontsize=10, color=INK)
    axes.text(
        -0.35,
        1.4,
        r"return $R_j=\sum_{k\geq j}P_k\,r_k$,  $P_k=\frac{1}{4}$",
        fontsize=10,
        color=INK,
    )
    axes.set(xlim=(-0.5, start + 8.9), ylim=(-6.6, 2.3))
    axes.axis("off")


def draw_mask(axes):
    """Which token of the packed row (down) may attend to which (across)."""
    ids = list(range(100))
    cuts = cut_lengths(len(THINKING), PRIOR.budgets)
    branches = [Branch(cut, ids[:1], ids[:2]) for cut, pair in zip(cuts, ANSWERS) for _ in pair]
    row = pack([Tree(ids[: len(PROMPT)], ids[: len(THINKING)], branches)])
    mask = dense_mask(row)[0, 0]
    trunk = len(PROMPT) + len(THINKING)
    kind = torch.zeros(mask.shape, dtype=torch.long)  # 0 hidden
    kind[mask] = 3  # a branch and itself
    kind[:, :trunk][mask[:, :trunk]] = 2  # thinking tokens
    kind[:, : len(PROMPT)][mask[:, : len(PROMPT)]] = 1  # the question
    axes.imshow(kind, cmap=ListedColormap(["white", "#aab2bf", BLUE, ORANGE]), vmin=0, vmax=3)
    n = len(mask)
    for edge in [len(PROMPT), trunk, *range(trunk + 3, n, 3)]:
        axes.axhline(edge - 0.5, color=GREY, lw=0.5)
    for edge in (len(PROMPT), trunk):
        axes.axvline(edge - 0.5, color=GREY, lw=0.5)
    middles = [len(PROMPT) / 2 - 0.5, len(PROMPT) + len(THINKING) / 2 - 0.5]
    axes.set_xticks([*middles, (trunk + n) / 2], ["x", "z", "summaries"], fontsize=10)
    labels = ["x", "z", *(f"$y_{{{j + 1},{a + 1}}}$" for j in range(4) for a in range(2))]
    axes.set_yticks([*middles, *(trunk + 1 + 3 * i for i in range(8))], labels, fontsize=9)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.tick_top()
    axes.set_xlabel(
        f"one packed row of {n} tokens:\nwhich token (down) sees which (across)",
        fontsize=11,
        color=INK,
        labelpad=8,
    )
    for spine in axes.spines.values():
        spine.set_color(GREY)


def main():
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.4, 6.2), width_ratios=[2.15, 1], facecolor="white", layout="constrained"
    )
    draw_trace(left)
    draw_mask(right)
    figure.savefig(ROOT / "docs" / "method.png", dpi=140)


if __name__ == "__main__":
    main()
