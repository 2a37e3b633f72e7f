"""What generates the tokens: transformers anywhere, vLLM where it is fast.

An engine is anything with

    add(request)        queue one sequence to sample
    step()              go on; the list of Outputs that are new
    has_work()          is anything queued or running?
    sync_weights(weights, version), version      take over the trainer's weights
    close()

PlainEngine finishes everything queued within one step() (unless told to stop at each token, for
evaluate.py --ask); VllmEngine (one in-process vLLM in every training process) samples one token of
each running request per step(). Both sample a request from its own seed, so its tokens depend
neither on what else is in the batch nor on the number of processes: but for rounding, see
`sample_tokens`.
"""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator

import torch

from rollout import Output, Request

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def require_engine(kind: str):
    """ValueError where the engine cannot be made on this machine."""
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm, but vLLM is not installed: "
            "pip install -r requirements-gpu.txt, or use --engine plain"
        )


def make_engine(
    kind: str,
    model_path: str,
    device: torch.device,
    max_length: int,
    tensor_parallel_size: int = 1,
    kv_cache_gb: float = 1.0,
):
    """The engine by name, "plain" or "vllm". max_length: longest sequence in tokens, with
    prompt."""
    if kind == "plain":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return PlainEngine(model_path, device, dtype)
    if kind == "vllm":
        return VllmEngine(model_path, device, max_length, tensor_parallel_size, kv_cache_gb)
    raise ValueError(f"unknown engine {kind!r}: use plain or vllm")


# ------------------------------------------------------------------------------ transformers alone


class PlainEngine:
    """Batched sampling with a KV cache. Its own copy of the model, in `dtype` on `device`."""

    def __init__(
        self,
        model_path: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 1024,
        max_batch_tokens: int = 2**17,
    ):
        """`max_batch_tokens`: of one batch, every sequence at its longest; bounds the KV cache
        (2**17 tokens of a 1.5B Qwen2 in bfloat16: 3.8 GB, twice that while it is copied)."""
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.max_batch, self.max_batch_tokens = device, max_batch, max_batch_tokens
        self.waiting: list[Request] = []
        self.running: list = []  # batches begun, where one_token_steps
        # Of the streamed requests of the last step, by id: tokens, and their keys and values.
        self.kept: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
        # True: step() samples one token of each running batch, for who wants to watch.
        self.one_token_steps = False
        self.version = 0

    def add(self, request: Request):
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Output]:
        """Sample all that waits to its end, in batches of like prompt lengths (less padding)."""

        def order(r):  # what has its prefix known apart: only its last tokens are prefilled
            return r.follows in known, len(r.prompt), r.id

        known, self.kept = self.kept, {}
        waiting, self.waiting = sorted(self.waiting, key=order), []
        batches = [self._generate(batch, known) for batch in self._batches(waiting)]
        if self.one_token_steps:
            self.running += batches
            new = [(batch, next(batch, None)) for batch in self.running]
            self.running = [batch for batch, outputs in new if outputs is not None]
            return [out for _, outputs in new for out in outputs or []]
        whole: dict[str, Output] = {}
        for batch in batches:
            for out in (out for outputs in batch for out in outputs):
                made = whole.setdefault(out.id, Output(out.id, [], [], True))
                made.tokens += out.tokens
                made.logp += out.logp
        return list(whole.values())

    def _batches(self, waiting: list[Request]) -> Iterator[list[Request]]:
        """Cut where a batch has max_batch requests, or would grow over max_batch_tokens."""
        batch, longest = [], 0
        for r in waiting:
            longest = max(longest, len(r.prompt) + r.max_tokens)
            too_long = (len(batch) + 1) * longest > self.max_batch_tokens
            if batch and (too_long or len(batch) == self.max_batch):
                yield batch
                batch, longest = [], len(r.prompt) + r.max_tokens
            batch.append(r)
        if batch:
            yield batch

    @torch.inference_mode()
    def _generate(self, batch: list[Request], known: dict) -> Iterator[list[Output]]:
        """The new token of every running request, position by position."""
        logits, cache, seen, position = self._prefill(batch, known)
        # One uniform number per token, drawn ahead from the request's own seed: what else is in the
        # batch cannot matter.
        longest = max(r.max_tokens for r in batch)
        uniform = torch.stack([uniforms(r.seed, longest) for r in batch]).to(self.device)
        temperature = torch.tensor([[r.temperature] for r in batch], device=self.device)
        stop = [set(r.stop) for r in batch]
        fed = [list(r.prompt) for r in batch]  # the tokens whose keys are in the cache
        alive = list(range(len(batch)))  # batch rows still in the tensors, in order
        for t in range(longest):
            tokens, logp = sample_tokens(logits, temperature, uniform[:, t])
            running, new = [], []
            for row, (i, token, value) in enumerate(zip(alive, tokens.tolist(), logp.tolist())):
                if i < 0:
                    continue  # finished earlier, not yet removed
                over = token in stop[i] or t + 1 >= batch[i].max_tokens
                new.append(Output(batch[i].id, [token], [value], over))
                if over:
                    alive[row] = -1
                    if batch[i].stream:
                        self._keep(batch[i].id, fed[i], cache, row)
                else:
                    running.append(row)
                    fed[i].append(token)
            yield new
            if not running:
                break
            if len(running) < 0.75 * len(alive):  # copying the cache costs: not at every token
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                tokens, seen, position = tokens[keep], seen[keep], position[keep]
                uniform, temperature = uniform[keep], temperature[keep]
                alive = [alive[row] for row in running]
            position = position + 1
            seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=-1)
            out = self.model(
                input_ids=tokens[:, None],
                attention_mask=seen,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]

    def _keep(self, name: str, tokens: list[int], cache, row: int):
        """Keep a finished row's keys and values for the requests that follow it, if there is
        room: [layers, 2, heads, tokens, head size]."""
        from transformers.cache_utils import DynamicLayer

        used = sum(len(kept) for kept, _ in self.kept.values())
        whole = all(type(layer) is DynamicLayer for layer in cache.layers)  # no sliding window
        if whole and used + len(tokens) < self.max_batch_tokens:
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            # The row's tokens stand together at the end, all appended since the prefill.
            own = [torch.stack([x[row, :, -len(tokens) :] for x in pair]) for pair in pairs]
            self.kept[name] = tuple(tokens), torch.stack(own)

    def _prefill(self, batch: list[Request], known: dict):
        """(next-token logits, KV cache, attention mask, last position), one row per request."""
        from transformers import DynamicCache

        # Summaries of one cut share their whole prompt: each distinct one once, then copy its
        # cache.
        distinct = {r.prompt: r.follows for r in batch}
        index = {prompt: i for i, prompt in enumerate(distinct)}
        owner = torch.tensor([index[r.prompt] for r in batch], device=self.device)
        # Reused: what the prompt has in common with a known sequence, but for its last token, whose
        # logits are wanted. The rest is computed. Both are padded at the left.
        reused = [
            common_prefix(prompt[:-1], known[name][0] if name in known else ())
            for prompt, name in distinct.items()
        ]
        rest = [prompt[n:] for prompt, n in zip(distinct, reused)]
        past, width = max(reused), max(map(len, rest))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in rest], device=self.device)
        seen = torch.tensor(
            [
                [0] * (past - n) + [1] * n + [0] * (width - len(p)) + [1] * len(p)
                for n, p in zip(reused, rest)
            ],
            device=self.device,
        )
        position = (seen.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.model.config)
        if past:
            kept = next(iter(known.values()))[1]
            layers, pair, heads, _, size = kept.shape
            old = kept.new_zeros(len(distinct), layers, pair, heads, past, size)
            for row, (name, n) in enumerate(zip(distinct.values(), reused)):
                if n:
                    old[row, ..., past - n :, :] = known[name][1][..., :n, :]
            for layer in range(layers):
                cache.update(old[:, layer, 0], old[:, layer, 1], layer)
        out = self.model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=position[:, past:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(owner)
        return out.logits[owner, -1], cache, seen[owner], position[owner, -1:]

    @torch.no_grad()
    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy the trainer's full tensors in; `version`: the training step they are of."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        self.kept = {}  # the old policy's
        if own:
            raise RuntimeError(f"weights never synced: {sorted(own)[:5]}")
        self.version = version

    def close(self):
        pass


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with in common."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def uniforms(seed: int, n: int) -> torch.Tensor:
    """n numbers in [0, 1) that depend on the seed alone. [n], float64."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample_tokens(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor):
    """Inverse-CDF sampling; temperature 0 is greedy.

        token = min{ v : Σ_{w≤v} π_T(w) > u }

    logits [N, V], temperature [N, 1], uniform u [N] in [0, 1) -> tokens [N], log π_T(token) [N].
    Cumulated in float64: at V = 152k a float32 sum is off by more than many tokens' probability.
    Rounding in the logits remains: between 1 and 2 processes, 3 of 16 summaries of a model with
    V = 49k went apart at a token of p < 1e-4 (with vLLM, which draws by an exponential race, none).
    """
    greedy = temperature[:, 0] == 0
    logp = (logits.float() / torch.where(temperature == 0, 1.0, temperature)).log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)
    cdf = (cdf / cdf[:, -1:]).contiguous()
    tokens = torch.searchsorted(cdf, uniform[:, None].contiguous(), right=True)[:, 0]
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


# -------------------------------------------------------------------------------------------- vLLM


class VllmEngine:
    """One vLLM engine inside each process, stepped by hand through its public calls.

    In-process, so that `sync_weights` hands it the trainer's tensors directly, and so that a
    summary can be requested between two tokens of its thinking trace: it then finds its prompt in
    the prefix cache. With tensor parallelism, the processes of a group submit the same requests in
    the same order and stay in step by that alone.
    """

    def __init__(
        self,
        model_path: str,
        device: torch.device,
        max_length: int,
        tensor_parallel_size: int = 1,
        kv_cache_gb: float = 1.0,
        slots: int = 512,
    ):
        """`slots`: requests that run at a time (vLLM's default for this use, 128, is a
        server's)."""
        if not torch.distributed.is_initialized():
            # vLLM would make a group of its own, of one process, and all would sample on GPU 0.
            raise RuntimeError(
                "VllmEngine joins the processes that exist: call "
                "distributed.start() before building it"
            )
        on_gpu = device.type == "cuda"
        # Before vLLM is imported, which is heavy and optional: hence here and not on top. Its
        # background process would be out of our reach (and vLLM refuses it under torchrun).
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
        # At every sync, of a layer that has tables and no weights.
        logging.getLogger(RELOAD_LOGGER).addFilter(lambda r: "RotaryEmb" not in r.getMessage())
        from transformers import AutoConfig, AutoModelForCausalLM
        from vllm import EngineArgs, LLMEngine

        # On CPUs: sequences are too short to share blocks of the default 128 tokens, or to pay for
        # compilation; and a prompt split over two steps crashes when its request has a seed ("CPU
        # Generator does not use offset").
        on_cpu = {"block_size": 32, "enforce_eager": True, "enable_chunked_prefill": False}
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model_path,
                dtype="bfloat16" if on_gpu else "float32",
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
                disable_log_stats=True,
                max_model_len=max_length,
                max_num_seqs=slots,
                max_num_batched_tokens=max(8192, max_length),
                # external_launcher: torchrun started the processes, vLLM joins them.
                tensor_parallel_size=tensor_parallel_size,
                distributed_executor_backend="external_launcher",
                # A fixed cache leaves the other memory to training; the share is only checked.
                kv_cache_memory_bytes=int(kv_cache_gb * 2**30),
                gpu_memory_utilization=0.5,
                # processed: log π at the sampling temperature, which the trainer's ratio needs.
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                seed=torch.distributed.get_rank() // tensor_parallel_size,
                **({} if on_gpu else on_cpu),
            )
        )
        with torch.device("meta"):  # names only: no memory, no numbers
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self.names = set(model.state_dict())
        self.version = 0

    def add(self, request: Request):
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        self.engine.add_request(
            request.id,
            tokens_input(list(request.prompt)),
            SamplingParams(
                # No top-p, top-k or penalties: they renormalise, and the sampler's log-probs would
                # not be the policy's.
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                output_kind=kind,
                # Without a seed vLLM draws from the trainer's generator, one per process.
                seed=request.seed,
                # The request's own stops alone decide; vLLM returns the stop token with the rest.
                stop_token_ids=list(request.stop),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                flat_logprobs=True,
            ),
        )  # of the sampled token alone

    def has_work(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> list[Output]:
        """One token for every running request. On GPUs vLLM runs a step ahead: it may return []."""
        outputs = []
        for out in self.engine.step():
            (completion,) = out.outputs
            logp = list(completion.logprobs.logprobs)
            outputs.append(Output(out.request_id, list(completion.token_ids), logp, out.finished))
        return outputs

    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Reload all weights from the trainer's full tensors, in one call.

        vLLM finishes each layer (fusing, packing) when its last tensor has come, so calls with a
        part of them would leave layers half done, without an error.
        """
        if self.has_work():
            raise RuntimeError(
                "sync_weights while requests run: their next tokens would mix two "
                "policies. Step until has_work() is False"
            )
        self.engine.step()  # what vLLM scheduled ahead on a GPU, for requests that are over
        missing = set(self.names)

        def passing_through():
            for name, tensor in weights:
                missing.discard(name)
                yield name, tensor

        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": passing_through()})
        if missing:  # vLLM only logs these
            raise RuntimeError(f"weights never synced: {sorted(missing)[:5]}")
        # Cached keys and values are the old policy's; kept, they are served silently to prompts
        # seen before.
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM could not drop its prefix cache after a weight sync: "
                "old and new policy would mix"
            )
        self.version = version

    def close(self):
        """Shut down and free the memory. vLLM ends torch.distributed: nothing collective
        follows."""
        torch.distributed.barrier()  # nobody leaves while another still samples
        self.engine.engine_core.shutdown()  # LLMEngine itself has no shutdown
