"""Measure the speed of minimas and of its alternatives on one machine.

The result is a Markdown page of medians and ratios.

    python tools/benchmark.py                          # random weights in the shape of Qwen3-0.6B
    python tools/benchmark.py --model FOLDER --rounds 9 --threads 2 --out benchmark.md
    python tools/benchmark.py --contenders '*q4*' --only decode load --batch-sizes 1

Each round runs every contender of tools/benchmarking/contenders.py once. The order changes from
round to round, so a machine that slows down affects all contenders alike. All contenders compute
the same function from the same weights. Results are compared before the timing, in float32 and
on one layer of each format, and in every round with the contender's first result. If they differ
by more than rounding explains, the command ends with an error and prints no table. A contender
whose library is not installed is left out with a message.

    latent step   hidden state -> aligned embedding -> layers; mean of `STEPS` steps after
                  `--context` tokens
    decode step   token -> layers -> logits -> most likely token; measured in the same way
    prefill       `--context` tokens per row into an empty KV cache, up to the last hidden state
    load          in new processes: from the file to a model, its first token, peak memory (Linux)

First calls, which pack weights and compile steps, are timed separately. Three other measurements
need a real model and are run separately (tools/benchmarking/end_to_end.py and quality.py):

    python tools/benchmark.py --end-to-end FOLDER --questions FILE.jsonl --limit 10
                                                       # latent_mas, text_mas and single
    python tools/benchmark.py --memory-error FOLDER [--gguf FILE]
                                                       # error of each weight format in the KV cache
    python tools/benchmark.py --perplexity FOLDER --text FILE [--gguf FILE]
                                                       # perplexity of each weight format

The benchmark does not sample, use a GPU or wait for an idle machine. Other processes affect every
figure. The page shows the load average before the run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # minimas and tools of the checkout

from tools.shared.interrupt import quit_quietly

quit_quietly()

from tools.benchmarking.command import main  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("benchmark", lambda: main(__doc__.partition("\n")[0])))
