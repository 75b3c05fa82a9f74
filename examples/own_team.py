"""Make a team of your own: two agents in order, then two side by side and one that sums up.

python examples/own_team.py
"""

import sys

sys.path.insert(0, ".")  # runs in a checkout, without installing minimas
from minimas import Agent, Team, latent_mas, load

lm = load("weights/tiny")
question = "Tom has 5 coins. He buys 4 more. He loses 2. How many coins does Tom have?"

# In order: each agent works on the KV cache of all agents before it. The last one answers.
pair = Team(
    (
        Agent("planner", "Planner: work it out. {question}", latent_steps=6),
        Agent("judger", "Judger: give the answer. {question}"),
    )
)
# Side by side: no agent sees the others, and the last one gets all of their caches, joined.
experts = Team(
    (
        Agent("math", "Math expert: work it out. {question}"),
        Agent("science", "Science expert: work it out. {question}"),
        Agent("summarizer", "Summarizer: give the answer. {question}"),
    ),
    parallel=True,
)
for team in (pair, experts):
    [result] = latent_mas(lm, [question], team)
    steps = ", ".join(f"{agent.name} {agent.latent_steps}" for agent in result.agents)
    print(f"{result.answer} (latent steps: {steps})")
