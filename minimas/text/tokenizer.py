"""Text to token ids and back, and the chat template that makes an agent's turn from a message.

A user's text can never become a control token. Where a control token would touch user text,
`encode_turn` cuts the text inside that token before encoding, so that the ids spell the same
characters in ordinary tokens. All other text is encoded in one piece, so that any Hugging Face
tokenizer gives the same ids. The template is the model's own, rendered in a sandbox, or ChatML if
the model has none. This file does not know torch, models or roles.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from ..core.config import read_json

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stands for a message in a rendered template, to see what the template puts around it. The two
# private-use characters make sure that no template holds this text.
PLACEHOLDER = "\ue0f1a message of minimas\ue0f2"
# What compiling or rendering a faulty template raises.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
    SyntaxError,
)


@dataclass(frozen=True)
class Turn:
    """The text of an agent's turn, and its untrusted spans as (start, end) in characters."""

    text: str
    untrusted: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: "Turn") -> "Turn":
        shift = len(self.text)
        moved = tuple((start + shift, end + shift) for start, end in other.untrusted)
        return Turn(self.text + other.text, self.untrusted + moved)


class Tokenizer:
    """The tokenizer and chat template of a model folder, or of the `files` that a GGUF file holds.

    `size` is the highest id + 1; `end_ids` are the tokens that end a turn; `turn_end` is the text
    that the template puts after an assistant's message.
    """

    def __init__(
        self, folder: str | Path, files: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Raises FileNotFoundError or ValueError naming the file that is missing or broken."""
        self.path = Path(folder) / "tokenizer.json"
        if files is None:
            data = self.path.read_bytes()
            settings = read_json(Path(folder) / "tokenizer_config.json", needed=False)
        else:
            data = json.dumps(files["tokenizer.json"]).encode()
            settings = files.get("tokenizer_config.json", {})
        try:
            self.backend = Backend.from_buffer(data)
            self.backend.encode("\ue000 a")  # fails for a missing unknown token
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path}: not a readable tokenizer ({error})") from error
        # Padding or truncation set for training would add or drop tokens silently.
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise ValueError(f"{self.path}: found an empty vocabulary, expected tokens")
        added = self.backend.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items()}
        self._find_template(Path(folder), settings)
        end_token = self._special.get("eos_token", "<|im_end|>")
        self.end_ids = frozenset(
            i for name, i in self.control.items() if name in (end_token, "<|im_end|>")
        )
        answer = 2 * PLACEHOLDER
        both = self._render({"user": PLACEHOLDER, "assistant": answer}, generation_prompt=False)
        _, shown, turn_end = both.rpartition(answer)  # a template may show the last message only
        if not shown:
            self._around("user", "assistant", generation_prompt=False)  # raises
        self.turn_end = turn_end or end_token

    def set_thinking(self, thinks: bool) -> None:
        """Set the template's `enable_thinking`. Raises ValueError for a template without it."""
        if "enable_thinking" not in self._source:
            problem = "found no enable_thinking, expected it (--think and --no-think switch it)"
            raise ValueError(f"{self.template_path}: chat_template: {problem}")
        self._special["enable_thinking"] = thinks

    def encode(self, text: str) -> list[int]:
        """Return the ids of trusted text, in which control tokens count as such; adds no token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_turn(self, turn: Turn) -> list[int]:
        """Return the ids of a turn in which no control token comes from an untrusted span.

        Raises ValueError if an untrusted span holds a control token of a single character.
        """
        return [token for token, _, _ in self._encode(turn)]

    def tokens_before(self, turn: Turn, end: int) -> int:
        """Return how many of the turn's tokens begin before character `end`."""
        return sum(start < end for _, start, _ in self._encode(turn))

    def _encode(self, turn: Turn) -> list[tuple[int, int, int]]:
        """Return the tokens of a turn as (id, start, end), with the characters that they cover."""
        cuts, control = {0, len(turn.text)}, set(self.control.values())
        while True:
            tokens: list[tuple[int, int, int]] = []
            for start, end in itertools.pairwise(sorted(cuts)):
                piece = self.backend.encode(turn.text[start:end], add_special_tokens=False)
                for token, (a, b) in zip(piece.ids, piece.offsets, strict=True):
                    tokens.append((token, start + a, start + b))
            # A control token may begin in trusted text and only reach into untrusted text, as one
            # that includes the spaces after it does. It is cut where the untrusted text begins.
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

    def turn(self, user: str, system: str | None = None, prefix: str = "") -> Turn:
        """Return the turn of one user message, up to `prefix` in the open assistant turn.

        A system message comes first if one is given. Both messages are untrusted, `prefix` is
        trusted. Raises ValueError naming the template's file if it cannot be rendered or changes a
        message.
        """
        messages = {"user": user} if system is None else {"system": system, "user": user}
        text = self._render(messages)
        around = self._around(*messages)
        # Some templates strip some of the messages.
        for bodies in itertools.product(*((m, m.strip()) for m in messages.values())):
            turn = Turn(around[0])
            for body, after in zip(bodies, around[1:], strict=True):
                turn += Turn(body, ((0, len(body)),)) + Turn(after)
            if turn.text == text:
                return turn + Turn(prefix)
        raise ValueError(
            f"{self.template_path}: chat_template: found one that changes a message or depends on "
            "what it says, expected every message as it is"
        )

    def user_turn(
        self, parts: Sequence[str], system: str | None = None, prefix: str = ""
    ) -> list[Turn]:
        """Return the turn of one user message, cut before the message and between its `parts`.

        The result is what comes before the message, then every part. The last part includes the
        rest of the turn, up to `prefix` in the open assistant turn. Raises ValueError as `turn`
        does.
        """
        message = "".join(parts)
        turn = self.turn(message, system, prefix)
        start, end = turn.untrusted[-1]
        unstripped = start - message.index(turn.text[start:end])
        ends = itertools.accumulate(len(part) for part in parts)
        edges = [start, *(min(max(unstripped + length, start), end) for length in ends)]
        pieces = [
            Turn(turn.text[a:b], ((0, b - a),) if a < b else ())
            for a, b in itertools.pairwise(edges)
        ]
        pieces[-1] += Turn(turn.text[end:])
        return [Turn(turn.text[:start], turn.untrusted[:-1]), *pieces]

    def written(self, text: str) -> Turn:
        """Return an agent's generated text and the end of its turn, which follow its prompt."""
        return Turn(text, ((0, len(text)),)) + Turn(self.turn_end)

    def _around(self, *roles: str, generation_prompt: bool = True) -> list[str]:
        """Return what the template puts before, between and after messages of these roles."""
        messages = dict.fromkeys(roles, PLACEHOLDER)
        around = self._render(messages, generation_prompt).split(PLACEHOLDER)
        if len(around) != len(roles) + 1:
            raise ValueError(
                f"{self.template_path}: chat_template: found one that drops, repeats or changes a "
                f"message, expected each of {', '.join(roles)} once and as it is"
            )
        return around

    def _render(self, messages: Mapping[str, str], generation_prompt: bool = True) -> str:
        """Return the template's text for messages given as role -> content."""
        try:
            return self._template.render(
                messages=[{"role": role, "content": text} for role, text in messages.items()],
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"{self.template_path}: the chat template cannot be rendered ({error})"
            ) from error

    def _find_template(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Find the template and the texts of special tokens that it may use."""
        source, self.template_path = settings.get("chat_template"), folder / "tokenizer_config.json"
        own_file = folder / "chat_template.jinja"
        if own_file.is_file():
            source, self.template_path = read_text(own_file), own_file
        if isinstance(source, list):  # several templates by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        self._source = CHATML if source is None else source
        self._special: dict[str, Any] = {}  # the text of the special tokens, such as eos_token
        for field, token in settings.items():
            name = token.get("content") if isinstance(token, dict) else token
            if field.endswith("_token") and isinstance(name, str):
                self._special[field] = name

    @functools.cached_property
    def _template(self) -> Template:
        """Compile the template, with what transformers gives to one and nothing more."""
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = _to_json
        return sandbox.from_string(self._source)


class TextStream:
    """The text of ids that come one at a time, in pieces of whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self._returned = 0  # characters returned so far

    def push(self, token: int) -> str:
        """Return the text that `token` completes, "" while a character is unfinished."""
        self.ids.append(token)
        piece: str = self._stream.step(self._tokenizer.backend, token) or ""
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

    Raises FileNotFoundError or ValueError naming it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"found bytes that are not UTF-8 ({error}), expected text"
        raise ValueError(f"{path}: {problem}") from error


def is_text(text: str) -> bool:
    """Return whether `text` can be encoded; half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class GenerationTag(Extension):
    """Ignore {% generation %}, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[Node]:
        """Return the statements between the tag and {% endgeneration %}."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON text, with the parameters that transformers gives to templates."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> Any:
    raise TemplateError(message)
