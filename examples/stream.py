"""Follow a team while it works, event by event.

    python examples/stream.py

The events are the start and the end of each agent, each thought and each piece of text. At the end
there is a result for each question.
"""

import sys

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import Result, load, stream
from minimas.results import AgentEnd, AgentStart, Piece, Thought

lm = load("weights/tiny")
question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
for event in stream(lm, [question], method="latent_mas"):
    if isinstance(event, AgentStart):
        print(f"{event.agent} ", end="", flush=True)
    elif isinstance(event, Thought):
        print(".", end="", flush=True)
    elif isinstance(event, Piece):
        print(event.text, end="", flush=True)
    elif isinstance(event, AgentEnd):
        print(f" ({event.memory.lengths[0]} slots)")
    elif isinstance(event, Result):
        print(event.answer)
