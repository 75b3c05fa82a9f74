"""The contenders of tools/benchmark.py: minimas, the authors' method, bitsandbytes and llama.cpp.

All of them load the same checkpoint. A contender prefills a context (`start`) and removes what
came after it (`rewind`). It has a method for each task that it supports: `latent`, `decode`,
`prefill`. For each task, its `reads` names the weights that one step reads. To add a contender,
write such a class and add a row to `CONTENDERS`. This module does not depend on timing, rounds or
tables.

    B rows   T context   D hidden   V vocabulary
"""

import ctypes
import importlib
import inspect
import logging
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minimas import Aligner, Config, Qwen3, load, think
from minimas.core.model import prefill
from minimas.fast.quantize import FORMATS, TORCH_FORMATS

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# Steps in one sample: long compared with the scheduler's noise, short compared with the context.
STEPS = 4
Reads = dict[str, tuple[str, ...]]


class Minimas:
    """The library as its own agents use it: `prefill`, `think`, and a decoding loop."""

    needs: ClassVar[tuple[str, ...]] = ()
    # The embedding matrix is never read as a whole. Only a decode step needs the LM head, and only
    # a latent step needs W_a.
    reads: ClassVar[Reads] = {
        "latent": ("trunk", "W_a"),
        "decode": ("trunk", "head"),
        "prefill": ("trunk",),
    }

    def __init__(
        self, entry: "Entry", source: Path, align: Aligner | None, dtype: torch.dtype
    ) -> None:
        quantize = None if entry.format == "bf16" else entry.format
        self.lm = load(source, device="cpu", dtype=dtype, quantize=quantize, compile=entry.compiled)
        self.model = self.lm.model
        self.align = align

    def start(self, ids: Tensor) -> None:
        """Prefill the context (B, T), from which latent and decode steps continue."""
        self.cache = self.model.new_cache(len(ids))
        self.hidden = prefill(self.model, ids.tolist(), self.cache)  # (B, 1, D)
        self.filled = self.cache.lengths

    def rewind(self) -> None:
        """Remove all slots after the context without a copy: slots from `lengths` on are free."""
        self.cache.lengths = self.filled

    def stop(self) -> None:
        """Free the KV cache."""
        del self.cache

    def latent(self, ids: Tensor) -> Tensor:
        """Take `STEPS` latent steps. Returns the last hidden state (B, D)."""
        assert self.align is not None
        return think(self.model, self.align, self.hidden, self.cache, STEPS)[1][:, -1]  # (B, D)

    def decode(self, ids: Tensor) -> Tensor:
        """Decode `STEPS` times. Returns the last logits (B, V).

        The next token is given instead of chosen, because contenders may choose differently if two
        logits are close.
        """
        for token in ids[:, :STEPS].split(1, dim=1):  # (B, 1)
            logits = self.model.logits(self.model(self.model.embed(token), self.cache))  # (B, 1, V)
            logits.argmax(-1).tolist()
        return logits[:, -1]  # (B, V)

    def prefill(self, ids: Tensor) -> Tensor:
        """Prefill the context (B, T) into an empty cache. Returns the last hidden state (B, D)."""
        return prefill(self.model, ids.tolist(), self.model.new_cache(len(ids)))[:, -1]  # (B, D)


class Authors:
    """The method of LatentMAS's models.py (github.com/Gen-Verse/LatentMAS) in transformers.

    The authors call the whole causal LM with a mask of ones, with the hidden states of every layer
    and without `logits_to_keep`. So each latent step also computes logits that are not used, and a
    prefill computes the logits of every position. The state is multiplied by a matrix in float32,
    even if the matrix is the identity. Three things are left out in the authors' favour: copies of
    the thoughts, the sampling code of `generate`, and float32, which they choose on a CPU.
    """

    needs: ClassVar[tuple[str, ...]] = ("transformers",)
    reads: ClassVar[Reads] = {
        "latent": ("trunk", "head", "W_a"),
        "decode": ("trunk", "head"),
        "prefill": ("trunk", "head"),
    }

    def __init__(
        self, entry: "Entry", source: Path, align: Aligner | None, dtype: torch.dtype
    ) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.model = self.load(entry, source, dtype)
        self.align = align
        # transformers 5.24 calls it `cache`, and warns at every call that uses the older name.
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def load(self, entry: "Entry", source: Path, dtype: torch.dtype) -> Any:
        """Return the model of transformers."""
        return transformers_model(source, dtype)

    def start(self, ids: Tensor) -> None:
        """Prefill the context (B, T), as in `Minimas`."""
        self.cache = self.new_cache()
        self.context = ids.shape[1]
        self.hidden = self.forward(self.cache, input_ids=ids)  # (B, D)

    def rewind(self) -> None:
        """Remove all slots after the context. Cropping makes views, which the next step copies."""
        if extra := self.cache.get_seq_length() - self.context:
            self.cache.crop(-extra)

    def stop(self) -> None:
        """Free the KV cache."""
        del self.cache

    def new_cache(self) -> Any:
        """Return an empty cache of transformers."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def arguments(self, cache: Any, given: Tensor) -> dict[str, Any]:
        """Return what every call takes in addition to its new positions `given` (B, T, …)."""
        mask = torch.ones(len(given), cache.get_seq_length() + given.shape[1], dtype=torch.int64)
        return {"attention_mask": mask, self.cache_argument: cache, "use_cache": True}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        """Return the last position's state after the final norm, (B, D).

        `inputs` is either `input_ids` (B, T) or `inputs_embeds` (B, T, D).
        """
        [given] = inputs.values()
        output = self.model(
            **inputs, **self.arguments(cache, given), output_hidden_states=True, return_dict=True
        )
        return output.hidden_states[-1][:, -1]  # type: ignore[no-any-return]

    def latent(self, ids: Tensor) -> Tensor:
        """Take `STEPS` latent steps, as in `Minimas`."""
        assert self.align is not None
        matrix, norm = self.align.matrix, self.align.norm
        assert matrix is not None and norm is not None  # the ridge map has both
        hidden = self.hidden  # (B, D)
        for _ in range(STEPS):
            aligned = hidden.to(torch.float32) @ matrix
            aligned = aligned * (norm / aligned.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            hidden = self.forward(self.cache, inputs_embeds=aligned.to(hidden.dtype)[:, None])
        return hidden

    def decode(self, ids: Tensor) -> Tensor:
        """Decode `STEPS` times, as in `Minimas`."""
        for token in ids[:, :STEPS].split(1, dim=1):  # (B, 1)
            logits = self.model(token, **self.arguments(self.cache, token), logits_to_keep=1).logits
            logits.argmax(-1).tolist()
        return logits[:, -1]  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor) -> Tensor:
        """Prefill the context into an empty cache, as in `Minimas`."""
        return self.forward(self.new_cache(), input_ids=ids)


class TrunkOnly(Authors):
    """The authors' method without what is not needed: logits and hidden states of other layers."""

    # No "decode": it needs the logits.
    reads: ClassVar[Reads] = {"latent": ("trunk", "W_a"), "prefill": ("trunk",)}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        """Return the state of the last position (B, D), as in `Authors`."""
        [given] = inputs.values()
        output = self.model.model(**inputs, **self.arguments(cache, given))
        return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]


class BitsAndBytes(TrunkOnly):
    """transformers with bitsandbytes. The LM head runs only if logits are needed."""

    needs: ClassVar[tuple[str, ...]] = ("transformers", "accelerate", "bitsandbytes")
    reads: ClassVar[Reads] = Minimas.reads

    def load(self, entry: "Entry", source: Path, dtype: torch.dtype) -> Any:
        """Return the model of transformers with weights in the format of the entry."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        # int8 warns at every product that it casts to float16, and the warning takes longer than
        # the product.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        options: dict[str, Any] = {"load_in_8bit": True}
        if entry.format == "nf4":
            options = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.bfloat16,
            }
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=config
        ).eval()


@lru_cache(maxsize=1)
def transformers_model(source: Path, dtype: torch.dtype) -> Any:
    """Return one model for all contenders that need it. Only the latest model is kept."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


class LlamaCpp:
    """llama.cpp through its C interface: one `llama_decode` per step, with default settings.

    Only the number of threads is set. llama.cpp has no latent step, but a batch may hold
    embeddings and ask for states after the final norm. A latent step is such a call after the map
    in float32. llama.cpp also computes the logits of every position whose state is asked for.
    Therefore a prefill asks for the logits of the last position, as its users do, and not for its
    state.
    """

    needs: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    reads: ClassVar[Reads] = Authors.reads  # the prefill uses the head for one position only

    def __init__(
        self, entry: "Entry", source: Path, align: Aligner | None, dtype: torch.dtype
    ) -> None:
        self.c = quiet_llama()
        self.align = align
        self.context = None
        params = self.c.llama_model_default_params()
        self.model = self.c.llama_model_load_from_file(str(source).encode(), params)
        if not self.model:
            raise ValueError(f"{source}: llama.cpp cannot load it")
        self.V = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.D = self.c.llama_model_n_embd(self.model)

    def start(self, ids: Tensor) -> None:
        """Prefill the context (B, T), after allocating slots and the batches that will be sent."""
        rows, self.width = ids.shape
        params = self.c.llama_context_default_params()
        params.n_ctx = rows * (self.width + 256)
        params.n_seq_max = rows
        params.n_batch = max(2048, ids.numel())
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.stop()
        self.context = self.c.llama_init_from_model(self.model, params)
        self.memory = self.c.llama_get_memory(self.context)
        sizes = {"whole": (ids.numel(), 0), "token": (rows, 0), "state": (rows, self.D)}
        self.batches = {name: self.c.llama_batch_init(*size, 1) for name, size in sizes.items()}
        self.place("whole", self.width, 0)
        for name in ("token", "state"):
            self.place(name, 1, self.width)
        self.give("whole", ids)
        self.prefill(ids)
        # The state of the last token comes from a second call for that token, because the states of
        # the whole context would come with gigabytes of logits.
        self.rewind(self.width - 1)
        self.give("token", ids[:, -1:])
        self.hidden = self.run("token", states=True, step=-1).clone()

    def give(self, name: str, ids: Tensor) -> None:
        """Copy tokens (B, …) into a batch."""
        tokens = ids.to(torch.int32).contiguous()
        ctypes.memmove(self.batches[name].token, tokens.data_ptr(), tokens.nbytes)

    def place(self, name: str, width: int, first: int) -> None:
        """Set the row and position of each entry of a batch, and ask for each row's last result."""
        batch = self.batches[name]
        batch.n_tokens = width * self.c.llama_n_seq_max(self.context)
        for i in range(batch.n_tokens):
            batch.pos[i] = first + i % width
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // width
            batch.logits[i] = i % width == width - 1

    def run(self, name: str, states: bool, step: int = 0) -> Tensor:
        """Send a batch `step` positions after the context.

        Returns a view of the last states (B, D) or logits (B, V). Raises ValueError if llama.cpp
        reports an error.
        """
        batch = self.batches[name]
        if name != "whole":
            for i in range(batch.n_tokens):
                batch.pos[i] = self.width + step
        self.c.llama_set_embeddings(self.context, states)
        if failed := self.c.llama_decode(self.context, batch):
            raise ValueError(f"llama.cpp: llama_decode returned {failed}")
        if states:
            pointer, size = self.c.llama_get_embeddings(self.context), self.D
        else:
            pointer, size = self.c.llama_get_logits(self.context), self.V
        rows = self.c.llama_n_seq_max(self.context)
        address = ctypes.addressof(pointer.contents)
        floats = (ctypes.c_float * (rows * size)).from_address(address)
        return torch.frombuffer(floats, dtype=torch.float32).view(rows, size)  # (B, D) or (B, V)

    def rewind(self, length: int | None = None) -> None:
        """Remove all slots after the context, or after the first `length` positions."""
        first = self.width if length is None else length
        for row in range(self.c.llama_n_seq_max(self.context)):
            self.c.llama_memory_seq_rm(self.memory, row, first, -1)

    def stop(self) -> None:
        """Free the KV cache and the batches."""
        if self.context is not None:
            for batch in self.batches.values():
                self.c.llama_batch_free(batch)
            self.c.llama_free(self.context)
        self.context = None

    def latent(self, ids: Tensor) -> Tensor:
        """Take `STEPS` latent steps, as in `Minimas`."""
        assert self.align is not None
        hidden = self.hidden  # (B, D)
        for step in range(STEPS):
            aligned = self.align(hidden).contiguous()  # (B, D) float32
            ctypes.memmove(self.batches["state"].embd, aligned.data_ptr(), aligned.nbytes)
            hidden = self.run("state", states=True, step=step)
        return hidden.clone()

    def decode(self, ids: Tensor) -> Tensor:
        """Decode `STEPS` times, as in `Minimas`."""
        for step, token in enumerate(ids[:, :STEPS].split(1, dim=1)):  # (B, 1)
            self.give("token", token)
            logits = self.run("token", states=False, step=step)
            logits.argmax(-1).tolist()
        return logits.clone()

    def prefill(self, ids: Tensor) -> Tensor:
        """Prefill the context, which the cache holds afterwards. Returns the last logits (B, V)."""
        self.c.llama_memory_clear(self.memory, False)
        return self.run("whole", states=False).clone()


@lru_cache(maxsize=1)
def silent_log() -> Any:
    """Return a log function for C that prints nothing.

    `lru_cache` keeps the function alive, because C code calls it.
    """
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def quiet_llama() -> Any:
    """Return the C interface of llama.cpp, without its page of log lines for every file."""
    import llama_cpp

    llama_cpp.llama_log_set(silent_log(), ctypes.c_void_p())
    return llama_cpp


# -- the table of contenders -----------------------------------------------------------------------


class Entry(NamedTuple):
    """How to make a contender: its class, its weight format, and whether its steps are compiled."""

    make: Any  # Minimas, Authors … LlamaCpp
    format: str
    compiled: bool = False


Contender = Minimas | Authors | LlamaCpp
REFERENCE = "minimas-bf16"  # all results are compared with its results
YARDSTICK = "authors-bf16"  # all times are compared with its times
CONTENDERS = {
    REFERENCE: Entry(Minimas, "bf16"),
    "minimas-bf16-compiled": Entry(Minimas, "bf16", True),
    "minimas-q8": Entry(Minimas, "q8"),
    "minimas-q8-compiled": Entry(Minimas, "q8", True),
    "minimas-q4": Entry(Minimas, "q4"),
    "minimas-q4-compiled": Entry(Minimas, "q4", True),
    "minimas-int8": Entry(Minimas, "int8"),
    "minimas-nf4": Entry(Minimas, "nf4"),
    YARDSTICK: Entry(Authors, "bf16"),
    "trunk-bf16": Entry(TrunkOnly, "bf16"),
    "bitsandbytes-int8": Entry(BitsAndBytes, "int8"),
    "bitsandbytes-nf4": Entry(BitsAndBytes, "nf4"),
    "llama.cpp-bf16": Entry(LlamaCpp, "bf16"),
    "llama.cpp-Q8_0": Entry(LlamaCpp, "Q8_0"),
    "llama.cpp-Q4_0": Entry(LlamaCpp, "Q4_0"),
}
LEGEND = (
    f"`{YARDSTICK}` is the paper's loop in transformers. `trunk-bf16` is the same without the "
    "unused logits and hidden states that the authors' code computes. `bitsandbytes-*` is "
    "transformers with bitsandbytes, without unused logits. llama.cpp has no latent step: its "
    "line is a batch of embeddings that asks for states, and it computes logits as well."
)
# Left out in this order if memory is too small for all contenders.
SPARE = ("minimas-nf4", "minimas-int8", "llama.cpp-bf16")
# Bits per weight in the matrices of the layers, and in the LM head. Q8_0 and Q4_0 have a float16
# scale for every 32 weights, and Q4_0 has a Q6_K head. The scales of whole rows (q8, int8) are
# less than 0.1 % and are not counted.
BITS: dict[str, tuple[float, float]] = {
    "bf16": (16, 16),
    "Q8_0": (8.5, 8.5),
    "Q4_0": (4.5, 6.5625),
}
BITS |= {name: (bits, 8 if name in TORCH_FORMATS else 16) for name, bits in FORMATS.items()}
# The largest relative difference from bf16 that a format explains after one layer of random
# weights, which have no redundancy. Each limit is twice the measured difference. After four latent
# steps the difference is about three times as large (0.8 for 4 bits; for unrelated results, 1.4).
TOLERANCE = {
    "bf16": 0.02,
    "q8": 0.08,
    "q4": 0.4,
    "int8": 0.08,
    "nf4": 0.4,
    "Q8_0": 0.08,
    "Q4_0": 0.4,
}


def chosen(patterns: Sequence[str]) -> list[str]:
    """Return the contenders that match a shell pattern, with the reference and the yardstick.

    Raises ValueError if a pattern matches none.
    """
    kept = {REFERENCE, YARDSTICK}
    for pattern in patterns:
        matching = [name for name in CONTENDERS if fnmatch(name, pattern)]
        if not matching:
            expected = f"{', '.join(CONTENDERS)}, or a pattern for them"
            raise ValueError(f"--contenders: found {pattern!r}, expected {expected}")
        kept.update(matching)
    return [name for name in CONTENDERS if name in kept]


def missing(entry: Entry) -> str | None:
    """Return the first package that a contender needs and that cannot be imported, or None."""
    needs = (*entry.make.needs, *(("bitsandbytes",) if entry.format in ("nf4", "int8") else ()))
    for package in needs:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError):  # a broken build raises one of the last two
            return str(package)
    return None


def weight_bytes(config: Config, format: str) -> dict[str, int]:
    """Return the bytes of the parts of a model in `format`: "trunk", "head", "W_a" (float32)."""
    with torch.device("meta"):
        state = Qwen3(config).state_dict()
    matrices = vectors = 0
    for name, tensor in state.items():
        if not name.startswith(("model.layers.", "model.norm.")):
            continue
        if tensor.ndim == 2:
            matrices += tensor.numel()
        else:
            vectors += tensor.numel()
    bits, head_bits = BITS[format]
    return {
        "trunk": int(matrices * bits / 8) + 2 * vectors,
        "head": int(config.vocab_size * config.hidden_size * head_bits / 8),
        "W_a": 4 * config.hidden_size**2,
    }


def stored_bytes(config: Config, entry: Entry) -> int:
    """Return the bytes of all weights of a contender.

    A tied embedding is also the LM head if the head has 16 bits, and always in llama.cpp.
    """
    sizes = weight_bytes(config, entry.format)
    one_matrix = BITS[entry.format][1] == 16 or entry.make is LlamaCpp
    shared = config.tie_word_embeddings and one_matrix
    embedding = 0 if shared else 2 * config.vocab_size * config.hidden_size
    return sizes["trunk"] + sizes["head"] + embedding
