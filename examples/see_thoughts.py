"""See what latent thoughts stand for: the likeliest tokens of the LM head for each of them.

    python examples/see_thoughts.py

The agents of weights/tiny think through the intermediate results, one per thought.
"""

import sys

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import latent_mas, load
from minimas.lens import Lens

lm = load("weights/tiny")
lens = Lens(lm, top=2)
question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
[result] = latent_mas(lm, [question], on_event=lens)
for trace, thoughts in lens.seen:
    print(trace.name)
    for number, thought in enumerate(thoughts, start=1):
        likely = "  ".join(f"{token!r} {chance:.0%}" for token, chance in thought.tokens)
        print(f"  {number}  {likely:<32}  entropy {thought.entropy:.2f}")
print(result.answer)
