"""Keep a working memory in a file, and use it later, in another process if you like.

python examples/memory_files.py
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import Agent, KVCache, Team, latent_mas, load, remember

lm = load("weights/tiny")
plan = "Planner: work it out. Eva has 2 cards. She finds 7 more. She loses 3."
plan += " How many cards does Eva have?"
memory = remember(lm, plan, latent_steps=6, role="agent")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "planner.safetensors"
    memory.save(path)
    print(f"saved {memory.lengths[0]} slots in {path.stat().st_size:,} bytes")
    loaded = KVCache.load(path, lm.model)  # an error for another model

# The judger sees the plan and the thoughts only in the memory: the question has no numbers.
judger = Team((Agent("judger", "Judger: give the answer. {question}"),))
question = "How many cards does Eva have?"
[result] = latent_mas(lm, [question], judger, memory=loaded, keep_memory=True)
assert result.memory is not None  # the KV cache after the answer, for a next call
print(f"{result.answer}, with {result.memory.lengths[0]} slots afterwards")
