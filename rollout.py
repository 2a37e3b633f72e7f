"""How do we sample thinkings, cut them, and ask for summaries?

One loop, two engines. `sample_rollouts` is the algorithm: start every thinking, and the moment one crosses a budget
ask for its A summaries there, while it thinks on. An engine is anything with

    add(request)      queue one sequence to sample            step() -> list[Output]   go on, return what is new
    has_work()        is anything queued or running?          sync_weights(weights, version), version, close()

PlainEngine (transformers; any machine) finishes everything queued within one step(); VllmEngine (one in-process vLLM
per process) samples one token per step(), so its summaries really run beside the thinkings. Both sample a request from
its own seed, a function of (seed, step, question, sample): results depend neither on what else is in the batch nor on
the number of processes.
"""

import importlib.util
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from budgets import cut_lengths, segment_index
from rewards import has_one_think_end
from tree import Branch, Tree

THINK_END = "</think>"
CUT_TEXT = f"...\n\n...\n\n{THINK_END}"        # closes a thinking that did not close itself (SPEC 2)
ANSWER_HEADER = "\n\n**Final Answer**\n"       # asks for the summary


@dataclass(frozen=True)
class Protocol:
    """The token ids of the thinking/summary protocol, read off one tokenizer: the only place models differ."""

    think_end: int
    eos: tuple[int, ...]
    cut_text: tuple[int, ...]
    answer_header: tuple[int, ...]
    max_summary_tokens: int     # appended text included

    @classmethod
    def of(cls, tokenizer, max_summary_tokens: int = 128, eos: Iterable[int] = ()) -> "Protocol":
        """`eos`: further end-of-text ids (a model's generation config may list several). Raises ValueError when the
        tokenizer has no one-token </think>, since thinkings are stopped and counted at that token."""
        def encode(text):
            return tuple(tokenizer.encode(text, add_special_tokens=False))
        think_end = encode(THINK_END)
        if len(think_end) != 1 or think_end[0] == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path or 'this model'} writes {THINK_END} as "
                             f"{len(think_end)} tokens; take a reasoning model that has it as one (R1-Distill, Qwen3)")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-text token: "
                             "set eos_token, summaries would never end")
        made = cls(think_end[0], tuple(sorted({tokenizer.eos_token_id, *eos})), encode(CUT_TEXT),
                   encode(ANSWER_HEADER), max_summary_tokens)
        longest = len(made.cut_text) + len(made.answer_header)
        if longest >= max_summary_tokens:
            raise ValueError(f"max_summary_tokens {max_summary_tokens} leaves no room for an answer behind the "
                             f"{longest} appended tokens: raise it above {longest}")
        return made


def open_model(model: str, max_budget: int, max_prompt_tokens: int, max_summary_tokens: int):
    """(tokenizer, protocol) of a model, checked before any weight is loaded.

    Raises ValueError when the model cannot be found, has no one-token </think>, or has too short a context for
    prompt + b_M + summary.
    """
    if model == "miniature":
        import miniature
        tokenizer, context, eos = miniature.make_tokenizer(), miniature.MODEL["max_position_embeddings"], None
    else:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            context = AutoConfig.from_pretrained(model).max_position_embeddings
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0][:160]
            raise ValueError(f"--model {model}: no model directory or hub name that can be read ({reason})") from e
        try:
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:     # a model need not ship one
            eos = None
    eos = [eos] if isinstance(eos, int) else eos or []
    needed = max_prompt_tokens + max_budget + max_summary_tokens
    if needed > context:
        raise ValueError(f"prompt {max_prompt_tokens} + largest budget {max_budget} + summary {max_summary_tokens} = "
                         f"{needed} tokens, but {model} has a context of {context}: lower the budgets or max_prompt_tokens")
    return tokenizer, Protocol.of(tokenizer, max_summary_tokens, eos)


@dataclass
class Summary:
    """One answer to one cut. `logp` holds the sampler's log-probs of `tokens`, at the sampling temperature."""

    budget_index: int           # 0..M-1
    draw: int                   # 0..A-1
    cut: int                    # thinking tokens it saw
    appended: list[int]
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    score: float = 0.0
    verdict: Any = None         # the running verification; resolved into `score` at the end of sampling


@dataclass
class Rollout:
    """One thinking and its M·A summaries, ordered by (budget, draw)."""

    question: Any               # data.Question: .index, .prompt (token ids), .ground_truth
    sample: int                 # 0..G-1
    thinking: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: str = ""            # "" running | "closed" by </think> | "eos" end-of-text instead | "length" hit b_M
    summaries: list[Summary] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[int, ...]       # generation ends with (and returns) any of these
    seed: int
    temperature: float
    stream: bool = False        # report tokens as they come, if the engine can


@dataclass
class Output:
    id: str
    tokens: list[int]           # new since the last Output of this request
    logp: list[float]
    finished: bool


def request_seed(*key: int) -> int:
    """A 63-bit seed from (seed, step, question, sample, budget, draw): the whole randomness policy.

    Nothing else is drawn anywhere, so there is no generator state to save, and a resumed run repeats itself.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_rollouts(engine, questions, budgets: tuple[int, ...], num_rollouts: int, num_summaries: int,
                    protocol: Protocol, temperature: float, seed: tuple[int, ...], grade: Callable | None = None,
                    streaming: bool = True) -> list[Rollout]:
    """Sample G thinkings per question and A summaries at each of the M cuts of each thinking.

    grade(rollout, summary) is called as each summary arrives and returns a future of its score, so verification
    overlaps generation. streaming=False asks for summaries only when all thinkings have ended: the same cuts
    and the same seeds, only slower. Returns B·G rollouts ordered by (question, sample).
    """
    rollouts = [Rollout(question, sample) for question in questions for sample in range(num_rollouts)]
    asked_by: dict[str, tuple[Rollout, Summary | None]] = {}
    running = len(rollouts)

    for r in rollouts:
        name = f"{r.question.index}-{r.sample}"
        asked_by[name] = (r, None)
        engine.add(Request(name, tuple(r.question.prompt), budgets[-1], (protocol.think_end, *protocol.eos),
                           request_seed(*seed, r.question.index, r.sample), temperature, stream=True))

    def ask_for_summaries(r: Rollout):
        """Request the summaries of every budget that this thinking has crossed or, once ended, can no longer reach."""
        for j in range(len(r.summaries) // num_summaries, len(budgets)):
            # At exactly b_j tokens a thinking that still runs is going to be longer, hence cut there.
            if not r.finish and len(r.thinking) < budgets[j]:
                break
            cut = cut_lengths(len(r.thinking), budgets)[j]
            at_end = bool(r.finish) and cut == len(r.thinking)
            closed = at_end and r.finish == "closed"
            appended = list(protocol.answer_header if closed else protocol.cut_text + protocol.answer_header)
            for a in range(num_summaries):
                s = Summary(j, a, cut, appended)
                r.summaries.append(s)
                if at_end and r.finish == "eos":
                    continue    # the text is over: nothing can follow, and SPEC 3 scores it 0
                name = f"{r.question.index}-{r.sample}-{j}-{a}"
                asked_by[name] = (r, s)
                engine.add(Request(name, (*r.question.prompt, *r.thinking[:cut], *appended),
                                   protocol.max_summary_tokens - len(appended), protocol.eos,
                                   request_seed(*seed, r.question.index, r.sample, j, a), temperature))

    while engine.has_work():
        for out in engine.step():
            r, s = asked_by[out.id]
            target = r.thinking if s is None else s.tokens
            target.extend(out.tokens)
            (r.logp if s is None else s.logp).extend(out.logp)
            if s is None:
                if out.finished:
                    last = r.thinking[-1]
                    r.finish = "closed" if last == protocol.think_end else "eos" if last in protocol.eos else "length"
                    running -= 1
                if streaming:
                    ask_for_summaries(r)
                elif running == 0:
                    for each in rollouts:
                        ask_for_summaries(each)
            elif out.finished and grade is not None:
                s.verdict = grade(r, s)

    for r in rollouts:
        for s in r.summaries:
            if s.verdict is not None:
                s.score, s.verdict = float(s.verdict.result()), None
    return rollouts


def make_grader(verifier, tokenizer, protocol: Protocol) -> Callable[[Rollout, Summary], Any]:
    """grade(rollout, summary) -> future of 1.0 or 0.0: the format rule first, then the verifier (SPEC 3).

    The format rule reads text, not ids: a policy may also spell </think> in smaller tokens.
    """
    def decode(ids) -> str:
        return tokenizer.decode([i for i in ids if i not in protocol.eos], skip_special_tokens=False)

    # The A summaries of a cut share its thinking, which can be long; answers are short, and would only push it out.
    decode_thinking = lru_cache(maxsize=256)(decode)

    def grade(rollout: Rollout, summary: Summary):
        thinking = decode_thinking(tuple(rollout.thinking[:summary.cut]))
        appended, answer = decode(summary.appended), decode(summary.tokens)
        if not has_one_think_end(thinking, appended, answer, THINK_END):
            return None     # score stays 0
        return verifier.submit(appended + answer, rollout.question.ground_truth)

    return grade


def scores_of(rollouts: list[Rollout], num_rollouts: int, num_budgets: int, num_summaries: int) -> torch.Tensor:
    """The verdicts as one tensor, [B, G, M, A]."""
    flat = [s.score for r in rollouts for s in r.summaries]
    return torch.tensor(flat).reshape(-1, num_rollouts, num_budgets, num_summaries)


def cuts_of(rollouts: list[Rollout], num_rollouts: int, budgets: tuple[int, ...]) -> torch.Tensor:
    """The cut of every budget, [B, G, M], int64."""
    cuts = [cut_lengths(len(r.thinking), budgets) for r in rollouts]
    return torch.tensor(cuts).reshape(-1, num_rollouts, len(budgets))


def save_rollouts(path: Path, identity: dict, rollouts: list[Rollout]):
    """Keep a step's rollouts, complete or not at all: most of a step's cost is in them."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((identity, rollouts)))
    partial.rename(path)


def load_rollouts(path: Path, identity: dict) -> list[Rollout] | None:
    """The rollouts that an interrupted run of the same identity kept at `path`, or None. Only read files of your own
    runs: unpickling executes what it reads."""
    if not path.exists():
        return None
    saved_by, rollouts = pickle.loads(path.read_bytes())
    return rollouts if saved_by == identity else None


def to_tree(rollout: Rollout, thinking_advantages: list[float], summary_advantages: list[list[float]],
            budgets: tuple[int, ...], last_only: bool = False) -> Tree:
    """One rollout as a training tree: A_j on the thinking tokens of segment j, one advantage on each summary.

    thinking_advantages [M], summary_advantages [M][A]. last_only trains the last budget's summaries alone (GRPO); the
    others are left out of the tree altogether, since nothing attends to them.
    """
    branches = [Branch(s.cut, s.appended, s.tokens, summary_advantages[s.budget_index][s.draw], s.logp)
                for s in rollout.summaries if s.tokens and (s.budget_index == len(budgets) - 1 or not last_only)]
    per_token = [thinking_advantages[segment_index(t, budgets)] for t in range(1, len(rollout.thinking) + 1)]
    return Tree(list(rollout.question.prompt), rollout.thinking, branches, per_token, rollout.logp)


# ------------------------------------------------------------------------------------------------- the engines


def require_engine(kind: str):
    """ValueError where the engine cannot be made on this machine."""
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--engine vllm, but vLLM is not installed: pip install -r requirements-gpu.txt, or take "
                         "--engine plain")


def make_engine(kind: str, model_path: str, device: torch.device, max_length: int, tensor_parallel_size: int = 1,
                kv_cache_gb: float = 1.0):
    """The engine by name: "plain" or "vllm". `max_length`: tokens of the longest sequence, prompt included."""
    if kind == "plain":
        return PlainEngine(model_path, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if kind == "vllm":
        return VllmEngine(model_path, device, max_length, tensor_parallel_size, kv_cache_gb)
    raise ValueError(f"unknown engine {kind!r}: use plain or vllm")


class PlainEngine:
    """Batched sampling with a KV cache, in transformers alone. Its own copy of the model, in `dtype` on `device`."""

    def __init__(self, model_path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                 max_batch: int = 1024):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa")
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.max_batch = device, max_batch
        self.waiting: list[Request] = []
        self.version = 0

    def add(self, request: Request):
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Output]:
        """Sample everything that waits to its end, in batches of like prompt lengths (less padding)."""
        waiting, self.waiting = sorted(self.waiting, key=lambda r: (len(r.prompt), r.id)), []
        done = []
        for i in range(0, len(waiting), self.max_batch):
            done += self._generate(waiting[i:i + self.max_batch])
        return done

    @torch.inference_mode()
    def _generate(self, batch: list[Request]) -> list[Output]:
        # Summaries of one cut share their whole prompt: prefill each distinct prompt once, then copy its cache.
        prompts = list(dict.fromkeys(r.prompt for r in batch))
        index = {p: i for i, p in enumerate(prompts)}
        owner = torch.tensor([index[r.prompt] for r in batch], device=self.device)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        position = (seen.cumsum(-1) - 1).clamp_min(0)
        out = self.model(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_select_indices(owner)
        logits, seen, position = out.logits[owner, -1], seen[owner], position[owner, -1:]

        # One uniform number per token, drawn ahead from the request's own seed: the rest of the batch cannot matter.
        longest = max(r.max_tokens for r in batch)
        uniform = torch.stack([torch.rand(longest, dtype=torch.float64, generator=torch.Generator().manual_seed(r.seed))
                               for r in batch]).to(self.device)
        temperature = torch.tensor([[r.temperature] for r in batch], device=self.device)
        outputs = [Output(r.id, [], [], True) for r in batch]
        stop = [set(r.stop) for r in batch]
        alive = list(range(len(batch)))                       # batch rows still in the tensors, in order
        for t in range(longest):
            tokens, logp = sample_tokens(logits, temperature, uniform[:, t])
            running = []
            for row, (i, token, value) in enumerate(zip(alive, tokens.tolist(), logp.tolist())):
                if i < 0:
                    continue                                  # finished earlier, not yet removed
                outputs[i].tokens.append(token)
                outputs[i].logp.append(value)
                if token in stop[i] or len(outputs[i].tokens) >= batch[i].max_tokens:
                    alive[row] = -1
                else:
                    running.append(row)
            if not running:
                break
            if len(running) < 0.75 * len(alive):              # drop finished rows now and then, not at every token
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                tokens, seen, position = tokens[keep], seen[keep], position[keep]
                uniform, temperature = uniform[keep], temperature[keep]
                alive = [alive[row] for row in running]
            position = position + 1
            seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=-1)
            out = self.model(input_ids=tokens[:, None], attention_mask=seen, position_ids=position,
                             past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
        return outputs

    @torch.no_grad()
    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy the trainer's full tensors in; `version` is the number of updates they have seen."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        if own:
            raise RuntimeError(f"weights never synced: {sorted(own)[:5]}")
        self.version = version

    def close(self):
        pass


def sample_tokens(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. Temperature 0 is greedy.

    logits [N, V], temperature [N, 1], uniform [N] in [0, 1) -> tokens [N], log π_T(token) [N]. Cumulated in
    float64: at V = 152k a float32 sum is off by more than many tokens' probability.
    """
    greedy = temperature[:, 0] == 0
    logp = (logits.float() / torch.where(temperature == 0, 1.0, temperature)).log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)
    cdf = (cdf / cdf[:, -1:]).contiguous()
    tokens = torch.searchsorted(cdf, uniform[:, None].contiguous(), right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------- vLLM engine


class VllmEngine:
    """One vLLM engine inside each process, stepped by hand through its public calls.

    In-process, so that `sync_weights` hands it the trainer's tensors directly, and so that a summary can be asked for
    between two tokens of its thinking: it then finds its prompt in the prefix cache. With tensor parallelism, the
    processes of a group submit the same requests in the same order and stay in step by that alone.
    """

    def __init__(self, model_path: str, device: torch.device, max_length: int, tensor_parallel_size: int = 1,
                 kv_cache_gb: float = 1.0, slots: int = 512):
        """`slots`: requests that run at a time; vLLM's own default for an engine driven like this is a server's, 128."""
        if not torch.distributed.is_initialized():
            # vLLM would make a group of its own, of one process, and everybody would sample on the first GPU.
            raise RuntimeError("VllmEngine joins the processes that exist: call distributed.start() before building it")
        on_gpu = device.type == "cuda"
        # Before vLLM is imported, which is heavy and optional: hence all of this here and not on top. Its background
        # process would sample out of our reach (and vLLM refuses it under torchrun). What it warns of on CPUs is speed.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
        from transformers import AutoConfig, AutoModelForCausalLM
        from vllm import EngineArgs, LLMEngine

        # On CPUs: sequences are too short to share blocks of the default 128 tokens, or to pay for compilation; and a
        # prompt that is split over two steps crashes when its request has a seed ("CPU Generator does not use offset").
        on_cpu = {} if on_gpu else {"block_size": 32, "enforce_eager": True, "enable_chunked_prefill": False}
        self.engine = LLMEngine.from_engine_args(EngineArgs(
            model=model_path, dtype="bfloat16" if on_gpu else "float32", skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            max_model_len=max_length, max_num_seqs=slots, max_num_batched_tokens=max(8192, max_length),
            # external_launcher: torchrun started the processes, vLLM joins them instead of starting workers.
            tensor_parallel_size=tensor_parallel_size, distributed_executor_backend="external_launcher",
            # A fixed cache leaves the rest of the memory to training. The share is only vLLM's check at the start.
            kv_cache_memory_bytes=int(kv_cache_gb * 2**30), gpu_memory_utilization=0.5,
            # processed: log π at the sampling temperature, what the trainer's ratio needs; raw would be at T = 1.
            logprobs_mode="processed_logprobs", enable_prefix_caching=True, disable_log_stats=True,
            seed=torch.distributed.get_rank() // tensor_parallel_size, **on_cpu))
        with torch.device("meta"):      # names only: no memory, no numbers
            self.names = set(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path)).state_dict())
        self.version = 0

    def add(self, request: Request):
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self.engine.add_request(request.id, tokens_input(list(request.prompt)), SamplingParams(
            # No top-p, top-k or penalties: they renormalise, and the sampler's log-probs would not be the policy's.
            temperature=request.temperature, max_tokens=request.max_tokens,
            # Without a seed vLLM draws from the process's generator: the trainer's, and another one on each process.
            seed=request.seed,
            # The request's own stops alone decide; vLLM returns the stop token with the rest.
            stop_token_ids=list(request.stop), ignore_eos=True, detokenize=False,
            logprobs=0, flat_logprobs=True,     # of the sampled token alone
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY))

    def has_work(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> list[Output]:
        """One token for every running request. On GPUs vLLM runs a step ahead: a call may come back with nothing yet."""
        outputs = []
        for out in self.engine.step():
            (completion,) = out.outputs
            logp = list(completion.logprobs.logprobs)
            outputs.append(Output(out.request_id, list(completion.token_ids), logp, out.finished))
        return outputs

    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Reload all weights from the trainer's full tensors, in one call: vLLM finishes each layer (fusing, packing) when
        its last tensor has come, so calls with a part of them would leave layers half done, without an error."""
        if self.has_work():
            raise RuntimeError("sync_weights while requests run: their next tokens would mix two policies. Step until "
                               "has_work() is False")
        self.engine.step()      # what vLLM had scheduled ahead on a GPU, for requests that are over by now
        missing = set(self.names)

        def passing_through():
            for name, tensor in weights:
                missing.discard(name)
                yield name, tensor

        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": passing_through()})
        if missing:     # vLLM only logs these
            raise RuntimeError(f"weights never synced: {sorted(missing)[:5]}")
        # Cached keys and values are the old policy's; kept, they are served silently to prompts seen before.
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not drop its prefix cache after a weight sync: old and new policy would mix")
        self.version = version

    def close(self):
        """Shut down and free the memory. vLLM ends torch.distributed with it: nothing collective can follow."""
        torch.distributed.barrier()             # nobody leaves while another still samples
        self.engine.engine_core.shutdown()      # LLMEngine itself has no shutdown
