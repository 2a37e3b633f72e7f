"""Two engines that sample tokens: transformers anywhere, vLLM where it is fast.

An engine is anything with

    add(request)        queue one sequence to sample
    step()              continue sampling; returns the list of new Outputs
    has_work()          is anything queued or running?
    sync_weights(weights, version), version      take over the trainer's weights
    close()

PlainEngine finishes everything queued within one step(), or samples one token per step() for
callers that stream; VllmEngine (one in-process vLLM in every training process) samples one token of
each running request per step(). Both sample a request from its own seed, so its tokens depend
neither on what else is in the batch nor on the number of processes, up to rounding (see
`sample_tokens`).
"""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence

from rollout import Output, Request
from runtime.models import as_saved, first_line, load_model, read_config, without_weights

# SplitMix64's constants, as signed 64-bit integers.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def require_engine(kind: str):
    """ValueError where the engine cannot be made on this machine."""
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        fix = "pip install -r requirements-gpu.txt, or use --engine plain"
        raise ValueError(f"--engine vllm, but vLLM is not installed: {fix}")


def make_engine(
    kind: str,
    model_path: str,
    device: torch.device,
    max_length: int,
    tensor_parallel_size: int = 1,
    kv_cache_gb: float = 1.0,
):
    """The engine by name, "plain" or "vllm". `max_length`: of a sequence, prompt included."""
    if kind == "vllm":
        return VllmEngine(model_path, device, max_length, tensor_parallel_size, kv_cache_gb)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return PlainEngine(model_path, device, dtype)


# ------------------------------------------------------------------------------ transformers alone


class PlainEngine:
    """Batched sampling with a KV cache, on its own copy of the model, in `dtype` on `device`.

    ValueError when the model's weights cannot be loaded.
    """

    max_batch = 1024  # requests
    # Of a batch, every sequence at its longest. It bounds the KV cache (of a 1.5B Qwen2 in
    # bfloat16: 3.8 GB, twice that while it is copied).
    max_batch_tokens = 2**17

    def __init__(self, model_path: str, device="cpu", dtype: torch.dtype = torch.float32):
        self.model = load_model(model_path, dtype, "sdpa").to(device).eval().requires_grad_(False)
        self.device = device
        self.waiting: list[Request] = []
        self.running: list[Iterator[list[Output]]] = []  # unfinished batches, if one_token_steps
        self.one_token_steps = False  # for callers that stream: one token of each batch per step()
        self.version = 0

    def add(self, request: Request):
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Output]:
        """Sample everything queued to its end, in batches of similar prompt lengths."""
        self.running += [self._generate(batch) for batch in self._batches()]
        if self.one_token_steps:
            new = [(batch, next(batch, None)) for batch in self.running]
            self.running = [batch for batch, outputs in new if outputs is not None]
            return [out for _, outputs in new for out in outputs or []]
        whole: dict[str, Output] = {}
        for out in (out for batch in self.running for outputs in batch for out in outputs):
            sampled = whole.setdefault(out.id, Output(out.id, [], [], True))
            sampled.tokens += out.tokens
            sampled.logp += out.logp
        self.running = []
        return list(whole.values())

    def _batches(self) -> Iterator[list[Request]]:
        """Everything queued, cut at max_batch requests and before max_batch_tokens is exceeded."""
        waiting, self.waiting = sorted(self.waiting, key=lambda r: (len(r.prompt), r.id)), []
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
    def _generate(self, batch: list[Request]) -> Iterator[list[Output]]:
        """The new token of every unfinished request, position by position."""
        logits, cache, seen, position = self._prefill(batch)
        longest = max(r.max_tokens for r in batch)
        seed = torch.tensor([r.seed for r in batch], device=self.device)
        temperature = torch.tensor([[r.temperature] for r in batch], device=self.device)
        stop = [set(r.stop) for r in batch]
        alive = list(range(len(batch)))  # the request of each row of the tensors; -1: finished
        for t in range(longest):
            tokens, logp = sample_tokens(logits, temperature, seed, t)
            unfinished, new = [], []
            for row, (i, token, value) in enumerate(zip(alive, tokens.tolist(), logp.tolist())):
                if i < 0:
                    continue
                finished = token in stop[i] or t + 1 >= batch[i].max_tokens
                new.append(Output(batch[i].id, [token], [value], finished))
                if finished:
                    alive[row] = -1
                else:
                    unfinished.append(row)
            yield new
            if not unfinished:
                break
            if len(unfinished) < 0.75 * len(alive):  # copying the cache costs: not at every token
                keep = torch.tensor(unfinished, device=self.device)
                cache.batch_select_indices(keep)
                tokens, seen, position = tokens[keep], seen[keep], position[keep]
                seed, temperature = seed[keep], temperature[keep]
                alive = [alive[row] for row in unfinished]
            position = position + 1
            seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=-1)
            inputs = {"input_ids": tokens[:, None], "position_ids": position, "use_cache": True}
            out = self.model(**inputs, attention_mask=seen, past_key_values=cache)
            logits = out.logits[:, -1]

    def _prefill(self, batch: list[Request]):
        """(next-token logits, KV cache, attention mask, last position), one row per request."""
        # The summaries of a cut share their prompt: prefill it once and copy its cache.
        row_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in batch))}
        rows = torch.tensor([row_of[r.prompt] for r in batch], device=self.device)
        prompts = [torch.tensor(p, device=self.device) for p in row_of]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        seen = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")
        position = (seen.cumsum(-1) - 1).clamp_min(0)
        cache = transformers.DynamicCache(config=self.model.config)
        inputs = {"input_ids": ids, "position_ids": position, "attention_mask": seen}
        out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(rows)
        return out.logits[rows, -1], cache, seen[rows], position[rows, -1:]

    @torch.no_grad()
    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy the trainer's full tensors in; `version`: the training step they are of."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        if own:
            raise RuntimeError(f"weights never synced: {sorted(own)[:5]}")
        self.version = version

    def close(self):
        pass


def sample_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by an exponential race; temperature 0 is greedy.

        token = argmax_v( log π_T(v) - log E_v )      E_v = `exponentials`(seed, position)

    Of V exponential clocks with rates π_T(v), v's is the first to ring with probability π_T(v).
    Rounding decides only where two are the first at almost the same time: logits off by 1e-5 at
    random change at most one token in some 180,000, whatever V is.
    logits [N, V], temperature [N, 1], seed [N] int64 -> tokens [N], log π_T(token) [N].
    """
    # In blocks of rows: on a CPU the dozen passes over a block then stay within its cache.
    block = 2**26 if logits.is_cuda else 2**18
    rows = max(1, block // logits.shape[-1])
    tokens, logp = [], []
    for x, t, s in zip(logits.split(rows), temperature.split(rows), seed.split(rows)):
        greedy = t[:, 0] == 0
        probs = (x.float() / torch.where(t == 0, 1.0, t)).softmax(-1)
        first = (probs / exponentials(s, position, x.shape[-1])).argmax(-1)  # monotone in the above
        tokens.append(torch.where(greedy, x.argmax(-1), first))
        logp.append(probs.gather(-1, tokens[-1][:, None])[:, 0].log())
    return torch.cat(tokens), torch.cat(logp)


def exponentials(seed: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Exponential variables that depend on (seed, position, token) alone.

        E_v = -log(1 - u_v)      u_v = hash(hash(hash(seed) + position) + (v + 1) γ) / 2^63

    A hash instead of generators: nothing to keep between tokens, and what else is in the batch
    cannot matter. u carries its relative precision down to 0, where E_v is small and wins.
    seed [N] int64 -> [N, V = size], float32.
    """
    key = mix_bits(mix_bits(seed.clone()).add_(position))
    v = torch.arange(1, size + 1, device=seed.device)
    bits = mix_bits(key[:, None] + v * GAMMA).bitwise_and_(2**63 - 1)
    u = bits.float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)  # never 0 or 1
    return u.neg_().log1p_().neg_()


def mix_bits(x: torch.Tensor) -> torch.Tensor:
    """Scramble int64 in place, one to one: SplitMix64's output function (Steele, Lea, Flood 2014).

    Products wrap around; the masks take away what a right shift copies of the sign.
    """
    x.bitwise_xor_((x >> 30).bitwise_and_(2**34 - 1)).mul_(MULTIPLIERS[0])
    x.bitwise_xor_((x >> 27).bitwise_and_(2**37 - 1)).mul_(MULTIPLIERS[1])
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


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
        """`slots`: requests that run at a time; vLLM's default of 128 suits a server."""
        if not torch.distributed.is_initialized():
            # vLLM would make a group of its own, of one process, and all would sample on GPU 0.
            raise RuntimeError("call distributed.start() first: VllmEngine joins its processes")
        on_gpu = device.type == "cuda"
        # Before vLLM is imported, which is heavy and optional: hence here and not on top. Its
        # background process would be out of our reach (and vLLM refuses it under torchrun).
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
        # At every sync, of a layer that has tables and no weights.
        logging.getLogger(RELOAD_LOGGER).addFilter(lambda r: "RotaryEmb" not in r.getMessage())
        from vllm import EngineArgs, LLMEngine

        settings = {
            "dtype": "bfloat16" if on_gpu else "float32",
            "max_num_seqs": slots,
            "max_num_batched_tokens": max(8192, max_length),
            # external_launcher: torchrun started the processes, vLLM joins them.
            "distributed_executor_backend": "external_launcher",
            # A fixed cache leaves the other memory to training; the share is only checked.
            "kv_cache_memory_bytes": int(kv_cache_gb * 2**30),
            "gpu_memory_utilization": 0.5,
            # processed: log π at the sampling temperature, which the trainer's ratio needs.
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "seed": torch.distributed.get_rank() // tensor_parallel_size,
        }
        quiet = {"use_tqdm_on_load": False, "disable_log_stats": True, "skip_tokenizer_init": True}
        # On CPUs: sequences are too short to share blocks of the default 128 tokens, or to pay for
        # compilation; and a prompt split over two steps crashes when its request has a seed ("CPU
        # Generator does not use offset").
        on_cpu = {"block_size": 32, "enforce_eager": True, "enable_chunked_prefill": False}
        size = {"max_model_len": max_length, "tensor_parallel_size": tensor_parallel_size}
        settings |= quiet | size | ({} if on_gpu else on_cpu)
        try:
            self.engine = LLMEngine.from_engine_args(EngineArgs(model=model_path, **settings))
        except SafetensorError as e:
            raise ValueError(f"{model_path} does not load ({first_line(e)}): get it again") from e
        self.version = 0
        try:
            self.model = without_weights(read_config(model_path))
        except AssertionError as e:  # it has decorated transformers' classes of the model
            self.close()
            problem = "has no code of its own for this model, and changes that of the trainer"
            raise ValueError(f"{model_path}: vLLM {problem}: use --engine plain") from e

    def add(self, request: Request):
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        parameters = SamplingParams(
            # No top-p, top-k or penalties: they renormalise, and the sampler's log-probs would not
            # be the policy's.
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            output_kind=kind,
            # Without a seed vLLM draws from the trainer's generator, one per process.
            seed=request.seed,
            # The request's own stops alone decide; vLLM returns the stop token with the rest.
            stop_token_ids=list(request.stop),
            ignore_eos=True,
            detokenize=False,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
        )
        self.engine.add_request(request.id, tokens_input(list(request.prompt)), parameters)

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
            fix = "step() until has_work() is False"
            raise RuntimeError(f"sync_weights while requests run would mix two policies: {fix}")
        self.engine.step()  # what vLLM scheduled ahead on a GPU, for requests that are over
        missing = set(self.model.state_dict())

        def passing_through():
            for name, tensor in weights:
                missing.discard(name)
                yield name, tensor

        saved = as_saved(self.model, passing_through())
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": saved})
        if missing:  # vLLM only logs these
            raise RuntimeError(f"weights never synced: {sorted(missing)[:5]}")
        # The old policy's keys and values would be served silently to prompts seen before.
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: old and new policy would mix")
        self.version = version

    def close(self):
        """Shut down and free the memory. vLLM ends torch.distributed too: start() it again."""
        torch.distributed.barrier()  # nobody leaves while another still samples
        self.engine.engine_core.shutdown()  # LLMEngine itself has no shutdown
