"""Remember notes once, and ask many questions about them. Nothing is prefilled twice.

    python examples/ask_a_document.py

Three notes become three KV caches, each with a few latent thoughts, and are joined. weights/tiny
was trained on notes of this form.
"""

import sys

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import Agent, KVCache, Team, latent_mas, load, remember

lm = load("weights/tiny")
notes = [
    "Math expert: work it out. Eva has 5 coins. She buys 7 more. She eats 6. "
    "She doubles the coins.",
    "Science expert: work it out. Tom has 3 coins. He loses 1. He gets 7 more.",
    "Code expert: work it out. Ben has 8 coins. He loses 3. He doubles the coins. He gets 1 more.",
]
caches = [remember(lm, note, latent_steps=6, role="agent") for note in notes]
memory = KVCache.concat(caches)
print(f"remembered {memory.lengths[0]} slots, {memory.nbytes:,} bytes")

reader = Team((Agent("summarizer", "Summarizer: give the answer. {question}"),))
for name in ("Eva", "Tom", "Ben"):
    question = f"How many coins does {name} have?"
    [result] = latent_mas(lm, [question], reader, memory=memory)
    print(f"{question} {result.answer} ({result.usage.prompt_tokens} prompt tokens)")
