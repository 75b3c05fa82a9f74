r"""Find the answer in a generated text and compare it with the gold answer: `extract` and `grade`.

The rules are tried in this order; the first one that finds something decides.

* math: the last `\boxed{}`; `#### 42`; "the answer is 42"; the last sentence with a number: there
  the result of an equation ("3 * 6 = 18"), else the last number. Numbers are compared exactly, as
  fractions; expressions as strings.
* choice: the last `\boxed{}` that names an option; the last "#### B" at the end, "the answer is
  (B)", "I choose B" or "so B is correct"; a line that is an option. An option is named by its
  letter or by its own words.
* code: the last closed Python block that defines something other than tests, with the blocks it is
  connected to.
* free: the text after the thoughts. Its last line may state the answer alone.

Text inside `<think>` is ignored. A truncated box or thought, two answers ("5 or 6", "18 to 20") and
an equation that states no value ("2x = 10") are not an answer. The rules prefer a missed right
answer to an accepted wrong one. Does not know: models, prompts, data sets, running programs, and
algebra. `grade(…, verify=True)` asks math-verify whether two different expressions are equal.
"""

import ast
import re
import textwrap
from collections.abc import Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any
from unicodedata import normalize

KINDS = ("math", "choice", "code", "free")
LIMIT = 500  # digits of a number; a longer one is compared as text
_ASCII = str.maketrans("−–‐‑—×·÷⁄≈“”‘’。", "-----**//=\"\"''.")


def extract(kind: str, text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the answer in `text` in plain form ("1234", "-1/2", "50%"; "b"; a program), or None if
    there is none.

    `choices` maps each option's letter to its text; without it the letters are a to j.
    Raises ValueError if the kind is unknown, and for no text.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    thoughts, _, said = text.rpartition("</think>")
    said = said.partition("<think>")[0].strip()
    if kind == "free":
        return said or None
    said = said or thoughts.replace("<think>", " ")  # nothing follows the thoughts
    if kind == "choice":
        letters = _choice(said, choices)
        return letters.pop() if len(letters) == 1 else None
    return _math(said) if kind == "math" else _program(said)


def grade(
    kind: str, text: str, gold: str, choices: Mapping[str, str] | None = None, verify: bool = False
) -> bool:
    """Return whether the answer in `text` is `gold`.

    `gold` may carry commas, units, a box or GSM8K's whole solution, or be an option's text. A
    percentage equals its number and its share: 50% is 50 and 0.5. `verify` lets math-verify compare
    expressions that differ as strings; two plain numbers are always compared exactly.
    Raises ValueError if the kind is "code" or unknown, ImportError if `verify` needs math-verify
    and it is missing.
    """
    if kind == "code":
        raise ValueError("--kind: code is graded by running its tests, which minimas does not do")
    answer = extract(kind, text, choices)
    if answer is None:
        return False
    if kind == "free":
        last = _ANSWER_LINE.sub("", answer.rpartition("\n")[2])
        held = (_box(answer) or ("", ""))[0] or answer
        return _bare(gold) in map(_bare, (answer, last, held))
    if kind == "choice":
        return {answer} == _named(gold, choices)
    right = _math(gold) if "####" in gold or _box(gold) else _value(gold)
    if right is None:
        return False
    if not _number(answer) or not _number(right):
        return answer.casefold() == right.casefold() or (verify and _verified(answer, right))
    number, value = Fraction(answer.rstrip("%")), Fraction(right.rstrip("%"))
    return number in (value, value * Fraction(100) ** (answer.endswith("%") - right.endswith("%")))


# math-verify misreads equations, ratios, "…" and words, compares decimals by rounding, and hangs on
# towers of powers.
_NOT_VERIFIED = re.compile(
    r"[=:<>;]|\.|\\[lc]?dots|(?<![\\A-Za-z])[A-Za-z]{2,}|\^[^+\-=,]*\^|\^\{?-?\d{4}|\d{5}!"
)


def _verified(answer: str, gold: str) -> bool:
    """Whether math-verify takes gold / answer for 1. It would take the difference of two tiny
    numbers for 0.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "verify: found no math-verify, expected it from: pip install math-verify"
        ) from error
    if len(answer) > LIMIT or _NOT_VERIFIED.search(f"{answer},{gold}"):
        return False
    return bool(verify(parse("$1$"), parse(rf"$\frac{{{gold}}}{{{answer}}}$")))


_HELD = r"(?:\\.|[^{}\\])*+"
for _depth in range(5):  # braces in braces
    _HELD = rf"(?:\\.|[^{{}}\\]|\{{{_HELD}\}})*+"
_OPENED = r"\\(?:boxed|fbox) ?\{"
_BOX = re.compile(rf"(?s){_OPENED}({_HELD})\}}")
_TWO_BOXES = re.compile(_OPENED + r".{0,100}\}[\s$.]*(?:or|and)[\s$]*$")


def _box(text: str) -> tuple[str, str] | None:
    r"""What the last box holds, and the text after it.

    None without a box, ("", "") if it is cut off or two are offered. An empty \boxed{} quotes the
    instruction.
    """
    opened = [match.start() for match in re.finditer(_OPENED + r"(?!\s*\})", text)]
    if not opened:
        return None
    start = opened[-1]
    box = _BOX.match(text, start)
    if not box or _TWO_BOXES.search(text[max(0, start - 150) : start]):
        return "", ""
    return box[1], text[box.end() :]


# -- math ------------------------------------------------------------------------------------------

_TERM = r"(?<=[\d)}\]%]|\b[A-Za-z])"  # after a number, a bracket or a variable, not after a word
_FRAC = (
    r"(?<![/^])\\[dtc]?frac ?"
    r"(?:\{ ?(-?\d[\d,.]*) ?\} ?\{ ?(\d[\d,.]*) ?\}|(\d) ?(\d))(?! ?[\\^]|\d)"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# From LaTeX and Markdown to plain text, in this order. After it a number is one word.
_REWRITES: list[tuple[str, Any]] = [
    (r"[\u2e80-\u9fff]+|</?answer>", " "),  # they stand next to a number without a space
    (r"\b[A-Z]{2}\\?\$(?=\d)", ""),  # US$18
    (r"(?:\^ ?\{?\\circ\}?|°) ?(?:\\(?:text|mathrm) ?\{ ?[CFK] ?\}|[CFK]\b)?", ""),
    (
        r"\\!|\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]]|\\?[$€£¥]|(?<!\d)\*\*|\*\*(?!-?\d)|`",
        "",
    ),
    (r"\{,\}|(?<=\d)\\,(?=\d{3}(?!\d))", ","),  # 1{,}234 and 1\,234
    (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r" \1 "),
    (r"(?:\\[\\,;: ]|\\q?quad(?![a-z])|~|[^\S\n])+", " "),
    (rf"(?<=\d) ?({'|'.join(_SCALES)})\b", lambda scale: f"*10^{_SCALES[scale[1]]}"),
    (r"\*\*|\^\{(-?\d+)\}", r"^\1"),  # 10**3 and 10^{3}
    (r"√ ?(\w+)|\\sqrt ?(\w)", r"\\sqrt{\1\2}"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r" ?(?:\\?%|\bpercent\b)", "%"),
    (r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=10\^)|(?<=[\d%]) x (?=\d)", "*"),
    (r"(?<=[\w)}\]]) ?([*/^]) ?(?=[\w({\\-])", r"\1"),  # 2 * 3
    (_TERM + r" ([-+]) (?=[\d(\\]|[A-Za-z]\b)", r"\1"),  # x + 5
    (_TERM + r" (?=\\[a-z])", ""),  # 2 \sqrt{3}
    # 3\frac{1}{2} and 3 1/2 are 3&1/2
    (rf"(?<=\d) ?(?={_FRAC})|(?<=\d) (?=\d+/\d+(?![\w/^*]))", "&"),
    (_FRAC, r"\1\3/\2\4"),
    (r"(?:\b[Nn]egative|(?<![\d)%] )\b[Mm]inus) (?=\d)", "-"),
    (r"(?:\bnot|\bcannot|n't)(?: be)? -?\d+(?:[.,]\d+)*", ""),  # it is 18, not 5
    (r"\A\s*- (?=\S+\s*\Z)", "-"),  # "- 5" alone is no list
    (r"(\b(?:is|are|was|be):?) - (?=\d)", r"\1 -"),
    (r" ?(?<![<>!])= ?(-(?= ))? ?", r" = \1"),
]
_END = r"\n|[.!?](?=\s|$)"  # of a sentence
_HASHES = r"#### *(?!\d+[.)] )([-+]?[\d.].*)"  # not the heading "#### 1. Add"
_ANSWER_IS = (
    r"(?im)\banswer\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])[\s:]*"
    r"|^[# ]*(?:final )?answer *\n\s*"
)
_ASIDE = r",(?! ?-?\d)|;| (?:because|since|as|so|which)\b"
# 2 dozen, 5 to ten, 2 and a half
_COUNT = (
    "(?:(?:a )?half|a quarter|dozen|pi|sqrt|hundred|thousand|million|billion|trillion|two|three"
    r"|four|five|six|seven|eight|nine|ten)\b"
)
_WORD = (  # a possible unit
    r"(?:(?!(?:in|for|at|per|on|with|after|is|are|was|equals|makes|gives|leaves)\b)[A-Za-z]+,? )?"
)
_JOINED_BEFORE = re.compile(
    rf"(?:\bor (?:[a-z]+ )?|\d[^\s\d]{{0,3}} {_WORD}(?:(?:and|to|-) )?|{_COUNT} (?:to|and) |\S - )$"
)
_JOINED_AFTER = re.compile(rf"{_WORD}(?:or\b|(?:(?:and|to|-) )?(?:[-+(]*\d|{_COUNT}))")
_MORE_VALUES = r"[,;] \w = "  # x = 1, y = 2
# The last word before an equation. These words do not end one: they belong to it.
_WORDS = (
    r"(?s)\A.*(?:[,;:]|(?<![\\A-Za-z])"
    r"(?!(?:sin|cos|tan|log|ln|and|or|plus|minus"
    r"|times|twice|double|half|of(?= [A-Za-z]\b))\b)[A-Za-z]{2,}) (?!=)"
)
_UNIT_WORD = (  # a word that is no function and no product of two variables
    r"(?<![\\A-Za-z_{])(?!(?:sin|cos|tan|log|and|plus|minus|times|twice|double|half)\b)"
    r"[A-Za-z]{3,}\b"
)
_STATES = re.compile(  # a variable, a word, f(x); else arithmetic without variables
    r"\s*(?:(?:[A-Za-z](?:_?\d+|_\w|_\{\w+\})?|\\[a-z]+|[A-Za-z]{3,})'*|[f-hEPTV]\(-?\w+\)"
    r"|(?:a )?(?:[\d.,+\-*/^!(){}\[\]%&]|\\(?:sqrt|frac|binom|div|pi)(?![a-z])| (?![a-z]))*"
    r"(?: [A-Za-z]{3,})?)\s*"
)
_FACTOR = (  # 1,234.5e6^7
    r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\^-?\d{1,3})?"
)
_NUMBER = re.compile(  # sign, the 3 of 3&1/2, product, percent, attached unit: 5km, 5/day, not 5x
    rf"([-+]?)(?:(\d+)&(?=\d+/\d+\b))?({_FACTOR}(?:[*/]{_FACTOR})*)(%?)"
    r"(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|am|pm|st|nd|rd|th|/[A-Za-z]{3,})?"
)
_UNIT = re.compile(
    rf"(?i)(?:(?!(?:or|and|to|plus|minus|times|over|{_COUNT})\b)(?:[a-z]+-)?[a-z]{{2,}}"
    r"|(?-i:[amghsLNJ]))(?:/[a-z]+)?(?:\^[23])?"
)


def _plain(text: str) -> str:
    """Unicode forms of digits, letters and signs as ASCII: full-width, 10³ as 10^3, 3½ as 3 1/2."""
    text = re.sub("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", ",", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda power: "^" + normalize("NFKC", power[0]), text)
    return normalize("NFKC", re.sub("(?=[¼-¾⅐-⅞])", " ", text)).translate(_ASCII)


def _simple(text: str) -> str:
    text = _plain(text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"(?<=\d )([ckm]?m|ft)\^[23]\b", r"\1", text)  # 18 m^2: the 2 is no number


def _math(text: str) -> str | None:
    if box := _box(text):
        return _value(box[0])
    text = _simple(text)
    if hashes := re.findall(_HASHES, text):
        return _value(hashes[-1])
    sentences = [part for part in re.split(_END, text) if re.search(r"\d", part)]
    sentence, which = "".join(sentences[-1:]), -1  # the last number
    if markers := list(re.finditer(_ANSWER_IS, text)):
        said, *end = re.split(f"({_END})", text[markers[-1].end() :], maxsplit=1)
        doubted = end[:1] == ["?"] or re.search(r"\b(?:wrong|incorrect)\b", said)
        if re.search(r"[\d\\]", said) and not doubted:
            sentence, which = re.sub("^- ", "-", said), 0  # the first one
    if re.search(_MORE_VALUES, sentence):
        return None
    if which == 0:
        sentence = re.split(_ASIDE, sentence, maxsplit=1)[0]
    if " = " in sentence:
        sentence, which = _result(sentence), 0
    words = sentence.split()
    numbers = [i for i, word in enumerate(words) if re.search(r"[\d\\]", word)]
    if not numbers or "=" in words:
        return None
    if len(words) == 1:
        return _value(sentence)
    i = numbers[which]
    before, after = " ".join([*words[max(0, i - 3) : i], ""]), " ".join(words[i + 1 : i + 4])
    if _JOINED_BEFORE.search(before) or _JOINED_AFTER.match(after):
        return None
    return _number(words[i].lstrip("(\"'").rstrip(",.;:!?)\"'"))


def _result(text: str) -> str:
    """The right side of an equation if its left side is a name or arithmetic; else the equation
    as it is.
    """
    left, _, right = text.rpartition(" = ")
    chain = re.sub(_UNIT_WORD, "", re.sub(_WORDS, "", left))
    chain = re.sub(r"(?<=\d) *x *(?=\d)", "*", chain)  # 700x2
    return right if all(map(_STATES.fullmatch, chain.split(" = "))) else text


def _value(text: str) -> str | None:
    """What a box, a gold or a `####` line says: a number with its unit, else an expression
    without its spaces.
    """
    text = _simple(text)
    if not re.search(r",(?!\d{3})|;|\b(?:and|or)\b", text.rpartition(" = ")[0]):
        text = _result(text)
    text = re.sub("^- ", "-", text.strip(" \n,;:").rstrip("."))
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+", text):
        text = text.replace(" ", "")
    number, *units = text.split() or [""]
    value = _number(number.strip("(){}"))
    if value and all(_UNIT.fullmatch(unit.strip("()")) for unit in units):
        return value
    # The space in "1 2" and "no solution" means something.
    return re.sub(r"(?<![A-Za-z])\s+(?!\d)|(?<!\d)\s+(?![A-Za-z])", "", text) or None


def _number(word: str) -> str | None:
    """A number in plain form, "1234", "0.5" for a decimal, "-7/2" for a fraction, "50%"."""
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
    sign = "-" if found[1] == "-" and value else ""
    top, bottom = Decimal(value.numerator), Decimal(value.denominator)
    decimal = Context(prec=2 * LIMIT).divide(top, bottom)
    if "/" in found[3] or Fraction(decimal) != value:
        return f"{sign}{value}{found[4]}"
    return f"{sign}{decimal:f}{found[4]}"


# -- choice ----------------------------------------------------------------------------------------

_CHOSEN = (
    r"(?i)\b(?:answer|option|choice)\b[^\n.:=]{0,40}?(?:\b(?:is|was|be)\b|[:=])\s*|答案\W*[是为]?"
    r"|\b(?:choose|pick|select|think|must be)\b|\b(?:so|thus|hence|therefore)\b,?"
    r"|#### *(?=[^\n]*\Z)"
)
_NEGATED = re.compile(  # "I would not choose", "the answer can't be"; but not "not A so I choose"
    r"(?i)(?:\bnot|\bnever|\bcannot|n['’]t)\b"
    r"(?:(?!\b(?:so|but|and|then|thus|hence|because|only)\b)[^.\n;,:]){0,24}$"
)
_ANSWER_LINE = re.compile(
    r"(?i)^[^a-z]*(?:so |thus |therefore,? )?(?:the )?(?:final |correct )?"
    r"answer(?: is\b|:|\** *:)"
)
_DRESS = r"</?answer>|\\(?:text|math)[a-z]*|\\[()\[\]!]|[*_`${}]|\\(?=[%&#])|<\|\w+\|>"
_LETTER = re.compile(  # "the correct option" "(" B ")." or B -
    r"(?:(?:it|it's|that|is|most|likely|probably|definitely|the|correct|best|final|answer|option"
    r"|choice|letter)\b:? ?){0,6}([(\[]?)([a-z0-9])([)\].:,;!]*(?: -(?= ))?)(?=\s|$)"
)
_SECOND = re.compile(  # (A) or B; A, B
    r"\W*(?:(?:or|and)\W+(?:option )?([a-z0-9])\b|([a-z0-9])(?!\w| \w| \())"
)
_CONTRAST = re.compile(r"\W*(?:not|rather than|instead of) (?:option )?\(?[a-z0-9]\b(?! \w)")
_REFUSED = re.compile(
    r" ?(?:is|are|was|were|would be|must be|seems)? ?"
    r"(?:not|never|wrong|incorrect|false|invalid|unlikely|ruled out)\b"
    r"| ?(?:isn't|can't|cannot|doesn't|does not)"
)
_AFFIRMED = re.compile(" (?:because|since|is (?:the )?(?:correct|right|best|answer))")
_GOES_ON = r"(?:[.;:!](?= )|,? (?:because|since|as|which|due)\b| \()"  # after an option's words


def _choice(text: str, choices: Mapping[str, str] | None) -> set[str]:
    if box := _box(text):
        held, text = box
        if letters := _named(held, choices):
            return letters
    for marker in reversed(list(re.finditer(_CHOSEN, text))[-1000:]):
        said = text[marker.end() : marker.end() + LIMIT].partition("\n")[0]
        letters = _named(said, choices)
        if letters and not _NEGATED.search(text[max(0, marker.start() - 40) : marker.end()]):
            return letters
    lines = set(text.split("\n"))
    return {letter for line in lines for letter in _named(line, choices, alone=True)}


def _named(text: str, choices: Mapping[str, str] | None, alone: bool = False) -> set[str]:
    """The options that `text` names. Only a letter with a bracket or a stop, "(B)" or "B.", may be
    followed by words that are not its option's, so that "A cat sat" and "I think" name none.
    `alone`: not even that one.
    """
    given = choices or dict.fromkeys("abcdefghij", "")
    options = {str(key).strip().lower(): _bare(str(words)) for key, words in given.items()}
    text = _bare(text)
    if (lead := _LETTER.match(text)) and (key := lead[2]) in options:
        rest = text[lead.end() :]
        words = _bare(rest)
        if words in ("", options[key]) or _CONTRAST.match(rest):
            return {key}
        if words in options.values() or _REFUSED.match(rest):
            return set()  # the letter of one and the text of another
        if second := _SECOND.match(rest):
            return {key, second[1] or second[2]} & options.keys()
        closed = lead[3] and (not lead[1] or lead[3][0] in ")]")  # "(A mouse" is not
        if _AFFIRMED.match(rest) or (closed and not alone):
            return {key}
    said = (text, _bare(re.sub(r"^(?:option|choice|answer)\b", "", text)))
    same = {key for key, words in options.items() if words and words in said}
    if same or alone:
        return same
    begun = [k for k in options if options[k] and re.match(re.escape(options[k]) + _GOES_ON, text)]
    return {max(begun, key=lambda key: len(options[key]))} if begun else set()


def _bare(text: str) -> str:
    """Text without LaTeX, Markdown, case, spaces and punctuation around it, and without brackets
    around all of it.
    """
    text = re.sub(r"\\[,;: ]|~", " ", _plain(text))
    text = " ".join(re.sub(_DRESS, "", text).casefold().split()).strip(" .,;:!?\"'")
    bracketed = re.fullmatch(r"\(((?:[^()]|\([^()]*\))*)\)", text)
    return bracketed[1].strip(" .,;:!?\"'") if bracketed else text


# -- code ------------------------------------------------------------------------------------------

# Indent, fence, language, program, closing fence. As in CommonMark, the closing fence has at least
# the length of the opening one and at most three more spaces before it. Models also put a fence
# after other text on the same line.
_BLOCK = re.compile(
    r"(?ms)^( *)[^\n`~]*(`{3,}|~{3,})[ {.]*(\w*)[^\n`]*\n(.*?)"
    r"(^(?:\1)? {0,3}\2[`~]* *$|(?<=[^\s`~])\2 *$|\Z)"
)
_DEFINED = r"(?m)^(?:(?:async +)?def|class) +(\w+)|^(?:from .* )?import +(.+)"
_SOLUTION = r"(?m)^(?:(?:async +)?def|class) +(?!(?i:_?test|main\b|\w*test\b))(?!.*TestCase)"


def _program(text: str) -> str | None:
    """The last closed Python block that defines something other than tests, and the blocks it is
    connected to.

    Without one: a block that the token limit cut off, the last block, or the text itself if it is a
    program.
    """
    found = _BLOCK.findall(text.replace("\r\n", "\n"))
    python = [block for block in found if block[2].lower() in ("", "python", "python3", "py")]
    blocks = [(textwrap.dedent(code).strip("\n"), end) for *_, code, end in python]
    defining = [block for block in blocks if re.search(_SOLUTION, block[0])]
    wanted = [block for block in defining if block[1]] or defining or blocks
    if wanted:
        program = wanted[-1][0]
        for earlier, _ in reversed(blocks[: blocks.index(wanted[-1])]):
            if _connected(program, earlier) or _connected(earlier, program):
                program = f"{earlier}\n\n{program}"
        return program or None
    if found or len(text) > 100_000:  # the parser takes a kilobyte of memory per byte of text
        return None
    try:
        nodes = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    says_only = all(isinstance(node, ast.Expr | ast.AnnAssign | ast.Pass) for node in nodes)
    return None if says_only else text.strip("\n")


def _connected(program: str, other: str) -> bool:
    """Whether `program` uses a name that only `other` defines or imports."""
    defined, own = (
        set(re.findall(r"\w+", " ".join(map(" ".join, re.findall(_DEFINED, code)))))
        for code in (other, program)
    )
    return not (defined - own).isdisjoint(re.findall(r"\w+", program))
