"""minimas: latent collaboration between language-model agents in plain PyTorch.

It implements LatentMAS (arXiv 2511.20639):

    from minimas import load, latent_mas

    lm = load("weights/tiny")
    question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
    [result] = latent_mas(lm, [question])
    print(result.text, result.usage)

A public name is imported on first use, because importing torch takes seconds, which
`minimas --help` does not need. `__init__.pyi` tells type checkers what the names are.
"""

import sys
from importlib import import_module
from types import ModuleType

PUBLIC = {
    "agents": "latent_mas single stream text_mas",
    "core": "Aligner Config KVCache Qwen3 alignment_matrix think",
    "load": "LM load",
    "memory": "remember",
    "results": "Result",
    "teams": "Agent Team hierarchical sequential",
    "text.generate": "Sampling generate",
    "text.tokenizer": "Tokenizer",
}
HOMES = {name: home for home, names in PUBLIC.items() for name in names.split()}
__all__ = list(HOMES)
__version__ = "0.1.0"


class Package(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{HOMES[name]}", __name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module `load` must not replace the function `load`.
        if name not in HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*self.__dict__, *HOMES]


sys.modules[__name__].__class__ = Package
