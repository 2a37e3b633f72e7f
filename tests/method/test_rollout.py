"""Cuts, appended texts, seeds and scores, on an engine whose thinking traces are given."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import rollout
from rollout import Markers, Output, Request, request_seed, sample_rollouts, to_tree
from runtime.data import Question
from runtime.engines import PlainEngine, sample_tokens
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


def test_inverse_cdf_sampling_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(5, 3)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999], dtype=torch.float64)
    tokens, logp = sample_tokens(logits, torch.ones(5, 1), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    assert logp.exp().tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.3])
    tokens, _ = sample_tokens(logits, torch.zeros(5, 1), uniform)
    assert tokens.tolist() == [1] * 5  # temperature 0 is greedy


def test_sampling_follows_the_distribution_at_the_temperature():
    n, logits = 20000, torch.tensor([1.0, 0.0, -1.0])
    tokens, _ = sample_tokens(
        logits.expand(n, 3),
        torch.full((n, 1), 0.6),
        torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    share = torch.bincount(tokens, minlength=3) / n
    assert (share - (logits / 0.6).softmax(-1)).abs().max() < 0.02


# --------------------------------------------------------------------------------- the plain engine


@pytest.fixture(scope="module")
def engine(tiny_model_path):
    return PlainEngine(str(tiny_model_path))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def finish(engine, requests):
    for r in requests:
        engine.add(r)
    out = {}
    while engine.has_work():
        out.update({o.id: o for o in engine.step()})
    return out


def test_plain_engine_equals_transformers_generate(engine):
    """Greedy, uneven prompts, a stop token: against the library's own loop, one request at a
    time."""
    prompts = [(19, 38, 9, 3), (20, 9, 3), (19, 38, 48, 44, 40, 9, 3)]
    out = finish(engine, [Request(str(i), p, 12, (2, 4), 0, 0.0) for i, p in enumerate(prompts)])
    for i, p in enumerate(prompts):
        expected = engine.model.generate(
            torch.tensor([p]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[2, 4],
            pad_token_id=1,
        )[0, len(p) :]
        assert out[str(i)].tokens == expected.tolist()


def test_what_else_is_in_the_batch_does_not_matter(engine):
    requests = [
        Request(str(i), tuple(range(5, 6 + i % 7)), 5 + i % 9, (2,), request_seed(0, i), 1.0)
        for i in range(20)
    ]
    together = finish(engine, requests)
    for r in requests:
        alone = finish(engine, [r])[r.id]
        assert alone.tokens == together[r.id].tokens
        assert alone.logp == pytest.approx(together[r.id].logp, abs=1e-4)


def test_one_token_steps_give_the_same_tokens_one_at_a_time(engine):
    requests = [
        Request(str(i), (19, 38, 9, 3)[: 2 + i % 3], 4 + i, (2,), request_seed(1, i), 1.0)
        for i in range(6)
    ]
    whole = finish(engine, requests)
    stepped = {r.id: [] for r in requests}
    engine.one_token_steps = True
    try:
        for r in requests:
            engine.add(r)
        while engine.has_work():
            for out in engine.step():
                assert len(out.tokens) == len(out.logp) == 1
                stepped[out.id] += out.tokens
                assert out.finished == (len(stepped[out.id]) == len(whole[out.id].tokens))
    finally:
        engine.one_token_steps = False
    assert stepped == {name: out.tokens for name, out in whole.items()}


@pytest.mark.parametrize("room, kept_all", [(2**17, True), (40, False), (0, False)])
def test_summaries_reuse_the_keys_and_values_of_their_trace(
    engine, tokenizer, monkeypatch, room, kept_all
):
    """Same tokens as from the whole prefix, of which only the appended text is computed again. With
    room for few traces or none, the others are."""
    markers, widths, forward = Markers.from_tokenizer(tokenizer, 5), [], engine.model.forward
    questions = [
        Question(i, "", "4", tuple(tokenizer.encode(text + " ?<think>")))
        for i, text in enumerate(("2 +2", "7 *3 -1 +4"))
    ]

    def sampled():
        return [
            (s.tokens, s.logp)
            for r in sample_rollouts(engine, questions, (4, 9, 12), 4, 2, markers, 1.0, (0, 0))
            for s in r.summaries
        ]

    def recorded(**inputs):
        widths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    with monkeypatch.context() as without:
        without.setattr(engine, "_keep", lambda *row: None)
        expected = sampled()
    monkeypatch.setattr(engine.model, "forward", recorded)
    keep, kept = engine._keep, []

    def in_room(*row):
        with monkeypatch.context() as here:
            here.setattr(engine, "max_batch_tokens", room)
            keep(*row)
        kept.append(len(engine.kept))

    monkeypatch.setattr(engine, "_keep", in_room)
    for (tokens, logp), (same, close) in zip(sampled(), expected, strict=True):
        assert tokens == same and logp == pytest.approx(close, abs=1e-5)
    assert max(kept) == 8 if kept_all else max(kept) < 8 and bool(max(kept)) == bool(room)
    prompt, *others = [w for w in widths if w > 1]  # a forward each, besides single tokens
    assert prompt == 6
    # One more than the appended text: a trace's last token was sampled, but never computed.
    appended = len(markers.cut_text + markers.answer_header)
    assert others == [1 + appended] if kept_all else max(others) > 1 + appended


def test_a_model_with_sliding_windows_is_sampled_as_without_reuse(tokenizer, tmp_path):
    """A window's layer has dropped the early keys of a long trace, so nothing of it is reused."""
    torch.manual_seed(0)
    small = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    MistralForCausalLM(small).save_pretrained(tmp_path)
    sliding, markers = PlainEngine(str(tmp_path)), Markers.from_tokenizer(tokenizer, 5)
    questions = [Question(0, "", "4", tuple(tokenizer.encode("2 +2 ?<think>")))]
    for r in sample_rollouts(sliding, questions, (4, 9, 12), 4, 2, markers, 1.0, (0, 0)):
        for s in r.summaries:
            prompt = [*r.question.prompt, *r.thinking[: s.cut], *s.appended, *s.tokens]
            logits = sliding.model(torch.tensor([prompt])).logits[0, -len(s.tokens) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(s.tokens)), s.tokens]
            assert s.logp == pytest.approx(logp.tolist(), abs=1e-5)


def test_kept_keys_end_with_the_weights_they_are_of(engine, tokenizer):
    engine.add(Request("trace", (19, 38, 9, 3), 6, (), 0, 1.0, stream=True))
    engine.step()
    assert list(engine.kept) == ["trace"]
    engine.sync_weights(list(engine.model.state_dict().items()), version=0)
    assert engine.kept == {}


def test_batches_are_bounded_by_tokens(engine, monkeypatch):
    """A batch's cache grows to requests x longest sequence: long prompts run in smaller batches."""
    requests = [
        Request(f"{n}-{i}", (20,) * n, 8, (4,), i, 1.0) for n in (3, 30, 60) for i in range(6)
    ]

    def sampled():
        for r in requests:
            engine.add(r)
        return {o.id: o.tokens for o in engine.step()}

    together, sizes, generate = sampled(), [], engine._generate

    def recorded(batch, known):
        sizes.append(len(batch) * max(len(r.prompt) + r.max_tokens for r in batch))
        return generate(batch, known)

    monkeypatch.setattr(engine, "_generate", recorded)
    monkeypatch.setattr(engine, "max_batch_tokens", 140)
    assert sampled() == together
    assert len(sizes) == 6 and max(sizes) <= 140
    monkeypatch.setattr(engine, "max_batch_tokens", 10)  # no room even for one: one at a time
    assert sampled() == together and len(sizes) == 6 + len(requests)
    assert engine.step() == []


def test_sampler_logprobs_are_the_trainers(engine, tokenizer, tiny_model_path):
    from packing import pack, token_logprobs

    markers = Markers.from_tokenizer(tokenizer, 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="sdpa")
    question = Question(0, "2 +2 ?", "4", tuple(tokenizer.encode("2 +2 ?<think>")))
    for temperature in (1.0, 0.6):
        rollouts = sample_rollouts(
            engine, [question], (4, 8, 12), 3, 2, markers, temperature, (0, 0)
        )
        row = pack([to_tree(r, torch.zeros(3), torch.zeros(3, 2), (4, 8, 12)) for r in rollouts])
        gap = (token_logprobs(model, row, temperature) - row.sampler_logp)[row.trained]
        assert gap.abs().max() < 1e-4


def test_sync_weights_changes_what_is_sampled_and_refuses_a_partial_set(tiny_model_path):
    engine = PlainEngine(str(tiny_model_path))
    trainer = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with torch.no_grad():
        for p in trainer.parameters():
            p.add_(torch.randn_like(p))
    request = Request("a", (19, 38, 9, 3), 12, (2,), 0, 0.0)
    engine.sync_weights(trainer.state_dict().items(), version=7)
    assert engine.version == 7
    expected = trainer.generate(
        torch.tensor([request.prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=1,
    )[0, 4:]
    assert finish(engine, [request])["a"].tokens == expected.tolist()
    with pytest.raises(RuntimeError, match="never synced"):
        engine.sync_weights(list(trainer.state_dict().items())[:-3], version=8)


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
