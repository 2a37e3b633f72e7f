"""The plain engine's draws by hand and by statistics; the engine against transformers' own loop and
against the trainer's log-probs."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from packing import pack, token_logprobs
from rollout import Markers, Request, Sampling, request_seed, sample_rollouts
from runtime.data import Question
from runtime.engines import GAMMA, PlainEngine, mix_bits, require_engine, sample_tokens
from tests.conftest import finish
from train import to_trees

BUDGETS = (4, 8, 12)
REQUESTS = [
    Request(f"{n}-{i}", tuple(range(5, 5 + n)), 3 + i, (2, 4), request_seed(n, i), 1.0, i == 0)
    for n in (2, 3, 30)
    for i in range(6)
]


@pytest.fixture(scope="module")
def engine(tiny_model_path):
    return PlainEngine(str(tiny_model_path))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def rollouts_of(engine, tokenizer, temperature: float):
    text, markers = "2 +2 ?<think>", Markers.from_tokenizer(tokenizer, 7)
    questions = [Question(0, text, "4", tuple(tokenizer.encode(text)))]
    return sample_rollouts(engine, questions, Sampling(BUDGETS, 3, 2, temperature, (0, 0)), markers)


# ---------------------------------------------------------------------------------- the draws


def hashed(x: int) -> int:
    """SplitMix64's output function, in Python's own integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64():
    # The generator's published first outputs from the state 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = torch.arange(1, 4) * GAMMA + 1234567
    assert [x % 2**64 for x in mix_bits(states).tolist()] == expected
    assert [hashed((1234567 + i * GAMMA) % 2**64) for i in (1, 2, 3)] == expected


def test_the_race_by_hand():
    """The token is that of the least E_v / π(v), with E_v computed once more in Python."""
    probs, seeds = [0.2, 0.5, 0.3], [0, 1, 2, 3, request_seed(0, 7), 2**63 - 1]
    logits = torch.log(torch.tensor([probs])).expand(len(seeds), 3)
    for position in range(20):
        expected = []
        for seed in seeds:
            key = hashed((hashed(seed) + position) % 2**64)
            bits = [hashed((key + v * GAMMA) % 2**64) % 2**63 for v in (1, 2, 3)]
            clocks = [-math.log1p(-n / 2**63) / p for n, p in zip(bits, probs)]
            expected.append(clocks.index(min(clocks)))
        drawn = torch.tensor(seeds)
        tokens, logp = sample_tokens(logits, torch.ones(len(seeds), 1), drawn, position)
        assert tokens.tolist() == expected and drawn.tolist() == seeds
        assert logp.exp().tolist() == pytest.approx([probs[v] for v in expected])
        greedy, _ = sample_tokens(logits, torch.zeros(len(seeds), 1), drawn, position)
        assert greedy.tolist() == [1] * len(seeds)  # temperature 0


N = 200_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])
# 99.9 % quantiles of chi-square; the seeds are fixed, so a test that passes once always passes.
CHI_SQUARE = {7: 24.3, 49: 85.4}


def draws(first_seed: int, position: int) -> torch.Tensor:
    """The tokens of N requests with consecutive seeds, at temperature 0.6."""
    seeds, temperature = torch.arange(first_seed, first_seed + N), torch.full((N, 1), 0.6)
    return sample_tokens(LOGITS.expand(N, 8), temperature, seeds, position)[0]


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return ((observed - expected) ** 2 / expected).sum().item()


def test_sampling_follows_the_distribution_at_the_temperature():
    expected = N * (LOGITS / 0.6).double().softmax(-1)
    for position in (0, 1, 5000):
        observed = torch.bincount(draws(0, position), minlength=8)
        assert chi_square(observed, expected) < CHI_SQUARE[7]
    assert chi_square(observed, N * (LOGITS / 0.61).double().softmax(-1)) > CHI_SQUARE[7]


@pytest.mark.parametrize(
    "other",
    [(0, 1), (0, 2), (1, 0), (2**40, 0), (1, 1)],
    ids=["next position", "the one after", "next request", "far request", "next of both"],
)
def test_positions_and_requests_are_independent(other):
    """Pairs of tokens are as frequent as the product of the two frequencies."""
    pairs = torch.bincount(8 * draws(0, 0) + draws(*other), minlength=64).view(8, 8).double()
    expected = pairs.sum(1, keepdim=True) * pairs.sum(0) / N
    assert chi_square(pairs, expected) < CHI_SQUARE[49]


def test_rounding_flips_as_few_tokens_as_theory_says():
    """Logits moved by noise of standard deviation σ flip (1 - Σ π²) σ / √π of the tokens.

    The gap between the first two clocks on a log scale has density Σ_v π_v (1 - π_v) at 0, and the
    noise must exceed it: E[max(0, δ - δ')] = σ/√π.
    """
    rows, vocabulary, flips, expected = 40, 49_152, {1e-5: 0, 0.05: 0}, 0.0
    generator, ones = torch.Generator().manual_seed(0), torch.ones(rows, 1)
    for position in range(8):
        logits = 2 * torch.randn(rows, vocabulary, generator=generator)
        noise = torch.randn(rows, vocabulary, generator=generator)
        seeds = torch.arange(rows) + rows * position
        tokens, _ = sample_tokens(logits, ones, seeds, position)
        for size in flips:
            moved, _ = sample_tokens(logits + size * noise, ones, seeds, position)
            flips[size] += (moved != tokens).sum().item()
        expected += (1 - logits.softmax(-1).square().sum(-1)).sum().item() * 0.05 / math.pi**0.5
    assert flips[1e-5] == 0  # of 320; 0.002 are expected
    assert abs(flips[0.05] - expected) < 3 * expected**0.5 and expected > 8


def test_a_draw_depends_on_its_row_alone():
    """At a vocabulary whose rows do not share a block, and in another order."""
    logits = torch.randn(7, 49_152, generator=torch.Generator().manual_seed(0))
    rows = (logits, torch.tensor([[1.0], [0.6], [0.0], [1.0], [2.0], [1.0], [0.1]]))
    rows = (*rows, torch.tensor([request_seed(i) for i in range(7)]))
    tokens, logp = sample_tokens(*rows, 3)
    for order in ([6, 2, 0, 5], [1], [0, 1, 2, 3, 4, 5, 6][::-1]):
        again, again_logp = sample_tokens(*(x[order] for x in rows), 3)
        assert torch.equal(again, tokens[order]) and torch.equal(again_logp, logp[order])


# ------------------------------------------------------------------------------- the plain engine


def generated(model, prompt, max_tokens: int, stop: list[int]) -> list[int]:
    """What transformers' own greedy loop says."""
    settings = {"do_sample": False, "eos_token_id": stop, "pad_token_id": 1}
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, **settings)
    return tokens[0, len(prompt) :].tolist()


def test_plain_engine_equals_transformers_generate(engine):
    """Greedy, uneven prompts, two stop tokens; the library runs one request at a time."""
    prompts = [(19, 38, 9, 3), (20, 9, 3), (19, 38, 48, 44, 40, 9, 3)]
    sampled = finish(
        engine, [Request(str(i), p, 12, (2, 4), 0, 0.0) for i, p in enumerate(prompts)]
    )
    for i, prompt in enumerate(prompts):
        assert sampled[str(i)][0] == generated(engine.model, prompt, 12, [2, 4])


@pytest.mark.parametrize(
    "how", ["alone", "in reverse", "one token a step", "few requests", "few tokens", "no room"]
)
def test_what_else_is_in_the_batch_does_not_matter(engine, monkeypatch, how):
    """Tokens depend on the request alone: not on its batch, order, bounds or on streaming."""
    expected, sizes, generate = finish(engine, REQUESTS), [], engine._generate

    def recorded(batch):
        sizes.append((len(batch), len(batch) * max(len(r.prompt) + r.max_tokens for r in batch)))
        return generate(batch)

    monkeypatch.setattr(engine, "_generate", recorded)
    monkeypatch.setattr(engine, "one_token_steps", how == "one token a step")
    bounds = {"few requests": (4, 2**17), "few tokens": (1024, 100), "no room": (1024, 10)}
    for name, bound in zip(("max_batch", "max_batch_tokens"), bounds.get(how, (1024, 2**17))):
        monkeypatch.setattr(engine, name, bound)
    if how == "alone":
        sampled = {k: v for r in REQUESTS for k, v in finish(engine, [r]).items()}
    else:
        sampled = finish(engine, REQUESTS[::-1] if how == "in reverse" else REQUESTS)
    for name, (tokens, logp) in expected.items():
        assert sampled[name][0] == tokens and sampled[name][1] == pytest.approx(logp, abs=1e-4)
    if how == "few requests":
        assert [n for n, _ in sizes] == [4, 4, 4, 4, 2]
    elif how == "few tokens":
        assert 4 < len(sizes) < 18 and max(tokens for _, tokens in sizes) <= 100
    else:
        assert len(sizes) == (18 if how in ("alone", "no room") else 1)


def test_one_token_steps_return_one_token_of_each_request(engine, monkeypatch):
    monkeypatch.setattr(engine, "one_token_steps", True)
    engine.add(REQUESTS[0])
    assert [len(out.tokens) for out in engine.step()] == [1]
    engine.add(REQUESTS[1])  # joins while the first one still runs
    assert sorted(out.id for out in engine.step()) == ["2-0", "2-1"]
    while engine.has_work():
        assert all(len(out.tokens) == 1 for out in engine.step())


def test_a_shared_prompt_is_prefilled_once(engine, monkeypatch):
    rows, forward = [], engine.model.forward

    def recorded(**inputs):
        rows.append(inputs["input_ids"].shape)
        return forward(**inputs)

    monkeypatch.setattr(engine.model, "forward", recorded)
    finish(engine, REQUESTS)  # 18 requests, 3 prompts, the longest of 30 tokens
    assert rows[0] == (3, 30) and rows[1] == (18, 1) and all(width == 1 for _, width in rows[1:])
    assert rows[-1][0] < 18  # finished rows are removed


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_trainers(engine, tokenizer, tiny_model_path, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="sdpa")
    rollouts = rollouts_of(engine, tokenizer, temperature)
    row = pack(to_trees(rollouts, torch.zeros(1, 3, 3), torch.zeros(1, 3, 3, 2), BUDGETS))
    gap = (token_logprobs(model, row, temperature) - row.sampler_logp)[row.trained]
    assert gap.abs().max() < 1e-4


def test_a_model_with_sliding_windows_is_sampled_right(tokenizer, tmp_path):
    """No tree trains on it, but it can be evaluated. Contexts are longer than the window here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=6, **sizes, **heads)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    engine = PlainEngine(str(tmp_path))
    for r in rollouts_of(engine, tokenizer, 1.0):
        for s in r.summaries:
            prompt = [*r.question.prompt, *r.thinking[: s.cut], *s.appended, *s.tokens]
            logits = engine.model(torch.tensor([prompt])).logits[0, -len(s.tokens) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(s.tokens)), s.tokens]
            assert s.logp == pytest.approx(logp.tolist(), abs=1e-5)


def test_sync_weights_changes_what_is_sampled_and_refuses_a_partial_set(tiny_model_path):
    engine = PlainEngine(str(tiny_model_path))
    trainer = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.parameters():
            p.add_(torch.randn_like(p))
    request = Request("a", (19, 38, 9, 3), 12, (2,), 0, 0.0)
    before = finish(engine, [request])["a"][0]
    engine.sync_weights(trainer.state_dict().items(), version=7)
    expected = generated(trainer, request.prompt, 12, [2])
    assert finish(engine, [request])["a"][0] == expected != before and engine.version == 7
    with pytest.raises(RuntimeError, match="never synced"):
        engine.sync_weights(list(trainer.state_dict().items())[:-3], version=8)
    assert engine.version == 7


def test_a_missing_engine_is_refused(monkeypatch):
    monkeypatch.setattr("runtime.engines.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--engine vllm, but vLLM is not installed"):
        require_engine("vllm")
    require_engine("plain")
