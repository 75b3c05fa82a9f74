"""A conversation: each message is prefilled after the KV cache of all earlier turns.

A single agent gets the message as it is, unless the model's folder has a prompt for it. A message
or command that fails, or is stopped by Ctrl-C, leaves the conversation as it was. This file does
not depend on how an answer is made.
"""

import sys
from argparse import Namespace

from .core.cache import KVCache
from .core.errors import ContextError
from .load import LM
from .screen import ERRORS, Settings, report_error, say, show_answers
from .teams import Agent, Team

try:  # noqa: SIM105
    # On a terminal: lines of more than 4,095 bytes, the arrow keys, and earlier messages.
    import readline  # noqa: F401
except ImportError:  # on Windows
    pass

COMMANDS = "/clear, /save FILE (after a message), /load FILE, /show or /exit"


def chat(args: Namespace, lm: LM, options: Settings, settings: Settings) -> None:
    """Answer each line of standard input. A line that begins with a slash is a command.

    For `options` and `settings`, see `show_answers`.
    """
    if args.method == "single":
        args.method = "text_mas"
        options["team"] = lm.teams.get("single", Team((Agent("assistant", "{question}"),)))
    options["keep_memory"] = True
    memory = start = options.get("memory")
    turns = 0
    say(args, f"minimas: type a message, {COMMANDS}")
    while True:
        try:
            # Where answers are redirected, `input` would print the sign among them.
            line = input("> " * (sys.stdin.isatty() and sys.stdout.isatty())).strip()
        except EOFError:
            return
        try:
            match line.split(maxsplit=1):
                case ["/exit"]:
                    return
                case ["/clear"]:
                    memory = start
                    turns = 0
                case ["/save", file] if memory:
                    memory.save(file)
                case ["/load", file]:
                    memory = KVCache.load(file, lm.model)
                    turns = 0
                case ["/show"]:
                    for name, value in {"turns": turns, "KV cache": memory, **settings}.items():
                        print(f"{name:>14}: {value}", file=sys.stderr)
                case [command, *_] if command[0] == "/":
                    raise ValueError(f"found {line!r:.40}, expected {COMMANDS}")
                case [_, *_]:
                    options |= {"memory": memory, "continues": memory is not None}
                    asked = [("free", [{"question": line}])]
                    [result] = show_answers(args, lm, options, settings, asked)
                    memory = result.memory
                    turns += 1
        except KeyboardInterrupt:
            say(args, "\nminimas: stopped, the conversation is as it was")
        except ContextError as error:
            report_error(ContextError(f"{error}; /clear empties the KV cache"), args)
        except ERRORS as error:
            if isinstance(error, OSError) and line[0] != "/":  # from stdout, not from a file
                raise
            report_error(error, args)
