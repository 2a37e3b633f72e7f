"""One packed row must be the same computation as its sequences, one by one."""

import random
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from packing import (
    Branch,
    Tree,
    balance,
    check_attention,
    dense_mask,
    is_visible,
    pack,
    pack_share,
    token_logprobs,
)
from tests.conftest import ROOT


def other_architecture(name: str):
    """A random tiny model of another family: nothing in packing.py knows Qwen2."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        vocab_size=49,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return (
        Qwen3ForCausalLM(Qwen3Config(head_dim=32, **sizes))
        if name == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**sizes))
    )


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_tree_equals_separate_sequences_in_other_families(name):
    model = other_architecture(name).eval()
    trees = [random_tree(random.Random(seed)) for seed in range(3)]
    row = pack(trees)
    assert (
        token_logprobs(model, row, 0.8)[row.trained] - by_separate_sequences(model, trees, 0.8)
    ).abs().max() < 1e-4


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def random_tree(rng: random.Random, cuts=None, thinking=None, vocab=49, appended=None) -> Tree:
    def tokens(n):
        return [rng.randrange(vocab) for _ in range(n)]

    thinking = rng.randrange(1, 30) if thinking is None else thinking
    cuts = [rng.randint(0, thinking) for _ in range(rng.randrange(1, 5))] if cuts is None else cuts
    branches = [
        Branch(
            cut,
            tokens(rng.randrange(1, 4) if appended is None else appended),
            tokens(rng.randrange(1, 9)),
            rng.gauss(0, 1),
        )
        for cut in cuts
    ]
    return Tree(
        tokens(rng.randrange(1, 8)),
        tokens(thinking),
        branches,
        [rng.gauss(0, 1) for _ in range(thinking)],
    )


def sequence_logprobs(model, context, continuation, temperature):
    """log π of `continuation` after `context`, by an ordinary causal forward."""
    if not continuation:
        return torch.zeros(0)
    logits = model(torch.tensor([context + continuation])).logits[0] / temperature
    logp = logits.log_softmax(-1)[len(context) - 1 : -1]
    return logp.gather(-1, torch.tensor(continuation)[:, None])[:, 0]


def by_separate_sequences(model, trees, temperature):
    """Log-probs of all trained tokens in row order, each tree written out as 1 + number-of-branches
    sequences."""
    parts = []
    for t in trees:
        parts.append(sequence_logprobs(model, t.prompt, t.thinking, temperature))
        parts += [
            sequence_logprobs(
                model, t.prompt + t.thinking[: b.cut] + b.appended, b.summary, temperature
            )
            for b in t.branches
        ]
    return torch.cat(parts)


SPECIAL = {
    "cut of length 0": dict(cuts=[0, 0, 5], thinking=9),
    "equal cuts": dict(cuts=[4, 4, 4, 8], thinking=8),
    "never closed, all cuts at the end": dict(cuts=[20, 20], thinking=20),
    "no branches": dict(cuts=[], thinking=6),
    "empty thinking": dict(cuts=[0, 0], thinking=0),
    "no appended text": dict(cuts=[3, 7, 7], thinking=7, appended=0),
}


@pytest.mark.parametrize("case", [*range(6), *SPECIAL])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tree_equals_separate_sequences(model, case, temperature):
    rng = random.Random(str(case))
    trees = (
        [random_tree(rng, **SPECIAL[case])]
        if case in SPECIAL
        else [random_tree(rng) for _ in range(rng.randrange(1, 4))]
    )
    if case in SPECIAL:
        trees.append(random_tree(rng))  # never alone: a neighbour in the row must not leak in
    row = pack(trees, multiple=rng.choice([1, 16]))
    weights = torch.randn(int(row.trained.sum()), generator=torch.Generator().manual_seed(0))

    model.zero_grad()
    packed = token_logprobs(model, row, temperature, chunk=7)
    assert (packed[~row.trained] == 0).all()
    (packed[row.trained] * weights).sum().backward()
    packed_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    model.zero_grad()
    separate = by_separate_sequences(model, trees, temperature)
    (separate * weights).sum().backward()
    separate_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    assert (packed[row.trained] - separate).abs().max() < 1e-4
    assert (packed_gradient - separate_gradient).norm() / separate_gradient.norm() < 1e-5


def test_a_wrong_cut_would_be_noticed(model):
    """The comparison above can fail: one token more of trunk, and the log-probs move."""
    tree = random_tree(random.Random(1), cuts=[4], thinking=9)
    right = token_logprobs(model, pack([tree]))
    row = pack([tree])
    row.trunk_end = torch.where(row.branch == 1, row.trunk_end + 1, row.trunk_end)
    assert (token_logprobs(model, row) - right).abs().max() > 1e-3


def test_mask_by_brute_force():
    trees = [random_tree(random.Random(seed)) for seed in range(3)]
    row, visible, start = pack(trees, multiple=16), set(), 0
    for t in trees:
        trunk = list(range(start, start + len(t.prompt) + len(t.thinking)))
        visible |= {(q, k) for q in trunk for k in trunk if k <= q}
        start = trunk[-1] + 1
        for b in t.branches:
            branch = list(range(start, start + len(b.appended) + len(b.summary)))
            seen = trunk[: len(t.prompt) + b.cut]
            visible |= {(q, k) for q in branch for k in seen} | {
                (q, k) for q in branch for k in branch if k <= q
            }
            start = branch[-1] + 1
    padding = range(start, len(row.input_ids))
    visible |= {(q, k) for q in padding for k in padding if k <= q}
    assert {tuple(pair) for pair in dense_mask(row)[0, 0].nonzero().tolist()} == visible


@pytest.mark.parametrize("seed", range(8))
def test_flex_mask_is_what_evaluating_the_rule_on_every_pair_gives(seed):
    """Counting intervals instead: the same lists of full and partial blocks, to the element."""
    from torch.nn.attention.flex_attention import create_block_mask

    rng = random.Random(seed)
    lengths = [rng.choice([0, 5, 150, 400]) for _ in range(rng.randrange(1, 5))]
    cuts = [0, 0] if seed % 3 == 0 else None
    row = pack([random_tree(rng, cuts, thinking) for thinking in lengths], multiple=128)
    n = len(row.input_ids)

    def rule(batch, head, q, k):
        return is_visible(q, k, row.branch, row.trunk, row.trunk_end)

    wanted = create_block_mask(rule, None, None, n, n, device="cpu").as_tuple()
    got = row.block_mask.as_tuple()
    assert row.block_mask is row.block_mask and len(got) == len(wanted)
    for ours, theirs in zip(got, wanted):
        if torch.is_tensor(theirs):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        else:
            assert callable(theirs) or ours == theirs


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="FlexAttention compiles, on a CPU with g++"
)
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("tasks/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_compiler_traces_this_file(path):
    """Dynamo skips files by name (`tree.py`, `test_*.py` ...): FlexAttention would become dense."""
    verdict = torch._dynamo.trace_rules.check_file(str(path))
    assert not verdict.skipped, f"{path.name}: {verdict.reason}: rename it"


@pytest.mark.slow
@needs_compiler
def test_attention_compiles_for_the_first_length_then_for_all(model, tiny_model_path):
    """One graph for the first row, one with a dynamic length, none after; no graph break; and the
    log-probs of dense attention. Forward only: FlexAttention's backward exists on GPUs alone.

    More graphs end at Dynamo's limit of 8, beyond which attention silently holds T x T scores.
    Every row brings a new mask function, as in training.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flex = AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, attn_implementation="flex_attention"
    ).eval()
    graphs, lengths = [], []
    for number in (1, 3, 6, 2, 8, 11, 14, 16, 19, 4, 1):
        trees = [random_tree(random.Random(seed), thinking=60) for seed in range(number)]
        row = pack(trees, multiple=128)
        with torch.no_grad():
            logp = token_logprobs(flex, row)
            assert (logp - token_logprobs(model, row)).abs().max() < 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        lengths.append(len(row.input_ids))
    assert len(set(lengths)) >= 8, lengths
    assert graphs[:2] == [1, 2] and set(graphs[2:]) == {2}, list(zip(lengths, graphs))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@needs_compiler
def test_where_the_compiler_gives_up_is_an_error(tiny_model_path, monkeypatch):
    """The recompile limit, and a graph break: without the error, attention would turn dense."""
    import packing

    flex = AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, attn_implementation="flex_attention"
    ).eval()
    short, long = ([random_tree(random.Random(0), thinking=n)] for n in (60, 200))
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        token_logprobs(flex, pack(short, multiple=128))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            token_logprobs(flex, pack(long, multiple=128))
    torch._dynamo.reset()
    monkeypatch.setattr(packing, "is_visible", torch.compiler.disable(is_visible))
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        token_logprobs(flex, pack(short, multiple=128))
    torch._dynamo.reset()


def test_row_by_hand():
    tree = Tree(
        [1, 2],
        [3, 4, 5],
        [Branch(1, [6], [7, 8], 0.5, [-0.1, -0.2]), Branch(3, [6], [9], -1.0)],
        [0.1, 0.2, 0.3],
        [-1.0, -2.0, -3.0],
    )
    row = pack([tree], multiple=4)
    nan = float("nan")
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 6, 9, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 5, 6, 0, 1]
    assert row.trained.tolist() == [False] * 2 + [True] * 3 + [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert row.previous.tolist() == [0, 0, 1, 2, 3, 2, 5, 6, 4, 8, 0, 10]
    assert row.advantages.tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0, 0.5, 0.5, 0, -1, 0, 0])
    assert row.sampler_logp.tolist() == pytest.approx(
        [nan, nan, -1, -2, -3, nan, -0.1, -0.2, nan, nan, nan, nan], nan_ok=True
    )
    assert len(tree) == 10


def test_bad_trees_and_models_are_refused(model, tiny_model_path):
    with pytest.raises(ValueError, match="outside its thinking trace"):
        pack([Tree([1], [2, 3], [Branch(3, [4], [5])])])
    eager = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="eager")
    with pytest.raises(ValueError, match="'eager' where sdpa_by_tree"):
        token_logprobs(eager, pack([Tree([1], [2], [])]))


SMALL = dict(
    vocab_size=49, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=96, max_position_embeddings=256,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
REFUSED = {
    "Qwen2": ({"attention_dropout": 0.1}, "packed row are .* off .*: dropout"),
    "Cohere": ({"logit_scale": 0.06}, "this cohere in a packed row are .* changed logits"),
    "Gemma2": ({"layer_types": ["full_attention"] * 2, "head_dim": 16}, "this gemma2 .* off those"),
    "Qwen3Next": ({}, "layers of linear_attention"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of conv"),
    "Mistral": ({"sliding_window": 12}, "sliding_attention .window 12., which do not attend"),
    "Phi3": ({"sliding_window": 12}, "window 12"),
    "Gemma3Text": ({"sliding_window": 12, "head_dim": 16}, "window 12"),
    "FalconH1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "layers of hybrid"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_a_row_would_compute_wrongly_is_refused(family):
    """Copied alone, this file has nothing but itself to notice it by."""
    changes, complaint = REFUSED[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    row = pack([random_tree(random.Random(0), cuts=[4, 8], thinking=12) for _ in range(2)])
    with pytest.raises(ValueError, match=complaint):
        token_logprobs(model, row)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_is_longer_than_every_sequence_is_no_window():
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SMALL, sliding_window=24)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    fits = [random_tree(random.Random(seed), cuts=[4], thinking=5) for seed in range(3)]
    row = pack(fits)
    assert row.longest <= 24 < len(row.input_ids)
    alone = by_separate_sequences(model, fits, 1.0)
    assert (token_logprobs(model, row)[row.trained] - alone).abs().max() < 1e-4
    with pytest.raises(ValueError, match="window 24"):  # also after a row that was right
        token_logprobs(model, pack([random_tree(random.Random(0), thinking=29)]))
    check_attention(config, 24)


@pytest.mark.parametrize("multiple", [1, 32])
def test_attention_tree_by_tree_equals_attention_over_the_row(model, tiny_model_path, multiple):
    by_tree = AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, attn_implementation="sdpa_by_tree"
    ).eval()
    trees = [random_tree(random.Random(seed)) for seed in range(5)]
    row, gradients, logps = pack(trees, multiple), [], []
    assert [end - start for start, end in row.trees][:5] == [len(tree) for tree in trees]
    for one in (model, by_tree):
        one.zero_grad()
        logps.append(token_logprobs(one, row, 0.8))
        (logps[-1] * row.advantages).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert (logps[0] - logps[1]).abs().max() < 1e-5
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5
    ids = torch.tensor([[1, 2, 3]])  # an ordinary sequence, without a tree mask
    assert torch.allclose(by_tree(ids).logits, model(ids).logits, atol=1e-5)


def test_a_row_without_trained_tokens_still_has_a_backward(model):
    model.zero_grad()
    logp = token_logprobs(model, pack([Tree([0], [], [])]))
    logp.sum().backward()
    assert logp.tolist() == [0.0] and all(
        p.grad is None or p.grad.abs().max() == 0 for p in model.parameters()
    )


def test_balance_deals_every_tree_once_evenly_and_in_step():
    rng = random.Random(0)
    lengths = [rng.randrange(200, 10000) for _ in range(256)]
    plan = balance(lengths, 8, 32768)
    assert sorted(i for rank in plan for row in rank for i in row) == list(range(256))
    assert len({len(rank) for rank in plan}) == 1
    assert all(sum(lengths[i] for i in row) <= 32768 for rank in plan for row in rank)
    loads = [sum(lengths[i] for row in rank for i in row) for rank in plan]
    assert max(loads) / (sum(loads) / 8) < 1.02
    assert plan == balance(lengths, 8, 32768)


def test_balance_gives_an_oversized_tree_its_own_row_and_idle_processes_empty_ones():
    assert balance([50, 5, 4], 2, 10) == [[[0]], [[1, 2]]]
    assert balance([3], 3, 10) == [[[0]], [[]], [[]]]


def test_a_row_is_filled_to_its_last_token():
    assert balance([6, 4], 1, 10) == [[[0, 1]]]
    assert balance([6, 5], 1, 10) == [[[0], [1]]]


def test_the_shares_of_all_processes_are_the_whole_update():
    """Each tree once, the same number of rows everywhere, nothing to train where none is left."""
    trees = [random_tree(random.Random(seed), thinking=n) for seed, n in enumerate((30, 9, 5))]
    shares = [pack_share(trees, rank, 4, 64, multiple=8) for rank in range(4)]
    trained = sum(int(row.trained.sum()) for rows in shares for row in rows)
    assert trained == int(pack(trees).trained.sum())
    assert {len(rows) for rows in shares} == {1}
    assert [int(rows[0].trained.sum()) == 0 for rows in shares] == [False, False, False, True]
    assert all(len(row.input_ids) % 8 == 0 for rows in shares for row in rows)
