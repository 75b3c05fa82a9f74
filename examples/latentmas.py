"""LatentMAS (arXiv 2511.20639) on one page: four agents, one model, one working memory.

Run `python examples/latentmas.py ["QUESTION"]`. It uses minimas.core (W_a in latent.py, the loop in
rollout.py) and weights/tiny, which knows only such questions and was trained without the method.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing minimas
from minimas.core import Aligner, load_model, think
from minimas.core.model import prefill

question = " ".join(sys.argv[1:]) or (
    "Eva has 2 cards. She finds 7 more. She loses 3. She doubles the cards. "
    "How many cards does Eva have?"
)

# All agents are the same model. They differ only in their prompts, which are in the model's folder.
TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
model = load_model(TINY)
tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
teams = json.loads((TINY / "teams.json").read_text(encoding="utf-8"))
agents = teams["sequential"]["agents"]
# The alignment W_a (equation 3) maps a hidden state to an input embedding.
align = Aligner.from_model(model, "ridge", rows=tokenizer.get_vocab_size())
# The working memory (section 3.2): one KV cache, which every agent hands to the next one.
cache = model.new_cache(batch_size=1)


def feed(text: str) -> torch.Tensor:
    """Prefill `text` into the cache, and return the last hidden state (1, 1, D)."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    print(f"  prefilled {len(ids)} tokens, now {cache.lengths[0] + len(ids)} slots")
    return prefill(model, [ids], cache)


for agent in agents:  # each has a chat turn of its own
    print(agent["name"])
    prompt = agent["prompt"].replace("{question}", question)
    hidden = feed(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    if agent is not agents[-1]:
        # Latent thoughts (section 3.1): feed back e = rescale(h W_a), and never decode a token.
        thoughts, _ = think(model, align, hidden, cache, teams["latent_steps"])
        print(f"  thought {thoughts.shape[1]} times, now {cache.lengths[0]} slots")
        feed("<|im_end|>\n")  # the turn ends; its prompt and its thoughts stay in the cache

# Only the last agent decodes text, here greedily. It attends to all prompts and thoughts before it.
answer: list[int] = []
while len(answer) < 256:
    token = int(model.logits(hidden).argmax())
    if token == tokenizer.token_to_id("<|im_end|>"):
        break
    answer.append(token)
    hidden = model(model.embed(torch.tensor([[token]])), cache)
print(tokenizer.decode(answer).strip())
