"""minimas: latent collaboration between language-model agents in plain PyTorch.

It implements LatentMAS (arXiv 2511.20639):

    from minimas import load, latent_mas

    lm = load("weights/tiny")
    question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
    [result] = latent_mas(lm, [question])
    print(result.text, result.usage)
"""

import sys

try:
    import torch  # noqa: F401  (imported first, because it takes most of the start-up)
except KeyboardInterrupt:
    if sys.argv[:1] != ["-m"]:  # `python -m minimas` ends quietly, as with Ctrl-C later on
        raise
    sys.exit(130)

from .agents import latent_mas, single, stream, text_mas
from .core.cache import KVCache
from .core.config import Config
from .core.latent import Aligner, alignment_matrix, think
from .core.model import Qwen3
from .load import LM, load
from .memory import remember
from .results import Result
from .teams import Agent, Team, hierarchical, sequential
from .text.generate import Sampling, generate
from .text.tokenizer import Tokenizer

__all__ = [
    "LM", "Agent", "Aligner", "Config", "KVCache", "Qwen3", "Result", "Sampling", "Team",
    "Tokenizer", "alignment_matrix", "generate", "hierarchical", "latent_mas", "load",
    "remember", "sequential", "single", "stream", "text_mas", "think",
]  # fmt: skip
__version__ = "0.1.0"
