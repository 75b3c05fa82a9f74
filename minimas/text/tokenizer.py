"""Text to token ids and back, and the chat template that makes an agent's turn from a message.

A user's text can never become a control token. Where a control token would touch user text,
`encode_turn` cuts the text inside that token before encoding, so that the ids spell the same
characters in ordinary tokens. All other text is encoded in one piece, so that the ids are those of
the Hugging Face tokenizer. The template is the model's own, rendered in a sandbox, or ChatML if the
model has none. This file does not depend on torch, models or roles.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from ..core.config import read_json

Token = tuple[int, int, int]  # its id, and the characters it covers: start and end
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stands for a message in a rendered template, to show what the template puts around it. The two
# private-use characters make sure that no template contains this text.
PLACEHOLDER = "\ue0f1a message of minimas\ue0f2"
EXCHANGE = [("user", "x"), ("assistant", "x")]  # stands for an earlier or later turn
# Added tokens that are control tokens, such as <think> or [INST]. Others may be ordinary words.
TAG = r"<.*\w.*>|\[.*\w.*\]"
SURROGATE = "[\ud800-\udfff]"  # half of a pair, which cannot be encoded
EACH_MESSAGE = "each message once, unchanged and in order"
# The tags {% generation %} and {% endgeneration %}, see `Tokenizer._template`.
GENERATION = r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})"
# The exceptions that compiling or rendering a faulty template may raise.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    SyntaxError,
)


@dataclass(frozen=True)
class PromptText:
    """A part of the conversation as text, with its untrusted spans as (start, end) in characters.

    No control token can come from an untrusted span.
    """

    text: str
    untrusted: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_user(cls, text: str) -> "PromptText":
        """Return a text that is untrusted as a whole."""
        return cls(text, ((0, len(text)),))

    def __add__(self, other: "PromptText") -> "PromptText":
        shift = len(self.text)
        moved = tuple((start + shift, end + shift) for start, end in other.untrusted)
        return PromptText(self.text + other.text, self.untrusted + moved)

    def cut(self, start: int, end: int) -> "PromptText":
        """Return the part from character `start` up to `end`."""
        spans = [(max(a, start) - start, min(b, end) - start) for a, b in self.untrusted]
        return PromptText(self.text[start:end], tuple((a, b) for a, b in spans if a < b))


class Tokenizer:
    """The tokenizer and chat template of a model folder, or of the `files` that a GGUF file holds.

    `size` is the highest token id + 1, `end_ids` are the tokens that end a turn, and `turn_end` is
    the text that the template puts after an assistant's message.
    """

    def __init__(
        self, folder: str | Path, files: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Read the tokenizer and the chat template.

        Raises FileNotFoundError or ValueError naming the file that is missing or broken.
        """
        self.path = Path(folder) / "tokenizer.json"
        self.template_path = self.path.with_name("tokenizer_config.json")
        given = files or {}
        data = json.dumps(given["tokenizer.json"]).encode() if given else self.path.read_bytes()
        specials = read_json(self.path.with_name("special_tokens_map.json"), needed=False)
        settings = given.get("tokenizer_config.json") or read_json(self.template_path, needed=False)
        try:
            self.backend = Backend.from_buffer(data)
            self.backend.encode("\ue000 a")  # fails if the unknown token is missing
            self.size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path}: not a readable tokenizer ({error})") from error
        # Padding or truncation set for training would add or drop tokens silently.
        self.backend.no_padding()
        self.backend.no_truncation()
        self.control = {
            token.content: i
            for i, token in self.backend.get_added_tokens_decoder().items()
            if token.special or re.search(TAG, token.content)
        }
        self._special: dict[str, Any] = {}  # the text of special tokens that the template may use
        for field, token in (*specials.items(), *settings.items()):
            name = token.get("content") if isinstance(token, dict) else token
            if field.endswith("_token") and isinstance(name, str):
                self._special[field] = name
        source = settings.get("chat_template")
        if isinstance(source, list):  # several templates by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            if "default" not in named:
                raise self._refusal(f"the names {list(named)}", "'default' among them")
            source = named["default"]
        file = self.path.with_name("chat_template.jinja")
        if file.is_file():
            self.template_path = file
            source = read_text(file)
        self._source = CHATML if source is None else source
        dialog = self._conversation(EXCHANGE, generation_prompt=False)
        names = self._special.get("eos_token", "<|im_end|>"), "<|im_end|>"
        self.turn_end = dialog.text[dialog.untrusted[1][1] :] or names[0]
        closing = [i for i in self.encode(self.turn_end) if i in self.control.values()]
        ids = [*map(self.backend.token_to_id, names), *closing[:1]]
        self.end_ids = frozenset(i for i in ids if i is not None)

    def set_thinking(self, thinks: bool) -> None:
        """Set the template's `enable_thinking`. Raises ValueError for a template without it."""
        if "enable_thinking" not in self._source:
            raise self._refusal("no enable_thinking", "one, for --think and --no-think")
        self._special["enable_thinking"] = thinks

    def encode(self, text: str) -> list[int]:
        """Return the ids of a trusted text, including its control tokens; adds no other tokens."""
        return self.encode_turn(PromptText(text))

    def encode_turn(self, turn: PromptText) -> list[int]:
        """Return the ids of a turn, in which no control token comes from an untrusted span.

        Raises ValueError if an untrusted span holds a character that is itself a control token.
        """
        return [token for token, _, _ in self.tokens(turn)]

    def tokens(self, turn: PromptText) -> list[Token]:
        """Return the tokens of a turn.

        Raises ValueError as `encode_turn` does, or for half of a surrogate pair.
        """
        if re.search(SURROGATE, turn.text):
            raise ValueError(
                f"prompt: found {re.findall(SURROGATE, turn.text)[0]!a}, expected whole characters"
            )
        cuts = {0, len(turn.text)}
        control = set(self.control.values())
        while True:
            tokens = list[Token]()
            for start, end in itertools.pairwise(sorted(cuts)):
                piece = self.backend.encode(turn.text[start:end], add_special_tokens=False)
                for token, (a, b) in zip(piece.ids, piece.offsets, strict=True):
                    tokens.append((token, start + a, start + b))
            # A control token that includes the spaces after it may begin in trusted text and reach
            # into untrusted text. It is cut where the untrusted text begins.
            wrong = {
                max(start + 1, first)
                for token, start, end in tokens
                if token in control
                for first, last in turn.untrusted
                if start < last and first < end
            }
            if not wrong:
                return tokens
            if wrong <= cuts:  # a control token of one character cannot be cut
                raise ValueError(
                    f"question: found a character that is a control token of {self.path}, "
                    "expected text"
                )
            cuts |= wrong

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def turn(
        self,
        user: str,
        system: str | None = None,
        prefix: str = "",
        first: bool = True,
        last: bool = True,
    ) -> PromptText:
        """Return the turn of one user message, up to `prefix` in the open assistant turn.

        A system message comes before it if one is given. Both messages are untrusted, `prefix` is
        trusted. If not `first`, the turn follows an earlier one that was closed with `turn_end`. If
        not `last`, it ends where the template puts an assistant's message that is part of the
        conversation. Generation may begin at another place.

        Raises ValueError naming the template's file if it cannot be rendered, if it changes a
        message, or if it cannot put such a turn after another one.
        """
        own = [("user", user)] if system is None else [("system", system), ("user", user)]
        earlier = [] if first else EXCHANGE
        later = [] if last else EXCHANGE[::-1]
        turn = self._conversation([*earlier, *own, *later])
        if not last:
            turn = turn.cut(0, turn.untrusted[-2][0])
        if not first:
            exchange = self.turn("x", last=False).text + "x" + self.turn_end
            if not turn.text.startswith(exchange):
                raise self._refusal(
                    "one that closes a turn differently at the end of a conversation"
                )
            turn = turn.cut(len(exchange), len(turn.text))
            if turn.text not in self._render([*EXCHANGE, *earlier, *own, *later]):
                raise self._refusal("one that numbers the turns")
        return turn + PromptText(prefix)

    def user_turn(
        self,
        parts: Sequence[str],
        system: str | None = None,
        prefix: str = "",
        first: bool = True,
    ) -> list[PromptText]:
        """Return the turn of one user message, cut before the message and between its `parts`.

        The result is what comes before the message, then every part. The last part includes the
        rest of the turn, up to `prefix` in the open assistant turn. For `first` and ValueError, see
        `turn`.
        """
        message = "".join(parts)
        turn = self.turn(message, system, prefix, first)
        start, end = turn.untrusted[-1]
        unstripped = start - message.find(turn.text[start:end])
        starts = itertools.accumulate(map(len, parts[:-1]), initial=unstripped)
        edges = [min(max(edge, start), end) for edge in starts]
        return [turn.cut(a, b) for a, b in itertools.pairwise([0, *edges, len(turn.text)])]

    def message(self, text: str, role: str) -> tuple[PromptText, PromptText]:
        """Return one untrusted message up to its last character, and the end of its turn.

        Raises ValueError as `turn` does.
        """
        turn = self._conversation([(role, text)], generation_prompt=False)
        end = turn.untrusted[0][1]
        return turn.cut(0, end), turn.cut(end, len(turn.text))

    def _conversation(
        self, messages: Sequence[tuple[str, str]], generation_prompt: bool = True
    ) -> PromptText:
        """Return the template's text for (role, content) messages.

        The result has one untrusted span per message, without the white space that a template may
        strip.
        """
        text = self._render(messages, generation_prompt)
        marked = [(role, PLACEHOLDER) for role, _ in messages]
        around = self._render(marked, generation_prompt).split(PLACEHOLDER)
        pattern = re.escape(around[0])
        for (_, message), after in zip(messages, around[1:], strict=False):
            core = re.escape(message.strip())
            spaces_after = len(message) - len(message.rstrip())
            pattern += rf"(\s*?{core}\s{{0,{spaces_after}}}){re.escape(after)}"
        whole = re.fullmatch(pattern, text)
        if whole is None or len(around) != len(messages) + 1:
            raise self._refusal(
                "one that drops, repeats, moves or changes a message of "
                f"{', '.join(role for role, _ in messages)}"
            )
        return PromptText(text, tuple(map(whole.span, range(1, len(around)))))

    def _refusal(self, found: str, expected: str = EACH_MESSAGE) -> ValueError:
        return ValueError(
            f"{self.template_path}: chat_template: found {found}, expected {expected}"
        )

    def _render(self, messages: Sequence[tuple[str, str]], generation_prompt: bool = True) -> str:
        """Return the template's text for (role, content) messages."""
        try:
            return self._template.render(
                messages=[{"role": role, "content": text} for role, text in messages],
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"{self.template_path}: the chat template cannot be rendered ({error})"
            ) from error

    @functools.cached_property
    def _template(self) -> Template:
        """Compile the template, with the globals and filters of transformers and no others."""
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals["raise_exception"] = _raise_exception
        # One time: a turn is rendered several times, and must be the same each time.
        sandbox.globals["strftime_now"] = datetime.now().strftime
        sandbox.filters["tojson"] = _to_json
        # {% generation %} marks an assistant's text for training. It is a scope, like {% with %}.
        return sandbox.from_string(re.sub(GENERATION, r"\1with", self._source))


class TextStream:
    """Decode ids that come one at a time, in pieces of text that later ids do not change."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self._settled = self._returned = 0  # counts: ids decoded, characters returned

    def push(self, token: int) -> str:
        """Add a token, and return the new text that is final, "" while it may still change.

        It may change while a character is unfinished, or in a run of byte tokens such as <0xE2>,
        which is decoded as a whole and ends at the next token with text of its own.
        """
        self.ids.append(token)
        backend = self._tokenizer.backend
        in_run = str(backend.id_to_token(token)).startswith("<0x")
        if in_run or not self._tokenizer.decode([token]):
            return ""
        piece = self._stream.step(backend, self.ids[self._settled :]) or ""
        self._settled = len(self.ids)
        self._returned += len(piece)
        return piece

    def finish(self) -> str:
        """Return the rest of the text, such as the first bytes of an unfinished character."""
        return self.text[self._returned :]

    @property
    def text(self) -> str:
        """Return the text of all ids so far."""
        return self._tokenizer.decode(self.ids)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises FileNotFoundError or ValueError naming the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found bytes that are not UTF-8, expected text") from error


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not blank and can be encoded.

    Half of a surrogate pair cannot be encoded.
    """
    text = isinstance(value, str) and value.strip()
    return bool(text) and not re.search(SURROGATE, value)


def _to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, **named: Any
) -> str:
    """Return JSON text: the filter `tojson`, with the parameters that it has in transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **named
    )


def _raise_exception(message: str) -> Any:
    raise TemplateError(message)
