"""Cuts, appended texts, seeds and scores, on an engine whose thinking traces are given."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import rollout
from rollout import Markers, Output, Request, request_seed, sample_rollouts, to_tree
from runtime.data import Question
from tests.conftest import TwoPhases

MARKERS = Markers(
    think_end=90, eos=(99,), cut_text=(80, 90), answer_header=(81,), max_summary_tokens=6
)
BUDGETS = (2, 4, 6)


class ScriptedEngine:
    """Gives every request its next tokens one per step(), thinking traces as scripted, summaries as
    [7, 99]."""

    def __init__(self, traces):
        self.traces, self.running, self.requests, self.steps = traces, {}, [], 0

    def add(self, request: Request):
        self.requests.append((self.steps, request))
        self.running[request.id] = list(self.traces[request.id] if request.stream else [7, 99])[
            : request.max_tokens
        ]

    def has_work(self):
        return bool(self.running)

    def step(self):
        self.steps += 1
        out = []
        for name, left in list(self.running.items()):
            token = left.pop(0)
            out.append(Output(name, [token], [-0.5], not left))
            if not left:
                del self.running[name]
        return out


def run(traces, streaming=True, grade=None, num_summaries=2):
    engine = ScriptedEngine({f"0-{g}": t for g, t in enumerate(traces)})
    question = Question(0, "?", "5", (1, 2))
    rollouts = sample_rollouts(
        engine if streaming else TwoPhases(engine),
        [question],
        BUDGETS,
        len(traces),
        num_summaries,
        MARKERS,
        1.0,
        (0, 0),
        grade,
    )
    return rollouts, engine


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "thinking, finish, cuts, closed",
    [
        ([5, 5, 5, 5, 5, 5], "length", [2, 4, 6], [False, False, False]),  # hit b_M, never closed
        (
            [5, 5, 5, 5, 5, 90],
            "closed",
            [2, 4, 6],
            [False, False, True],
        ),  # closed with its last allowed token
        (
            [5, 5, 5, 90],
            "closed",
            [2, 4, 4],
            [False, True, True],
        ),  # closed exactly at a budget; shared cut
        ([5, 5, 90], "closed", [2, 3, 3], [False, True, True]),
        ([90], "closed", [1, 1, 1], [True, True, True]),
    ],
)
def test_cuts_and_appended_texts(thinking, finish, cuts, closed, streaming):
    (r,), _ = run([thinking], streaming)
    assert r.finish == finish and r.thinking == thinking
    assert [s.cut for s in r.summaries] == [c for c in cuts for _ in range(2)]
    assert [(s.budget_index, s.draw) for s in r.summaries] == [
        (j, a) for j in range(3) for a in range(2)
    ]
    for s, c in zip(r.summaries[::2], closed):
        assert s.appended == ([81] if c else [80, 90, 81])
        assert s.tokens == [7, 99] and s.logp == [-0.5, -0.5]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_trace_that_ends_in_end_of_text_scores_zero_from_there_on(streaming):
    def grade(r, s):
        f = Future()
        f.set_result(1.0)
        return f

    (r,), engine = run([[5, 5, 99]], streaming, grade)
    assert r.finish == "eos"
    assert [s.score for s in r.summaries] == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]  # b_1 = 2 cut it before it ended
    assert [bool(s.tokens) for s in r.summaries] == [True, True, False, False, False, False]
    assert len(engine.requests) == 1 + 2


def test_summary_prompts_lengths_and_seeds():
    (r,), engine = run([[5, 6, 7, 90]])
    summaries = [request for _, request in engine.requests[1:]]
    assert [s.prompt for s in summaries] == [(1, 2, 5, 6, 80, 90, 81)] * 2 + [
        (1, 2, 5, 6, 7, 90, 81)
    ] * 4
    assert [s.max_tokens for s in summaries] == [6] * 6  # whatever was appended
    assert len({request.seed for _, request in engine.requests}) == 7


def test_summaries_are_requested_as_soon_as_a_budget_is_crossed_and_changes_nothing_else():
    traces = [[5, 5, 90], [5] * 6]
    streamed, engine = run(traces)
    waited, later = run(traces, streaming=False)
    assert [
        (r.thinking, r.finish, [(s.cut, s.appended, s.tokens) for s in r.summaries])
        for r in streamed
    ] == [
        (r.thinking, r.finish, [(s.cut, s.appended, s.tokens) for s in r.summaries]) for r in waited
    ]
    assert {request for _, request in engine.requests} == {
        request for _, request in later.requests
    }  # seeds included
    assert min(step for step, request in engine.requests if not request.stream) == 2  # b_1 = 2
    assert (
        min(step for step, request in later.requests if not request.stream) == 6
    )  # the last trace's end


def test_seeds_differ_in_every_part_of_their_key_and_repeat():
    keys = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    seeds = [request_seed(*k) for k in keys]
    assert len(set(seeds)) == len(keys) and seeds == [request_seed(*k) for k in keys]
    assert all(0 <= s < 2**63 for s in seeds)


def test_to_tree_places_advantages_by_segment():
    (r,), _ = run([[5, 5, 5, 90]])
    thinking, summary = (
        torch.tensor([0.25, 0.5, 0.75]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    )
    tree = to_tree(r, thinking, summary, BUDGETS)
    assert tree.advantages == [0.25, 0.25, 0.5, 0.5]
    assert [(b.cut, b.advantage) for b in tree.branches] == [
        (2, 1.0),
        (2, 2.0),
        (4, 3.0),
        (4, 4.0),
        (4, 5.0),
        (4, 6.0),
    ]
    last = to_tree(r, thinking, summary, BUDGETS, last_only=True)
    assert [b.advantage for b in last.branches] == [5.0, 6.0]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def test_protocol_reads_the_tokenizer(tokenizer):
    markers = Markers.from_tokenizer(tokenizer, 7, eos=[2, 1])
    assert tokenizer.decode([markers.think_end]) == "</think>"
    assert (
        tokenizer.decode(markers.cut_text + markers.answer_header)
        == "...\n\n...\n\n</think>\n\n**Final Answer**\n"
    )
    assert markers.eos == (1, 2)
    assert markers.appended_tokens == 3


def test_a_tokenizer_without_one_token_think_end_is_refused():
    def with_encoding(ids):
        return SimpleNamespace(
            encode=lambda text, add_special_tokens: ids,
            unk_token_id=0,
            eos_token_id=1,
            name_or_path="some/model",
        )

    for ids in ([5, 6, 7], [0]):
        with pytest.raises(ValueError, match="some/model.*</think>"):
            Markers.from_tokenizer(with_encoding(ids))


def test_grader_wants_exactly_one_think_end(tokenizer):
    markers = Markers.from_tokenizer(tokenizer, 7)
    asked = []
    verifier = SimpleNamespace(
        submit=lambda summary, ground_truth: asked.append((summary, ground_truth)) or "future"
    )
    grade = rollout.make_grader(verifier, tokenizer, markers)
    question = Question(0, "?", "5", (2,))
    ids = {
        text: tokenizer.encode(text)
        for text in (" =5</think>", "\\boxed{5}<|end|>", "</think>\\boxed{5}<|end|>")
    }
    r = rollout.Rollout(question, 0, ids[" =5</think>"], finish="closed")
    good = rollout.Summary(0, 0, 2, list(markers.answer_header), ids["\\boxed{5}<|end|>"])
    assert grade(r, good) == "future" and asked == [("\\boxed{5}", "5")]
    again = rollout.Summary(0, 0, 2, list(markers.answer_header), ids["</think>\\boxed{5}<|end|>"])
    assert grade(r, again) is None and len(asked) == 1


def test_only_the_first_paragraph_of_a_summary_is_graded(tokenizer):
    asked = []
    verifier = SimpleNamespace(submit=lambda summary, ground_truth: asked.append(summary))
    grade = rollout.make_grader(
        verifier, SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids))), MARKERS
    )
    r = rollout.Rollout(
        Question(0, "?", "5", ()), 0, [ord(c) for c in "so </think>"], finish="closed"
    )
    grade(r, rollout.Summary(0, 0, 11, [], [ord(c) for c in "\n\n\\boxed{4}\n\nno, \\boxed{5}"]))
    assert asked == ["\\boxed{4}"]
