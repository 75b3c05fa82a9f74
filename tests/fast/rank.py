"""The program of one torchrun rank in the tests of parallel.py: `python -m tests.fast.rank OUT`."""

import os
import sys
from pathlib import Path

import torch

from minimas import KVCache, Sampling, latent_mas, load, think
from minimas.core.model import prefill

QUESTIONS = [
    "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?",
    "Tom has 3 coins. He finds 2 more. He doubles the coins. How many coins does Tom have?",
]


def run(folder: Path, quantize: str | None, parallel: bool) -> dict[str, torch.Tensor | list[str]]:
    """Prefill ragged rows, think, cut, join and answer. Returns states and texts."""
    dtype = "bfloat16" if quantize else "float32"
    lm = load(folder, device="cpu", dtype=dtype, quantize=quantize, parallel=parallel)
    model = lm.model
    cache = model.new_cache(2)
    hidden = prefill(model, [[1, 2, 3, 4, 5], [6, 7]], cache, chunk_tokens=3)
    thoughts, hidden = think(model, lm.aligner("ridge"), hidden, cache, 3)
    joined = KVCache.concat([cache.keep_last(4), cache.truncate(2)])
    after = model(model.embed(torch.tensor([[8], [9]])), joined)
    sampling = Sampling(temperature=0.8, max_new_tokens=8)
    results = latent_mas(lm, QUESTIONS, sampling=sampling)
    layers = [weight for name, weight in model.state_dict().items() if "_proj.weight" in name]
    sizes = [sum(weight.numel() for weight in layers), cache.keys[0].shape[1]]
    states = {"prefill": hidden, "thoughts": thoughts, "after": after}
    return states | {"sizes": torch.tensor(sizes), "texts": [result.text for result in results]}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {
        str(quantize): run(out / "model", quantize, parallel=True)
        for quantize in (None, "q4", "nf4")
    }
    torch.save(found, out / f"rank{os.environ['RANK']}.pt")
