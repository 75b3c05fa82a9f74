r"""What a text answers, and whether that is right: `extract` and `grade`, by exact rules and without a guess.

Where the answer stands, by kind; thoughts are cut off first, and an unfinished `<think>` answers nothing:

* math: the last `\boxed{}`, else `#### 42`, else "the answer is 42", else what follows the last "=" of the last
  sentence with a number, else the text's last number. Numbers are compared as fractions, anything else as a string.
* choice: the last `\boxed{}`, else "the answer is (B)", else a line that is an option, else the last sentence's.
* code: the last closed Python block that defines something. free: the text.

A box cut off by the token limit, and two answers at once ("A or B"), are no answer. Where both sides could be argued,
a text counts as no answer: that costs a right answer now and then, and never lets a wrong one pass.

Does not know: models, prompts, data sets, algebra (\sqrt{8} is not 2\sqrt{2} here), and how to run a program.
"""

import ast
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

KINDS = ("math", "choice", "code", "free")
LIMIT = 500  # digits. A number beyond is compared as text: 1e999999999 must not fill the memory


def extract(kind: str, text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the answer in `text` in its plain form ("1234", "-1/2", "50%"; "b"; a program), or None if there is none.

    `choices` maps each option's letter to its text, for the kind "choice"; without it the letters are a to j.
    Never raises on any text; raises ValueError on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    said = _after_thinking(text)
    if kind == "free":
        return said or None
    # A thought that was closed and followed by nothing is all there is to go by.
    said = said or text.rpartition("</think>")[0].replace("<think>", "").replace("</think>", "")
    if kind == "code":
        return _program(said)
    return _math(_plain(said)) if kind == "math" else _choice(_plain(said), choices)


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
        return _folded(answer) == _folded(gold)
    gold = _plain(gold)
    if kind == "choice":
        return answer == _gold_letter(gold, choices)
    marked = "####" in gold or _BOX.search(gold)
    return _equal(answer, _math(gold) if marked else _value(_simple(gold)))


def _after_thinking(text: str) -> str:
    """What is said after the last thought and before an unfinished one."""
    return text.rpartition("</think>")[2].partition("<think>")[0].strip()


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


# -- characters, boxes: for math and choice ---------------------------------------------------------------------------

_SYMBOLS = dict(zip("−–‐‑‒﹣×⋅·∙÷⁄∕٫٬≈’‘“”", "-----" + "-****" + "///.,=" + "''\"\"", strict=True))
_SYMBOLS |= {"°": " degrees ", "√": r"\sqrt ", "π": r"\pi ", "。": ". "}
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*(\{?)")


def _plain(text: str) -> str:
    """Digits of every script, full-width letters, minus signs, powers (10³) and fractions (½) in ASCII."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # 1 234 567 with narrow spaces
    return re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+|[^\x00-\x7f]", lambda found: _ascii(found[0]), text)


@lru_cache(maxsize=4096)
def _ascii(char: str) -> str:
    if char[0] in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻":
        return "^" + unicodedata.normalize("NFKC", char).replace("−", "-")
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if "\uff01" <= char <= "\uff5e":  # full-width ASCII
        return chr(ord(char) - 0xFEE0)
    if "⁄" in (parts := unicodedata.normalize("NFKC", char)):  # a fraction in one character; 3½ is 3 1/2
        return " " + parts.replace("⁄", "/")
    if unicodedata.category(char) == "Cf":  # zero-width and direction marks
        return ""
    return " " if char.isspace() else char


def _box(text: str) -> str | None:
    r"""What the last box holds: None without a box, "" for one cut off and for "\boxed{3} or \boxed{5}".

    Empty boxes are skipped: they quote the instruction.
    """
    last: tuple[int, str] | None = None
    for found in reversed(list(_BOX.finditer(text))):
        start = found.end()
        if found[1]:
            end = _closing_brace(text, start)
        else:  # \boxed 5
            end = start + len(re.split(r"[\s$]", text[start : start + LIMIT], maxsplit=1)[0])
        content = text[start:end]
        if last is None:
            if end < 0:
                return ""
            if content.strip(" .$"):
                last = found.start(), content
        else:
            between = text[end + 1 : last[0]] if 0 <= end < last[0] <= end + 20 else "not joined"
            joined = re.fullmatch(r"[\s$.,]*(?:or|and|,|/|&|;)[\s$]*", between)
            return "" if joined and content != last[1] else last[1]
    return last[1] if last else None


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)  # \{ and \} do not count
        if not depth:
            return found.start()
    return -1


# -- math -------------------------------------------------------------------------------------------------------------

_STYLE = r"\\(?:text|math|operatorname|mbox)[a-z]*\s*\{([^{}]*)\}"
# What may be glued to a number and is no variable: 5km is 5, but 5x is not.
_UNITS = frozenset(
    [
        "m",
        "s",
        "g",
        "h",
        "l",
        "w",
        "v",
        "j",
        "n",
        "f",
        "km",
        "cm",
        "mm",
        "nm",
        "mi",
        "ft",
        "in",
        "yd",
        "kg",
        "mg",
        "lb",
        "lbs",
        "oz",
        "ml",
        "cl",
        "dl",
        "min",
        "mins",
        "sec",
        "secs",
        "hr",
        "hrs",
        "ms",
        "am",
        "pm",
        "st",
        "nd",
        "rd",
        "th",
        "kmh",
        "mph",
        "kph",
        "usd",
        "eur",
        "gb",
        "mb",
        "kb",
        "tb",
        "kw",
        "kwh",
        "hz",
        "cc",
        "deg",
        "pts",
    ]
)
_FUNCTIONS = frozenset(["sqrt", "root", "pi", "log", "ln", "exp", "sin", "cos", "tan", "mod", "half", "halves"])
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_REWRITES = [  # LaTeX and Markdown -> plain text; in this order
    (r"\\!|\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
    (r"\{,\}", ","),
    (r"(?<=\d)\\[,; ](?=\d{3}(?!\d))", ""),  # 1\,234
    (r"\\[,;: ()\[\]]|~|\\q?quad(?![A-Za-z])|\\\\", " "),
    (r"\\([$%#&_])", r"\1"),
    *[(_STYLE, r" \1 ")] * 3,  # \text{\textbf{…}}: the inner one first
    (r"[ \t]+", " "),
    (r"\^[ \t]*\{?[ \t]*\\circ[ \t]*\}?|\\degrees?(?![A-Za-z])", " degrees "),
    (r"[ \t]*\\(?:times|cdot|ast)(?![A-Za-z])[ \t]*", "*"),
    (r"degrees +[CFK]\b", "degrees"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\approx(?![A-Za-z])", "="),
    (r"\^\{(-?\d+)\}", r"^\1"),
    (r"(?<=\d)\*\*(?=-?\d)", "^"),
    (r"\*\*|__|`", ""),
    (r"(?<=\d)[ \t]?x[ \t]?(?=10\^)", "*"),
    (r"\\[dtc]?frac[ \t]?(\d)[ \t]?(\d)", r"\\frac{\1}{\2}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"(?<=\d)[ \t]?\\frac\{ ?(\d[\d,.]*) ?\}[ \t]?\{ ?(\d[\d,.]*) ?\}", r" \1/\2"),
    (r"\\frac\{ ?(-?\d[\d,.]*) ?\}[ \t]?\{ ?(\d[\d,.]*) ?\}", r"\1/\2"),
    (r"\\sqrt[ \t]*([A-Za-z0-9]+)", r"\\sqrt{\1}"),
    (rf"(?<=[\d /])({'|'.join(sorted(_UNITS, key=len, reverse=True))}) ?\^-?\d", r"\1"),  # cm^2
    (r"([=:(,\[][ \t]*)-[ \t]+(?=[$\d.])", r"\1-"),
    (r"\b[Nn]egative[ \t]+(?=[$\d.])", "-"),
]
_SIMPLER = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]

_DIGITS = r"(?:(?<![.\w])\.)?\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?(?:\^-?\d+)?"
_NUMBER = re.compile(
    rf"(?P<sign>(?:(?<![\w)\]}}%])[-+])?(?:[$€£¥]{{1,3}}-?)?)"
    rf"(?:(?P<whole>\d+)[ ](?P<part>\d+/\d+)(?![\d/])|(?P<product>{_DIGITS}(?:[ \t]?[*/][ \t]?{_DIGITS})*))"
    rf"(?P<suffix>[ ]?%|[ ](?:percent|{'|'.join(_SCALES)})\b)?",
    re.ASCII,  # a Chinese character is a letter, and may stand before a number or a minus
)
_FACTOR = re.compile(r"((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d+))?(?:\^(-?\d+))?")
_CANONICAL = re.compile(r"-?\d{1,1000}(?:\.\d{1,3000}|/0*[1-9]\d{0,1000})?%?")
# Left or right of a number that is only a part of something: \sqrt{2}, x^2, f(5), 3-5, 18 + 2, 2\pi, 0.\overline{3}.
_PART_BEFORE = re.compile(r"(?:[{\\^_]|\w\(|[\d)\]}%][ \t]*[-+*/]+[ \t]*|[A-Za-z][-+*/]+|\d or )$", re.ASCII)
_PART_AFTER = re.compile(r"[{^_(]|[ \t]?\\|\.\\|[ \t]*[-+*/][ \t]*[\d(\\]|[+*][A-Za-z]")
_WORDS = re.compile(r"-?(?:[^\W\d_]+(?:-(?=[^\W\d_]))?|[\s.,:;'\"$€£¥¢()?%]|/ ?(?=[^\W\d_]))*")

_HASHES = re.compile(r"####[ \t]*(?!\d+[.)][ \t])([-+$€£¥]*[\d.][^\n]*)")  # not the heading "#### 1. Add"
_ANSWER_IS = re.compile(
    r"(?:\banswer\b(?:[ \t]+(?:to|of|for)\b[^\n.:=]{0,40}?)?[ \t]*"
    r"(?:\b(?:is|are|was|(?:would|will|must|should|has[ \t]to)[ \t]+be)\b|:|=)|^[# \t]*(?:final[ \t]+)?answer[ \t]*$)"
    r"(?![ \t]*not\b)[\s:*]*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")


def _math(text: str) -> str | None:
    box = _box(text)
    if box is not None:
        return _value(_simple(box))
    text = _simple(text)
    if hashes := _HASHES.findall(text):
        return _value(hashes[-1])
    if markers := list(_ANSWER_IS.finditer(text)):
        start = markers[-1].end()
        stated = _stated(_SENTENCE_END.split(text[start : start + LIMIT], maxsplit=1)[0])
        if stated is not None:
            return stated or None
    last = None
    for found in _NUMBER.finditer(text):
        last = last if _named(text, found) else found
    if last is None:
        return None
    start = max(text.rfind(end, 0, last.start()) for end in ("\n", ". ", "! ", "? ")) + 1
    if "=" in text[start : last.end()]:
        left, _, right = _SENTENCE_END.split(text[start:], maxsplit=1)[0].rpartition("=")
        return None if re.search(r"\bor [A-Za-z] ?$", left) else _stated(right) or None  # x = 2 or x = -2
    return _read(text, last)


def _simple(text: str) -> str:
    for pattern, replacement in _SIMPLER:
        text = pattern.sub(replacement, text)
    return text


def _right_side(text: str) -> str:
    """What the last "=" leads to; the whole text where several things are equated (x = 1, y = 2)."""
    left, sign, right = text.rpartition("=")
    if not sign or left.endswith(tuple("<>!")) or re.search(r",(?!\d{3})|;|\b(?:and|or)\b", left):
        return text
    return right


def _stated(sentence: str) -> str | None:
    """The value that a sentence begins with; "" if it states two ("5 or 6"), None if it states none."""
    clause = re.split(r",(?!\d{3})|;|\b(?:and|or)\b", sentence, maxsplit=1)[0]
    if re.match(r",? ?(?:(?:and|or) (?:[A-Za-z] ?= ?)?[-$]*\d|[A-Za-z] ?=)", sentence[len(clause) :]):
        return ""
    for part in (_right_side(clause), sentence):
        for found in _NUMBER.finditer(part):
            if not _named(part, found):
                return _read(part, found)
    return _value(sentence) if "\\" in sentence else None


def _named(text: str, found: re.Match[str]) -> bool:
    """Whether the digits belong to a name (H2O, x1), or are what the answer is not."""
    before = text[max(0, found.start() - 4) : found.start()]
    if before == "not ":
        return True
    return re.search(r"[A-Za-z_]$", before) is not None and found[0][0] not in "$€£¥"


def _whole(text: str, found: re.Match[str]) -> bool:
    """Whether the number stands for itself and is not a part of an expression."""
    before, after = text[max(0, found.start() - 8) : found.start()], text[found.end() : found.end() + 8]
    if _named(text, found) or _PART_BEFORE.search(before) or _PART_AFTER.match(after):
        return False
    glued = re.match(r"(/?)([A-Za-z]+)", after)
    if not glued or glued[2].lower() in _UNITS:
        return True
    return len(glued[2]) > (1 if glued[1] else 3)  # 5/day, 5apples; but 5/x, 5xy


def _read(text: str, found: re.Match[str]) -> str | None:
    """A number found in prose, or the expression around it."""
    if _whole(text, found) and (number := _number(found)) is not None:
        return number
    left = re.split(r"\s", text[max(0, found.start() - LIMIT) : found.start()])[-1]
    right = re.split(r"\s", text[found.end() : found.end() + LIMIT], maxsplit=1)[0]
    around = _squeezed(left + found[0] + right)
    if around and _CANONICAL.fullmatch(around) and not _whole(text, found):
        return None  # the operand of a sum: 18 + 2
    return around


def _value(text: str) -> str | None:
    """What a box, a gold or a `####` line says: a number with words around it, else the expression as a string."""
    text = _right_side(text).strip(" \t\r\n$")
    text = re.sub(r"^([-+])[ ]+", r"\1", re.sub(r"^\{([^{}]*)\}$", r"\1", text))
    numbers = [found for found in _NUMBER.finditer(text) if not _named(text, found)]
    if len(numbers) == 1 and _whole(text, numbers[0]):
        before, after = text[: numbers[0].start()], text[numbers[0].end() :]
        if _only_words(before, frozenset("a")) and _only_words(after, _UNITS | {"a"}):
            return _number(numbers[0]) or _squeezed(text)
    return _squeezed(text)


def _only_words(text: str, short: frozenset[str]) -> bool:
    """Whether nothing in `text` computes: no operator, no function, and no single letter (a variable) but `short`."""
    words = re.findall(r"[A-Za-z]+", text.lower())
    known = all(word in short if len(word) == 1 else word not in _FUNCTIONS for word in words)
    return known and _WORDS.fullmatch(text) is not None


def _squeezed(text: str) -> str | None:
    """An expression without its spaces, except between words."""
    text = re.sub(r"\s+", " ", text).strip(" $,;:?").rstrip(".")
    return re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", text) or None


def _number(found: re.Match[str]) -> str | None:
    """A match of _NUMBER, exactly: "1234", "0.5" if it was a decimal, "-7/2" if it was a fraction, "50%"."""
    if len(found[0]) > LIMIT:
        return None
    value = _product(found["part"] or found["product"])
    if value is not None and found["part"]:
        value = value + int(found["whole"]) if value < 1 else None  # 3 1/2, but not 2 9/3
    if value is None:
        return None
    suffix = (found["suffix"] or "").strip()
    value *= _SCALES.get(suffix, 1) * (-1 if "-" in found["sign"] else 1)
    percent = "%" if suffix in ("%", "percent") else ""
    places = value.denominator.bit_length()  # enough, if the decimal ends at all
    if value.denominator == 1 or "/" in found[0] or 10**places % value.denominator:
        return f"{value}{percent}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}".rstrip("0") + percent


def _product(text: str) -> Fraction | None:
    """The value of "2*10^3" or "1/2"; None where a factor is no number, divides by zero or is beyond LIMIT."""
    value = Fraction(1)
    for operator, factor in re.findall(r"([*/]?)\s*([^*/\s]+)", text):
        parts = _FACTOR.fullmatch(factor)
        if not parts:  # 1,2 and 1.2.3
            return None
        digits, exponent, power = parts[1].replace(",", ""), int(parts[2] or 0), int(parts[3] or 1)
        if (len(digits) + abs(exponent)) * abs(power) > LIMIT:
            return None
        base = Fraction(digits) * Fraction(10) ** exponent
        if base == 0 and (operator == "/" or power < 0):
            return None
        value = value / base**power if operator == "/" else value * base**power
        if max(abs(value.numerator), value.denominator) > 10**LIMIT:
            return None
    return value


def _equal(answer: str, gold: str | None) -> bool:
    if gold is None or answer.casefold() == gold.casefold():
        return gold is not None
    if not _CANONICAL.fullmatch(answer) or not _CANONICAL.fullmatch(gold):
        return False
    left, right = Fraction(answer.rstrip("%")), Fraction(gold.rstrip("%"))
    if answer.endswith("%") != gold.endswith("%") and right in (left / 100, left * 100):
        return right == (left / 100 if answer.endswith("%") else left * 100)
    return left == right


# -- choice -----------------------------------------------------------------------------------------------------------

_DRESS = re.compile(r"\\(?:text|math)[a-z]*(?![A-Za-z])|\\[()\[\],;! ]|[*_`${}]|\\(?=[%&#])|<\|\w+\|>|</?[a-z]{1,3}>")
_LEAD = re.compile(  # what may stand between "the answer is" and the letter
    r"(?:(?:the|that|it|is|most|likely|probably|clearly|definitely|certainly|thus|therefore|simply|correct|best|final|"
    r"option|choice|letter|answer|either|both)\b[\s:]*){1,6}",
    re.IGNORECASE,
)
_LETTER = re.compile(r"([(\[\"'<]*)([A-Za-z0-9])([)\]\"'>.:,;!?]*)(?=[\s/&]|$)")
_SECOND = re.compile(
    r"(?:\s*(?:/|&|,|\b(?:or|and)\b)){0,2}\s*(?:(?:option|choice)\s+)?[(\[\"']*([A-Za-z0-9])"
    r"(?=[)\]\"'.,;:!]|\s*$|\s+(?:or|and|is|are|both)\b)"
)
_REFUSED = re.compile(
    r"\s*(?:(?:is|are|was|would be|seems)\s+(?:not|never|incorrect|invalid|wrong|false|unlikely|ruled|eliminated|out)\b"
    r"|isn't|cannot|can't|doesn't|does not)",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"\s*(?:$|[^\w\s]|(?:because|since|is|due|given|based|which)\b)", re.IGNORECASE)
_ENDS = r"(?:[.,;:!)]|\s+[-(]|\s+(?:because|since|as)\b)"  # of an option's words
_CHOSEN = re.compile(
    r"\b(?:answer|option|choice)\b(?:[ \t]+(?:to|of|for)\b[^\n.:=]{0,40}?)?[ \t]*"
    r"(?:\b(?:is|was|(?:would|will|must|should|has to) be)\b|:|=|\n)(?![ \t]*not\b)[\s:]*"
    r"|\b(?:answer|choose|pick|select|go with|going with)\b[\s:]+",
    re.IGNORECASE,
)
_CORRECT = re.compile(
    r"(?:^|[.,;:(]\s*|\b(?:option|choice|that|so|therefore|thus|hence|think|believe)\s+)([A-Za-z0-9])\)?\s+"
    r"(?:is|must be|would be|seems)\s+(?:the\s+|most\s+|likely\s+|only\s+){0,3}(?:correct|right|best|answer)\b",
    re.IGNORECASE | re.MULTILINE,
)
_PICK = re.compile(
    r"\(([A-Za-z0-9])\)|\b(?i:option|choice|letter)\s+([A-Z0-9])\b"
    r"|\b(?i:is|it's|be|thus|therefore|hence|so),?:?\s+([A-Z0-9])(?=[.,;!]?(?:\s|$))"
)


def _choice(text: str, choices: Mapping[str, str] | None) -> str | None:
    options = _options(choices)
    box = _box(text)
    if box is not None:
        return _option(_undressed(box), options) or None
    text = _undressed(text).strip()
    for marker in reversed(list(_CHOSEN.finditer(text))[-1000:]):
        found = _option(text[marker.end() : marker.end() + LIMIT].partition("\n")[0], options, begins=True)
        if found is not None:
            return found or None
    if correct := {letter.lower() for letter in _CORRECT.findall(text)} & options.keys():
        return _only(correct)
    lines = [line for line in text.split("\n") if line.strip()]
    read = {line: _option(line, options) for line in set(lines)}
    found_in = [read[line] for line in lines]
    named = {found for found in found_in if found is not None}
    if len(named) > 1:  # the options repeated, then a letter
        named = {read[line] for line in lines if len(line.strip("()[]. ")) == 1} - {None}
    if named:
        return _only(named) or None if found_in[0] is not None or found_in[-1] is not None else None
    last = re.split(r"[.!?]\s+", lines[-1])[-1] if lines else ""
    picks = [pick for pick in _PICK.finditer(last) if not _REFUSED.match(last, pick.end())]
    return _only({pick[pick.lastindex or 0].lower() for pick in picks} & options.keys())


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def _options(choices: Mapping[str, str] | None) -> dict[str, str]:
    """Lower-case letter -> the option's text as `_option` compares it."""
    if choices is None:
        return dict.fromkeys("abcdefghij", "")
    return {letter.strip().lower(): _wording(_undressed(_plain(words))) for letter, words in choices.items()}


def _undressed(text: str) -> str:
    r"""Without LaTeX and Markdown around letters and words: \text{B} is B, **B** is (B)."""
    text = re.sub(r"\*\*\(?([A-Za-z0-9])[).:]*\*\*", r"(\1)", text)
    return _DRESS.sub("", text)


def _wording(text: str) -> str:
    text = _folded(text).strip(" .;:!?\"'")
    return re.sub(r"^(?:the|an?) (?=.)", "", text)


def _option(text: str, options: Mapping[str, str], begins: bool = False) -> str | None:
    """The option named by `text`, by letter or in words; "" where it names two, None where it names none.

    A letter without a bracket, a full stop or the like counts only where it stands alone, so that "A cat sat" and
    "I think" are none. `begins`: the option's words may be followed by more.
    """
    text = text[:LIMIT].strip()
    lead = _LEAD.match(text)
    rest = text[lead.end() :] if lead else text
    if (letter := _LETTER.match(rest)) and letter[2].lower() in options:
        key, rest = letter[2].lower(), rest[letter.end() :]
        second = _SECOND.match(rest) if "," in letter[3] or re.match(r"\s*(?:/|&|(?:or|and)\b)", rest) else None
        if second and second[1].lower() in options and second[1].lower() != key:
            return ""
        if _REFUSED.match(rest):
            return None
        words = _wording(rest)
        if letter[1] or letter[3] or _GOES_ON.match(rest) or (words and words == options[key]):
            others = {other for name, other in options.items() if name != key} - {"", options[key]}
            return "" if words in others else key
    said = _wording(text)
    same = {key for key, words in options.items() if words and words == said}
    if begins and not same:
        starts = [key for key, words in options.items() if words and re.match(re.escape(words) + _ENDS, said)]
        same = set(sorted(starts, key=lambda key: len(options[key]))[-1:])
    return _only(same)


def _gold_letter(gold: str, choices: Mapping[str, str] | None) -> str | None:
    options = _options(choices)
    gold = gold.strip()
    return gold.lower() if gold.lower() in options else _choice(gold, choices)


# -- code -------------------------------------------------------------------------------------------------------------

_FENCE = re.compile(
    r"^[^\n`]*```+([^\n`]*)\n(.*?)(?:(?P<closed>^[ \t]*```(?!`*[ \t]*\w)|```[ \t]*$|(?=^[ \t]*```))|\Z)",
    re.DOTALL | re.MULTILINE,
)
_DEFINES = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+\w|^\w+[ \t]*=[ \t]*lambda\b", re.MULTILINE)


def _program(text: str) -> str | None:
    """The last closed Python block that defines something: not the usage example after it, nor its output.

    Without one: a block that the token limit cut off, the last block, the text itself if it is a program.
    """
    blocks = [
        (textwrap.dedent(fence[2]).strip("\n"), fence["closed"] is not None)
        for fence in _FENCE.finditer(text.replace("\r\n", "\n"))
        if (fence[1].lower().split() or ["python"])[0] in ("python", "python3", "py")
    ]
    defining = [(code, closed) for code, closed in blocks if _DEFINES.search(code)]
    wanted = [code for code, closed in defining if closed] or [code for code, _ in (defining or blocks)]
    if wanted:
        return wanted[-1] or None
    return text.strip("\n") if "```" not in text and _is_program(text) else None


def _is_program(text: str) -> bool:
    """Whether the whole text is Python and not prose that happens to parse, such as "yes" or "Answer: 42"."""
    if len(text) > 100_000:  # the parser takes a kilobyte of memory per byte of text
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, in code that is not ours
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    acts = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.Call)
    return any(isinstance(node.value if isinstance(node, ast.Expr) else node, acts) for node in body)
