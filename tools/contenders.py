"""Who races in tools/benchmark.py: minimas, the authors' way in transformers, bitsandbytes, llama.cpp; one checkpoint.

A contender reads a context (`start`), forgets what came behind it (`rewind`), and has a method for each task that it
can do, `latent`, `decode`, `prefill`, named in `reads` with the weights that one step of it reads. A new contender is
such a class and a row of `FIELD`. Does not know: clocks, rounds, tables.

    B rows   T context   D hidden   V vocabulary
"""

import ctypes
import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimas import Aligner, Config, Qwen3, load, think
from minimas.core.model import prefill
from minimas.fast.quantize import FORMATS

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
STEPS = 4  # in one sample, so that it is long beside the scheduler's noise, and the memory hardly longer at its end
Reads = dict[str, tuple[str, ...]]


class Minimas:
    """The library as its own agents use it: `read`, `think`, and a decoding loop."""

    needs: ClassVar[tuple[str, ...]] = ()
    # Of the weights in each task: all but the embedding; the LM head for a token only, W_a for a thought only.
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
        self.model, self.align = self.lm.model, align

    def start(self, ids: Tensor) -> None:
        """Read the context (B, T) into the memory that latent and decode steps continue."""
        self.cache = self.model.new_cache(len(ids))
        self.hidden = prefill(self.model, ids.tolist(), self.cache)  # (B, 1, D)
        self.filled = self.cache.lengths

    def rewind(self) -> None:
        """Forget all but the context: slots behind `lengths` are free, so nothing is copied."""
        self.cache.lengths = self.filled

    def stop(self) -> None:
        """Give the memory back."""
        del self.cache

    def latent(self, ids: Tensor) -> Tensor:
        assert self.align is not None
        return think(self.model, self.align, self.hidden, self.cache, STEPS)[1][:, -1]  # (B, D)

    def decode(self, ids: Tensor) -> Tensor:
        for token in ids[:, :STEPS].split(1, dim=1):  # (B, 1)
            logits = self.model.logits(self.model(self.model.embed(token), self.cache))  # (B, 1, V)
            logits.argmax(
                -1
            ).tolist()  # the next token is not fed: a close call may differ between contenders
        return logits[:, -1]

    def prefill(self, ids: Tensor) -> Tensor:
        return prefill(self.model, ids.tolist(), self.model.new_cache(len(ids)))[:, -1]


class Authors:
    """The way of LatentMAS's models.py (github.com/Gen-Verse/LatentMAS), on transformers' own model.

    They call the whole causal LM, with a mask of ones, every layer's hidden states and no `logits_to_keep`: each latent
    step also computes logits that nobody reads, and a prefill the logits of every position. The state is mapped in
    float32, by a matrix even where it is the identity. Left out in their favour: copies of the thoughts, the sampling
    machinery of `generate`, and float32, which they choose on a CPU.
    """

    needs: ClassVar[tuple[str, ...]] = ("transformers",)
    reads: ClassVar[Reads] = {
        "latent": ("trunk", "head", "W_a"), "decode": ("trunk", "head"), "prefill": ("trunk", "head"),
    }  # fmt: skip

    def __init__(
        self, entry: "Entry", source: Path, align: Aligner | None, dtype: torch.dtype
    ) -> None:
        from transformers.utils import logging as theirs

        theirs.disable_progress_bar()
        self.model = self.load(entry, source, dtype)
        self.align = align
        # transformers 5.24 calls it `cache`, and warns at every call that uses the older name.
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def load(self, entry: "Entry", source: Path, dtype: torch.dtype) -> Any:
        return transformers_model(source, dtype)

    def start(self, ids: Tensor) -> None:
        """As in `Minimas`."""
        self.cache, self.context = self.new_cache(), ids.shape[1]
        self.hidden = self.forward(self.cache, input_ids=ids)  # (B, D)

    def rewind(self) -> None:
        """Forget all but the context: a view; the next step copies the layer, as each one does."""
        if extra := self.cache.get_seq_length() - self.context:
            self.cache.crop(-extra)

    def stop(self) -> None:
        """Give the memory back."""
        del self.cache

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def arguments(self, cache: Any, given: Tensor) -> dict[str, Any]:
        """What every call carries besides its new positions `given` (B, T, …)."""
        mask = torch.ones(len(given), cache.get_seq_length() + given.shape[1], dtype=torch.int64)
        return {"attention_mask": mask, self.cache_argument: cache, "use_cache": True}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        """The last position's state after the final norm, (B, D), of `input_ids` or `inputs_embeds`."""
        [given] = inputs.values()
        output = self.model(
            **inputs, **self.arguments(cache, given), output_hidden_states=True, return_dict=True
        )
        return output.hidden_states[-1][:, -1]  # type: ignore[no-any-return]

    def latent(self, ids: Tensor) -> Tensor:
        assert self.align is not None
        hidden, matrix, norm = self.hidden, self.align.matrix, self.align.norm
        assert matrix is not None and norm is not None  # the ridge map has both
        for _ in range(STEPS):
            aligned = hidden.to(torch.float32) @ matrix
            aligned = aligned * (norm / aligned.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            hidden = self.forward(self.cache, inputs_embeds=aligned.to(hidden.dtype)[:, None])
        return hidden

    def decode(self, ids: Tensor) -> Tensor:
        for token in ids[:, :STEPS].split(1, dim=1):
            logits = self.model(token, **self.arguments(self.cache, token), logits_to_keep=1).logits
            logits.argmax(-1).tolist()
        return logits[:, -1]  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor) -> Tensor:
        return self.forward(self.new_cache(), input_ids=ids)


class TrunkOnly(Authors):
    """The same without what the authors could leave out: no logits, no hidden states of other layers."""

    # to decode, the logits are needed
    reads: ClassVar[Reads] = {"latent": ("trunk", "W_a"), "prefill": ("trunk",)}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        [given] = inputs.values()
        states: Tensor = self.model.model(
            **inputs, **self.arguments(cache, given)
        ).last_hidden_state
        return states[:, -1]


class BitsAndBytes(TrunkOnly):
    """transformers' own way to bitsandbytes, trunk only where no logits are needed."""

    needs: ClassVar[tuple[str, ...]] = ("transformers", "accelerate", "bitsandbytes")
    reads: ClassVar[Reads] = Minimas.reads

    def load(self, entry: "Entry", source: Path, dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        # int8 says at every call of every matrix that it casts to float16, and that takes longer than the matrix
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        how: dict[str, Any] = {"load_in_8bit": True}
        if entry.format == "nf4":
            how = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            }
            how |= {"bnb_4bit_compute_dtype": torch.bfloat16}
        config = BitsAndBytesConfig(**how)
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=config
        ).eval()


@lru_cache(maxsize=1)
def transformers_model(source: Path, dtype: torch.dtype) -> Any:
    """One model for all contenders that need it; the next folder or dtype takes its place."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


class LlamaCpp:
    """llama.cpp by its C interface, one `llama_decode` a step, its defaults but for the number of threads.

    It has no latent step of its own, but a batch may bring embeddings and ask for states after the final norm: with the
    map in float32 between two calls, that is one. It computes the logits of every such position all the same, so that a
    prefill asks for the last position's logits, as its users do, not for its state.
    """

    needs: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    reads: ClassVar[Reads] = Authors.reads  # in a prefill the head of one position only

    def __init__(
        self, entry: "Entry", source: Path, align: Aligner | None, dtype: torch.dtype
    ) -> None:
        self.c, self.align, self.context = quiet_llama(), align, None
        self.model = self.c.llama_model_load_from_file(
            str(source).encode(), self.c.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"{source}: llama.cpp cannot load it")
        self.V = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.D = self.c.llama_model_n_embd(self.model)

    def start(self, ids: Tensor) -> None:
        """As in `Minimas`: a context with room for (B, T) and the steps, and the batches that will be sent."""
        rows, self.width = ids.shape
        params = self.c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = (
            rows * (self.width + 256),
            rows,
            max(2048, ids.numel()),
        )
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.stop()
        self.context = self.c.llama_init_from_model(self.model, params)
        self.memory = self.c.llama_get_memory(self.context)
        sizes = {"whole": (ids.numel(), 0), "token": (rows, 0), "state": (rows, self.D)}
        self.batches = {name: self.c.llama_batch_init(*size, 1) for name, size in sizes.items()}
        self.fill("whole", self.width, 0)
        for name in ("token", "state"):
            self.fill(name, 1, self.width)
        self.give("whole", ids)
        self.prefill(ids)
        self.rewind(
            self.width - 1
        )  # the last token once more: states of all would bring the logits of all, gigabytes
        self.give("token", ids[:, -1:])
        self.hidden = self.run("token", states=True, step=-1).clone()

    def give(self, name: str, ids: Tensor) -> None:
        """Put tokens (B, …) into a batch."""
        tokens = ids.to(torch.int32).contiguous()
        ctypes.memmove(self.batches[name].token, tokens.data_ptr(), tokens.nbytes)

    def fill(self, name: str, width: int, first: int) -> None:
        """Say of each entry of a batch which row and position it is, and ask for the result of each row's last one."""
        batch = self.batches[name]
        batch.n_tokens = width * self.c.llama_n_seq_max(self.context)
        for i in range(batch.n_tokens):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = first + i % width, 1, i // width
            batch.logits[i] = i % width == width - 1

    def run(self, name: str, states: bool, step: int = 0) -> Tensor:
        """Send a batch, `step` positions behind the context; a view of the last states (B, D) or logits (B, V)."""
        batch = self.batches[name]
        for i in range(batch.n_tokens if name != "whole" else 0):
            batch.pos[i] = self.width + step
        self.c.llama_set_embeddings(self.context, states)
        if failed := self.c.llama_decode(self.context, batch):
            raise ValueError(f"llama.cpp: llama_decode returned {failed}")
        get, size = (
            (self.c.llama_get_embeddings, self.D) if states else (self.c.llama_get_logits, self.V)
        )
        rows = self.c.llama_n_seq_max(self.context)
        floats = (ctypes.c_float * (rows * size)).from_address(
            ctypes.addressof(get(self.context).contents)
        )
        return torch.frombuffer(floats, dtype=torch.float32).view(rows, size)

    def rewind(self, length: int | None = None) -> None:
        """As in `Minimas`; or to another length."""
        for row in range(self.c.llama_n_seq_max(self.context)):
            self.c.llama_memory_seq_rm(
                self.memory, row, self.width if length is None else length, -1
            )

    def stop(self) -> None:
        """Give the memory back."""
        if self.context is not None:
            for batch in self.batches.values():
                self.c.llama_batch_free(batch)
            self.c.llama_free(self.context)
        self.context = None

    def latent(self, ids: Tensor) -> Tensor:
        assert self.align is not None
        hidden, given = self.hidden, self.batches["state"]
        for step in range(STEPS):
            aligned = self.align(hidden).contiguous()  # (B, D) float32
            ctypes.memmove(given.embd, aligned.data_ptr(), aligned.nbytes)
            hidden = self.run("state", states=True, step=step)
        return hidden.clone()

    def decode(self, ids: Tensor) -> Tensor:
        for step, token in enumerate(ids[:, :STEPS].split(1, dim=1)):  # (B, 1)
            self.give("token", token)
            logits = self.run("token", states=False, step=step)
            logits.argmax(-1).tolist()
        return logits.clone()

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits (B, V); afterwards the memory holds the context again, as after `start`."""
        self.c.llama_memory_clear(self.memory, False)
        return self.run("whole", states=False).clone()


_silent: Any = None  # kept alive: C calls it


def quiet_llama() -> Any:
    """The C interface of llama.cpp, which otherwise logs a page for every file."""
    import llama_cpp

    global _silent
    _silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    return llama_cpp


# -- the field ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """How one contender is made: the class, the format of its weights, whether its steps are compiled."""

    make: Any  # Minimas, Authors … LlamaCpp
    format: str
    compiled: bool = False


Contender = Minimas | Authors | LlamaCpp
REFERENCE, YARDSTICK = (
    "minimas-bf16",
    "authors-bf16",
)  # whose results count, and whom the others are measured against
FIELD = {
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
    f"`{YARDSTICK}` is the paper's loop over transformers; `trunk-bf16` the same without the spare logits and hidden "
    "states that the authors' code computes; `bitsandbytes-*` is transformers with bitsandbytes, trunk only. llama.cpp "
    "has no latent step; its line is a batch of embeddings that asks for states, and it computes logits on the way."
)
SPARE = (
    "minimas-nf4",
    "minimas-int8",
    "llama.cpp-bf16",
)  # left out, in this order, where not all fit into memory
# Bits a weight, in the trunk's matrices and in the LM head. Q8_0 and Q4_0: a scale in float16 for 32 weights, and Q4_0
# with a Q6_K head. The scales of whole rows (q8, int8) are less than 0.1 % and left out.
BITS = {"bf16": (16, 16), "Q8_0": (8.5, 8.5), "Q4_0": (4.5, 6.5625)}
BITS |= {name: (stored.bits, 16 if stored.package else 8) for name, stored in FORMATS.items()}
# Relative difference to bf16 that a format explains after one layer of random weights, which have no redundancy: twice
# what was measured. Four thoughts make three times as much of it (4 bits: 0.8; garbage gives 1.4).
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
    """The names of the field that match a shell pattern, the reference and the yardstick always among them."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in FIELD):
            raise ValueError(
                f"--contenders: found {pattern!r}, expected {', '.join(FIELD)}, or a pattern of them"
            )
    kept = (REFERENCE, YARDSTICK)
    return [
        name
        for name in FIELD
        if name in kept or any(fnmatch(name, pattern) for pattern in patterns)
    ]


def missing(entry: Entry) -> str | None:
    """Which package a contender lacks here, if any."""
    needs = (*entry.make.needs, *(("bitsandbytes",) if entry.format in ("nf4", "int8") else ()))
    for package in needs:
        try:
            importlib.import_module(package)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ):  # built without what it needs is as good as missing
            return package
    return None


def weight_bytes(config: Config, format: str) -> dict[str, int]:
    """Bytes of the parts of a model in `format` that a step reads: "trunk", "head", and "W_a" in float32."""
    with torch.device("meta"):
        state = Qwen3(config).state_dict()
    trunk = {
        name: t for name, t in state.items() if name.startswith(("model.layers.", "model.norm."))
    }
    matrices = sum(t.numel() for t in trunk.values() if t.ndim == 2)
    vectors, head = (
        sum(t.numel() for t in trunk.values()) - matrices,
        config.vocab_size * config.hidden_size,
    )
    bits = BITS[format]
    return {
        "trunk": int(matrices * bits[0] / 8) + 2 * vectors, "head": int(head * bits[1] / 8),
        "W_a": 4 * config.hidden_size**2,
    }  # fmt: skip


def stored_bytes(config: Config, entry: Entry) -> int:
    """Bytes of all weights of a contender; the embedding is its head where both are in 16 bits, or in llama.cpp."""
    sizes, exact = weight_bytes(config, entry.format), 2 * config.vocab_size * config.hidden_size
    shared = config.tie_word_embeddings and (BITS[entry.format][1] == 16 or entry.make is LlamaCpp)
    return sizes["trunk"] + sizes["head"] + (0 if shared else exact)


# -- what they load ----------------------------------------------------------------------------------------------------


def write_random(folder: Path, layers: int, vocab_size: int = QWEN3_06B["vocab_size"]) -> None:
    """A checkpoint in the shape of Qwen3-0.6B with random bf16 weights, of a size that keeps activations near 1."""
    raw = QWEN3_06B | {"num_hidden_layers": layers, "vocab_size": vocab_size}
    with torch.device("meta"):
        state = Qwen3(Config.from_dict(raw)).state_dict()
    torch.manual_seed(0)
    for name, meta in state.items():
        weight = (
            torch.ones(meta.shape)
            if meta.ndim == 1
            else torch.randn(meta.shape) * meta.shape[1] ** -0.5
        )
        state[name] = weight.bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def write_gguf(folder: Path, out: Path) -> None:
    """The weights of a Qwen folder as a bf16 GGUF file, with a vocabulary of names: it is only ever fed ids.

    Raises ValueError for the Llama layout, whose queries and keys GGUF keeps in another order.
    """
    import gguf

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    c = Config.from_dict(raw)
    if c.model_type not in ("qwen2", "qwen3"):
        raise ValueError(
            f"{folder}: model_type: found {c.model_type!r}, expected qwen2 or qwen3 to write a GGUF file"
        )
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[c.model_type]
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    file = gguf.GGUFWriter(out, c.model_type)
    file.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_key_length(c.head_dim)
    file.add_value_length(c.head_dim)
    file.add_rope_freq_base(c.rope_theta)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    file.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    file.add_token_merges(["t 0"])
    file.add_eos_token_id(c.vocab_size - 1)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():
                if c.tie_word_embeddings and key == "lm_head.weight":
                    continue
                tensor, name = (
                    weights.get_tensor(key),
                    names.get_name(key, try_suffixes=(".weight", ".bias")),
                )
                if tensor.ndim == 1:
                    file.add_tensor(name, tensor.float().numpy())
                else:
                    data = tensor.bfloat16().view(torch.uint8).numpy()
                    file.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def write_source(folder: Path, entry: Entry, work: Path) -> Path:
    """What a contender loads: the folder, or for llama.cpp a GGUF file in `work` of llama.cpp's own quantization."""
    if entry.make is not LlamaCpp:
        return folder
    whole, wanted = work / "bf16.gguf", work / f"{entry.format}.gguf"
    if not whole.exists():
        write_gguf(folder, whole)
    if not wanted.exists():
        c = quiet_llama()
        params = c.llama_model_quantize_default_params()
        params.ftype, params.nthread = (
            getattr(c, f"LLAMA_FTYPE_MOSTLY_{entry.format}"),
            torch.get_num_threads(),
        )
        if c.llama_model_quantize(str(whole).encode(), str(wanted).encode(), params):
            raise ValueError(f"{whole}: llama.cpp cannot quantize it to {entry.format}")
    return wanted
