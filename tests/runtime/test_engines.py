"""The plain engine against transformers' own loop and against the trainer's log-probs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from packing import pack, token_logprobs
from rollout import Markers, Request, Sampling, request_seed, sample_rollouts
from runtime.data import Question
from runtime.engines import PlainEngine, require_engine, sample_tokens
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


def finish(engine, requests) -> dict[str, tuple[list[int], list[float]]]:
    """{request id: (tokens, log-probs)}; nothing may follow an output that says it is the last."""
    sampled, finished = {r.id: ([], []) for r in requests}, set()
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for out in engine.step():
            assert out.id not in finished and len(out.tokens) == len(out.logp)
            sampled[out.id][0].extend(out.tokens)
            sampled[out.id][1].extend(out.logp)
            finished |= {out.id} if out.finished else set()
    assert finished == set(sampled) and engine.step() == []
    return sampled


def rollouts_of(engine, tokenizer, temperature: float):
    text, markers = "2 +2 ?<think>", Markers.from_tokenizer(tokenizer, 7)
    questions = [Question(0, text, "4", tuple(tokenizer.encode(text)))]
    return sample_rollouts(engine, questions, Sampling(BUDGETS, 3, 2, temperature, (0, 0)), markers)


# ---------------------------------------------------------------------------------- the draws


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
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_tokens(logits.expand(n, 3), torch.full((n, 1), 0.6), uniform)
    share = torch.bincount(tokens, minlength=3) / n
    assert (share - (logits / 0.6).softmax(-1)).abs().max() < 0.02


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
