"""Present a .gguf file as the Hugging Face folder it was made from: JSON files, tensors by name.

The changes of llama.cpp's converter are undone: the names of tensors, the order of the rows of Q
and K, and tied embeddings that are stored twice. A field that is not supported, or not known for
certain, raises an error that names it. gguf_file.py reads the bytes, and core/checkpoint.py finds
missing tensors.

Source: llama.cpp's convert_hf_to_gguf.py and its list of pre-tokenizers, llama-vocab.cpp.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoint import EMBEDDING, HEAD
from ..core.config import Config
from .gguf_file import FLOATS, StoredTensor, read_header, table

CHUNK_WEIGHTS = 2**20  # weights decoded at a time
# The parts of a model and of a layer: GGUF's names and Hugging Face's names. They are one table,
# because no name occurs in both.
TOP = LAYER = dict(
    table("""
        token_embd model.embed_tokens
        output_norm model.norm
        output lm_head
        blk model.layers
        attn_norm input_layernorm
        attn_q self_attn.q_proj
        attn_k self_attn.k_proj
        attn_v self_attn.v_proj
        attn_output self_attn.o_proj
        attn_q_norm self_attn.q_norm
        attn_k_norm self_attn.k_norm
        ffn_norm post_attention_layernorm
        ffn_gate mlp.gate_proj
        ffn_up mlp.up_proj
        ffn_down mlp.down_proj
    """)
)
# Fields of a config.json, and their names in a GGUF file.
FIELDS = table("""
    hidden_size embedding_length
    intermediate_size feed_forward_length
    num_hidden_layers block_count
    num_attention_heads attention.head_count
    num_key_value_heads attention.head_count_kv
    head_dim attention.key_length
    max_position_embeddings context_length
    rms_norm_eps attention.layer_norm_rms_epsilon
    rope_theta rope.freq_base
""")
# Fields of a generation_config.json, and their names in a GGUF file.
SAMPLING = table("""
    temperature temp
    top_k top_k
    top_p top_p
    min_p min_p
    repetition_penalty penalty_repeat
""")
# Metadata that changes the forward pass -> the values that mean "not in use", like absence.
UNSUPPORTED: dict[str, Any] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.causal": (True,),
    **dict.fromkeys(
        """
        attention.sliding_window attention.clamp_kqv attention.max_alibi_bias attention.scale
        attention.output_scale attention.temperature_scale rope.dimension_sections expert_count
        logit_scale residual_scale embedding_scale attn_logit_softcapping final_logit_softcapping
        router_logit_softcapping
        """.split(),
        (0,),
    ),
}
# Regular expressions that cut text into words, by tokenizer.ggml.pre. A name is listed only if its
# Hugging Face tokenizer is known for certain.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
PRE_TOKENIZERS = {
    pre: [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts
    ]
    + [BYTES]
    for pre, *cuts in (
        ("qwen2", WORDS.replace("{1,3}", "")),
        ("llama-bpe", WORDS),
        ("smollm", r"\p{N}", GPT2_WORDS),
        ("gpt-2", GPT2_WORDS),
    )
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values in tokenizer.ggml.token_type
# A file names one end token, but the model may generate another. llama.cpp also stops at these.
END_TOKENS = "<|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> <|eom_id|>".split()


def rounded(value: Any) -> Any:
    """Return a float with six digits, and any other value as it is.

    A file has float32 numbers, in which 1e-06 is 9.99999997e-07.
    """
    return float(f"{value:.6g}") if isinstance(value, float) else value


class GGUF:
    """A .gguf file, with its shards, as a Hugging Face folder: `files`, and tensors by name.

    `files` holds config.json and generation_config.json. It also holds tokenizer.json and
    tokenizer_config.json, unless `no_tokenizer` is a sentence that says why not. `tensors` and
    their `shapes` are by Hugging Face's names. `needs` says which package is missing to compare LM
    head and embedding.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers, and a sample of the embeddings' rows.

        Raises FileNotFoundError for a missing file or shard, and ValueError naming the file, the
        field, what was found and what was expected.
        """
        self.path = path
        self.needs = ""
        self._header = header = read_header(path)
        self.tensors: dict[str, StoredTensor] = {}
        for tensor in header.tensors:
            field = f"tensor {tensor.name!r:.80}"
            header.require(
                tensor.name != "rope_freqs.weight",  # how Llama 3's RoPE scaling is stored
                field,
                "RoPE scaling",
                "none (not supported)",
            )
            key = ".".join(TOP.get(part, part) for part in tensor.name.split("."))
            header.require(key not in self.tensors, field, "it repeated", "it once")
            self.tensors[key] = tensor
        raw = self._config()
        self.config = c = Config.from_dict(raw, f"{path}: config.json")
        sizes = dict.fromkeys("rope.dimension_count attention.value_length".split(), (c.head_dim,))
        for name, allowed in (UNSUPPORTED | sizes).items():
            field = f"{c.model_type}.{name}"
            value = header.metadata.get(field, allowed[0])
            header.require(value in allowed, field, repr(value), f"{allowed[0]!r}")
        self.shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        self._ids: dict[str, int] = {}  # of special tokens; -1 for none, as in llama.cpp
        for name in "eos eot eom unknown padding bos".split():
            field = f"tokenizer.ggml.{name}_token_id"
            self._ids[name] = value = header.value(field, int, -1)
            header.require(value < c.vocab_size, field, value, f"an id below {c.vocab_size:,}")
        tokens = header.value("tokenizer.ggml.tokens", list, [])
        # The tokens that end a text or a turn, the file's own first.
        ends = [i for i in list(self._ids.values())[:3] if i >= 0]
        ends += [i for i, token in enumerate(tokens) if token in END_TOKENS and i not in ends]
        generation = {
            field: rounded(header.metadata.get(f"general.sampling.{name}"))
            for field, name in SAMPLING
        }
        generation["do_sample"] = generation["temperature"] or generation["top_p"]
        generation["eos_token_id"] = ends
        self.files = {"config.json": raw, "generation_config.json": generation}
        self.no_tokenizer: str | None = None
        try:
            self.files |= self._tokenizer()
        except ValueError as error:
            self.no_tokenizer = str(error)

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU, its rows in Hugging Face's order.

        It is decoded in chunks of rows, so that there is no second copy of it in another dtype.
        """
        tensor = self.tensors[key]
        result = torch.empty(tensor.rows, tensor.shape[-1], dtype=dtype)
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            result[start : start + step] = tensor.read(start, start + step)
        return self._reorder(key, result.view(tensor.shape))

    def low_bits(self, key: str) -> str:
        """Return the low-bit format to load a matrix in: "q4", "q8", or "" for 16 bits."""
        tensor = self.tensors.get(key)
        if tensor is None or tensor.kind in FLOATS:
            return ""
        return "q4" if tensor.kind.startswith("Q4") and key not in (EMBEDDING, HEAD) else "q8"

    def blocks(self, key: str) -> list[Tensor]:
        """Return values (N, K), scales and minimums (N, G), see `StoredTensor.read_blocks`."""
        tensor = self.tensors[key]
        return [self._reorder(key, part.flatten(1)) for part in tensor.read_blocks(0, tensor.rows)]

    def _reorder(self, key: str, rows: Tensor) -> Tensor:
        """Return rows (N, any) in Hugging Face's order.

        RoPE rotates pairs of rows of Q and K. In Llama files only, the two rows of a pair are
        adjacent; in Hugging Face's layout they are half a head apart.
        """
        if self.config.model_type == "llama" and re.search(r"\.[qk]_proj\.", key):
            half = self.config.head_dim // 2
            # (N, .) -> (H, d/2, 2, .) -> (H, 2, d/2, .) -> (N, .)
            rows = rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return rows

    def _tie(self) -> bool:
        """Return whether embedding and LM head are one matrix.

        They are if the file has no LM head, or if the two differ only by rounding. In the second
        case, the more precise one is kept for both.
        """
        tensors = self.tensors
        self._header.require(
            EMBEDDING in tensors, "tensor token_embd.weight", "nothing", "a matrix"
        )
        embedding = tensors[EMBEDDING]
        head = tensors.get(HEAD)
        if head is None or head.shape != embedding.shape:
            return head is None
        coarse, fine = sorted((embedding, head), key=lambda tensor: tensor.row_bytes)
        try:
            middle = fine.rows // 2  # the first rows may be of unused tokens, with zeros in both
            a, b = (tensor.read(middle, middle + 64).float() for tensor in (coarse, fine))
        except ImportError as error:  # the file can still be described; `read` raises again
            self.needs = f"; LM head and embedding were not compared: {error}"
            return False
        # Measured: at most 0.12 with 4 bits or more, 0.27 for Q2_K, 1.4 for unrelated matrices.
        bits = 8 * coarse.row_bytes / coarse.shape[-1]
        if not torch.dist(a, b) < max(0.2, 2.5 / 2**bits) * b.norm():
            return False
        tensors[EMBEDDING] = fine
        del tensors[HEAD]
        return True

    def _config(self) -> dict[str, Any]:
        """Return the file's config.json. `Config` checks the values."""
        header = self._header
        family = header.value("general.architecture", str)
        raw = {field: header.metadata.get(f"{family}.{name}") for field, name in FIELDS}
        tied = self._tie()  # removes an LM head that only repeats the embedding
        kinds = {tensor.kind for tensor in self.tensors.values() if tensor.rows > 1}
        return raw | {
            "model_type": family,
            "rms_norm_eps": rounded(raw["rms_norm_eps"]),
            "tie_word_embeddings": tied,
            "vocab_size": self.tensors[EMBEDDING].shape[0],
            # The type of the matrices, if all of them have the same.
            "dtype": FLOATS.get(" ".join(kinds), "bfloat16"),
        }

    def _tokenizer(self) -> dict[str, Any]:
        """Return the files of a byte-level BPE tokenizer. Raises ValueError if one is a guess."""
        value = self._header.value
        require = self._header.require
        model = value("tokenizer.ggml.model", str)
        require(model == "gpt2", "tokenizer.ggml.model", repr(model), "'gpt2'")
        pre = value("tokenizer.ggml.pre", str)
        expected = f"one of {', '.join(PRE_TOKENIZERS)}"
        require(pre in PRE_TOKENIZERS, "tokenizer.ggml.pre", repr(pre), expected)
        tokens = value("tokenizer.ggml.tokens", list)
        types = value("tokenizer.ggml.token_type", list)
        expected = f"{len(tokens)}, one for every token"
        require(len(types) == len(tokens), "tokenizer.ggml.token_type", len(types), expected)
        # Unused tokens are left out. Added tokens stay, because the library would renumber them.
        vocabulary = {str(token): i for i, token in enumerate(tokens) if types[i] != UNUSED}
        different = len(vocabulary) == len(types) - types.count(UNUSED)
        require(different, "tokenizer.ggml.tokens", "a repeated token", "distinct ones")
        pairs = [str(merge).split(" ") for merge in value("tokenizer.ggml.merges", list)]
        wrong = [
            pair
            for pair in pairs
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()
        ]
        require(not wrong, "tokenizer.ggml.merges", wrong[:1], "two tokens that make a third")
        flags = dict.fromkeys("single_word lstrip rstrip normalized".split(), False)
        tokenizer = {
            "added_tokens": [
                {"id": i, "content": token, "special": types[i] == CONTROL, **flags}
                for token, i in vocabulary.items()
                if types[i] in (CONTROL, USER_DEFINED)
            ],
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
            "decoder": BYTES,
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": pairs,
                "ignore_merges": pre == "llama-bpe",  # a word that is a token stays whole
            },
        }
        by_id = dict(enumerate(tokens))
        names = {"eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        if self.config.model_type == "llama":  # Qwen has no bos token, but the converter stores one
            names["bos"] = "bos_token"
        settings = {field: by_id.get(self._ids[name]) for name, field in names.items()}
        settings["chat_template"] = self._header.metadata.get("tokenizer.chat_template")
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
