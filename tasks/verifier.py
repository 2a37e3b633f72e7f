r"""The math verifier: whether an answer equals the ground truth.

RL finds a grader's false positives, and inputs on which it hangs. So rules accept or refuse what
they can, and math-verify judges the rest in processes that can be killed. The rules apply in this
order, and the first that reaches a verdict settles it (tests/tasks/test_verifier_rules.py has the
cases). This file works when copied alone into an empty folder.

1. A ground truth that is None or blank marks an invalid row: never rewarded, and counted.
2. The answer is the last balanced \boxed{}; none, blank or oversized is wrong.
3. Both sides lose what has no meaning: spacing, \left, \dfrac, unicode. Equal text is right.
4. Plain numbers compare as exact fractions: 2/4 is 1/2. A decimal may be rounded to a relative 1e-6
   of a ground truth that is no integer. p% is p and p/100, because questions ask for either.
5. A leading `x =` is dropped, and only the last value of a chain counts; but 203 = 204 is a hedge.
6. A unit on one side only is dropped: the question fixes it. Other units are wrong.
7. Lists compare item by item. A bare list or a {set} has no order ("find all solutions"); (a,b) has
   one, and brackets must agree, since a closed interval is not an open one.
8. Refused: shapes that take minutes, restated questions (n!, \sum or \log for a number), other
   words or bases, variables that the ground truth lacks, half an equation.
9. math-verify compares the rest, and what it accepts must also agree to a relative 1e-6.
"""

import atexit
import ctypes
import importlib.util
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from fractions import Fraction

MAX_NUMBER_CHARS = 4000  # Python refuses to read integers over 4300 digits
MAX_ANSWER_CHARS = 400  # no dataset answer is longer, and parsing time grows faster than length
MAX_DEPTH = 30  # parsers recurse; real answers nest less than ten deep
MAX_CACHE = 50_000  # remembered verdicts: the summaries of a rollout repeat the same boxes
TASK_TIMEOUT = 5.0  # seconds for one comparison; ordinary ones take 0.01
START_TIMEOUT = 300.0  # seconds for a worker's imports, which may load a judge's weights
WORKER_MEMORY = 2 << 30  # bytes of address space per worker
FAILURES = ("timeouts", "deaths", "exceptions", "unparsable_ground_truths", "invalid_ground_truths")
LOUD_FAILURE_SHARE = 0.02  # above this share of failed gradings, training should say so
MAX_ITEMS = 20  # unordered lists compare every item with every item
RELATIVE_TOLERANCE = Fraction(1, 10**6)  # an absolute one rewards 0.0 for 1e-19

# ---------------------------------------------------------------------------- rules 2 and 3: text

_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...}, or None. Linear time: a text can be all braces."""
    answer = None
    # To TeX, \{ and \} are no braces. If no box closes that way, as in \boxed{204\}, they count.
    for also_braces in ((), (r"\{", r"\}")):
        opened = []
        for match in _BRACE.finditer(text):
            token = match[0][-1] if match[0] in also_braces else match[0]
            if token == "}" and opened:
                start = opened.pop()
                if start is not None:  # an enclosing box closes later, so it wins
                    answer = text[start : match.end() - 1]
            elif token == "{" or "box" in token:
                opened.append(match.end() if "box" in token else None)
        if answer or "\\" not in text:
            break
    return answer


_COMMANDS = r"\times \cdot \pi \sqrt \infty \le \ge \cup \in \pm".split()
_UNICODE = str.maketrans(
    {
        **dict(zip("−–—，（）％０１２３４５６７８９", "---,()%0123456789")),
        **dict(zip("×·π√∞≤≥∪∈±", (command + " " for command in _COMMANDS))),
        **{"°": r"^\circ ", "²": "^2", "³": "^3", "\u200b": "", "\ufeff": ""},
    }
)
# Applied in this order; most with an example. END ends a command's name: \le leaves \left alone.
_REWRITES = [
    (re.compile(pattern.replace("END", r"(?![a-zA-Z])")), new)
    for pattern, new in [
        (r"\\(?:boxed|fbox)(?=\s*\{)|\\!\s*", ""),  # \boxed{5}, 12,\!000
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # \(5\), $5$, \$5
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)END\.?", ""),  # \left(1, 2\right)
        (r"\{,\}(?=\d{3}(?!\d))", ""),  # (1{,}000, 2)
        (r"(?<!\\)\\[,;: ]|~|\\q?quadEND|\s+", " "),  # 5\ \text{cm}
        (r"\\[dtc]fracEND", r"\\frac"),  # \dfrac{1}{2}
        (r"\\varnothingEND", r"\\emptyset"),
        (r"<=", r"\\le "),  # x<=5
        (r">=", r"\\ge "),
        (r"\\(?:mbox|text(?:rm|bf|it|normal))(?=\s*\{)", r"\\text"),  # \textbf{(C)}
        (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)END", ","),  # 4 or 6
        (r"(?i)^\s*(?:the )?(?:final )?answer(?: is|:)", ""),  # The answer is 5
        (r"(?:\^\s*(?:\\circEND|\{\s*\\circ\s*\})|\\degreeEND)(?:\s*[CF]END)?", " "),  # 45^{\circ}
        (r"\\%|\\text\s*\{\s*percent\s*\}|(?<![a-zA-Z\\])(?:percent|pct)END", "%"),  # 28 percent
        (r"\\(frac|sqrt)(?:\s+(?=\w)|(?=\d))(\w)", r"\\\1{\2}"),  # \frac12, \sqrt3
        (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),  # \frac{1}2
        (r"\\(?:text|math(?:bf|rm))\s*\{\s*([\d.,]+)\s*\}", r"\1"),  # \mathbf{42}
        (r"(\.\d*)\\overline\s*\{\s*(\d{1,9})\s*\}", r"\1\2\2\2\2\2\2\2\2\2"),  # 0.1\overline{6}
        (r"_\s*\{\s*\\(?:(?:text|mathrm)\s*\{\s*)?(\w+)\s*\}(?:\s*\})?", r"_{\1}"),  # k_{\text{B}}
    ]
]
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")


def normalise(text: str) -> str:
    """One spelling for all that means the same, still LaTeX: math-verify reads it."""
    text = text.translate(_UNICODE)
    if "\\begin" not in text:  # in a matrix, \\ is a row break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # elsewhere \\sqrt is \sqrt
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = text.lstrip().rstrip(" .,;:\\")
    for _ in range(3):  # {5} and ((5)) are 5, but {1,2} is a set and (1,2) a point
        inner = text[1:-1]
        is_list = len(_split(inner, ",;")) > 1 and not (text[0] == "{" and plain_number(inner))
        if not _enclosed(text, "{(") or is_list:
            break
        text = inner.lstrip().rstrip(" .,;:\\")
    return text


def _key(text: str) -> str:
    """Text without formatting. Spaces between digits stay: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text))


def _depths(text: str) -> list[int]:
    return list(itertools.accumulate((char in "([{") - (char in ")]}") for char in text))


def _enclosed(text: str, opening: str) -> bool:
    """Whether the first character opens a bracket that only the last character closes."""
    ends = len(text) > 1 and text[0] in opening and text[-1] in ")]}"
    return ends and 0 not in _depths(text)[:-1]


def _split(text: str, separators: str) -> list[str]:
    """The non-blank pieces between separators that stand outside of all brackets."""
    outside = zip(text, _depths(text))
    marked = "".join("\0" if depth == 0 and char in separators else char for char, depth in outside)
    return [piece.strip() for piece in marked.split("\0") if piece.strip()]


# ------------------------------------------------------------------------- rule 4: plain numbers

_THOUSANDS = re.compile(  # 1,234 or 1 234; not 1 234/5
    r"(?<![\d.])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+(?! ?/))(?!\d)"
)
_POWER_OF_TEN = re.compile(  # 1.6 \times 10^{-19} or 10^4
    r"(?:(?<=[\d.])\s*(?:\\times|\\cdot|\*|x)\s*|^)10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?$"
)
_FRAC = re.compile(r"\s*\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")
_RATIO = re.compile(r"(?:(\d+) )?(-?\d+) ?/ ?(-?\d+)")  # 7/2 or 3 1/2
_DECIMAL = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")  # no one writes out 1e99999


def plain_number(text: str) -> tuple[Fraction, bool, bool] | None:
    """(value, a decimal?, percent?) of an integer, decimal, fraction or mixed number; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    body = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), body.strip(" %"))
    body = _POWER_OF_TEN.sub(lambda match: f"{'' if match.start() else 1}e{match[1]}", body)
    body = _FRAC.sub(r" \1/\2", body).strip()
    if (ratio := _RATIO.fullmatch(body)) and int(ratio[3]):
        value = int(ratio[1] or 0) + Fraction(int(ratio[2]), int(ratio[3]))
    elif _DECIMAL.fullmatch(body):
        value = Fraction(body)
    else:
        return None
    return sign * value, not ratio and not body.isdigit(), text.endswith("%")


def _same_number(truth: str, box: str) -> bool | None:
    """Rule 4; None unless both are plain numbers."""
    # 1000,99 is a decimal only against a decimal number; elsewhere it may be a list
    truth, box = (
        re.sub(r"^(-?\d+),(\d\d|\d{4,})$", r"\1.\2", side) if "." in other else side
        for side, other in ((truth, box), (box, truth))
    )
    numbers = plain_number(truth), plain_number(box)
    if not all(numbers):
        return None
    (a, a_decimal, a_percent), (b, b_decimal, b_percent) = numbers
    rounded = (a_decimal or b_decimal) and a.denominator != 1
    tolerance = RELATIVE_TOLERANCE * abs(a) if rounded else 0
    readings = [b] if a_percent == b_percent else [b, b / 100 if b_percent else b * 100]
    return any(abs(a - reading) <= tolerance for reading in readings)


# ---------------------------------------------------------------- rules 5 to 7: names, units, lists

_NAME = re.compile(
    r"""             # x, f(2), V_1, \angle ABC, \text{Area}, (x, y)
    (?=.*[a-zA-Z])(?!.*\\(?:sqrt|frac|lim|sum|prod|int|pm|cdot|times|infty|pi|sin|cos|tan|log|ln)\b)
    (?:\\?[a-zA-Z]|\\text\s*\{[^{}]*\}|_\w|_\{[^{}]*\}|\([^()=]*\)|['|:\s])+""",
    re.VERBOSE,
)


def _variables(text: str) -> set[str]:
    """Single letters that stand for something unknown; e and i are numbers."""
    text = re.sub(r"\\(?:begin|end|mathbb)\s*\{\w*\}|\\[a-zA-Z]+", " ", _TEXT.sub(" ", text))
    return set(re.findall("[a-zA-Z]", text)) - set("eiE")


def _split_name(text: str) -> tuple[str, str]:
    r"""`f(x) = 4 + 1 = 5` -> (`f(x)`, `5`): what is named, and the last value of the chain."""
    exact = text.partition(r"\approx")[0].strip()
    if exact and not _NAME.fullmatch(exact):  # \sqrt{2} \approx 1.414: the exact form counts
        text = exact
    *heads, value = _split(re.sub(r"\\(?:approx|in)(?![a-zA-Z])", "=", text), "=") or [""]
    if not heads or len(_split("=".join(heads), ",;")) > 1:  # x = 1, y = 2 is a list
        return "", text
    if _NAME.fullmatch(heads[0]):
        return re.sub(r"\s", "", heads[0]), value
    # 2 + 2 = 4 states its value, 203 = 204 states two, and x + y = 5 is an equation
    numbers = filter(None, map(plain_number, [*heads, value]))
    values = {number / (100 if percent else 1) for number, _, percent in numbers}
    return "", text if len(values) > 1 or _variables(text) else value


def _drop_names(truth: str, box: str) -> tuple[str, str]:
    """Both sides without `x =`; unchanged for x = 1 against y = 1, or a value against x + y = 5."""
    (truth_name, a), (box_name, b) = _split_name(truth), _split_name(box)
    other_name = truth_name and box_name and truth_name != box_name
    return (truth, box) if other_name or "=" in a or "=" in b else (a, b)


_UNIT = re.compile(
    r"""
    (?:(?<=[\d)}])|(?<=\\pi))\s*(?:
        \\(?:text|mathrm)\s*\{(?P<text>[^{},\d]*(?:\^?[23])?)\}             # 10\text{ cm}
        |(?<![\\a-zA-Z])(?P<bare>cm|mm|km|ft|in|lbs?|oz|kg|mg|hrs?|min|sec|mph|mi|am|pm|th|st|nd|rd
            |mol|rad|Hz|eV|kJ|kW|mL|kN|Pa|m/s|km/h
            |[a-zA-Z]{4,}(?:\s+[a-zA-Z]+)*)(?![a-zA-Z])                     # 5 cm, 64 square feet
    )\s*(?P<power>\^\s*\{?-?\d\}?)?$""",
    re.VERBOSE,
)


def _split_unit(text: str) -> tuple[str, str]:
    r"""`10\text{ cm}^2` -> (`10`, `cm^2`). A single bare letter is a variable (2k, 10m)."""
    match = _UNIT.search(text)
    if match is None or re.search(r"\b(?:not|if)\b", match[0]):
        return text, ""
    value = text[: match.start()].strip()
    if len(_split(value, ",;")) > 1 and not plain_number(value):  # 1 cm, 2 cm: item by item
        return text, ""
    unit = re.sub(r"[{}\s.]", "", (match["text"] or match["bare"] or "") + (match["power"] or ""))
    return value, re.sub(r"(?<=\w\w)s\b", "", unit.lower())


def _items(text: str) -> tuple[str, list[str]]:
    r"""`(1, 2]` -> ("(]", [1, 2]), `1, 2` -> ("", [1, 2]), `\pm 4` -> ("", [4, -4])."""
    body = re.sub(r"\\([{}])", r"\1", text)
    if _enclosed(body, "([{"):
        inner = _split(body[1:-1], ",;")
        if len(inner) > 1:
            return body[0] + body[-1], inner
    items = []
    for item in [text] if plain_number(text) else _split(text, ",;"):
        signs = "+-" if item.count(r"\pm") == 1 and r"\mp" not in item else " "
        items += [item.replace(r"\pm", sign).removeprefix("+").strip() for sign in signs]
    return "", items


_CERTAINTY = [False, None, True].index  # under it, max means "any of them", min "all of them"


def _equal_lists(truth: tuple, box: tuple, compare) -> bool | None:
    """Rule 7, for two results of `_items`."""
    (brackets, truth_items), (box_brackets, box_items) = truth, box
    # around a bare list, parentheses or braces mean nothing
    if brackets != box_brackets and {brackets, box_brackets} not in ({"", "()"}, {"", "{}"}):
        return False
    if max(len(truth_items), len(box_items)) > MAX_ITEMS:
        return False
    # brackets make the order count; so do names on one side only: x = 1, y = 2 against 1, 2
    names = [{_split_name(item)[0] for item in items} for items in (truth_items, box_items)]
    if brackets not in ("", "{}") or (len(names[0]) > 1 and names[1] == {""}):
        verdicts = [_equal(*pair, compare) for pair in zip(truth_items, box_items)]
        verdicts += [False] * (len(truth_items) != len(box_items))
    else:
        table = [[_equal(a, b, compare) for b in box_items] for a in truth_items]
        verdicts = [max(line, key=_CERTAINTY, default=False) for line in [*table, *zip(*table)]]
    return min(verdicts, key=_CERTAINTY, default=True)


# ------------------------------------------------------------------- rule 8, and the rules in order

_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp)h?(?![a-zA-Z])")
_HEAVY = re.compile(
    r"""
    \^\s*\{?[-(\s]*\d{5,}                                               # 2^{100000}
    |\^\s*\{?[-(\s]*(?:\d{2,}\s*\^|\d\s*\^\s*\{?\s*\d{2,})              # 2^{10^9}, 9^{9^{99}}
    |\^\s*\{\s*\(*\\?\w*\s*\^\s*\{\s*\(*\\?\w*\s*\^                     # x^{x^{x^x}}
    |(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])[^()]*\)\s*\^\s*\{?\s*\d{3,}    # (x+y)^{100}
    |\d{4,}\s*\)*\s*!|!\s*\)*\s*!|-\s*-\s*-                             # 9999!, 3!!, ---1
    """,
    re.VERBOSE,
)
_RESTATED = re.compile(
    r"""!|(?<!\{)\\(?:sum|prod|i*nt|oint|lim|[dt]?binom|choose|gcd|lcm|[bp]?mod
    |lfloor|lceil|max|min|det)(?![a-zA-Z])""",
    re.VERBOSE,
)
_BASE = re.compile(r"(?<=[\d)}])_\{?\s*(\w+)")
_ORDER = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt)(?![a-zA-Z])")


def _words(text: str) -> str:
    """The letters of an answer in words, or "". One letter A-F is a choice: c or (C) is C."""
    plain = _TEXT.sub(r" \1 ", text).strip()
    match = re.fullmatch(r"\(?([A-Fa-f])\)?|([A-Za-z][A-Za-z\s.'-]*[A-Za-z.])", plain)
    return re.sub(r"[\s.'-]+", "", match[1] or match[2]).casefold() if match else ""


def _only_interval(text: str) -> bool:
    r"""(2,5] and (-\infty,2) may be written 2 < x \le 5 and x < 2; but (2,5) may be a point."""
    return _items(text)[0] in ("(]", "[)") or r"\infty" in text


def _refused(truth: str, box: str) -> bool:
    """Rule 8: shapes that cannot answer this ground truth, or that would only cost time."""
    if _HEAVY.search(box) or _HEAVY.search(truth):
        return True
    # \sum k does not answer where 5050 is asked for; but 100! may stand for its many digits
    restated = _RESTATED.search(box) and not _RESTATED.search(truth) and len(truth) < 30
    if restated or (plain_number(truth) and _FUNCTION.search(box)):
        return True
    stray = _variables(box) - _variables(truth)  # math-verify reads 2A as 2a
    if stray and not (_ORDER.search(box) and _only_interval(truth)):
        return True
    # 4 is not 4x, x^2 + y^2 = z^2 is not z^2, 1011_2 is not 1011, \text{not } 4 is not 4
    words = [
        sorted(word.strip().casefold() for word in _TEXT.findall(side) if word.strip()[1:])
        for side in (truth, box)
    ]
    return bool(
        plain_number(box)
        and _variables(truth)
        or ("=" in truth) != ("=" in box)
        or _BASE.findall(truth) != _BASE.findall(box)
        or words[0] != words[1]
    )


def _equal(truth: str, box: str, compare=lambda truth, box: None) -> bool | None:
    """Rules 3 to 9 on normalised text; `compare` is rule 9. None: left to math-verify."""
    if _key(truth) == _key(box):
        return True
    verdict = _same_number(truth, box)
    if verdict is not None:
        return verdict
    if len(box) > MAX_ANSWER_CHARS or max(_depths(box), default=0) > MAX_DEPTH:
        return False
    named = _drop_names(truth, box)
    if named != (truth, box):
        return _equal(*named, compare)
    (truth_value, truth_unit), (box_value, box_unit) = _split_unit(truth), _split_unit(box)
    if truth_unit or box_unit:
        other_unit = truth_unit and box_unit and truth_unit != box_unit
        return False if other_unit else _equal(truth_value, box_value, compare)
    lists = _items(truth), _items(box)
    is_list = [bool(brackets) or len(items) > 1 for brackets, items in lists]
    if all(is_list):
        return _equal_lists(*lists, compare)
    if any(is_list) and (plain_number(truth) or plain_number(box)):
        return False
    words = _words(truth), _words(box)  # as products of letters, ba would be ab
    if all(words) or any(len(word) > 3 for word in words):
        return words[0] == words[1]
    return False if _refused(truth, box) else compare(truth, box)


# ------------------------------------------------------------------- rule 1, and math-verify itself


def _alternatives(ground_truth) -> list[str]:
    """The normalised texts of a str, int, float, or list of these. Empty for an invalid row."""
    if isinstance(ground_truth, (list, tuple)):
        return [text for item in ground_truth for text in _alternatives(item)]
    if isinstance(ground_truth, (int, float)) and abs(ground_truth) < 10**MAX_NUMBER_CHARS:
        ground_truth = str(ground_truth)
    if not isinstance(ground_truth, str):
        return []
    text = normalise(extract_answer(ground_truth) or ground_truth)
    return [text] if text else []


def is_valid_ground_truth(ground_truth) -> bool:
    """False for a row that is never rewarded: blank, neither text nor number, or a list of such."""
    return bool(_alternatives(ground_truth))


def _math_verify(truth: str, box: str) -> bool | None:
    """Rule 9, in a worker. None if math-verify cannot read the ground truth."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, I

    # units=True would drop the s of 2s, and other boxes make it misread bare text
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    config = [LatexExtractionConfig(normalization_config=normalization)]

    def read(text):
        sides = parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)  # the parent keeps time
        # it reads i as a variable, so that e^{i\pi} would not be -1
        return [
            side.subs({symbol: I for symbol in side.free_symbols if symbol.name == "i"})
            if isinstance(side, Expr)
            else side
            for side in sides
            if not isinstance(side, str)
        ]

    a, b = read(truth), read(box)
    if not a:
        return None
    as_interval = _only_interval(truth)
    return bool(b) and (
        verify(a, b, allow_set_relation_comp=as_interval, timeout_seconds=None)
        and _close(a[0], b[0])
    )


def _close(truth, box) -> bool:
    """Equal to a relative 1e-6 at one point; to math-verify, two tiny numbers are equal."""
    from sympy import Expr, N, Rational

    if not (isinstance(truth, Expr) and isinstance(box, Expr)):
        return True
    symbols = sorted(truth.free_symbols | box.free_symbols, key=str)
    point = {symbol: Rational(7 + 3 * k, 5 + 2 * k) for k, symbol in enumerate(symbols)}
    a, b = (N(side.doit().subs(point)) for side in (truth, box))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return True
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= 1e-6 * size if a and b else size < 1e-30)  # a zero may be rounded


# -------------------------------------------------------------------------------------- supervision
# A string can keep the parser busy for hours, in C code, which no exception interrupts: only a
# process can be stopped. multiprocessing would import the parent's main module into each, which
# under `torchrun train.py` means torch. So a worker is this file, run as a script: a fresh process,
# safe beside threads and CUDA.


class Grader:
    """Worker processes that reply to a line with a line, in the background; a stuck one is killed.

    `command`: the arguments of `python`. A worker replies to its first line, which is empty, once
    it is ready, and to later ones within `timeout` seconds. num_workers (int) threads with a
    process each start with the first task. `stats` counts gradings: graded, fast (without a
    process), and FAILURES.
    """

    def __init__(self, command: list[str], num_workers: int, timeout: float):
        self.command, self.num_workers, self.timeout = command, num_workers, timeout
        self.stats = dict.fromkeys(("graded", "fast", *FAILURES), 0)
        self._reported = dict(self.stats)
        self._reset()

    def _reset(self):
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        self._tasks, self._processes, self._threads = queue.SimpleQueue(), [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Kill the processes. What is still pending scores 0.0 and counts as a death."""
        if self._pid == os.getpid():
            with self._lock:
                self._closed = True
                for process in self._processes:
                    process.kill()
                for _ in self._threads:
                    self._tasks.put(None)

    def take_stats(self) -> dict[str, int]:
        """The counters since the last call: one batch, for the training log."""
        with self._lock:
            recent = {name: count - self._reported[name] for name, count in self.stats.items()}
            self._reported = dict(self.stats)
        return recent

    def _enqueue(self, line: str, on_reply):
        """Call on_reply(exchange(line)) later, from another thread."""
        with self._lock:
            if not self._closed:
                self._tasks.put((line, on_reply))
                while len(self._threads) < self.num_workers:
                    self._threads.append(threading.Thread(target=self._work, daemon=True))
                    self._threads[-1].start()
                return
        on_reply("deaths")

    def _work(self):
        process = None
        while (task := self._tasks.get()) is not None:
            line, on_reply = task
            if process is None or process.poll() is not None:  # it may be killed while idle
                process = self._new_process()
            on_reply(exchange(process, line, self.timeout) if process else "deaths")

    def _new_process(self) -> subprocess.Popen | None:
        with self._lock:
            if self._closed:
                return None
            process = start_worker(self.command)
            self._processes = [p for p in self._processes if p.poll() is None] + [process]
        exchange(process)  # outside of the lock, since it may take long
        return process


def start_worker(command: list[str]) -> subprocess.Popen:
    """A worker process: in a session of its own, because Ctrl-C is meant for the parent; with a
    fixed hash seed, because sympy depends on the order of sets."""
    return subprocess.Popen(
        [sys.executable, *command, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )


def exchange(process: subprocess.Popen, line: str = "", timeout: float = START_TIMEOUT) -> str:
    """A worker's reply to a line; "timeouts" if it was killed for being late, "deaths" if it ended
    otherwise. The empty line waits until the worker is ready."""
    late = []
    timer = threading.Timer(timeout, lambda: (late.append(True), process.kill()))
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        reply = process.stdout.readline().strip()
    except OSError:  # its end of the pipe is closed
        reply = ""
    timer.cancel()
    timer.join()  # if it has fired, it kills this process, not the next one
    if reply and not late:
        return reply
    process.kill()
    process.wait()
    return "timeouts" if late else "deaths"


def serve_worker(reply_to, parent: int):
    """The worker's side: write reply_to(line) for every line, and end with the parent process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() != parent:  # it ended before that call
        sys.exit()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        replies.write(reply_to(line.strip()) + "\n")


class Verifier(Grader):
    """Grades in the background: `submit` summaries as they arrive, collect the futures later.

    num_workers (int) processes start with the first pair that the rules cannot decide; `timeout`
    (seconds) bounds one comparison. Equal pairs are graded once: remembered ones count as fast.
    ImportError if math-verify is missing.
    """

    def __init__(self, num_workers: int = 2, timeout: float = TASK_TIMEOUT):
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("verifier.py needs math_verify: pip install math-verify")
        self._known = {}  # (truths, box) -> a verdict, or the futures that wait for it
        super().__init__([os.path.abspath(__file__), str(timeout)], num_workers, timeout)

    def _reset(self):
        super()._reset()  # waiting futures are the parent's
        self._known = {key: v for key, v in self._known.items() if isinstance(v, str)}

    def submit(self, summary: str, ground_truth, question: str = "") -> Future:
        """A future of 0.0 or 1.0, never an error. ground_truth: str, int, float, or a list.

        The question is not read; all graders take the same arguments.
        """
        if self._pid != os.getpid():  # a forked child must not write into its parent's pipes
            self._reset()
        box = extract_answer(summary) if isinstance(summary, str) else None
        box = normalise(box) if box and len(box) <= MAX_NUMBER_CHARS else ""
        key, future = (tuple(_alternatives(ground_truth)), box), Future()
        with self._lock:
            known = self._known.setdefault(key, [])
            if isinstance(known, list):
                known.append(future)
        if isinstance(known, str):
            self._finish([future], known, fast=True)
        elif known[0] is future:  # the first of equal pairs; the others wait for it
            try:
                verdict = _verdict(*key)
            except Exception:
                verdict = "exceptions"  # a fault in the rules: a counted 0
            if verdict:
                self._settle(key, verdict, fast=True)
            else:
                self._enqueue(json.dumps(key), lambda reply: self._settle(key, reply))
        return future

    def score(self, pairs) -> list[float]:
        """0.0 or 1.0 for each (summary, ground_truth), in order; waits for all of them."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def _settle(self, key, verdict: str, fast: bool = False):
        with self._lock:
            waiting = self._known.pop(key)
            if len(self._known) >= MAX_CACHE:
                self._known = {k: v for k, v in self._known.items() if isinstance(v, list)}
            self._known[key] = verdict  # failures too: a hostile string costs its seconds once
        self._finish(waiting, verdict, fast)

    def _finish(self, futures: list[Future], verdict: str, fast: bool):
        with self._lock:
            for name in ("graded", *["fast"] * fast, *[verdict] * (verdict in FAILURES)):
                self.stats[name] += len(futures)
        for future in futures:
            future.set_result(float(verdict == "right"))


def failure_share(stats: dict) -> float:
    """Share of gradings that scored 0 for another reason than a wrong answer."""
    return sum(stats[name] for name in FAILURES) / max(stats["graded"], 1)


_shared, _shared_lock = None, threading.Lock()


def is_correct(summary: str, ground_truth) -> bool:
    """Whether the last box is the ground truth. Thread-safe; bounded time; never an error."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close)
    return _shared.submit(summary, ground_truth).result() == 1.0


def _verdict(truths, box: str, *compare) -> str | None:
    """The verdict on the best of the alternatives, in a word; None: left to math-verify."""
    if not truths:
        return "invalid_ground_truths"
    best = max((_equal(truth, box, *compare) for truth in truths), key=_CERTAINTY) if box else False
    return None if best is None else "right" if best else "wrong"


def _grade(line: str, timeout: float) -> str:
    """One pair's verdict, in a worker. A word: printing or pickling a parsed object can hang."""
    if not line:
        return "ready"
    # the parent keeps time; if it is gone, the kernel ends even a worker stuck in C code
    signal.alarm(int(timeout) + 3)
    try:
        return _verdict(*json.loads(line), _math_verify) or "unparsable_ground_truths"
    except MemoryError:
        os._exit(1)  # a death: a fresh worker has memory again
    except BaseException:  # math-verify's TimeoutException is not an Exception
        return "exceptions"
    finally:
        signal.alarm(0)


def _limit_worker():
    import resource  # absent on Windows, where workers cannot run but the rules can

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parser prints its complaints


if __name__ == "__main__":
    import math_verify  # noqa: F401    now, not during the first task

    _limit_worker()
    serve_worker(lambda line: _grade(line, float(sys.argv[1])), int(sys.argv[2]))
