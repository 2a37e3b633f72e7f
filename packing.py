"""Tree attention: a thinking trace with all its summaries as one training row, and its log-probs.

All summaries of one trace share its prefix, so train on the tree instead of M·A copies of the
prefix. A row is one flat sequence that holds one or more trees, here one tree with two cuts:

    tokens     p p p t t t t t t  a s s  a a s s     p prompt, t thinking (together: the trunk)
    position   0 1 2 3 4 5 6 7 8  5 6 7  9 . . .     a appended text, s summary (a branch)
    trained    . . . x x x x x x  . x x  . . x x     only what the policy itself wrote

A branch token attends to the trunk up to its cut and to its own branch, nothing else, and its
positions continue from the cut: exactly what it saw when it was sampled. With 8000 thinking
tokens, 4 budgets and 4 summaries a row has about 10,000 tokens instead of about 82,000, for the
same log-probs and gradients up to rounding.

T is the row's tokens, V the vocabulary, D the hidden size. This file works when copied alone, under
any name but `tree.py`: torch's compiler skips files of that name (it takes them for dm-tree).
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass
class Branch:
    """One appended text + summary, hanging off the trunk after `cut` thinking tokens."""

    cut: int
    appended: list[int]
    summary: list[int]
    advantage: float = 0.0  # one number for every summary token
    sampler_logp: list[float] = field(default_factory=list)  # per summary token; empty: unknown


@dataclass
class Tree:
    """One prompt with its thinking trace and the branches to train; token ids throughout."""

    prompt: list[int]
    thinking: list[int]
    branches: list[Branch]
    advantages: list[float] = field(default_factory=list)  # per thinking token; empty: all 0
    sampler_logp: list[float] = field(default_factory=list)  # per thinking token; empty: unknown

    def __len__(self) -> int:
        branches = sum(len(b.appended) + len(b.summary) for b in self.branches)
        return len(self.prompt) + len(self.thinking) + branches


@dataclass
class Row:
    """A packed row; every tensor is [T]. Each trunk and each branch of the row has an id."""

    input_ids: Tensor  # int64
    position_ids: Tensor  # int64
    branch: Tensor  # int64, id of the token's own branch (a trunk token: of its trunk)
    trunk: Tensor  # int64, id of the trunk it hangs from (a trunk token: of its own)
    trunk_end: Tensor  # int64, row index before which that trunk is visible to it
    previous: Tensor  # int64, row index whose hidden state predicts this token
    trained: Tensor  # bool, written by the policy: carries loss
    advantages: Tensor  # float32, 0 where not trained
    sampler_logp: Tensor  # float32, nan where unknown
    old_logp: Tensor | None = None  # float32, log-probs before the step's first update

    def to(self, device) -> "Row":
        return Row(**{k: None if v is None else v.to(device) for k, v in vars(self).items()})

    @cached_property
    def block_mask(self):
        return flex_mask(self)  # built once, however many forwards the row goes through

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence that the row stands for."""
        return int(self.position_ids.max()) + 1

    @cached_property
    def trees(self) -> list[tuple[int, int]]:
        """[start, end) of every tree: between them nothing is visible."""
        starts = (self.trunk.diff().nonzero()[:, 0] + 1).tolist()
        return list(zip([0, *starts], [*starts, len(self.trunk)]))


def pack(trees: list[Tree], multiple: int = 1) -> Row:
    """Lay trees one after another into one row, padded to a `multiple` of tokens.

    Masks and predecessors are carried from here and never rebuilt from token ids later: an
    end-of-text that doubles as padding would be lost. Raises ValueError on a cut outside the trace.
    """
    columns = {name: [] for name in Row.__dataclass_fields__ if name != "old_logp"}
    ids, new_id = columns["input_ids"], count()

    def add(tokens, position, scope, previous, advantages=None, sampler_logp=()):
        """One run of consecutive tokens; scope: its branch, trunk and trunk_end. Trained where it
        has advantages, be they an empty list."""
        start, n = len(ids), len(tokens)
        ids.extend(tokens)
        columns["position_ids"].extend(range(position, position + n))
        for name, value in zip(("branch", "trunk", "trunk_end"), scope):
            columns[name].extend([value] * n)
        columns["previous"].extend([previous, *range(start, start + n - 1)][:n])
        columns["trained"].extend([advantages is not None] * n)
        columns["advantages"].extend(advantages or [0.0] * n)
        columns["sampler_logp"].extend(sampler_logp or [float("nan")] * n)

    for tree in trees:
        trunk, start, prompt = next(new_id), len(ids), len(tree.prompt)
        scope, thinking = (trunk, trunk, start), start + prompt
        # The first prompt token has no predecessor; it is never trained, so any index will do.
        add(tree.prompt, 0, scope, start)
        add(tree.thinking, prompt, scope, thinking - 1, tree.advantages, tree.sampler_logp)
        for b in tree.branches:
            if not 0 <= b.cut <= len(tree.thinking):
                raise ValueError(
                    f"a branch is cut at {b.cut}, outside its thinking trace of "
                    f"{len(tree.thinking)} tokens"
                )
            position, trunk_end = prompt + b.cut, thinking + b.cut
            scope = (next(new_id), trunk, trunk_end)
            # The first branch token is predicted from the last trunk token that it can see ...
            add(b.appended, position, scope, trunk_end - 1)
            # ... and the summary's first from the appended text's last, its neighbour in the row.
            previous = len(ids) - 1 if b.appended else trunk_end - 1
            advantages = [b.advantage] * len(b.summary)
            position += len(b.appended)
            add(b.summary, position, scope, previous, advantages, b.sampler_logp)
    # Padding is one more trunk that sees only itself: an empty softmax row would be nan.
    padding = next(new_id)
    add([0] * (-len(ids) % multiple), 0, (padding, padding, 0), 0)

    dtypes = {"trained": torch.bool, "advantages": torch.float32, "sampler_logp": torch.float32}
    tensors = {k: torch.tensor(v, dtype=dtypes.get(k, torch.int64)) for k, v in columns.items()}
    return Row(**tensors)


def is_visible(q, k, branch: Tensor, trunk: Tensor, trunk_end: Tensor):
    """May token q attend to token k?  The one rule behind both masks:

        k ≤ q  and  ( branch_k = branch_q   or   branch_k = trunk_q and k < trunk_end_q )

    The second half lets a branch see its trunk up to the cut. q, k: row indices that broadcast.
    """
    in_own_branch = branch[k] == branch[q]
    in_trunk_before_cut = (branch[k] == trunk[q]) & (k < trunk_end[q])
    return (k <= q) & (in_own_branch | in_trunk_before_cut)


def dense_mask(row: Row) -> Tensor:
    """[1, 1, T, T] bool, True = attend; for scaled_dot_product_attention. Memory T²: short rows."""
    index = torch.arange(len(row.input_ids), device=row.input_ids.device)
    q, k = index[:, None], index[None, :]
    return is_visible(q, k, row.branch, row.trunk, row.trunk_end)[None, None]


def flex_mask(row: Row):
    """The same rule as a BlockMask for FlexAttention, which skips blocks where nothing is visible.

    A token sees two intervals, its trunk up to the cut and its own branch up to itself: so visible
    pairs are counted by block, in T²/128 steps where create_block_mask takes T². T % 128 = 0.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, size = len(row.input_ids), 128
    index = torch.arange(n, device=row.input_ids.device)

    def keys_in(start, end):  # how many keys of each block are in [start, end): [T, T/128]
        left, right = index[::size], index[::size] + size
        return (end[:, None].clamp_max(right) - start[:, None].clamp_min(left)).relu()

    first = torch.searchsorted(row.branch, torch.stack([row.trunk, row.branch]))  # ids ascend
    pairs = keys_in(first[0], row.trunk_end) + keys_in(first[1], index + 1)
    pairs = pairs.view(-1, size, n // size).sum(1)  # [T/128, T/128]

    def listed(chosen):  # per block of queries: how many blocks of keys; their indices first
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1).int()[None, None], order.int()[None, None]

    # Local tensors instead of `row`: the compiler turns captured tensors into inputs of the graph,
    # and so need not compile again for every row.
    branch, trunk, trunk_end = row.branch, row.trunk, row.trunk_end

    def rule(batch, head, q, k):
        return is_visible(q, k, branch, trunk, trunk_end)

    full = pairs == size * size
    return BlockMask.from_kv_blocks(*listed((pairs > 0) & ~full), *listed(full), size, rule, (n, n))


def attend_by_tree(module, query, key, value, attention_mask, trees=(), **settings):
    """sdpa, tree by tree: Σ n² scores instead of T². As attn_implementation: "sdpa_by_tree"."""
    if len(trees) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    parts = []
    for start, end in trees:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))  # [1, heads, n, head size]
        mask = attention_mask[:, :, start:end, start:end]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register("sdpa_by_tree", attend_by_tree)
AttentionMaskInterface.register("sdpa_by_tree", sdpa_mask)


@contextmanager
def compiled_whole():
    """Raise on a graph break; otherwise FlexAttention silently falls back to dense T x T scores."""
    from torch._dynamo import config, error_on_graph_break

    with config.patch(fail_on_recompile_limit_hit=True), error_on_graph_break(True):
        yield


def eager_target_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) at the targets. [N, V], [N] -> [N], float32."""
    logits = logits.float()
    if temperature != 1.0:  # the division would be one more pass over all logits
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


@cache
def compiled_target_logprobs():
    """The same in one pass over bfloat16 logits, without a float32 copy of them."""
    return torch.compile(eager_target_logprobs, dynamic=True)  # loads the compiler: on GPUs only


def check_attention(config, longest: int):
    """ValueError where a layer does not see all of `longest` tokens: the tree mask is for all."""
    window = getattr(config, "sliding_window", None)
    window = window or getattr(config, "attention_chunk_size", None)
    window = (getattr(config, "use_sliding_window", True) and window) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window)
    harmless = {"sliding_attention", "chunked_attention"} if window >= longest else set()
    if other := sorted({*kinds} - {"full_attention"} - harmless):
        raise ValueError(
            f"a {config.model_type} has layers of {', '.join(other)} (window {window}), which do "
            f"not attend to all of {longest} tokens: use shorter sequences, or another model"
        )


@torch.no_grad()
def check_model(model, row: Row, hidden: Tensor):
    """ValueError where a row is to this model not what its sequences are one by one.

    What the last trained token saw goes through the whole model as an ordinary sequence, and must
    give head(hidden). It does not with dropout, logits that are scaled or capped, layers that are
    no attention, and attention that takes no mask of booleans ("eager" adds it to the scores).
    """
    index = torch.arange(len(row.input_ids), device=hidden.device)
    last = int((index * row.trained).max())
    seen = row.input_ids[is_visible(last, index, row.branch, row.trunk, row.trunk_end)]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    # Not model(): FSDP has gathered the root. Not model.forward: accelerate's computes in bfloat16.
    plain = type(model).forward(model, seen[None], use_cache=False, logits_to_keep=1).logits[0]
    model.set_attn_implementation(implementation)
    ours = model.get_output_embeddings()(hidden[last : last + 1])
    gap = (ours - plain).abs().max() / plain.abs().max().clamp_min(1)
    if not gap < (1e-4 if plain.dtype == torch.float32 else 5e-2):  # nan is refused as well
        raise ValueError(
            f"the logits of this {model.config.model_type} in a packed row are {gap:.1e} off those "
            "of the plain sequence: dropout, changed logits, layers that are no attention, or "
            f"attn_implementation {implementation!r} where sdpa_by_tree or flex_attention is needed"
        )


def token_logprobs(model, row: Row, temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """log π_T(token_t | what it saw) for every trained token; 0 elsewhere. [T], float32.

        logp_t = h_t·W_{token_t} / T - logsumexp_v( h_t·W_v / T )    h_t: hidden state at previous_t

    The model's attn_implementation is "flex_attention" (GPU), "sdpa_by_tree" or "sdpa" (both with a
    dense mask). Logits exist for `chunk` tokens at a time and are recomputed in backward, so no
    [T, V] tensor is ever held: at V = 152k and 30k tokens, 18 GB. ValueError: see check_model.
    """
    check_attention(model.config, row.longest)
    flex = model.config._attn_implementation == "flex_attention"
    by_tree = model.config._attn_implementation == "sdpa_by_tree"
    with compiled_whole() if flex else nullcontext():
        hidden = model.get_decoder()(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=row.block_mask if flex else dense_mask(row),
            use_cache=False,
            **({"trees": row.trees} if by_tree else {}),
        ).last_hidden_state[0]  # [T, D]
    if not hasattr(model, "takes_rows"):  # once per model
        check_model(model, row, hidden)
        model.takes_rows = True
    head = model.get_output_embeddings()
    target_logprobs = compiled_target_logprobs() if hidden.is_cuda else eager_target_logprobs

    def chunk_logprobs(h: Tensor, targets: Tensor) -> Tensor:
        return target_logprobs(head(h), targets, temperature)

    where = row.trained.nonzero()[:, 0]
    h, targets = hidden[row.previous[where]], row.input_ids[where]
    parts = [
        checkpoint(chunk_logprobs, h[i : i + chunk], targets[i : i + chunk], use_reentrant=False)
        for i in range(0, len(where), chunk)
    ]
    out = torch.zeros(len(row.input_ids), device=hidden.device)
    if not parts:
        # `+ 0 · head(h)` keeps a row without trained tokens attached to the graph: under FSDP every
        # process must run the same backward, also the one whose share of the batch is empty.
        return out + 0.0 * head(hidden[:1]).float().sum()
    return out.index_copy(0, where, torch.cat(parts))


def balance(lengths: list[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Deal whole trees to processes and rows: result[rank][row] lists indices into `lengths`.

    Longest first, each to the process with the fewest tokens so far; within a process, the first
    row with room. Every process gets the same number of rows (empty ones at the end), since
    collectives come in step. A tree longer than max_tokens gets a row of its own. Deterministic:
    all processes compute the same plan.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    load = [0] * num_ranks
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for i in order:
        rank = load.index(min(load))
        load[rank] += lengths[i]
        for row in plan[rank]:
            if sum(lengths[k] for k in row) + lengths[i] <= max_tokens:
                row.append(i)
                break
        else:
            plan[rank].append([i])
    rows = max(len(p) for p in plan)
    return [p + [[] for _ in range(rows - len(p))] for p in plan]


def pack_share(
    trees: list[Tree], rank: int, num_ranks: int, max_tokens: int, multiple: int = 1
) -> list[Row]:
    """The rows of one update that this process trains; the same number of them on every process."""
    nothing = Tree([0], [], [])  # a row without loss, where another process has one row more
    plan = balance([len(tree) for tree in trees], num_ranks, max_tokens)[rank]
    return [pack([trees[i] for i in indices] or [nothing], multiple) for indices in plan]
