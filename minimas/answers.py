r"""Find the answer in a generated text and compare it with the gold answer: `extract` and `grade`.

The rules of a kind are tried in this order. The first one that finds something decides.

    math    the last box: "\boxed{18}"
            the last statement: "The answer is 18.", and "#### 18" as in GSM8K
            the result of an equation in the last sentence with a number: "So 3 * 6 = 18."
            the only number in the last clause of that sentence: "In the end, 18 are left."
    choice  the last box that names an option: "\boxed{B}", "\boxed{Paris}"
            the last statement: "The answer is (B)", "I choose B", "so B is correct", "#### B"
            the only line that is an option: "B. Paris"
    code    the last closed Python block that parses and defines more than tests and examples, with
            the blocks that it uses or that use it
    free    the text after the thoughts; its last line may state the answer, alone or in a box

An option is named by its letter or by its own words. Numbers are compared exactly, as fractions,
and expressions are compared as strings. `grade(…, verify=True)` asks math-verify whether two
different expressions are equal.

Text inside `<think>` is ignored. A truncated box or thought, two answers ("5 or 6", "18 to 20"), a
question, an inequality and an equation that states no value ("2x = 10") are not an answer. What a
text takes back ("Wait, it is 8") does not count. In doubt, the rules miss a right answer rather
than accept a wrong one. This file runs no programs and does no algebra.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Mapping
from decimal import Context
from fractions import Fraction
from itertools import islice
from symtable import symtable
from unicodedata import normalize

KINDS = ("math", "choice", "code", "free")
Choices = Mapping[str, str] | None  # each option's letter and text
LIMIT = 500  # digits of a number; a longer one is compared as text


def extract(kind: str, text: str, choices: Choices = None) -> str | None:
    """Return the answer in `text`, or None if there is none.

    The answer has a plain form, for example "1234", "-1/2" or "50%", "b", or a program. `choices`
    maps each option's letter to its text; without it the letters are a to j. Raises ValueError if
    the kind is unknown, but never because of `text`.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind: found {kind!r}, expected math, choice, code or free")
    thoughts, _, said = text.rpartition("</think>")
    said = said.partition("<think>")[0].rstrip()
    if kind == "free":
        return said.strip() or None
    said = said or thoughts.replace("<think>", " ")  # if nothing follows the thoughts
    if kind == "choice":
        letters = _choice(said, choices)
        return letters.pop() if len(letters) == 1 else None
    return _math(said) if kind == "math" else _program(textwrap.dedent(said))


def grade(kind: str, text: str, gold: str, choices: Choices = None, verify: bool = False) -> bool:
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
        last = answer.rpartition("\n")[2]
        stated = _box(last)[0] or re.sub(_ANSWER_LINE, r"\1", last)
        return _whole(gold) in map(_whole, (answer, stated))
    if kind == "choice":
        return {answer} == _named(gold, choices)
    right = _math(gold) if re.search(r"####|\\f?box", gold) else _value(gold)
    variables = set(re.findall(_VARIABLE_IS, f"{text}\0{gold}"))
    if right is None or len(variables) > 1:  # x = 5 is not y = 5
        return False
    if _number(answer) and _number(right):
        number, value = (Fraction(word.rstrip("%")) for word in (answer, right))
        shares = answer.endswith("%") - right.endswith("%")
        return number in (value, value * Fraction(100) ** shares)
    return answer == right or (verify and _verified(answer, right))


# math-verify misreads equations, ratios, "…", words and primes, ignores the base of 101_2, takes x
# for X, compares decimals by rounding, and hangs on towers of powers and on long texts.
_NOT_VERIFIED = r"""(?x) [=:<>;A-Z'] | \. | \d_ | \\frac\ ?\d\d\d | \\[lc]?dots
    | (?<![\\A-Za-z])[A-Za-z]{2,} | \^[^+\-=,]*\^ | \^\{?-?\d{4} | \d{5}! | .{999}"""


def _verified(answer: str, gold: str) -> bool:
    """Return whether gold / answer is 1, according to math-verify.

    It compares the quotient, because math-verify takes the difference of two tiny numbers for 0.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "verify: found no math-verify, expected it from: pip install math-verify"
        ) from error
    if re.search(_NOT_VERIFIED, f"{answer},{gold}"):
        return False
    quotient = re.sub(r"\^(-?\d+)", r"^{\1}", rf"$\frac{{{gold}}}{{{answer}}}$")
    return bool(verify(parse("$1$"), parse(quotient)))


# -- text ------------------------------------------------------------------------------------------

_ASCII = str.maketrans("−–‐‑—×·÷⁄≈“”‘’、【】「」", '-----**//=""\'\',[]""')
_UNICODE = {
    "(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))": ",",  # thin spaces: 1 234
    "[⁰¹²³⁴-⁹⁻]+": r"^\g<0>",  # 10³ is 10^3
    "(?=[¼-¾⅐-⅞])": " ",  # 3½ is 3 1/2
    "[负負]|マイナス": "-",
    # "not", before a number and after one
    r"(?i)(?:不是|并非|並非|\bне|\bnão é|\bnon è) ?(?=-?\d)": "not ",
    r"(?<=\d)[가이]? ?(?:아닙|아니)|(?<=\d)(?:では|じゃ)(?:あり|な)": " isn't ",
    "。": ". ",
}
_FONT = r"\\(?:text|math|m?box|emph|underline|bf|rm|bm|boldsymbol|displaystyle|[lL]arge)[a-z]*\b"
_BRACED = r"(?:\\.|[^{}\\])*+"
for _depth in range(5):  # braces in braces
    _BRACED = rf"(?:\\.|[^{{}}\\]|\{{{_BRACED}\}})*+"
_OPENED = r"\\(?:boxed|fbox) ?\{(?!\s*\})"  # an empty \boxed{} quotes the instruction
# Signs that a box is only a part of the answer. The text begins inside the box before the last one,
# and "@" stands for the \boxed of the last box.
_PART = rf"""(?xs)  # \boxed{{5}} hours and \boxed{{30}} minutes
    \A({_BRACED})\}} (?:\\q?quad|[^\w=])* (?:text\w*\W*)?
        (?:(?!(?:then|but|so|no|now|wait)\b)[a-z]+(?:\\q?quad|[^\w=])*)? (?:(?:and|to)\b[^\w=]*)?
        (?:\w+\ *=\ *)? \$? @\{{(?!\1\}})
    | (?: \bor[\s$}}]* (?:\w+\ *=\ *)?  # 18 or \boxed{{20}}
        | (?:[\d)=$]\s*- | [+/×÷^<≤≥≠] | (?<=[^-=\n])> | \w\s*\*  # 1 + \boxed{{42}}
          | \\(?:times|cdot|div|pm|[gln]eq?(?:slant)?)(?![a-z])) \s*
        | (?: \}} | \\sqrt | \^ | _ ) \{{ \s*  # \frac{{1}}{{\boxed{{12}}}}
        | [(\[]\s*-?\d[\d.]*,\s*  # (12, \boxed{{13}})
        | \b(?:not|never|isn't|than|cannot|can't|negative|minus|twice|half\ of)\ (?:be\ )?
        | [-\d] ) \$? @\{{  # -\boxed{{5}}
    | @\{{{_BRACED}\}} (?: [a-zA-Z](?![a-zA-Z])  # \boxed{{5}}x
        | _\{{?\d | [.,:]\d | \ \d+/\d  # \boxed{{12}}.5
        | ,\s*-?\d[\d.]*\s*[)\]] | [ $.]*\?
        | [ $.,;(]* (?:\\text\w*\{{)? \ * (?:(?:or|possibly|maybe|perhaps)\b[\s$}}]*)+ [\d\\]
        | [ $]* (?:[a-z]+\ )? and\ (?:\d|a\ half|\\frac)  # \boxed{{18}} hours and 30 minutes
        | [ $]* (?:hours?|hrs?|minutes?|feet|foot|ft|pounds?|lbs?|years?|weeks?|days?),?\ \d
        | [ $]* (?:isn't|wasn't|(?:is|was)\ (?:not|wrong|incorrect|false))\b
        | [ $]* remainder\ \d
        | (?:[ $~]|\\[,;:\ ]|\\text\w*\{{)* (?: \^(?!\{{?\\circ)
          | (?:to\ |[-–—+/*×÷])\ ?(?:[\d(\\]|[a-zA-Z]\b)  # \boxed{{42}} + 1
          | \\(?:pi|sqrt|[dt]?frac|times|cdot|div|ln|log|sin|cos|tan|[pb]?mod)(?![a-z])
          | (?:[<≤>≥]|\\[gl]e(?:q|qslant)?)[ ]
          | (?:hundred|thousand|[a-z]+illion|dozen)\b ))"""
_ANSWER = r"""(?x: (?<![A-Za-z]) (?<!wrong\ )(?<!incorrect\ )(?<!false\ )
    (?:answer|ans\b|respuesta|r[ée]ponse|antwort|resposta|risposta
    |ответ|jawaban|cevap|đáp\ án|câu\ trả\ lời|الإجابة|الجواب|उत्तर|答[案え]?|正解|정?답)
    (?!\ (?:choices|options)))"""
_IS = r"""(?x: (?:\b(?:is|was|be|es|est|ist|lautet|adalah|là|é|è)\b|(?<=nswer)'s\b|[是为為は은→➜]
    |[-=]>|[:=]|\ -\ )[\s:]*)"""


def _plain(text: str) -> str:
    """Return a text with full-width and similar digits, letters and signs replaced by ASCII."""
    if text.isascii():
        return text  # answers to MedQA are graded twice as fast (2-core Intel Xeon)
    return normalize("NFKC", _rewritten(text, _UNICODE)).translate(_ASCII)


def _rewritten(text: str, rules: Mapping[str, str]) -> str:
    """Return the text after replacing each pattern in turn."""
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text


def _box(text: str) -> tuple[str | None, str]:
    """Return what the last box holds, and the text after it.

    Returns None and the whole text if there is no box, and "" twice if the box is cut off or only a
    part of the answer.
    """
    parts = re.split(_OPENED, text)
    if len(parts) == 1:
        return None, text
    box = re.match(rf"(?s)({_BRACED})\}}(.*)", parts[-1])
    if not box or re.search(_PART, f"{parts[-2]}@{{{parts[-1]}"):
        return "", ""
    return box[1], box[2]


# -- math ------------------------------------------------------------------------------------------

_TERM = r"(?:(?<=[\d)}\]%])|(?<=\b[A-Za-z])|(?<=\d[A-Za-z]))(?<!'s)"  # after a number or variable
_FRAC = r"""(?x: (?<![/^])\\[dtc]?frac\ ?
    (?:\{\ ?(-?\d[\d,.]*)\ ?\}\ ?\{\ ?(\d[\d,.]*)\ ?\}|(\d)\ ?(\d))
    (?!\ ?[\\^]|[\d(]|\ ?(?:(?![mghsL]\b)[A-Za-z]|[xyz]{2,3}|ab|bc|ac|abc|mn|pq)\b))"""
# A number that is denied or supposed
_DENIED = r"""(?ix) (?:
        (?:\bnot|\bcannot|n't|\bno\ longer|\brather\ than|\binstead\ of  # it is not 5
          |\bno\ es|n'est\ pas|\bnicht)
        (?:\ (?:possibly|exactly|really|quite|simply|just))?(?:\ be|\ equal(?:\ to)?)?
      | \b(?:doubt|deny|unlikely|impossible|nobody|no\ one|not\ think|not\ believe
          |\w+n't\ (?:think|believe)|(?:false|wrong|not\ true|not\ the\ case)\ (?:to|that|answer)
          |suppose|assum(?:e|ing)|imagine|pretend|let(?:'s|\ us)\ say|if|unless|whether)\b
        [^,;:.=()\n\d]{0,40}?  # I doubt that it is 5; if it is 5, …
      | \b(?:false|wrong|incorrect)\ answer\b[^,;.=\n\d]{0,40}? )  # Wrong answer: 5
    \ -?\d+(?:[.,]\d+)*(?:,?\ but(?=\ [-\d]))?"""
# From LaTeX and Markdown to plain text, in this order. Afterwards every number is one word.
_REWRITES = {
    r"""(?x) \b(?:[A-Z]{1,2}\\?\$|Rs\.?\ ?)(?=\d) | \\?[$¢-¥\u20a0-\u20bf]  # US$18
    | (?:\^\ ?\{?\\circ\}?|°)\ ?(?:\\(?:text|mathrm)\ ?\{\ ?[CFK]\ ?\}|[CFK]\b)?  # 18 °C
    | \\! | \\(?:left|right)(?![a-z]) | \\[()\[\]] | ` | __
    | (?<!\d)\*\* | \*\*(?!-?\d)  # **18**, but not 2**3
    | (?<![\w*)}])\*(?=[^\s*]) | (?<=[^\s*])\*(?![\w*({\\ -])  # *18*
    """: "",
    # 1,234, 1{,}234, 1\,234 and 1'234; but not 0,123 and 1234,567
    r"(?<!\d{4})(?<!\b0)(?<=\d)(?:,|\{,\}|\\,|['_])(?=\d{3}(?!\d))": "",
    rf"{_FONT} ?\{{([^{{}}]*)\}}": r" \1 ",
    rf"{_FONT}|(?:\\[\\,;: ]|\\q?quad(?![a-z])|~|[^\S\n])+|</?[a-z]+>|<\|\w+\|>": " ",
    # Chinese, Japanese and Korean may touch a number; but 5万 is not 5.
    r"""(?x) (?:(?<!\d)(?<!\d\ )|(?![万萬亿億兆千百十半点點打ダ만억조천백십]))
      [\u2e80-\u9fff\uac00-\ud7a3]+""": " ",
    r"\A(-?\d{1,3}) (\d{3})(?: (\d{3}))?\.?\Z": r"\1\2\3",  # 12 345
    r"(?<=\d) ?hundreds?\b": "e2",
    r"(?<=\d) ?thousands?\b": "e3",
    r"(?<=\d) ?millions?\b": "e6",
    r"(?<=\d) ?billions?\b": "e9",
    r"(?<=\d) ?trillions?\b": "e12",
    r"\*\*|\^\{(-?\d+)\}": r"^\1",  # 10**3 and 10^{3}
    r"(?<=\d)_\{(\d+)\}(?!\d)": r"_\1",  # 101_{2}
    r"√ ?(\w+)|\\sqrt ?(\w)": r"\\sqrt{\1\2}",
    r"\\[dtc]frac(?![a-z])": r"\\frac",
    r" ?(?:\\?%|\bper ?cent\b)": "%",
    r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=10\^)|(?<=[\d%]) x (?=\d)": "*",
    r"(?<=[\w)}\]]) ?([*/^]) ?(?=[\w({\\-])": r"\1",  # 2 * 3
    r"(?<=\d)\*10\^(?=-?\d)": "e",  # 2*10^3
    rf"{_TERM} (?:([-+]) (?=[\d(\\]|[A-Za-z]\b)|(?=\\[a-z]))": r"\1",  # x + 5, 2 \sqrt{3}
    rf"(?<=\d) ?(?={_FRAC})|(?<=\d) (?=\d+/\d+(?![\w^*]))": "&",  # 3 1/2 is 3&1/2
    _FRAC: r"\1\3/\2\4",
    r"(?m)^ *=> *": "",  # an arrow before the answer
    _DENIED: "",
    r" ?(?:(?<![<>!])=|\\approx(?![a-z])) ?": " = ",
    # "minus 5"; "- 5" alone is not a list
    r"(?i)(?:\bnegative|(?<![\d)%] )\bminus) (?=\d)|\A\s*- (?=\S+\s*\Z)": "-",
    r"(?:(?<=\b(?:is|be|'s) )|(?<=(?:are|was) )|(?<=[:=] ))- (?=\d)": "-",  # it is - 5
    r"(?<=\d )([ckm]?m|ft|units)\^[23]\b": r"\1",  # 18 m^2: 2 is not a number
}
_END = r"\n|(?<=[.!?])\s(?!=)"  # the end of a sentence
_ANSWER_IS = rf"""(?xim) (?:{_ANSWER} [^\n.:=]{{0,40}}? {_IS}  # The answer is 18.
      | ^[#\ ]*(?:final\ )?answer\ *\n\s*  # a heading
      | \#{{4}}\ *(?=[-+]?[\d.])(?!\d+[.)]\ ))  # GSM8K's "#### 18"; not "#### 1. Add"
    (?=([^\n]{{0,200}}[\d\\][^\n]{{0,200}}))  # a value, and neither a question nor refuted
    (?!(?:[^\n.?]|\.\d){{0,200}}(?:\?|\b(?:wrong|incorrect)\b))"""
# A name and its equals sign
_NAME_IS = r"[A-Za-z]\S{0,20} = "
# Where a statement goes on about something else: "18, as 3 * 6 = 18", "18 (eighteen)"; but
# ", or 43", "(base 8)", "(at noon) or 43" and "; 43" change the answer.
_ASIDE = rf"""(?xi: (?! [,;]\ ?(?:\w+:\ )?[-+]?\d | \W*(?:in\ )?(?:base|mod|hex|octal|binary)
      | \W*(?!(?:because|since|as|so|which)\b)(?:\w+\ ){{0,2}}?
        (?:or|and|but|also|possibly|maybe|perhaps|could|might|alternatively)\b[^.\n]{{0,40}}?\d
      | \ \([^()]*\)\ *(?:[-+*/]|\b(?:or|and|plus|minus|times)\b)[^.\n]{{0,40}}?\d )
    (?: ,(?!\ ?(?-x:{_NAME_IS})) | !\Z | ; | \ \( | \ -\  | \ (?:because|since|as|so|which)\b ))"""
# Phrases that take back everything before them
_TAKEN_BACK = r"""(?xi) (?<=[.!?}$*\n,;-])\ ?  # 5. Wait, that is wrong. It is 8.
      (?:(?:oh,?\ )?(?:no,?\ )?wait|oh|oops|hmm+|(?:i'm\ |i\ am\ )?sorry|(?:i\ )?apolog\w+
      |hold\ on|actually|in\ fact
      |(?:but|however|though),?\ (?:(?:it|that|the\ (?:\w+\ )?(?:answer|result|total|value))
        (?:'s|\ is|\ was)\ )?(?:actually|really|in\ fact)
      |(?:scratch|strike)\ that|i\ take\ \w+\ back|i\ mean|make\ that|correction|edit(?=:)
      |my\ (?:mistake|bad|error)|on\ second\ thought|rather(?!\ than)|no(?=[,.!])
      |let\ me\ (?:re|double|correct|fix)\w*|(?:corrected|revised|updated)(?=\ (?:\w+\ )?answer)
      |(?:(?:but|note:)\ )?i\ (?:made\ an?|was\ wrong|mis\w+|forgot)
      |(?:it\ (?:seems|looks|appears)|there\ (?:was|is|seems)|upon\ (?:re|further|closer))
        [^.\n]{0,50}?\ (?:error|mistake|mis\w+|realiz\w+|notic\w+)
      |(?:that|it|this)(?:\ (?:answer|result))?(?:'s|\ is|\ was)\ (?:wrong|incorrect|a\ mistake
        |not\ (?:right|correct))
      |(?:that|it|this)\ (?:is|was)n't\ (?:right|correct))\b
    | (?<=[.!?\n])\ ?  # 5. Or maybe 8.
      (?:or|maybe|perhaps|possibly|alternatively|otherwise)\b (?=[^.\n]{0,100}\d)
    | (?<=[.!?\n;])\ ?  # 5. But it should be 8 cm. 5. But taxed: 8.; not: 5. But this needs 8 days.
      (?:but|however|although|except)\b (?=[^.\n]{0,100}\d) (?=[^.\n]{0,100}
        (?: \b(?:it|it's|that's|this\ is|so|also|answer|[a-z]+s\ to|be|could|might|should|may|no
            |think|gives|get|right|correct|actually|rather|total|result)\b
          | \d(?![\w%]*\ (?!(?:is|was|if|for|with|after|when|because|instead)\b)[a-z]) ))"""
# Where the last clause of a sentence begins: "In the end, 18 are left", "the total is 18"
_CLAUSE = r"""(?x) \b[a-z]{1,20}\ [a-z]{1,20}[,;:]\  | [,;:]\ (?![-+]?\d)
    | \b(?:then|because|[Ss]tep\ \d+(?=:))\b | \b(?:is|are|was|equals)\ (?=[-+]?\d)"""
# Words after the value of a statement: "18 apples in 3 days"
_LATER = r"""(?x) (\b\d\S{0,30}(?:\ [A-Za-z]+,?){0,9}?)
    \ (?:in(?!\ (?:base|hex|oct|bin))|for|at(?!\ (?:the\ )?(?:least|most))|per(?!\ mil)|on|with
    |after|every|each|out\ of(?!\ \d)|so|which|because|since)\b (?!.*\b(?:and|or|but)\b).*"""
# Words that count or calculate with the number before them
_COUNT = r"""(?x: \b(?: (?:a\ )?half | a\ quarter | do(?:[zc]en|uzaine)\w* | d[uú]tzend | score
    | gross | grand | hundreds? | hunderte? | thousands? | thou | tausende? | tusen\w* | duizend
    | mil | mille | mila | tys\w* | ribu | nghìn | ngàn | milliard\w* | bn | mn | mio | mln | mrd
    | (?:m|b|tr|quadr|quint|sext)(?:ill[ij]?[oóõ]|il[ijy][oóõ]|ilh[ãõ])\w* | juta | triệu
    | lakhs? | lacs? | crores?  # 5 dozen
    | two | three | four | five | six | seven | eight | nine | tens? | zero  # 5 to ten
    | (?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie)ths?  # 5 tenths
    | (?:hundred|thousand|[a-z]+illion)ths? | thirds? | quarters | halves | per\ ?mill?e?
    | squared | cubed | doubled | tripled | halved | factorial | below
    | mod | (?:in\ )?(?:base|hex|octal) | (?:in\ )?binary  # 5 in base 8
    | pi | sqrt | alpha | beta | gamma | theta | lambda | phi | omega | (?-i:[xyz]{2,3}) )\b)"""
# Words before a number that change it
_CHANGES = r"""(?x: \b(?: half | twice | thrice | double | triple | quadruple | squared? | cubed?
    | root | power | log | ln | exp | sqrt | mod | modulo | gcd | lcm | abs | ceil | floor
    | (?:arc)?(?:sin|cos|tan|cot|sec|csc)h? | absolute\ value\ of  # twice 5
    | and | plus | minus | times | point | choose | less | to\ the | added\ to | from
    | (?:divided|multiplied|divisible)\ by | one | eleven | twelve | [a-z]+teen
    | (?:twen|thir|for|fif|six|seven|eigh|nine)ty  # ten plus 5
    | than | below | under | over | above | beyond | within | near | exceed\w* | least | most
    | minimum | maximum | max | as\ \w+\ as | until  # more than 5
    | (?<!add\ )(?<!adds\ )(?<!comes\ )(?<!sums\ )up\ to
    | mehr\ als | weniger\ als | m[aá]s\ (?:de|que) | menos\ (?:de|que) | ma[iy]or\ que | menor\ que
    | plus\ (?:de|que) | moins\ (?:de|que) | более | менее | больше | меньше
    | never | not | neither | nor | hardly | barely | scarcely | rarely | seldom | but | except
    | (?:any|every|no)thing\ but | excluding | barring | besides | without  # all but 5
    | step | question | problem )\b)"""
# Forms that leave open which number is the answer
_UNCLEAR = rf"""(?xi) \b(?:or|maybe|perhaps|possibly)\b  # 5 or 6
    | [<>≠≤≥±≡] | != | \+/- | \\(?:[gln]eq?|pm|equiv)(?![a-z])  # x > 5
    | \ =\   # 2x = 10
    | \?\W*\Z  # is it 5?
    | \bat\ (?:the\ )?(?:least|most)\b  # 5 at most
    | \d\ +[:∶]  # 3 : 5
    | \d[^\s\d]{{0,3}}\ ?(?:[-+*/÷]|\\times)\s*\Z  # cut off: 3 + 4 = 7 +
    | \d\S{{0,20}}\ (?:times\ the|(?:[a-z]+\ )?(?:plus|minus|(?:divided|multiplied)\ by))\b
    | {_CHANGES}\ [^\w\s]*\d  # up to 5
    | \b(?!(?:total|average|mean|amount|profit|loss|price|cost|value|sum|speed|rate|score|distance
        |length|height|area|volume|weight|age|balance|change|discount)\ )
      [^\W_]+\ of\ [^\w\s]*\d  # the factorial of 5
    | \d[^\s\d]{{0,3}}\   # 5 dozen, 5 feet six, 5 to ten
      (?:(?!(?:in|for|at|per|on|with|after|is|are|was|equals|makes|gives)\b)[a-z]+,?\ )?
      (?:(?:and|to|to\ the|by|plus|minus|times|through|up\ to|of|over|divided\ by|vs\.?|point
        |[-~&])\ )?
      (?:[-+(~]*\d | {_COUNT} | (?<=and\ |lus\ |nus\ )(?:an?|one)\b)
    | \d\ (?-i:(?![mghsLNJ]\b|a\ [a-z])[A-Za-z]\b(?!'))  # 5 x, but 5 m and 5 a week
    | \d\ [^\W\d_A-Za-zÀ-ɏ]  # 5 тысяч
    | \d\S{{0,20}}\ (?:isn't|wasn't|cannot|can't|(?:is|was)\ (?:not|wrong|incorrect|false)\b)"""
# Two values: "x = 1, y = 2"
_TWO_VALUES = rf"{_NAME_IS}[^=]*?(?:[,;]|\b(?:and|or|when|if|where|for|at|with)\b) ?\b{_NAME_IS}"
# Where an equation begins: "2x = 10, so x = 5"
_BREAK = r"""(?x) ,(?!\ ?[a-z][,)]) | [;→⇒] | :(?![A-Za-z]\b)
    | \\(?:Rightarrow|rightarrow|implies|to)(?![a-z])
    | \b(?:so|then|thus|hence|therefore|gives|means|get|have|that|is|are|was|since|because)\b"""
# Parts of a name on the left side of an equation: x_1, f(3), (x, y), "Cost (in dollars)"
_INDEX = r"""(?x) _\{[^{}]*\} | _\w | (?<=\b[A-Za-z])\d+\b | (?<=\b[f-hpqCEPSTV])\([^()]*\)
    | ^\s*\([a-z](?:,\ ?[a-z])+\)\s*$
    | (?<=[a-z]\ )\((?:[a-z]{2,}\ ?)+\) | \bm(?=\\angle)"""
# Signs that the left side of an equation is more than a name: "2 * width", "half the number"
_OPERATOR = r"""(?x) [+*^!|:(){}\[\]<>≤≥≠±√] | /(?![A-Za-z]) | (?<![A-Za-z])- | -(?![A-Za-z])
    | (?<=\w)\ x\ (?=\d) | (?<=\d)x(?=\d) | (?<=[\d%])\ of\b | \\(?:sum|prod|int|lim)
    | (?<![A-Za-z])(?:frac|sqrt|binom|div|(?i:half|twice|double|triple|third|quarter|square[ds]?
      |cube[ds]?|root|log|ln|sin|cos|tan|mod|plus|minus|negative|times|over|divided|percent
      |reciprocal|(?:more|less)\ than)|(?:two|three|four|five|six|seven|eight|nine|ten)(?=\ [a-z]\b)
      |[xyz]{2,3}|ab|bc|ac|abc|mn|pq)\b
    | ^\W*(?i:let|suppose|assume|if|when|for|where|try|check)\b"""  # let x = 5
# Variables such as x, theta and the x of 5x, but not "a", the sign in 2 x 3, or a unit: 5g, 5km.
_VARIABLE = r"""(?x) (?<![A-Za-z\\'])(?!I\b|[aA]\ \w|x\ ?\d|(?<=\d)[gL]\b|(?<=\d\ )[gL]\b)
      [A-Za-z](?![A-Za-z'])
    | (?<=\d)(?!(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|hrs?|mins?|mph|am|pm|st|nd|rd|th)\b)[A-Za-z]{2,}
    | \b(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)\b"""
# "x = 5" at the end of a text or a gold answer
_VARIABLE_IS = r"\b([A-Za-z]) *= *[^=\n\0]*(?:\0|\Z)"
_EXACT = Context(prec=5 * LIMIT)  # digits, enough for every decimal that `_number` accepts
_DECIMAL = r"(?:\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
# Sign, the 3 of 3&1/2, base, power, divisor, percent, attached unit: 5km, 5/day, not 5x.
_NUMBER = rf"""(?x) (?=.{{1,{LIMIT}}}\Z) ([-+]?) (?:(\d+)&(?=\d+/\d+\b))? ({_DECIMAL})
    (?:\^(\d{{1,3}}|(?<=\b10\^)-\d{{1,3}}))? (?:/(?=\S*[1-9])({_DECIMAL}))? (%?)
    (?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|am|pm|st|nd|rd|th|[gL]|/[A-Za-z]{{3,}})?"""
_UNIT = rf"""(?xi) \(? (?:(?!(?:or|and|to|plus|minus|times|over|more|less|ab|bc|ac|abc|mn|pq|uv|gh
      |sin|cos|tan|log|ln)\b|{_COUNT})
    (?:[a-z]+-)?[a-z]{{2,}}|(?-i:[amghsLNJ])) (?:[/*][a-z]+)* (?:\^[23])? \)?"""


def _math(text: str) -> str | None:
    text = re.split(_TAKEN_BACK, text)[-1]
    held, rest = _box(text)
    if held is not None:
        value = _value(held)
        # If a statement after the box gives another value, there are two answers.
        return None if re.search(_ANSWER_IS, rest) and _math(rest) != value else value
    text = _rewritten(_plain(text), _REWRITES)
    said = re.findall(_ANSWER_IS, text)
    clause = re.split(f"{_END}|{_ASIDE}", said[-1])[0] if said else _last(_END, text)
    answer = _result(clause)
    answer = re.sub(_LATER, r"\1", answer) if said or answer != clause else _last(_CLAUSE, clause)
    if re.search(_UNCLEAR, answer):
        return None
    numbers = re.findall(r"(?<!\S)[(\"']*+(\S*(?:\d|\\[a-z])\S*)", answer)
    if numbers == answer.split():
        return _value(answer)
    return _number(numbers[0].rstrip(",.;:!?)\"'")) if len(numbers) == 1 else None


def _last(separator: str, text: str) -> str:
    """Return the last part of a text that has a digit."""
    return "".join(re.findall(r"(?m)^.*\d.*", re.sub(separator, "\n", text))[-1:])


def _result(text: str) -> str:
    """Return the right side of an equation whose left side is a name or arithmetic, else `text`."""
    left, _, right = text.rpartition(" = ")
    chain = re.split(_BREAK, left)[-1].split(" = ")
    # Only the ends of a chain: in "Profit = income - cost = 20 - 8 = 12", the middle is a formula.
    stated = all(map(_states, (chain[0], chain[-1])))
    return right if stated and not re.search(_TWO_VALUES, text) else text


def _states(left: str) -> bool:
    """Return whether the left side of an equation is a name or arithmetic without variables."""
    left = re.sub(_INDEX, "", left)
    variables = re.findall(_VARIABLE, left)
    if not re.search(r"\d", left):
        return len(variables) < 2 and not re.search(_OPERATOR, left)
    return not variables and all(
        re.search(r"\d|pi\b|^\W*$", term) for term in re.split(_OPERATOR, left)
    )


def _value(text: str) -> str | None:
    """Return the value in a box, a gold answer or a `####` line.

    It is a number, whose unit is dropped, or else an expression without its spaces.
    """
    text = _result(_rewritten(_plain(text), _REWRITES)).rstrip(" \n,;:.")
    text = re.sub(r"^[A-Za-z ]+(?::| is) *(?=-?[\d.])", "", text)
    number, *units = text.split() or [""]
    value = _number(number.strip("(){}"))
    if value and all(re.fullmatch(_UNIT, unit) for unit in units):
        return value
    text = re.sub(r"(?<!\\)\b(?:[A-Z][a-z]+|NO|[A-Z]{3,})\b", lambda word: word[0].lower(), text)
    # The space in "1 2" and "no solution" stays, because it has a meaning.
    return re.sub(r"(?<![A-Za-z])\s+(?!\d)|(?<!\d)\s+(?![A-Za-z])", "", text) or None


def _number(word: str) -> str | None:
    """Return a number in plain form, such as "1234", "0.5", "-7/2" or "50%", or None."""
    found = re.fullmatch(_NUMBER, word)
    if not found:
        return None
    sign, whole, base, power, divisor, percent = found.groups("")
    value = Fraction(base) ** int(power or 1) / Fraction(divisor or 1) + int(whole or 0)
    if max(value.numerator, value.denominator) > 10**LIMIT:
        return None
    decimal = _EXACT.divide(value.numerator, value.denominator).normalize(_EXACT)
    plain = str(value) if divisor else f"{decimal:f}"
    return f"{'-' if sign == '-' and value else ''}{plain}{percent}"


# -- choice ----------------------------------------------------------------------------------------

# Words before an option; group `said` holds the option and the rest of its line
_CHOSEN = rf"""(?ixm) (?: {_ANSWER}  # the answer is (B), 答案选B
      (?:(?!\ \(?(?-i:[A-J])\b)[^\n.:=]){{0,40}}?(?:{_IS}|(?<=[案え])(?=\W*[选選]))
    | ^[\#\ *]*(?:final\ )?answer[*\ ]*\n\s*  # a heading
    | \b(?:(?:correct|right|best|final|my)\ (?:option|choice)|selected)\W*[:=]
    | \b(?:option|choice|statement|solution|opci[óo]n|alternativa)
      (?:\ \w{{2,}}){{0,3}}\ (?:is|was|be|es|é)\b
    | \b(?:choose|pick|select|go(?:ing)?\ with|opt\ for|(?:must|has\ to)\ be)\b
    | (?:(?<=[,;.]\ )|\bonly\ )(?=\W{{0,4}}\w[^\n,;]{{0,60}}?  # A is wrong, B is right
      \ is\ (?:the\ )?(?:only\ |best\ |most\ )?(?:correct|right|best)\b(?![^\n.]*\ but\b))
    | \b(?:corresponds\ to|matches|leaves)\b(?=\ (?:option|choice|letter)\b)
    | 而是 | [选選](?:[择擇]|[项項]\W*[是为為])?
    | \#{{4}}\ *(?=[^\n]*\Z)  # in the last line
    | (?P<weak>\b(?:so|thus|hence|therefore|think|believe|guess|say|it's|it\ is)\b,?) )
    (?=(?P<said>.{{0,500}}))"""
# "I would not choose", "the answer can't be"; but not "not A so I choose"
_NEGATED = r"""(?xi) (?:\b(?:not|never|cannot|doubt|false|wrong|incorrect|worst|least|unlikely|if
      |suppose|(?:any|every)thing\ but)|n't)\b
      (?:(?!\b(?:so|but|and|then|thus|hence|because|only)\b)[^.\n;,:]){0,24}$
    | \b(?:no|não|non)\ (?:es|é|è)\s*$ | 不\w{0,3}\s*$"""
_ANSWER_LINE = r"""(?xi) ^(?:\#{4}|[^a-z]*(?:(?:so|thus|hence|therefore),?\ )?(?:the\ )?
    (?:final\ |correct\ )?answer(?:\ is\b:?|:|\**\ *:))[\ *]*(.*[^*.\n])?[*.]*$"""
_MARKUP = rf"""(?x) ^\s*(?:-|>|\#{{1,3}})\ +(?=\W*[A-Za-z]) | </?[a-z]{{1,6}}> | {_FONT}
    | \\[()\[\]!] | [*_`${{}}✅✓✔☑] | \\(?=[%&#]) | <\|\w+\|>"""
_AROUND = " .,;:!\"'\n"
# Markup and quotes at both ends, a bracket around all of it, the sign of a currency, the full stop.
_WHOLE = rf"""(?sx) \A(?:</?[a-z]{{1,6}}>|{_FONT}|\\[(\[]|[*_`${{"'])++ (.*?)
      (?<![\ .,;:!*_`$}}"'])[\ .,;:!]*+(?:</[a-z]{{1,6}}>|\\[)\]]|[*_`$}}"'])+[.,;:!]*\Z
    | \A\(((?:[^()]|\([^()]*\))*)\)\Z | \A\\?\$(?=\.?\d[^$]*\Z) | <\|\w+\|> | \\(?=[%&#])"""
# At most six words, such as in "the correct option (B).", then the letter and what closes it
_LETTER = r"""(?x) (?:(?:it|it's|that|is|most|likely|probably|definitely|clearly|therefore|thus|the
      |actually|indeed|simply|just|instead|still|now|statement
      |correct|right|best|final|answer|ans|option|choice|letter|la|le|l'|die|would|must|should|be
      |opci[óo]n|a\ letra|lettre)\b[:.]?\ ? | [选選][项項择擇]?\ ? | not\ \(?\w\)?,?\ but\ ){0,6}
    [(\["']*([a-z0-9])([)\]"'.:,;!]*(?:\ -(?=\ ))?)(?![!-~])"""
# Words that may follow the chosen letter: "because …", "but not C"
_AFFIRMED = r"""(?x: \ ?(?:because|since|as(?!\ well|\ is)|porque|parce|weil|denn|因[为為]|です
      |번?(?:입니다|이다|다)|选项|不[选選是]|而不|是?正[确確]
      |(?:is|would\ be|must\ be)\ (?:indeed\ |clearly\ )?
      (?:the\ (?:only\ )?)?(?:correct|right|best|answer)\b)
    | \W*(?:but\ |and\ )?(?:not|rather\ than|instead\ of|as\ opposed\ to|over)\ (?:option\ )?
      \(?[a-z0-9]\b(?!\ \w))"""
# A second letter: "(A) or B", "A, B"
_SECOND = r"""(?x) \W*((?:(?:or|and|maybe|perhaps|possibly|o|ou|oder|e|y|und|et|no|option)\W+
    |[和或与與及跟]\W*)+)? ([a-z0-9])(?(1)\b|(?![\w-]|\.\d|\ (?!(?:or|and)\b)[\w(]))"""
_REFUSED = r"""(?x) (?!\W*\w+\ answer:) \W*(?:but\ |which\ |and\ )?(?:it\ |this\ |that\ )?
    (?:is|are|was|were|would\ be|must\ be|seems)?\ ?(?:clearly\ |also\ |the\ |an?\ )?
    (?:not|never|wrong|incorrect|false|invalid|unlikely|ruled\ out|isn't|can't|cannot|doesn't)\b"""
_GOES_ON = r"(?:[.;:!](?= )|,? (?:because|since|as|which|due)\b| \((?!\w\)))"  # after the words


def _choice(text: str, choices: Choices) -> set[str]:
    held, text = _box(re.split(_TAKEN_BACK, text)[-1])
    boxed = _named(held or "", choices)
    text = _plain(text)
    for marker in reversed(list(re.finditer(_CHOSEN, text))[-300:]):
        letters = _named(marker["said"], choices, ".:,;!" if marker["weak"] else ")].:,;!")
        if letters and not re.search(_NEGATED, text[: marker.end()][-99:]):
            return letters | boxed
    return boxed or {
        letter for line in set(text.split("\n")) for letter in _named(line, choices, "")
    }


def _named(text: str, choices: Choices, ends: str = ")].:,;!") -> set[str]:
    """Return the options that `text` names; for "A or B", all options.

    After a letter with one of `ends`, words may follow that are not the option's: "(B) as it is",
    but not "A cat sat". Without `ends`, the text must be an option.
    """
    given = choices or dict.fromkeys("abcdefghij", "")
    options = {str(key).strip().lower(): _bare(str(words)) for key, words in given.items()}
    text = _bare(text)
    lead = re.match(_LETTER, text)
    if lead and lead[1] in options:
        key = lead[1]
        rest = text[lead.end() :]
        words = _bare(rest)
        if words in ("", options[key]) or re.match(_AFFIRMED, rest):
            return {key}
        if re.match(_SECOND, rest):
            return set(options)
        refused = words in options.values() or re.match(_REFUSED, rest)  # (A) the text of B
        if set(lead[2]) & set(ends) and not refused:
            return {key}
    said = {
        key: len(words)
        for key, words in options.items()
        if words
        and re.match(
            rf"(?:(?:option|choice|answer)\b[^\w-]*)?(?:\(?{re.escape(key)}\W+)?"
            rf"{re.escape(words)}\)?(?:$|{_GOES_ON if ends else '$'}"
            rf"|,? (?:option |choice |i\.e\.,? )?\(?{re.escape(key)}(?:\)|$)"
            rf"|,? (?:not|rather than|instead of|while|whereas)\b|{_AFFIRMED})",
            text,
        )
    }
    return {key for key in said if said[key] == max(said.values())}


def _whole(text: str) -> str:
    """Return a text without case, repeated spaces, and the markup and punctuation around it."""
    text = " ".join(_plain(text).casefold().split()).rstrip(" .,;:!")
    return re.sub(_WHOLE, r"\1\2", text)


def _bare(text: str) -> str:
    """Return a text without case, LaTeX and Markdown, and without spaces, punctuation or brackets
    around all of it.
    """
    text = re.sub(_MARKUP, "", re.sub(r"\\[,;: ]|~", " ", _plain(text)))
    return _whole(text.strip(_AROUND)).strip(_AROUND)


# -- code ------------------------------------------------------------------------------------------

# A fence may also follow other text on its line. The content of a Markdown block is Markdown.
_FENCE = r"""(?mx) ^(?:(?:[\ \t>*+-]|\d+[.)])*+|[^\n`~]*(?=[`~]+\ *\w*\ *\n))
    (`{3,}+(?=[^\n`]*\n)|~{3,}+)(?!\ *(?:markdown|md)\b)[\ {.]*(\w*).*\n"""
_EXAMPLE = r"""(?x) (?:async\ )?(?:def|class)\ (?:.*TestCase|check\(candidate
    |(?i:_?test|main\b|\w*tests?\b|(?:run_?)?(?:example|demo|usage)))"""
_STUB = r"""\.\.\.|pass\b|r?["']|raise NotImplemented"""  # the end of a function without a body


def _program(text: str) -> str | None:
    """Return the last closed Python block that solves the task, and the blocks connected to it.

    Such a block parses and defines more than tests and examples. If there is none, returns a block
    that the token limit cut off, the last block, or the text itself if it is a program.
    """
    # Block quotes, byte order marks and end tokens are removed.
    blocks = _blocks(re.sub(r"(?m)\r(?=\n)|^ {0,3}> ?(?!>)|\ufeff|<\|\w+\|>\s*\Z", "", text))
    if not blocks:
        lines, names = _parsed(text)
        # The body of a function may define nothing.
        code = names or any(isinstance(line, ast.Return | ast.If | ast.While) for line in lines)
        # "Answer: 42" is Python too, an annotation.
        return text.strip("\n") if code and not isinstance(lines[0], ast.AnnAssign) else None
    program = max(reversed(blocks), key=lambda block: (_solves(block), bool(_parsed(block)[0])))
    for earlier in reversed(blocks[: blocks.index(program)]):
        shared = set(re.findall(r"\w+", program)).intersection(re.findall(r"\w+", earlier))
        names = _parsed(earlier)[1]
        linked = shared & (names ^ _parsed(program)[1])
        # An example uses the program; a helper is used by it, or defines something else too.
        if _solves(earlier) if linked - names else linked or "import *" in earlier:
            program = f"{earlier}\n\n{program}"
    return program or None


def _blocks(text: str) -> list[str]:
    """Return the Python blocks of a Markdown text; a block that is not closed comes first.

    `_program` prefers later blocks. The closing fence is at least as long as the opening one. A
    fence at which the program would be incomplete is part of it, for example in a docstring.
    """
    blocks: list[str] = []
    position = 0
    while opening := re.compile(_FENCE).search(text, position):
        start = opening.end()
        closing = re.compile(rf"(?m)^[ \t]*{opening[1]}[`~]* *$|(?<=[^\s`~]){opening[1]} *$|\Z")
        ends = islice(closing.finditer(text, start), 15)
        found = [(textwrap.dedent(text[start : end.start()]).strip("\n"), end) for end in ends]
        program, end = max(found, key=lambda pair: bool(_parsed(pair[0])[0]))
        if re.fullmatch("(?i)(?:i?py(?:thon)?3?)?", opening[2]):
            blocks.insert(len(blocks) if end[0] else 0, program)
        position = end.end()
    return blocks


def _parsed(program: str) -> tuple[list[ast.stmt], set[str]]:
    """Return the statements of a program, and the names that it defines and imports.

    Both are empty if the program does not parse.
    """
    try:
        if len(program) > 100_000:  # the parser takes a kilobyte of memory per byte of text
            raise MemoryError
        with warnings.catch_warnings(action="ignore"):
            symbols = symtable(program, "", "exec").get_symbols()
            body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], set()
    return body, {one.get_name() for one in symbols if one.is_assigned() or one.is_imported()}


def _solves(program: str) -> bool:
    """Return whether a program defines more than tests, examples and functions without a body."""
    for node in _parsed(program)[0]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            whole, end = (ast.get_source_segment(program, part) for part in (node, node.body[-1]))
            if not re.match(_EXAMPLE, whole or "") and not re.match(_STUB, end or ""):
                return True
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            return True
    return False
