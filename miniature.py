"""The embedded default: a task, a tokenizer and a warm-started base, made here from nothing.

Anytime reasoning needs a policy that thinks well but wastefully. No such model fits on a CPU, so this file trains one:
a tiny Qwen2 imitates sloppy traces of last-digit arithmetic, in about a minute. Everything else (protocol, verifier,
tree packing, loss, loop) is what the 1.5B run uses; only the sizes differ.

    question   2 +2 *7 -3 ?                                 evaluate left to right, answer with the last digit
    thinking    =2 +2 =4 *7 =8 -3 =5</think>                terse: 2K + 2 tokens for K operations
    summary    **Final Answer** \\boxed{5}

A supervised trace is sloppy: a result is wrong now and then, and after a step it may check the last result again
(repairing it) or ramble. So there is something to gain at every budget: drop the rambling (small budgets), keep what
repairs errors (large ones). `_write_base` runs on one CPU thread, so that its weights depend only on the seed.
"""

import hashlib
import json
import os
import random
import shutil
import socket
from pathlib import Path

import torch

OPERATIONS = [f"+{n}" for n in range(1, 6)] + [f"-{n}" for n in range(1, 6)] + ["*3", "*7"]
MIN_OPERATIONS, MAX_OPERATIONS = 2, 7
ERROR_RATE = 0.05           # share of results written as a random digit
RAMBLE_RATE = (0.4, 1.0)    # per trace: how often a step is followed by a check or by filler, uniform in this range
CHECK_SHARE = 1 / 3         # of those, how many are checks
FILLER = [" hmm", " let", " me", " see", " .", " so"]

UNKNOWN, PAD, EOS, THINK, THINK_END = "<|unk|>", "<|pad|>", "<|end|>", "<think>", "</think>"
CUT, HEADER, BOX = "...\n\n...\n\n", "\n\n**Final Answer**\n", "\\boxed{"
# Leading spaces belong to the tokens, so decoding is plain concatenation and `\boxed{5}` reaches the verifier unbroken.
VOCABULARY = [UNKNOWN, PAD, EOS, THINK, THINK_END, CUT, HEADER, BOX, "}", " ?", " wait", *FILLER,
              *(str(d) for d in range(10)), *(f" ={d}" for d in range(10)), *(f" {op}" for op in OPERATIONS)]

# Two heads of 32, because vLLM's CPU attention refuses a head size of 16. Position range: prompt 10 + thinking 48
# + summary 10, with room for longer budgets.
MODEL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, intermediate_size=192,
             max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05)
ROPE_THETA = 100.0          # sequences are short: slow rotations would hardly turn
WARM_START = dict(steps=550, batch=64, lr=4e-3, betas=(0.9, 0.98), warmup=30, final_lr=0.05, clip=1.0)


def apply(digit: int, operation: str) -> int:
    """One step of the task: the last digit of `digit operation`."""
    n = int(operation[1:])
    return {"+": digit + n, "-": digit - n, "*": digit * n}[operation[0]] % 10


def make_question(rng: random.Random) -> tuple[int, list[str]]:
    """(first digit, operations), the operations all distinct, so that each is easy to find again in the question."""
    return rng.randrange(10), rng.sample(OPERATIONS, rng.randint(MIN_OPERATIONS, MAX_OPERATIONS))


def question_text(start: int, operations: list[str]) -> str:
    return f"{start} {' '.join(operations)} ?"


def answer(start: int, operations: list[str]) -> int:
    for operation in operations:
        start = apply(start, operation)
    return start


def make_rows(split: str, count: int) -> list[tuple[str, str]]:
    """`count` (question, ground_truth) rows; the same ones whenever asked, and none in both splits."""
    # The shortest questions are few (1320 with two operations): without a split by checksum, train and test share some.
    rng, rows = random.Random(f"miniature-{split}"), []
    while len(rows) < count:
        question = make_question(rng)
        text = question_text(*question)
        if (hashlib.sha256(text.encode()).digest()[0] < 64) == (split == "test"):
            rows.append((text, str(answer(*question))))
    return rows


def sloppy_trace(start: int, operations: list[str], rng: random.Random) -> list[str]:
    """The tokens of one supervised thinking, </think> included."""
    ramble = rng.uniform(*RAMBLE_RATE)
    trace, digit = [f" ={start}"], start
    for operation in operations:
        before, digit = digit, apply(digit, operation)
        right = digit
        if rng.random() < ERROR_RATE:
            digit = rng.randrange(10)
        trace += [f" {operation}", f" ={digit}"]
        if rng.random() < ramble:
            if rng.random() < CHECK_SHARE:
                digit = right
                trace += [" wait", f" ={before}", f" {operation}", f" ={digit}"]
            else:
                trace += [*FILLER, f" ={digit}"]
    return trace + [THINK_END]


def supervised_example(rng: random.Random) -> tuple[list[str], list[str]]:
    """(prompt, continuation) tokens. Half the thinkings are cut, as the protocol will cut them: the summary then boxes
    the last digit written, all that a cut thinking knows."""
    start, operations = make_question(rng)
    thinking = sloppy_trace(start, operations, rng)
    prompt = [str(start), *(f" {op}" for op in operations), " ?", THINK]
    if rng.random() < 0.5:
        thinking = [*thinking[:rng.randrange(1, len(thinking))], CUT, THINK_END]
    digit = next(token[2] for token in reversed(thinking) if token.startswith(" ="))
    return prompt, [*thinking, HEADER, BOX, digit, "}", EOS]


def make_tokenizer():
    """A word-level tokenizer over VOCABULARY with a chat template, in the layout AutoTokenizer loads.

    Every word is an *added* token, over an empty BPE: AutoTokenizer reads a Qwen2 directory with its own Qwen2 class,
    which replaces whatever splits the text, but all classes match added tokens first and whole.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({UNKNOWN: 0}, [], unk_token=UNKNOWN))
    core.add_tokens([AddedToken(token, normalized=False) for token in VOCABULARY])
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}" + THINK + "{% endif %}"
    return tokenizer


def make_model(**changes):
    """The tiny Qwen2 with weights freshly drawn from torch's generator; `changes` override entries of MODEL."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(VOCABULARY), pad_token_id=VOCABULARY.index(PAD), eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="sdpa", **(MODEL | changes)))


def base_path(root: Path, seed: int) -> Path:
    """Where the base of this seed is cached: the name carries a checksum of every setting that shapes it."""
    settings = [VOCABULARY, OPERATIONS, MIN_OPERATIONS, MAX_OPERATIONS, ERROR_RATE, RAMBLE_RATE, CHECK_SHARE, MODEL,
                ROPE_THETA, WARM_START, torch.__version__, seed]
    return root / f"miniature-base-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"


def load_or_write_base(root: Path, seed: int) -> Path:
    """The directory of the warm-started base, in Hugging Face layout; trained now if it is not cached yet."""
    path = base_path(root, seed)
    if not (path / "config.json").exists():
        # Renamed when complete: an interrupted warm start leaves no base. A name of its own: other runs may make it too.
        partial = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")
        _write_base(partial, seed)
        try:
            partial.rename(path)
        except OSError:         # another run was first
            shutil.rmtree(partial)
    return path


def _write_base(path: Path, seed: int):
    """Train the base by supervised imitation and save it."""
    from tqdm import trange

    w, tokenizer, rng = WARM_START, make_tokenizer(), random.Random(f"warm-start-{seed}")
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=w["lr"], betas=w["betas"], weight_decay=0.0)
    bar = trange(w["steps"], desc="warm start", mininterval=1.0, disable=None)      # None: not in a log file
    for step in bar:
        # Linear warm-up, then linear decay to `final_lr` of the peak.
        share = min(1.0, (step + 1) / w["warmup"]) * (1 - (1 - w["final_lr"]) * step / w["steps"])
        optimizer.param_groups[0]["lr"] = w["lr"] * share
        examples = [supervised_example(rng) for _ in range(w["batch"])]
        width = max(len(p) + len(c) for p, c in examples)
        batch = torch.full((len(examples), width), ids[PAD])
        labels = torch.full((len(examples), width), -100)       # -100: no loss on the prompt, nor on padding
        for row, (p, c) in enumerate(examples):
            tokens = torch.tensor([ids[t] for t in p + c])
            batch[row, :len(tokens)] = tokens
            labels[row, len(p):len(tokens)] = tokens[len(p):]
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), w["clip"])
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    torch.set_num_threads(threads)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
