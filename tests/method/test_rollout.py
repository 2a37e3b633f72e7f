"""Cuts, appended texts, seeds and scores, on an engine whose thinking traces are given."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import rollout
from rollout import Markers, Output, Request, Sampling, request_seed, sample_rollouts
from runtime.data import Question
from tests.conftest import TwoPhases
from train import to_trees

MARKERS = Markers(
    think_end=90, eos=(99,), after_cut=(80, 90, 81), after_closed=(81,), max_summary_tokens=6
)
BUDGETS = (2, 4, 6)


class ScriptedEngine:
    """Gives every request its next tokens one per step(), thinking traces as scripted, summaries as
    [7, 99]."""

    def __init__(self, traces):
        self.traces, self.running, self.requests, self.steps = traces, {}, [], 0

    def add(self, request: Request):
        self.requests.append((self.steps, request))
        tokens = self.traces[request.id] if request.stream else [7, 99]
        self.running[request.id] = list(tokens)[: request.max_tokens]

    def has_work(self):
        return bool(self.running)

    def step(self):
        self.steps += 1
        out = []
        for name, tokens in list(self.running.items()):
            token = tokens.pop(0)
            out.append(Output(name, [token], [-0.5], not tokens))
            if not tokens:
                del self.running[name]
        return out


def run(traces, streaming=True, grade=None, num_summaries=2):
    engine = ScriptedEngine({f"0-{g}": t for g, t in enumerate(traces)})
    question = Question(0, "?", "5", (1, 2))
    sampling = Sampling(BUDGETS, len(traces), num_summaries, temperature=1.0, seed=(0, 0))
    through = engine if streaming else TwoPhases(engine)
    return sample_rollouts(through, [question], sampling, MARKERS, grade), engine


# What a trace ends with, where it is cut, and whether its own </think> is before the cut.
TRACES = [
    ([5, 5, 5, 5, 5, 5], "length", [2, 4, 6], [False, False, False]),  # never closed
    ([5, 5, 5, 5, 5, 90], "closed", [2, 4, 6], [False, False, True]),  # with its last token
    ([5, 5, 5, 90], "closed", [2, 4, 4], [False, True, True]),  # exactly at a budget; shared cut
    ([5, 5, 90], "closed", [2, 3, 3], [False, True, True]),
    ([90], "closed", [1, 1, 1], [True, True, True]),
]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("thinking, finish, cuts, closed", TRACES)
def test_cuts_and_appended_texts(thinking, finish, cuts, closed, streaming):
    (r,), _ = run([thinking], streaming)
    assert r.finish == finish and r.thinking == thinking
    assert [s.cut for s in r.summaries] == [c for c in cuts for _ in range(2)]
    order = [(j, a) for j in range(3) for a in range(2)]
    assert [(s.budget_index, s.draw) for s in r.summaries] == order
    for s, c in zip(r.summaries[::2], closed):
        assert s.appended == ([81] if c else [80, 90, 81])
        assert s.tokens == [7, 99] and s.logp == [-0.5, -0.5]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_trace_that_ends_in_end_of_text_scores_zero_from_there_on(streaming):
    def grade(r, s):
        future = Future()
        future.set_result(1.0)
        return future

    (r,), engine = run([[5, 5, 99]], streaming, grade)
    assert r.finish == "eos"
    assert [s.score for s in r.summaries] == [1.0] * 2 + [0.0] * 4  # b_1 cut it before it ended
    assert [bool(s.tokens) for s in r.summaries] == [True] * 2 + [False] * 4
    assert len(engine.requests) == 1 + 2


def test_summary_prompts_lengths_and_seeds():
    (r,), engine = run([[5, 6, 7, 90]])
    summaries = [request for _, request in engine.requests[1:]]
    cut, closed = (1, 2, 5, 6, 80, 90, 81), (1, 2, 5, 6, 7, 90, 81)
    assert [s.prompt for s in summaries] == [cut] * 2 + [closed] * 4
    assert [s.max_tokens for s in summaries] == [6] * 6  # whatever was appended
    assert len({request.seed for _, request in engine.requests}) == 7


def test_summaries_are_requested_as_soon_as_a_budget_is_crossed_and_nothing_else_changes():
    def content(rollouts):
        return [(r.thinking, r.finish, [vars(s) for s in r.summaries]) for r in rollouts]

    def first_summary(engine):
        return min(step for step, request in engine.requests if not request.stream)

    traces = [[5, 5, 90], [5] * 6]
    streamed, engine = run(traces)
    waited, later = run(traces, streaming=False)
    assert content(streamed) == content(waited)
    assert {r for _, r in engine.requests} == {r for _, r in later.requests}  # seeds included
    assert first_summary(engine) == 2  # b_1
    assert first_summary(later) == 6  # the last trace's end


def test_seeds_differ_in_every_part_of_their_key_and_repeat():
    keys = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    seeds = [request_seed(*k) for k in keys]
    assert len(set(seeds)) == len(keys) and seeds == [request_seed(*k) for k in keys]
    assert all(0 <= s < 2**63 for s in seeds)


def test_scores_and_cuts_by_question_rollout_budget_and_draw():
    rollouts, _ = run([[5, 5, 90], [5] * 6, [90], [5] * 5 + [90]])  # as of 2 questions
    for i, r in enumerate(rollouts):
        for s in r.summaries:
            s.score = 100 * i + 10 * s.budget_index + s.draw
    scores = rollout.scores_of(rollouts, num_rollouts=2, num_budgets=3, num_summaries=2)
    assert scores.shape == (2, 2, 3, 2)  # [B, G, M, A]
    assert [scores[0, 0, 1, 0], scores[0, 1, 2, 1], scores[1, 0, 0, 1]] == [10, 121, 201]
    cuts = rollout.cuts_of(rollouts, 2, BUDGETS)
    assert cuts.tolist() == [[[2, 3, 3], [2, 4, 6]], [[1, 1, 1], [2, 4, 6]]]


def test_trees_have_their_advantages_by_segment():
    rollouts, _ = run([[5, 5, 5, 90], [5] * 6])
    thinking = torch.tensor([[[0.25, 0.5, 0.75], [1.0, 2.0, 3.0]]])  # [B, G, M]
    summary = torch.arange(12.0).reshape(1, 2, 3, 2)  # [B, G, M, A]
    first, second = to_trees(rollouts, thinking, summary, BUDGETS)
    assert first.advantages == [0.25, 0.25, 0.5, 0.5]
    assert second.advantages == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert [(b.cut, b.advantage) for b in first.branches] == list(zip([2, 2, 4, 4, 4, 4], range(6)))
    assert [b.advantage for b in second.branches] == list(range(6, 12))
    assert first.prompt == [1, 2] and first.sampler_logp == [-0.5] * 4
    last, _ = to_trees(rollouts, thinking, summary, BUDGETS, last_only=True)
    assert [b.advantage for b in last.branches] == [4.0, 5.0]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def test_markers_are_read_from_the_tokenizer(tokenizer):
    markers = Markers.from_tokenizer(tokenizer, 7, eos=[2, 1])
    assert tokenizer.decode([markers.think_end]) == "</think>"
    appended = tokenizer.decode(markers.after_cut)
    assert appended == "...\n\n...\n\n</think>\n\n**Final Answer**\n"
    assert markers.eos == (1, 2) and len(markers.after_cut) == 3


def test_a_tokenizer_without_one_token_think_end_or_end_of_text_is_refused():
    def tokenizer(ids, eos=1):
        return SimpleNamespace(
            encode=lambda *_, **__: ids, unk_token_id=0, eos_token_id=eos, name_or_path="some/model"
        )

    for ids in ([5, 6, 7], [0]):
        with pytest.raises(ValueError, match="some/model.*</think>"):
            Markers.from_tokenizer(tokenizer(ids))
    with pytest.raises(ValueError, match="some/model has no end-of-text"):
        Markers.from_tokenizer(tokenizer([5], eos=None))


def test_a_grader_gets_the_summary_where_the_text_has_exactly_one_think_end(tokenizer):
    """Without end-of-text, with the row's ground truth and question; or nobody is asked: 0."""
    markers, asked = Markers.from_tokenizer(tokenizer, 7), []
    grader = SimpleNamespace(
        submit=lambda *args, **context: asked.append((args, context)) or "future"
    )
    grade = rollout.make_grader(grader, tokenizer, markers)
    thinking, answer = tokenizer.encode(" =5</think>"), "\\boxed{5}<|end|>"
    r = rollout.Rollout(Question(0, "2 +3 ?", "5", (2,)), 0, thinking, finish="closed")

    def summary(cut, appended, text):
        return rollout.Summary(0, 0, cut, list(appended), tokenizer.encode(text))

    assert grade(r, summary(2, markers.after_closed, answer)) == "future"
    context = {"thinking": " =5</think>", "thinking_tokens": 2}
    assert asked == [(("\\boxed{5}", "5", "2 +3 ?"), context)]
    assert grade(r, summary(1, markers.after_cut, answer)) == "future"
    assert grade(r, summary(2, markers.after_closed, "</think>" + answer)) is None
    assert grade(r, summary(1, markers.after_closed, answer)) is None  # none at all
    assert len(asked) == 2
