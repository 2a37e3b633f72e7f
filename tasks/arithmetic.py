"""The embedded default: a task, a tokenizer and a warm-started base, made here from nothing.

Anytime reasoning needs a policy that thinks well but wastefully. No such model fits on a CPU, so
this file trains one: a tiny Qwen2 imitates sloppy traces of last-digit arithmetic, in a minute or
two. Everything else (markers, verifier, packing, loss, loop) is what the 1.5B run uses; only the
sizes differ.

    question   2 +2 *7 ?                 evaluate left to right, answer with the last digit
    trace       =2 +2 =4 *7 =3 so 3. wait =2 +2 =4 hmm let me see =4 *7 =8 so 8.</think>
    summary    **Final Answer** \\boxed{8}

A supervised trace goes over the chain once and states an answer, right or wrong. Then, as reasoning
models do, it goes over it again: a later pass mostly repeats what stands there, an error too, now
and then repairs one, and seldom spoils a right result. So being right early predicts being right
late, which is what BRPO's baseline builds on (a trace that closes with its first answer has no
later segments to predict). Checking still pays, because of the repairs; rambling costs everywhere.
Wherever it is cut, a trace knows the last answer that it completed.
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
LONGEST = 64  # thinking tokens of a supervised example at most
FILLER = [" hmm", " let", " me", " see"]

UNKNOWN, PAD, EOS, THINK, THINK_END = "<|unk|>", "<|pad|>", "<|end|>", "<think>", "</think>"
CUT, HEADER, BOX = "...\n\n...\n\n", "\n\n**Final Answer**\n", "\\boxed{"
# Leading spaces belong to the tokens: decoding is plain concatenation, and `\boxed{5}` reaches the
# verifier unbroken. A result is one token with its `=`, since it did not learn as two.
VOCABULARY = [
    UNKNOWN,
    PAD,
    EOS,
    THINK,
    THINK_END,
    CUT,
    HEADER,
    BOX,
    "}",
    " ?",
    " wait",
    *FILLER,
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
    """One step of the task: the last digit of `digit operation`."""
    n = int(operation[1:])
    return {"+": digit + n, "-": digit - n, "*": digit * n}[operation[0]] % 10


def make_question(rng: random.Random) -> tuple[int, list[str]]:
    """(first digit, operations), all distinct: each is easy to find again in question and trace."""
    return rng.randrange(10), rng.sample(OPERATIONS, rng.randint(MIN_OPERATIONS, MAX_OPERATIONS))


def question_text(start: int, operations: list[str]) -> str:
    return f"{start} {' '.join(operations)} ?"


def answer(start: int, operations: list[str]) -> int:
    for operation in operations:
        start = apply(start, operation)
    return start


def make_rows(split: str, count: int) -> list[tuple[str, str]]:
    """`count` (question, ground_truth) rows; always the same ones, and none in both splits."""
    # Short questions are few (1320 have two operations): only a checksum keeps the splits apart.
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
    """(tokens, digits) of one walk along the chain. `before`: the last pass's digits, [] if
    none."""
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
    """What a trace, cut anywhere, knows: its last completed answer, failing that its last digit."""
    answers = [token[4] for token in thinking if token.startswith(" so ")]
    results = [token[2] for token in thinking if token.startswith(" =")]
    return (answers or results)[-1]


def supervised_example(rng: random.Random) -> tuple[list[str], list[bool]]:
    """(tokens, trained). Half the traces, and all above LONGEST, are cut as the protocol cuts.

    What it appends is not trained on: a policy that imitates cuts closes its traces anywhere.
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

    Every word is an *added* token, over an empty BPE: AutoTokenizer reads a Qwen2 directory with
    its own Qwen2 class, which replaces whatever splits the text, but matches added tokens first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({UNKNOWN: 0}, [], unk_token=UNKNOWN))
    core.add_tokens([AddedToken(token, normalized=False) for token in VOCABULARY])
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}" + THINK + "{% endif %}"
    )
    return tokenizer


def make_model(**changes):
    """The tiny Qwen2, weights fresh from torch's generator; `changes` override entries of MODEL."""
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
    settings = [
        VOCABULARY,
        OPERATIONS,
        MIN_OPERATIONS,
        MAX_OPERATIONS,
        ERROR_RATE,
        REPAIR_RATE,
        SPOIL_RATE,
        RAMBLE_RATE,
        AGAIN_RATE,
        LONGEST,
        MODEL,
        ROPE_THETA,
        WARM_START,
        torch.__version__,
        seed,
    ]
    checksum = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return root / f"miniature-base-{checksum[:12]}"


def load_or_write_base(root: Path, seed: int) -> Path:
    """The directory of the warm-started base, in Hugging Face layout; trained now if not cached."""
    path = base_path(root, seed)
    if not (path / "config.json").exists():
        # An interrupted warm start leaves no base; another run may be making the same one.
        partial = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")
        _write_base(partial, seed)
        try:
            partial.rename(path)
        except OSError:  # the other run was first
            shutil.rmtree(partial)
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
    bar = trange(w["steps"], desc="warm start", mininterval=1.0)
    for step in bar:
        # Linear warm-up, then linear decay to `final_lr` of the peak.
        share = min(1, (step + 1) / w["warmup"]) * (1 - (1 - w["final_lr"]) * step / w["steps"])
        optimizer.param_groups[0]["lr"] = w["lr"] * share
        examples = [supervised_example(rng) for _ in range(w["batch"])]
        width = max(len(tokens) for tokens, _ in examples)
        batch = torch.full((len(examples), width), ids[PAD])
        labels = torch.full((len(examples), width), -100)  # -100: no loss here
        for row, (tokens, trained) in enumerate(examples):
            batch[row, : len(tokens)] = torch.tensor([ids[t] for t in tokens])
            labels[row, : len(tokens)] = batch[row, : len(tokens)].where(
                torch.tensor(trained), -100
            )
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
