"""Train weights/tiny, a Qwen3 model with 0.7 M parameters on which latent collaboration works.

    python tools/train_tiny.py --seed 0 --out DIR
    python tools/train_tiny.py --seed 0 1 2 --out DIR      # train three seeds, and write the best

After training, the command measures every row of the model card, and fails if a row misses its bar.
An interrupted run continues from the last saved round. Training does not use the method: the model
sees text transcripts, but no latent steps and no soft embeddings. The map W_a is computed from the
weights, as for any other model. Three properties make this map accurate: rows of equal norm in W_in
and W_out, a final norm without a gain, and noise on the input embeddings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # minimas and tools of the checkout

from tools.training.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__.partition("\n\n")[0]))
