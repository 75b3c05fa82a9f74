r"""What a text answers, and whether that is right: `extract` and `grade`, by exact rules and without a guess.

* math: the last `\boxed{}`, else `#### 42`, else "the answer is 42", else in the last sentence with a number what
  follows its last "=", else its last number. Numbers are compared as fractions, anything else as a string.
* choice: the last `\boxed{}`, else "the answer is (B)", else the lines that are an option.
* code: the last closed Python block that defines something. free: the text.

Thoughts are cut off first. An unfinished one, a box cut off by the token limit and two answers at once ("5 or 6") are
no answer. In doubt there is none: that costs a right answer now and then, so that no wrong one passes.
Does not know: models, prompts, data sets, algebra (\sqrt{8} is not 2\sqrt{2} here), and how to run a program.
"""

import ast
import re
import textwrap
from collections.abc import Mapping
from fractions import Fraction

KINDS = ("math", "choice", "code", "free")
LIMIT = 500  # digits of a number; one beyond is compared as text
_BRACE = re.compile(r"(?s)\\.|[{}]")  # \{ and \} do not count
_ASCII = {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # full-width forms; \d and int() know the digits of all scripts
_ASCII |= dict(zip(map(ord, "−–‐‑×·÷⁄"), "----**//", strict=True))


def extract(kind: str, text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the answer in `text` in its plain form ("1234", "-1/2", "50%"; "b"; a program), or None if there is none.

    `choices` maps each option's letter to its text; without it the letters are a to j. Raises only on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    thoughts, _, said = text.rpartition("</think>")
    said = said.partition("<think>")[0].strip()
    if kind == "free":
        return said or None
    said = said or thoughts.replace("<think>", " ")  # closed and nothing after it: all there is to go by
    if kind == "choice":
        letters = _choice(said, choices)
        return letters.pop() if len(letters) == 1 else None
    return _math(said) if kind == "math" else _program(said)


def grade(kind: str, text: str, gold: str, choices: Mapping[str, str] | None = None) -> bool:
    """Return whether the answer in `text` is `gold`. A gold may carry commas, units, a box, or be an option's text.

    A percentage equals its number and its share: 50% is 50 and 0.5. Raises ValueError on "code" and unknown kinds.
    """
    if kind == "code":
        raise ValueError("--kind: code is graded by running its tests, which minimas does not do")
    answer = extract(kind, text, choices)
    if answer is None:
        return False
    if kind == "free":
        return answer.casefold().split() == gold.casefold().split()
    if kind == "choice":
        return {answer} == _named(gold, choices)
    right = _math(gold) if "####" in gold or _box(gold) else _value(gold)
    if right is None or not _number(answer) or not _number(right):
        return answer.casefold() == (right or "").casefold()
    share = Fraction(100) ** (answer.endswith("%") - right.endswith("%"))
    return Fraction(answer.rstrip("%")) in (value := Fraction(right.rstrip("%")), value * share)


def _box(text: str) -> str | None:
    r"""What the last box holds: None without one, "" if it was cut off. An empty \boxed{} quotes the instruction."""
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox) ?\{", text))):
        depth, end = 1, box.end()
        while depth and (brace := _BRACE.search(text, end)):
            depth, end = depth + {"{": 1, "}": -1}.get(brace[0], 0), brace.end()
        if depth or text[box.end() : end - 1].strip():
            return "" if depth else text[box.end() : end - 1]
    return None


_TERM = r"(?<=[\d)}\]%]|\b[A-Za-z])"  # stands behind a number, a bracket or a variable, not behind a word
_FRAC = r"(?<![/^])\\[dtc]?frac ?(?:\{ ?(-?\d[\d,.]*) ?\} ?\{ ?(\d[\d,.]*) ?\}|(\d) ?(\d))(?! ?[\\^]|\d)"
_REWRITES = [  # LaTeX and Markdown to plain text, in this order; afterwards a number or an expression is one word
    (r"\\!|\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]]|\^ ?\{?\\circ\}?|\\?[$€£¥]|(?<!\d)\*\*|\*\*(?!-?\d)|`", ""),
    (r"\{,\}|(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),  # 1{,}234 and 1\,234
    (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r" \1 "),
    (r"(?:\\[\\,;: ]|\\q?quad(?![a-z])|~|[^\S\n])+", " "),
    (r"\*\*|\^\{(-?\d+)\}", r"^\1"),  # 10**3 and 10^{3}
    (r" ?(?:\\?%|\bpercent\b)", "%"),
    (r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=10\^)", "*"),
    (r"(?<=[\w)}\]]) ?([*/^]) ?(?=[\w({\\-])", r"\1"),  # 2 * 3
    (_TERM + r" ([-+]) (?=[\d(\\]|[A-Za-z]\b)", r"\1"),  # x + 5
    (_TERM + r" (?=\\[a-z])", ""),  # 2 \sqrt{3}
    (rf"(?<=\d) ?(?={_FRAC})|(?<=\d) (?=\d+/\d+(?![\w/^*]))", "&"),  # 3\frac{1}{2} and 3 1/2 are 3&1/2
    (_FRAC, r"\1\3/\2\4"),
    (r"\b[Nn]egative (?=\d)", "-"),
    (r"\bnot -?\d+(?:[.,]\d+)*", ""),  # it is 18, not 5
    (r" ?(?<![<>!])= ?(-(?= ))? ?", r" = \1"),
]
_END = re.compile(r"\n|[.!?](?=\s|$)")  # of a sentence
_ANSWER_IS = r"(?im)\banswer\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])[\s:]*|^[# ]*(?:final )?answer *\n\s*"
_TWO = re.compile(r"\d\S{0,3} or (?:\w = )?-?\d|[,;] \w = |^[-(]?\d\S* (?:and )?(?:\w = |[-(]?\d|a half)")
_FACTOR = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\^-?\d{1,3})?"  # 1,234.5e6^7
_NUMBER = re.compile(  # sign, the 3 of 3&1/2, product, percent, glued unit: 5km, 5/day, but 5x is another product
    rf"([-+]?)(?:(\d+)&(?=\d+/\d+\b))?({_FACTOR}(?:[*/]{_FACTOR})*)(%?)"
    r"(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|am|pm|st|nd|rd|th|/[A-Za-z]{3,})?"
)
_UNIT = re.compile(r"(?!(?:or|and|plus|minus|times|over)\b)[A-Za-z]{2,}(?:/[A-Za-z]+)?(?:\^[23])?|[amghsL]")
_SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "pi", "sqrt"}


def _simple(text: str) -> str:
    text = text.translate(_ASCII)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def _math(text: str) -> str | None:
    if (box := _box(text)) is not None:
        return _value(box)
    text = _simple(text)
    if hashes := re.findall(r"#### *(?!\d+[.)] )([-+]?[\d.].*)", text):  # not the heading "#### 1. Add"
        return _value(hashes[-1])
    sentence, place = ["", *(part for part in _END.split(text) if re.search(r"\d", part))][-1], -1  # the last number
    for marker in list(re.finditer(_ANSWER_IS, text))[-1:]:
        stated = _END.split(text[marker.end() :], maxsplit=1)[0]
        if re.search(r"[\d\\]", stated):
            sentence, place = re.sub("^- ", "-", stated), 0  # the first one
    two = _TWO.search(sentence)
    if place and " = " in sentence:
        sentence, place = sentence.rpartition(" = ")[2], 0
    words = sentence.split()
    numbers = [i for i, word in enumerate(words) if re.search(r"[\d\\]", word) and words[i + 1 : i + 2] != ["="]]
    if not numbers or two or _TWO.search(sentence):
        return None
    word, after = words[numbers[place]], "".join(words[numbers[place] + 1 :][:1])
    if len(words) == 1 or after.strip(",.").lower() in _SCALES:  # 2 million
        return _value(sentence) if len(words) == 1 else None
    return _number(word.lstrip("(\"'").rstrip(",.;:!?)\"'"))


def _value(text: str) -> str | None:
    """What a box, a gold or a `####` line says: a number with its unit, else an expression without its spaces."""
    left, _, right = (text := _simple(text)).rpartition(" = ")
    if not re.search(r",(?!\d{3})|;|\b(?:and|or)\b", left):  # x = 1, y = 2
        text = right
    text = re.sub("^- ", "-", text.strip(" \n,;:").rstrip("."))
    number, *units = text.split() or [""]
    value = _number(number.strip("()"))
    if value and all(_UNIT.fullmatch(unit) and unit.lower() not in _SCALES for unit in units):
        return value
    return re.sub(r"(?<![A-Za-z])\s+(?!\d)|(?<!\d)\s+(?![A-Za-z])", "", text) or None  # 1 2 is not 12


def _number(word: str) -> str | None:
    """A number in plain form, exactly: "1234", "0.5" if it was a decimal, "-7/2" if it was a fraction, "50%"."""
    found = _NUMBER.fullmatch(word)
    if not found or len(word) > LIMIT:
        return None
    value = Fraction(1)
    try:
        for operator, factor in re.findall(rf"([*/]?)({_FACTOR})", found[3].replace(",", "")):
            base, _, power = factor.partition("^")
            value *= Fraction(base) ** (int(power or 1) * (-1 if operator == "/" else 1))
            if max(value.numerator, value.denominator) > 10**LIMIT:
                return None
    except ZeroDivisionError:
        return None
    value += int(found[2] or 0)
    sign, places = "-" if found[1] == "-" and value else "", value.denominator.bit_length()
    if "/" in found[3] or 10**places % value.denominator:  # a fraction, or a decimal that never ends
        return f"{sign}{value}{found[4]}"
    digits = str(value.numerator * 10**places // value.denominator).zfill(places + 1)
    return sign + f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".") + found[4]


_CHOSEN = r"(?i)\b(?:answer|option|choice)\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])\s*|\b(?:choose|pick|select)\b"
_DRESS = r"\\(?:text|math)[a-z]*|\\[()\[\],;! ]|[*_`${}]|\\(?=[%&#])"
_LETTER = re.compile(  # "the correct option" "(" B ")."
    r"(?:(?:most|likely|probably|the|correct|answer|option|choice)\b:? ?){0,5}([(\[]?)([a-z0-9])([)\].:,;!]*)(?=\s|$)"
)
_SECOND = re.compile(r"\W*(?:(?:or|and)\W+(?:option )?([a-z0-9])\b|([a-z0-9])(?!\w| \w| \())")  # (A) or B; A, B


def _choice(text: str, choices: Mapping[str, str] | None) -> set[str]:
    if (box := _box(text)) is not None:
        return _named(box, choices)
    for marker in reversed(list(re.finditer(_CHOSEN, text))):
        if letters := _named(text[marker.end() : marker.end() + LIMIT].partition("\n")[0], choices):
            return letters
    return {letter for line in set(text.split("\n")) for letter in _named(line, choices, alone=True)}


def _named(text: str, choices: Mapping[str, str] | None, alone: bool = False) -> set[str]:
    """The options that `text` names. Only a dressed letter, "(B)" or "B.", may be followed by words that are not its
    option's, so that "A cat sat" and "I think" name none; `alone`: not even that.
    """
    given = choices or dict.fromkeys("abcdefghij", "")
    options = {str(key).strip().lower(): _bare(str(words)) for key, words in given.items()}
    if (lead := _LETTER.match(text := _bare(text))) and (key := lead[2]) in options:
        rest = text[lead.end() :]
        words = _bare(rest)
        if not words or words == options[key]:
            return {key}
        if words in options.values():  # the letter of one and the text of another
            return set()
        if second := _SECOND.match(rest):
            return {key, second[1] or second[2]} & options.keys()
        if re.match(" (?:because|since|is correct)", rest) or ((lead[1] or lead[3]) and not alone):
            return {key}
    return {key for key, words in options.items() if words and words == text}


def _bare(text: str) -> str:
    return " ".join(re.sub(_DRESS, "", text.translate(_ASCII)).casefold().split()).strip(" .,;:!?\"'")


_FENCE = re.compile(r"(?ms)^[^\n`]*```([^\n`]*)\n(.*?)(```|\Z)")  # language, program, closing fence or nothing


def _program(text: str) -> str | None:
    """The last closed Python block that defines something, not the usage example after it; without one: a block that
    the token limit cut off, the last block, the text if it is a program, which "yes" is not.
    """
    found = _FENCE.findall(text.replace("\r\n", "\n"))
    python = [(code, end) for tag, code, end in found if tag.strip().lower() in ("", "python", "python3", "py")]
    blocks = [(textwrap.dedent(code).strip("\n"), end) for code, end in python]
    defining = [block for block in blocks if re.search(r"(?m)^(?:async +)?(?:def|class) ", block[0])]
    if wanted := [block for block in defining if block[1]] or defining or blocks:
        return wanted[-1][0] or None
    try:  # the parser takes a kilobyte of memory per byte of text
        nodes = ast.parse(text).body if len(text) < 100_000 and "```" not in text else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return None if all(isinstance(node, ast.Expr | ast.AnnAssign | ast.Pass) for node in nodes) else text.strip("\n")
