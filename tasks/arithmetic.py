"""The task of the default run: last-digit arithmetic, its tokenizer, and a base made on a CPU.

    question   2 +2 *7 ?                 evaluate left to right, answer with the last digit
    trace       =2 +2 =4 *7 =3 so 3. wait =2 +2 =4 hmm let me see =4 *7 =8 so 8.</think>
    summary    **Final Answer** \\boxed{8}

Anytime reasoning needs a policy that thinks well but wastefully, and no such model fits on a CPU.
So this file trains one in a minute or two: a tiny Qwen2 imitates sloppy traces. All other code is
what the 1.5B run uses; only the sizes differ.

A supervised trace goes over the chain once and states an answer, right or wrong. Then, as reasoning
models do, it goes over it again. A later pass mostly repeats what is there, errors included; now
and then it repairs an error, and it seldom spoils a right result. So being right early predicts
being right late, which is what BRPO's baseline builds on. Checking pays, because of the repairs;
rambling never does. Wherever it is cut, a trace knows the last answer that it completed.
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
MIN_OPERATIONS, MAX_OPERATIONS = 2, 4
ERROR_RATE = 0.35  # first pass: share of results written as a random digit
REPAIR_RATE = 0.3  # later passes: how often a wrong step is put right, not repeated
SPOIL_RATE = 0.01  # later passes: share of other results written as a random digit
RAMBLE_RATE = (0.2, 1.0)  # how often filler follows a result; drawn per trace, uniformly
AGAIN_RATE = 0.9  # how often another pass follows an answer
LONGEST = 64  # most thinking tokens of a supervised example
FILLER = [" hmm", " let", " me", " see"]

UNKNOWN, PAD, EOS, THINK, THINK_END = "<|unk|>", "<|pad|>", "<|end|>", "<think>", "</think>"
CUT, HEADER, BOX = "...\n\n...\n\n", "\n\n**Final Answer**\n", "\\boxed{"
# Tokens include their leading space: decoding is plain concatenation, and `\boxed{5}` reaches the
# verifier unbroken. A result and its `=` are one token: as two, the model did not learn them.
VOCABULARY = [
    *(UNKNOWN, PAD, EOS, THINK, THINK_END, CUT, HEADER, BOX, "}", " ?", " wait", *FILLER),
    *(str(d) for d in range(10)),
    *(f" ={d}" for d in range(10)),
    *(f" so {d}." for d in range(10)),
    *(f" {operation}" for operation in OPERATIONS),
]

# Two heads of 32, because vLLM's CPU attention refuses a head size of 16. Position range: prompt 7
# + thinking 64 + summary 10, with room for longer budgets.
MODEL = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=192,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    initializer_range=0.05,
)
ROPE_THETA = 100.0  # sequences are short: slow rotations would hardly turn
WARM_START = dict(
    steps=900, batch=40, lr=4e-3, betas=(0.9, 0.98), warmup=30, final_lr=0.05, clip=1.0
)


def apply(digit: int, operation: str) -> int:
    """The last digit of `digit operation`."""
    n = int(operation[1:])
    return {"+": digit + n, "-": digit - n, "*": digit * n}[operation[0]] % 10


def make_question(rng: random.Random) -> tuple[int, list[str]]:
    """(first digit, operations). No operation repeats, so each is easy to find in the trace."""
    return rng.randrange(10), rng.sample(OPERATIONS, rng.randint(MIN_OPERATIONS, MAX_OPERATIONS))


def question_text(start: int, operations: list[str]) -> str:
    return f"{start} {' '.join(operations)} ?"


def answer(start: int, operations: list[str]) -> int:
    for operation in operations:
        start = apply(start, operation)
    return start


def make_rows(split: str, count: int) -> list[tuple[str, str]]:
    """`count` rows (question, ground_truth): always the same, and none in both splits."""
    # There are few short questions (1320 have two operations): a checksum assigns each to a split.
    rng, rows = random.Random(f"miniature-{split}"), []
    while len(rows) < count:
        question = make_question(rng)
        text = question_text(*question)
        if (hashlib.sha256(text.encode()).digest()[0] < 64) == (split == "test"):
            rows.append((text, str(answer(*question))))
    return rows


def one_pass(
    start: int, operations: list[str], before: list[int], ramble: float, rng: random.Random
) -> tuple[list[str], list[int]]:
    """(tokens, digits) of one pass over the chain. `before`: the previous pass's digits, or []."""
    tokens, digits = [f" ={start}"], [start]
    for i, operation in enumerate(operations):
        right = digit = apply(digits[-1], operation)
        if before and before[i] == digits[-1] and before[i + 1] != right:  # the same wrong step
            digit = right if rng.random() < REPAIR_RATE else before[i + 1]
        elif rng.random() < (SPOIL_RATE if before else ERROR_RATE):
            digit = rng.randrange(10)
        digits.append(digit)
        tokens += [f" {operation}", f" ={digit}"]
        if rng.random() < ramble:
            tokens += [*FILLER, f" ={digit}"]
    return [*tokens, f" so {digits[-1]}."], digits


def sloppy_trace(start: int, operations: list[str], rng: random.Random) -> list[str]:
    """The tokens of one supervised thinking trace, </think> included."""
    ramble = rng.uniform(*RAMBLE_RATE)
    trace, digits = one_pass(start, operations, [], ramble, rng)
    while rng.random() < AGAIN_RATE:
        tokens, digits = one_pass(start, operations, digits, ramble, rng)
        trace += [" wait", *tokens]
    return [*trace, THINK_END]


def known_answer(thinking: list[str]) -> str:
    """What a cut trace knows: its last completed answer or, without one, its last digit."""
    answers = [token[4] for token in thinking if token.startswith(" so ")]
    results = [token[2] for token in thinking if token.startswith(" =")]
    return (answers or results)[-1]


def supervised_example(rng: random.Random) -> tuple[list[str], list[bool]]:
    """(tokens, trained?). Half the traces, and all above LONGEST, are cut as a rollout's are.

    What a cut appends is not trained on: a policy that imitates cuts closes its traces anywhere.
    """
    start, operations = make_question(rng)
    prompt = [str(start), *(f" {operation}" for operation in operations), " ?", THINK]
    thinking, appended = sloppy_trace(start, operations, rng), [HEADER]
    if len(thinking) > LONGEST or rng.random() < 0.5:
        thinking = thinking[: rng.randint(1, min(len(thinking) - 1, LONGEST))]
        appended = [CUT, THINK_END, HEADER]
    summary = [BOX, known_answer(thinking), "}", EOS]
    trained = [False] * len(prompt) + [True] * len(thinking) + [False] * len(appended)
    return [*prompt, *thinking, *appended, *summary], trained + [True] * len(summary)


def make_tokenizer():
    """A word-level tokenizer over VOCABULARY with a chat template, as AutoTokenizer loads it.

    Every word is an *added* token, over an empty BPE: for a Qwen2 directory AutoTokenizer takes its
    Qwen2 class, which splits text in its own way, but matches added tokens first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({UNKNOWN: 0}, [], unk_token=UNKNOWN))
    core.add_tokens([AddedToken(token, normalized=False) for token in VOCABULARY])
    core.decoder = decoders.Fuse()
    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    generation_prompt = "{% if add_generation_prompt %}" + THINK + "{% endif %}"
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + generation_prompt
    return tokenizer


def make_model(**changes):
    """The tiny Qwen2 with weights from torch's generator; `changes` override entries of MODEL."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            pad_token_id=VOCABULARY.index(PAD),
            bos_token_id=None,
            eos_token_id=VOCABULARY.index(EOS),
            attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            **(MODEL | changes),
        )
    )


def base_path(root: Path, seed: int) -> Path:
    """Where the base of this seed is cached, named by a checksum of all settings that shape it."""
    task = [VOCABULARY, OPERATIONS, MIN_OPERATIONS, MAX_OPERATIONS]
    traces = [ERROR_RATE, REPAIR_RATE, SPOIL_RATE, RAMBLE_RATE, AGAIN_RATE, LONGEST]
    settings = [*task, *traces, MODEL, ROPE_THETA, WARM_START, torch.__version__, seed]
    checksum = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return root / f"miniature-base-{checksum[:12]}"


def load_or_write_base(root: Path, seed: int) -> Path:
    """The directory of the warm-started base, in Hugging Face layout; trained now if not cached."""
    path = base_path(root, seed)
    if not path.exists():
        # Renamed when complete: an interrupted warm start leaves no base.
        partial = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")
        _write_base(partial, seed)
        try:
            partial.rename(path)
        except OSError:
            shutil.rmtree(partial)
            if not path.exists():  # otherwise another run was first
                raise
    return path


def _write_base(path: Path, seed: int):
    """Train and save the base, on one CPU thread: so its weights depend only on the seed."""
    from tqdm import trange

    w, tokenizer, rng = WARM_START, make_tokenizer(), random.Random(f"warm-start-{seed}")
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), w["lr"], w["betas"], weight_decay=0.0)
    for step in trange(w["steps"], desc="warm start", mininterval=1.0, disable=None):
        # Linear warm-up, then linear decay to `final_lr` of the peak.
        share = min(1, (step + 1) / w["warmup"]) * (1 - (1 - w["final_lr"]) * step / w["steps"])
        optimizer.param_groups[0]["lr"] = w["lr"] * share
        examples = [supervised_example(rng) for _ in range(w["batch"])]
        width = max(len(tokens) for tokens, _ in examples)
        batch = torch.full((len(examples), width), ids[PAD])
        labels = torch.full((len(examples), width), -100)  # -100: no loss here
        for row, (tokens, trained) in enumerate(examples):
            tokens = torch.tensor([ids[token] for token in tokens])
            batch[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = tokens.where(torch.tensor(trained), -100)
        model(input_ids=batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), w["clip"])
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
