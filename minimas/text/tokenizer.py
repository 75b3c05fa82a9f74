"""Text ↔ token ids, and the chat template that makes an agent's turn out of a message.

A user's text can never become a control token: `encode_turn` cuts every control token that touches user text in two
before encoding it, so that the ids spell the same characters in ordinary tokens. All else is encoded in one piece, so
any Hugging Face tokenizer gives the same ids. The template is the model's own, run in a sandbox; ChatML where it
has none. Does not know: torch, models, roles.
"""

import bisect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from ..core.config import read_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HOLE = "\ue0f1minimas{}\ue0f2"  # stands for a message, to see what a template puts around it; no text holds it


@dataclass(frozen=True)
class Turn:
    """An agent's turn as text, and the spans of it, (start, end) in characters, that are not to be trusted."""

    text: str
    untrusted: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: "Turn") -> "Turn":
        shift = len(self.text)
        return Turn(
            self.text + other.text,
            self.untrusted + tuple((a + shift, b + shift) for a, b in other.untrusted),
        )

    def cut(self, start: int, end: int) -> "Turn":
        """Return the characters from `start` up to `end`, with the spans that lie in them."""
        spans = [(max(a, start) - start, min(b, end) - start) for a, b in self.untrusted]
        return Turn(self.text[start:end], tuple((a, b) for a, b in spans if a < b))


class Tokenizer:
    """The tokenizer.json of a model folder, or of the `files` that a GGUF file holds, with its chat template.

    `size` is the highest id + 1; `end_ids` are the tokens that end a turn; `turn_end` is the text that closes one.
    """

    def __init__(
        self, folder: str | Path, files: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Raises FileNotFoundError or ValueError naming the file that is missing or broken."""
        self.path = Path(folder) / "tokenizer.json"
        text = read_text(self.path) if files is None else json.dumps(files["tokenizer.json"])
        try:
            self.backend = Backend.from_str(text)
            self.backend.encode("\ue000 a")  # fails where unknown characters have no token
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.path}: not a readable tokenizer ({error})") from error
        # Padding or truncation set for training would add or drop tokens without a word.
        self.backend.no_padding()
        self.backend.no_truncation()
        self._read_template(Path(folder), files)
        self.control = {
            token.content: i for i, token in self.backend.get_added_tokens_decoder().items()
        }
        self.size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise ValueError(f"{self.path}: found an empty vocabulary, expected tokens")
        self.turn_end = self._turn_end()
        self.end_ids = frozenset(
            self.control[name] for name in {self._eos, "<|im_end|>"} & self.control.keys()
        )

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: control tokens in it are control tokens; nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_turn(self, turn: Turn) -> list[int]:
        """Ids of a turn in which no control token comes from an untrusted span; ValueError if that cannot be."""
        return self._encode(turn)[0]

    def tokens_before(self, turn: Turn, end: int) -> int:
        """Return how many of the turn's tokens begin before character `end`."""
        return bisect.bisect_left(self._encode(turn)[1], end)

    def _encode(self, turn: Turn) -> tuple[list[int], list[int]]:
        """Return the ids of a turn, and the character at which each of them begins."""
        cuts, control = {0, len(turn.text)}, set(self.control.values())
        while True:
            ids: list[int] = []
            starts: list[int] = []
            wrong: set[int] = set()
            for start, end in itertools.pairwise(sorted(cuts)):
                piece = self.backend.encode(turn.text[start:end], add_special_tokens=False)
                ids += piece.ids
                starts += [start + a for a, _ in piece.offsets]
                for i, (a, b) in zip(piece.ids, piece.offsets, strict=True):
                    if (
                        i in control
                    ):  # cut at the border if it only reaches over, as one that eats spaces does
                        wrong |= {
                            max(start + a + 1, x)
                            for x, y in turn.untrusted
                            if start + a < y and x < start + b
                        }
            if not wrong:
                return ids, starts
            if wrong <= cuts:  # one character, not to be cut
                raise ValueError(
                    f"question: found a character that is a control token of {self.path}, expected text"
                )
            cuts |= wrong

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def turn(self, user: str, system: str | None = None, prefix: str = "") -> Turn:
        """The turn of one user message, behind a system message if given, up to `prefix` in the open assistant turn;
        ValueError names a template that cannot be rendered. Both messages are untrusted, `prefix` is not.
        """
        contents = [system, user] if system is not None else [user]
        roles, holes = (
            ["system", "user"][-len(contents) :],
            [HOLE.format(i) for i in range(len(contents))],
        )
        text = self._render(roles, contents)
        # What surrounds the messages, seen with stand-ins for them, tells where they are in the text.
        frame = self._render(roles, holes)
        for stripped in itertools.product(
            (False, True), repeat=len(contents)
        ):  # as some templates do
            turn, rest = Turn(""), frame
            for content, hole, strip in zip(contents, holes, stripped, strict=True):
                before, _, rest = rest.partition(hole)
                body = content.strip() if strip else content
                turn += Turn(before) + Turn(body, ((0, len(body)),))
            if turn.text + rest == text:
                return turn + Turn(rest + prefix)
        raise ValueError(
            f"{self.template_path}: chat_template: found one that changes, drops or repeats a message, or depends on"
            " what it says, expected every message once and as it is"
        )

    def user_turn(
        self, parts: Sequence[str], system: str | None = None, prefix: str = ""
    ) -> list[Turn]:
        """Cut the turn of one user message made of `parts`; returns what comes before the message, then every part.

        The last one includes the rest of the turn, up to `prefix` in the open assistant turn. Raises ValueError as
        `turn` does.
        """
        message = "".join(parts)
        turn = self.turn(message, system, prefix)
        start, end = turn.untrusted[-1]
        whole = end - start == len(message)
        at = (
            start if whole else start - (len(message) - len(message.lstrip()))
        )  # the template stripped the message
        edges = [0, start]
        for part in parts[:-1]:
            at += len(part)
            edges.append(min(max(at, start), end))
        return [turn.cut(a, b) for a, b in itertools.pairwise([*edges, len(turn.text)])]

    def written(self, text: str) -> Turn:
        """What an agent wrote and the end of its turn, to be put behind the turn it answered."""
        return Turn(text, ((0, len(text)),)) + Turn(self.turn_end)

    def _turn_end(self) -> str:
        """What the template puts behind an assistant's text: `<|im_end|>\\n` in ChatML."""
        hole = HOLE.format(1)
        text = self._render(["user", "assistant"], [HOLE.format(0), hole], generation_prompt=False)
        if hole not in text:
            raise ValueError(f"{self.template_path}: the template drops the assistant message")
        return text.rpartition(hole)[2] or self._eos

    def _render(self, roles: list[str], contents: list[str], generation_prompt: bool = True) -> str:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, **self._names
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{self.template_path}: the chat template cannot be rendered ({error})"
            ) from error

    def _read_template(self, folder: Path, files: Mapping[str, dict[str, Any]] | None) -> None:
        settings_path, template_path = (
            folder / "tokenizer_config.json",
            folder / "chat_template.jinja",
        )
        settings = (
            read_json(settings_path, needed=False)
            if files is None
            else files.get("tokenizer_config.json", {})
        )
        source, self.template_path = settings.get("chat_template"), settings_path
        if template_path.is_file():
            source, self.template_path = read_text(template_path), template_path
        if isinstance(source, list):  # several templates by name
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get(
                "default"
            )
        fields = {
            field: settings.get(field)
            for field in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        names = {
            field: name.get("content") if isinstance(name, dict) else name
            for field, name in fields.items()
        }
        self._names = {field: name for field, name in names.items() if isinstance(name, str)}
        self._eos = self._names.get("eos_token", "<|im_end|>")
        # What transformers gives to a template, and nothing more.
        extensions = ["jinja2.ext.loopcontrols"]
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        try:
            self._template = sandbox.from_string(CHATML if source is None else source)
        except (TemplateError, TypeError, SyntaxError, RecursionError) as error:
            raise ValueError(
                f"{self.template_path}: not a readable chat template ({error})"
            ) from error


class TextStream:
    """Text of ids that come one by one; never half a character, never a control token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self._given = 0  # characters handed out so far

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is unfinished."""
        self.ids.append(token)
        piece: str = self._stream.step(self._tokenizer.backend, token) or ""
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """What is left when no more ids come, such as the first bytes of a character cut off by the limit."""
        return self.text[self._given :]

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises FileNotFoundError or ValueError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def is_text(text: str) -> bool:
    """Whether `text` can be encoded: half of a surrogate pair, as from a broken command line, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _raise_exception(message: str) -> Any:
    raise TemplateError(message)
