"""Real kinds of tokenizers: the parts of a sequence tokenise as its whole text does, or the
difference is known. R1's kind is built here; SmolLM2's comes with its package."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rewards import ANSWER_HEADER, CUT_TEXT
from rollout import Markers
from runtime.config import Config
from runtime.data import load_rows, make_questions
from tests.conftest import SHARED
from tests.end_to_end import make_smollm

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1_TOKENS = (BEGIN, END, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
R1_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
TEXTS = [
    "Find $x$ if $2x + 3 = 11$.",
    "What is \\frac{1}{2} of 60%? Round to 1.5 {units}.",
    "A train leaves at 9:40 and arrives at 12:05.\n\nHow many minutes is that?",
]


def r1_tokenizer():
    """Byte-level BPE with R1-Distill's special tokens and the end of its chat template. </think> is
    an added token that is *not* special, as in the original."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [*TEXTS, "**Final Answer**\n\\boxed{12}", "Wait ... so\n\n...\n\n"] * 3
    settings = {"vocab_size": 600, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    core.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **settings))
    for token in R1_TOKENS:
        core.add_tokens([AddedToken(token, normalized=False, special="think" not in token)])
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
    settings = {"chat_template": R1_CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, **settings)


SMOLLM = pytest.param("smollm", marks=[pytest.mark.real, make_smollm.needs_smollm])


@pytest.fixture(scope="module", params=["r1", SMOLLM])
def tokenizer(request):
    return r1_tokenizer() if request.param == "r1" else make_smollm.make_tokenizer()


def markers_of(tokenizer):
    return Markers.from_tokenizer(tokenizer, max_summary_tokens=118)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def questions(tokenizer):
    path, rows = SHARED / "data" / "train" / "math.json", [(text, "1") for text in TEXTS]
    if path.is_file():
        rows += random.Random(0).sample(load_rows(str(path))[0], 50)
    c = Config(prompt_template="{question} Reason step by step.", max_prompt_tokens=4096)
    return make_questions(rows, tokenizer, c)[0]


def test_prompts_are_their_text_once(tokenizer):
    """The chat template's special tokens are single tokens, none is doubled; <think> is opened."""
    for q in questions(tokenizer):
        rendered = tokenizer.decode(q.prompt, skip_special_tokens=False)
        assert rendered.rstrip("\n").endswith("<think>") and q.text in rendered
        ids = list(q.prompt)
        assert ids == encode(tokenizer, rendered), "the text does not tokenise back to its tokens"
        assert ids.count(encode(tokenizer, "<think>")[0]) == 1
        if tokenizer.bos_token == BEGIN:
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_parts_tokenise_as_one_stream_but_for_known_joints(tokenizer):
    """What the engine sees is joined from parts. After </think> nothing can merge, so header and
    closed traces are exactly the stream's; a cut merges with the dots or line breaks before it."""
    p = markers_of(tokenizer)
    assert [*encode(tokenizer, CUT_TEXT), *encode(tokenizer, ANSWER_HEADER)] == [*p.after_cut]
    prompt = list(questions(tokenizer)[0].prompt)
    text = tokenizer.decode(prompt)
    for thinking in ("So 2x = 8, x = 4", "we get 12\n\nNow add 3", "which is $\\frac{1}{2}"):
        parts = prompt + encode(tokenizer, thinking)
        assert parts == encode(tokenizer, text + thinking)
        closed = [*parts, p.think_end, *p.after_closed]
        assert closed == encode(tokenizer, f"{text}{thinking}</think>{ANSWER_HEADER}")
        cut = [*parts, *p.after_cut]
        assert cut == encode(tokenizer, text + thinking + CUT_TEXT + ANSWER_HEADER)
    # The known difference: another tokenisation of the same text, and the same from </think> on.
    for thinking in ("x = 4.", "so on..."):
        stream = encode(tokenizer, thinking + CUT_TEXT + ANSWER_HEADER)
        parts = [*encode(tokenizer, thinking), *p.after_cut]
        assert stream != parts and tokenizer.decode(stream) == tokenizer.decode(parts)
        after = len(p.after_closed) + 1
        assert stream[-after:] == parts[-after:]


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert markers_of(again) == markers_of(tokenizer)
    for q, p in zip(questions(tokenizer)[:20], questions(again)[:20]):
        assert q.prompt == p.prompt


def test_end_of_text_and_think_end_are_told_apart(tokenizer):
    p = markers_of(tokenizer)
    assert p.think_end not in p.eos and tokenizer.decode([p.think_end]) == "</think>"
    assert tokenizer.eos_token_id in p.eos
