"""Where the answer stands, the format rule, and what the scores add up to."""

import time

import pytest
import torch

import rewards


@pytest.mark.parametrize(
    "summary, graded",
    [
        (r"\boxed{4}", r"\boxed{4}"),
        ("\\boxed{4}.\n\nWait: \\boxed{5}", r"\boxed{4}."),  # more thinking is not read
        ("\n\n\\boxed{4}", r"\boxed{4}"),  # blank lines behind the header: forgiven
        (
            "so\n\\boxed{4}\nor\n\\boxed{5}\n \t\n6",
            "so\n\\boxed{4}\nor\n\\boxed{5}",
        ),  # lines of one paragraph
        ("\r\n\r\n\\boxed{4}\r\n\r\nno", r"\boxed{4}"),
        ("so\n\n\\boxed{4}", "so"),  # an answer in the second paragraph is too late
        ("", ""),
        (" \n\n ", ""),
    ],
)
def test_only_the_first_paragraph_is_graded(summary, graded):
    assert rewards.answer_paragraph(summary) == graded


def test_the_paragraph_is_found_in_linear_time():
    start = time.perf_counter()
    for text in (
        "\n " * 500_000 + "x",
        "x" + "\n" * 1_000_000,
        "a\n" * 500_000,
        "x\n" + " " * 1_000_000,
    ):
        rewards.answer_paragraph(text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "thinking, appended",
    [
        ("so 4", "...\n\n...\n\n</think>\n\n**Final Answer**\n"),  # cut, or unclosed at b_M
        ("", "...\n\n...\n\n</think>\n\n**Final Answer**\n"),
        ("so 4</think>", "\n\n**Final Answer**\n"),
        ("</think> so 4", "...\n\n...\n\n</think>\n\n**Final Answer**\n"),  # scores 0 then
    ],
)
def test_a_summary_is_requested(thinking, appended):
    assert rewards.appended_text(thinking) == appended
    closed = thinking.count("</think>") == thinking.endswith("</think>")
    assert rewards.has_one_think_end(thinking, appended, "4") is closed


@pytest.mark.parametrize(
    "thinking, appended, summary, one",
    [
        ("so 4</think>", "\n\n**Final Answer**\n", r"\boxed{4}", True),
        ("so", "...</think>\n\n", r"\boxed{4}", True),
        ("so", "\n\n**Final Answer**\n", r"\boxed{4}", False),
        ("so 4</think>", "...</think>", "", False),
        ("so 4</think>", "", "4</think>", False),
        ("so </thi", "nk>", "", True),
    ],
)
def test_exactly_one_think_end(thinking, appended, summary, one):
    assert rewards.has_one_think_end(thinking, appended, summary) is one


def test_another_think_end():
    assert rewards.has_one_think_end("a [END]", "", "b", think_end="[END]")
    assert not rewards.has_one_think_end("a", "", "</think>", think_end="[END]")


def test_returns_by_hand():
    scores = torch.tensor([[[[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]]])
    per_budget = rewards.mean_rewards(scores)
    assert per_budget.tolist() == [[[0.25, 0.5, 1.0]]]
    expected = torch.tensor([[[0.25 * 0.2 + 0.5 * 0.3 + 0.5, 0.5 * 0.3 + 0.5, 0.5]]])
    for probs in ([0.2, 0.3, 0.5], (0.2, 0.3, 0.5), torch.tensor([0.2, 0.3, 0.5])):
        torch.testing.assert_close(rewards.cumulative_returns(per_budget, probs), expected)


def test_the_base_prior_gives_every_segment_the_final_reward():
    per_budget = torch.rand(2, 3, 4, dtype=torch.float64)
    returns = rewards.cumulative_returns(per_budget, [0, 0, 0, 1])
    assert returns.dtype == per_budget.dtype
    assert torch.equal(returns, per_budget[..., -1:].expand_as(returns))
