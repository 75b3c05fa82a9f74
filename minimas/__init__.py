"""minimas: latent collaboration between language-model agents in plain PyTorch.

It implements LatentMAS (arXiv 2511.20639):

    from minimas import load, latent_mas

    lm = load("weights/tiny")
    question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
    [result] = latent_mas(lm, [question])
    print(result.text, result.usage)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agents import latent_mas, single, text_mas
    from .core import Aligner, Config, KVCache, Qwen3, alignment_matrix, think
    from .load import LM, load
    from .results import Result, Watcher
    from .teams import Agent, Team, hierarchical, sequential
    from .text.generate import Sampling, generate
    from .text.tokenizer import Tokenizer

__all__ = [
    "LM", "Agent", "Aligner", "Config", "KVCache", "Qwen3", "Result", "Sampling", "Team",
    "Tokenizer", "Watcher", "alignment_matrix", "generate", "hierarchical", "latent_mas", "load",
    "sequential", "single", "text_mas", "think",
]  # fmt: skip
__version__ = "0.1.0"
HOMES = ("agents", "core", "load", "results", "teams", "text.generate", "text.tokenizer")


class Package(ModuleType):
    """This package, whose public names are imported on first use.

    Importing torch takes seconds, which `minimas --help` does not need.
    """

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            modules = (import_module(f".{home}", __name__) for home in HOMES)
            self.__dict__[name] = next(getattr(m, name) for m in modules if hasattr(m, name))
            return self.__dict__[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "load" or not isinstance(value, ModuleType):  # `load` is the function
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*self.__dict__, *__all__]


sys.modules[__name__].__class__ = Package
