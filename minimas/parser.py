"""The flags of the command line, as tables. This file does not import torch, which takes seconds.

The first line of a command's table says what the command is for. Each other line is a flag: its
names, its value, and its text in --help. The value is a list of choices, ≥N for a whole number of N
or more, or a key of VALUES. A default may follow after "=".
"""

import argparse
import re
from functools import partial
from typing import Any, NoReturn

from . import __version__

ASK = """answer a question with a team of agents
--kind            math,choice,code,free  question kind (default: from its fields, else free)
--batch-size      ≥1=1    questions per batch of a file (default: %(default)s)
--method          latent_mas,text_mas,single=latent_mas  (default: %(default)s)
--transfer        full,latents,last,none,shuffled  what the next agent gets (default: full)
--save-memory     text    write the KV cache after the answer to this file
--compile         yes     faster steps after a warm-up of up to a minute
--models          named   model for a team file's agents whose model is NAME; repeatable
--parallel        yes     divide the model among the ranks of torchrun (docs/two_gpus.md)
"""
CHAT = """talk with one agent or a team: one message per line; keeps the KV cache
--method          single,latent_mas,text_mas=single  who answers (default: %(default)s)
"""
ANSWERING = """
--model -m        text=weights/tiny  folder, FILE.gguf, hub id, hub id:FILE.gguf or hub id:Q8_0
--team            text    sequential, hierarchical or FILE.json (default: sequential)
--latent-steps    steps   thoughts per agent, or auto (default: the model's, else 40)
--align           text    ridge, identity, prenorm, random, none or a file (default: ridge)
--layout          turn,chat  one user turn, or a chat turn for each agent (default: the team's)
--max-new-tokens -n  ≥1   (default: the model's, else 256)
--think           switch  let a thinking model think first (default: as in its template)
--temperature --temp  real  0: greedy (default: the model's)
--top-p           real    keep the likeliest tokens up to this mass (default: the model's)
--top-k           ≥0      keep this many tokens; 0: all (default: the model's)
--seed -s         ≥0=0    (default: %(default)s)
--memory          files   start after this KV cache from `remember`; repeat to join several
--show-thoughts   top     K likeliest tokens per thought (default: 3)
--json            yes     one JSON object per result on stdout
"""
CHECK = """measure what a hand-over does to a model's answers
model             text    folder, FILE.gguf, hub id, hub id:FILE.gguf or hub id:Q8_0
--layout          turn,chat  (default: the team's)
--latent-steps    ≥1=10   thoughts per agent (default: %(default)s)
--json            yes     print the report as one JSON object
"""
REMEMBER = """prefill a text once, and write its KV cache to a file
text              file    a text file, or - for stdin
--out             text=memory.safetensors  the file to write (default: %(default)s)
--model -m        text=weights/tiny  (default: %(default)s)
--role            user,system,agent,plain=user  chat role of the text (default: user)
--latent-steps    ≥0=0    thoughts at the end of the text (default: %(default)s)
--align           text=ridge  (default: %(default)s)
--bits            bits    8: round to 8 bits, a smaller file (default: not rounded)
"""
INFO = """describe a model and the memory it needs, or a saved KV cache or map
model             text    folder, FILE.gguf, hub id, hub id:FILE.gguf, or FILE.safetensors
--batch-size      ≥1=1    (default: %(default)s)
--context         ≥1=960  prompt tokens and latent steps of a row (default: %(default)s)
--max-new-tokens -n  ≥0=256  (default: %(default)s)
--debug           yes     show a traceback with an error
"""
RUNNING = """
--quantize        q4,q8,nf4,int8  weights in 4 or 8 bits (default: as in the file)
--dtype           text=auto  auto (as in the file), bfloat16, float16, float32 or float64
--device          text=auto  auto, cpu, cuda, cuda:N or mps (not tested) (default: auto)
--quiet           yes     print only errors on stderr
--debug           yes     show a traceback with an error
"""
COMMANDS = {
    "ask": ASK + ANSWERING + RUNNING,
    "chat": CHAT + ANSWERING + RUNNING,
    "remember": REMEMBER + RUNNING,
    "check": CHECK + RUNNING,
    "info": INFO,
}


def whole_number(low: int, text: str) -> int:
    """Return the whole number in a text. Raises ArgumentTypeError if it is less than `low`."""
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < low:
        raise argparse.ArgumentTypeError(
            f"found {text!r:.40}, expected a whole number, {low} or more"
        )
    return int(text)


VALUES = {
    "text": {},
    "bits": {"type": int, "choices": [8]},
    "steps": {"type": lambda n: n if n == "auto" else whole_number(0, n), "metavar": "N"},
    "named": {"action": "append", "metavar": "NAME=FOLDER"},
    "real": {"type": float, "metavar": "X"},
    "file": {"metavar": "FILE"},
    "files": {"action": "append", "metavar": "FILE"},
    "top": {"nargs": "?", "const": 3, "type": partial(whole_number, 1), "metavar": "K"},
    "yes": {"action": "store_true"},
    "switch": {"action": argparse.BooleanOptionalAction},
}


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`. A text after --show-thoughts is not its K, but the next argument."""
        for i, flag in enumerate(args[:-1] if args else []):  # None in the top parser
            if flag == "--show-thoughts" and not args[i + 1].isdecimal():
                args[i] = "--show-thoughts=3"
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line without the usage, and exit with status 2."""
        self.exit(2, f"minimas: error: {' '.join(message.split()):.500}\n")


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(prog="minimas", description="Agents that share a KV cache, not text (LatentMAS).")
    top.add_argument("--version", action="version", version=f"minimas {__version__}")
    # For commands that do not have these flags.
    top.set_defaults(parallel=False, compile=False, save_memory=None, quiet=False)
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, table in COMMANDS.items():
        purpose, *_ = table.split("\n")
        parser = commands.add_parser(name, help=purpose, allow_abbrev=False)
        if name == "ask":
            asked = parser.add_mutually_exclusive_group(required=True)
            asked.add_argument("question", metavar="QUESTION", nargs="?", help="or - for stdin")
            asked.add_argument("--file", help="JSON Lines, a question per line, or - for stdin")
        for names, value, text in re.findall(r"(.+?)  +(\S+)  +(.+)", table):
            kind, _, default = value.partition("=")
            options: Any = VALUES.get(kind, {"choices": kind.split(",")})
            if kind[0] == "≥":
                options = {"type": partial(whole_number, int(kind[1:])), "metavar": "N"}
            parser.add_argument(*names.split(), default=default or None, help=text, **options)
    return top
