"""LatentMAS without agents: the model, its working memory, the alignment W_a and the latent loop.

This folder imports nothing of minimas but itself. Copied alone, it loads a folder of safetensors
and runs the latent loop. Reading order: latent, rollout, cache, model, rotary, config, checkpoint,
files.
"""

from .cache import KVCache
from .checkpoint import load_model
from .config import Config
from .latent import Aligner, alignment_matrix
from .model import Qwen3
from .rollout import think

__all__ = ["Aligner", "Config", "KVCache", "Qwen3", "alignment_matrix", "load_model", "think"]
