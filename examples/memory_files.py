"""Keep a working memory in a file, and use it later, in another process if you like.

python examples/memory_files.py
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import KVCache, latent_mas, load, remember

lm = load("weights/tiny")
planner = "Planner: work it out. Eva has 2 cards. She finds 7 more. How many cards does Eva have?"
memory = remember(lm, planner, latent_steps=6, role="agent")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "planner.safetensors"
    memory.save(path)
    print(f"saved {memory.lengths[0]} slots in {path.stat().st_size:,} bytes")
    loaded = KVCache.load(path, lm.model)  # refused for another model

# A call that keeps its memory leaves a cache from which the next call can go on.
question = "Tom has 5 coins. He buys 4 more. He loses 2. How many coins does Tom have?"
[result] = latent_mas(lm, [question], memory=loaded, keep_memory=True)
assert result.memory is not None
print(f"{result.answer}, with {result.memory.lengths[0]} slots afterwards")
