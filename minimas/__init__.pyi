from .agents import latent_mas, single, stream, text_mas
from .core import Aligner, Config, KVCache, Qwen3, alignment_matrix, think
from .load import LM, load
from .memory import remember
from .results import Result
from .teams import Agent, Team, hierarchical, sequential
from .text.generate import Sampling, generate
from .text.tokenizer import Tokenizer

__all__ = [
    "LM", "Agent", "Aligner", "Config", "KVCache", "Qwen3", "Result", "Sampling", "Team",
    "Tokenizer", "alignment_matrix", "generate", "hierarchical", "latent_mas", "load", "remember",
    "sequential", "single", "stream", "text_mas", "think",
]  # fmt: skip
__version__: str
