"""LatentMAS without agents: the model, its KV cache, the alignment W_a and the latent loop.

This folder imports nothing from the rest of minimas. A copy of it alone can load a folder of
safetensors files and run the latent loop. Read the files in this order: latent, rollout, cache,
model, rotary, config, checkpoint, files.
"""

from .cache import KVCache
from .checkpoint import load_model
from .config import Config
from .latent import Aligner, alignment_matrix
from .model import Qwen3
from .rollout import think

__all__ = ["Aligner", "Config", "KVCache", "Qwen3", "alignment_matrix", "load_model", "think"]
