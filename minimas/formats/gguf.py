"""A .gguf file seen as the Hugging Face folder it was made of: config, tokenizer, settings, and tensors by those names.

What llama.cpp's converter did is undone: names, the order of Q's and K's rows, tied embeddings stored twice. What is
not supported, or not known for certain, is refused by name. Does not know: bytes (gguf_file.py), models, devices,
which tensors are missing (load.py compares the shapes).

Source: llama.cpp's convert_hf_to_gguf.py and its list of pre-tokenizers, llama-vocab.cpp.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import FAMILIES, Config
from .gguf_file import FLOATS, KINDS, Stored, shards

SLAB = 2**20  # weights decoded at a time
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
}
LAYER |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {
    f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"
}
LAYER |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = {  # a config.json's field -> a GGUF's
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# Metadata that changes the mathematics -> what means "not in use"; absence always does.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "attention.causal": (True,),
}
UNSUPPORTED |= dict.fromkeys(["rope.scaling.factor", "rope.scale_linear"], (0, 1))
UNSUPPORTED |= dict.fromkeys(
    "expert_count logit_scale residual_scale embedding_scale attn_logit_softcapping".split(), (0,)
)
UNSUPPORTED |= {
    f"attention.{name}": (0,) for name in ("sliding_window", "clamp_kqv", "max_alibi_bias", "scale")
}
# How a text is cut into words, by tokenizer.ggml.pre: those whose Hugging Face tokenizer is known for certain.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
CUTS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [SPLIT | {"pattern": {"Regex": WORDS.replace("{1,3}", "")}}, BYTES],
    "llama-bpe": [SPLIT, BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "gpt-2": [BYTES | {"use_regex": True}],
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
# A file names one end, the model may write another: llama.cpp stops at these too.
ENDS = "<|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> <|eom_id|>".split()


class GGUF:
    """A .gguf file, with its shards, seen as a Hugging Face folder: `files` and tensors under Hugging Face's names.

    `files` holds config.json, generation_config.json and, unless `no_tokenizer` is a sentence saying why not,
    tokenizer.json and tokenizer_config.json. `shapes` and `kinds` ("Q4_0", "F16", …) are by tensor.
    """

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError for a missing file or shard, ValueError naming file, field, found and expected, and
        ImportError for a tensor that needs the package gguf. Of the tensors it only samples the embeddings' rows.
        """
        headers = shards(Path(path))
        self._header = header = headers[0]
        family: str = header.value("general.architecture", str)
        header.require(
            family in FAMILIES,
            "general.architecture",
            repr(family),
            f"one of {', '.join(FAMILIES)}",
        )
        self._stored: dict[str, Stored] = {}
        for name, stored in [pair for part in headers for pair in part.tensors.items()]:
            if name == "rope_freqs.weight" and bool((stored.floats(0, stored.rows) == 1).all()):
                continue  # Llama 3's scaling as factors, of which 1 is none
            key = _hugging_face(name)
            if key is None or key in self._stored:
                found = (
                    "it in two shards"
                    if key
                    else "what belongs to nothing, or a scaling that is not supported"
                )
                raise ValueError(
                    f"{stored.path}: tensor {name!r:.80}: found {found}, expected one of {family}'s"
                )
            self._stored[key] = stored
        self.files = {
            "config.json": self._config(family),
            "generation_config.json": {"eos_token_id": self._ends()},
        }
        self.config = Config.from_dict(self.files["config.json"], f"{header.path}: config.json")
        self.shapes = {key: stored.shape for key, stored in self._stored.items()}
        self.kinds = {key: stored.kind for key, stored in self._stored.items()}
        self.no_tokenizer: str | None = None
        try:
            self.files |= self._tokenizer()
        except ValueError as error:
            self.no_tokenizer = str(error)

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """The weights of a tensor in Hugging Face's order; beside the result only a slab of rows is in memory."""
        stored, order = self._stored[key], self._order(key)
        result, step = torch.empty(stored.shape, dtype=dtype), max(1, SLAB // stored.width)
        for start in range(0, stored.rows, step):
            stop = min(start + step, stored.rows)
            rows = slice(start, stop) if order is None else order[start:stop]
            result.view(stored.rows, -1)[rows] = stored.floats(start, stop).to(dtype)
        return result

    def blocks(self, key: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A tensor's own blocks of 32 along the input, weight = values · scale + minimum; None for other types.

        Q4_0, Q4_1: values uint8 (N, K) of 0 … 15, scale and minimum float32 (N, K/32). Q8_0: values int8, no minimum.
        """
        stored, order = self._stored[key], self._order(key)
        if stored.kind in FLOATS or stored.number not in KINDS:
            return None
        values, scale, minimum = stored.blocks(0, stored.rows)
        if order is not None:
            back = order.argsort()
            values, scale, minimum = (
                values[back],
                scale[back],
                None if minimum is None else minimum[back],
            )
        return values, scale, minimum

    def _order(self, key: str) -> Tensor | None:
        """Which row of Hugging Face's each row is, (N,); None: as it stands. The two halves of a head that RoPE turns
        together alternate in Q and K of a llama file, and of no other family's.
        """
        if self.config.model_type != "llama" or not re.search(r"\.[qk]_proj\.", key):
            return None
        rows = torch.arange(self._stored[key].rows)
        return (
            rows.view(-1, 2, self.config.head_dim // 2).transpose(1, 2).flatten()
        )  # (H, 2, d/2) -> (N,)

    def _tie(self) -> bool:
        """Whether embedding and head are one matrix: one is stored, or two that differ by their rounding only."""
        embedding, head = self._stored.get(EMBEDDING), self._stored.get(HEAD)
        found = "nothing" if embedding is None else embedding.shape
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError(
                f"{self._header.path}: tensor token_embd.weight: found {found}, expected a matrix"
            )
        if head is None or head.shape != embedding.shape:
            return head is None
        sample = range(0, head.rows, max(1, head.rows // 64))
        ours, theirs = (
            torch.cat([one.floats(i, i + 1).float() for i in sample]) for one in (embedding, head)
        )
        # Measured: 0.04 (Q5_0 against Q8_0) and 0.08 (Q4_K, Q6_K); unrelated matrices are at 1.4.
        if not float((ours - theirs).norm()) <= 0.2 * float(theirs.norm()):
            return False
        self._stored[EMBEDDING] = max(
            embedding, head, key=lambda one: one.row_size
        )  # the finer one serves both
        del self._stored[HEAD]
        return True

    def _config(self, family: str) -> dict[str, Any]:
        header, tied = self._header, self._tie()
        for name, off in UNSUPPORTED.items():
            value = header.metadata.get(f"{family}.{name}", off[0])
            header.require(
                value in off,
                f"{family}.{name}",
                repr(value),
                f"{off[0]!r}, all else is not supported",
            )

        def asked(name: str, kind: type, default: float | None = None) -> Any:
            return header.value(f"{family}.{name}", kind, default)

        sizes = {field: asked(name, int) for field, name in SIZES.items()}
        heads = sizes["num_attention_heads"]
        rotated = asked("rope.dimension_count", int, sizes["hidden_size"] // max(1, heads))
        head_dim = asked("attention.key_length", int, rotated)
        for name in ("rope.dimension_count", "attention.value_length"):
            other = asked(name, int, head_dim)
            header.require(
                other == head_dim, f"{family}.{name}", other, f"{head_dim}, the size of a head"
            )
        kinds = {stored.kind for stored in self._stored.values() if len(stored.shape) > 1}
        dtype = "float32" if kinds == {"F32"} else "float16" if kinds == {"F16"} else "bfloat16"
        return sizes | {
            "architectures": [f"{family.capitalize()}ForCausalLM"],
            "model_type": family,
            "vocab_size": self._stored[EMBEDDING].shape[0],
            "num_key_value_heads": asked("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            # Stored as float32: 9.99999997e-07 was 1e-06.
            "rms_norm_eps": float(f"{asked('attention.layer_norm_rms_epsilon', float):.6g}"),
            "rope_theta": float(asked("rope.freq_base", float, 1e4 if family == "llama" else None)),
            "tie_word_embeddings": tied,
            "dtype": dtype,
        }

    def _id(self, name: str) -> int | None:
        field, most = f"tokenizer.ggml.{name}_token_id", self._stored[EMBEDDING].shape[0]
        if field not in self._header.metadata:
            return None
        value: int = self._header.value(field, int)
        self._header.require(0 <= value < most, field, value, f"an id below {most:,}")
        return value

    def _ends(self) -> list[int]:
        """Ids that end a text or a turn, the file's own first."""
        tokens, types = (
            self._header.value(f"tokenizer.ggml.{name}", list, [])
            for name in ("tokens", "token_type")
        )
        pairs = enumerate(zip(tokens, types, strict=False))
        ends = [self._id(name) for name in ("eos", "eot", "eom")]
        ends += [i for i, (token, kind) in pairs if kind == CONTROL and token in ENDS]
        return list(dict.fromkeys(i for i in ends if i is not None))

    def _tokenizer(self) -> dict[str, dict[str, Any]]:
        """The two files of a byte-level BPE tokenizer; raises ValueError where it would be a guess."""
        header = self._header
        model, pre = (header.value(f"tokenizer.ggml.{name}", str) for name in ("model", "pre"))
        header.require(
            model == "gpt2",
            "tokenizer.ggml.model",
            repr(model),
            "'gpt2': no other tokenizer is read",
        )
        header.require(pre in CUTS, "tokenizer.ggml.pre", repr(pre), f"one of {', '.join(CUTS)}")
        fields = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
        tokens, types, merges = (header.value(field, list) for field in fields)
        header.require(
            set(map(type, tokens + merges)) == {str}, fields[0], "numbers or nothing", "strings"
        )
        header.require(
            len(types) == len(tokens), fields[1], len(types), f"{len(tokens)}, one for every token"
        )
        # Added tokens stay in the vocabulary too: else the library would number them anew, behind the others.
        words = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
        header.require(
            len(words) == len(tokens) - types.count(UNUSED),
            fields[0],
            "a token twice",
            "different ones",
        )
        pairs = [merge.split(" ") for merge in merges]
        wrong = [
            p
            for p in pairs
            if len(p) != 2 or not (p[0] in words and p[1] in words and p[0] + p[1] in words)
        ]
        header.require(not wrong, fields[2], wrong[:1], "two tokens that make a third")
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        added = [
            (i, word, types[i]) for word, i in words.items() if types[i] in (CONTROL, USER_DEFINED)
        ]
        roles = {"eos": "eos", "unk": "unknown", "pad": "padding"}
        if (
            self.config.model_type == "llama"
        ):  # Qwen has no first token; the converter writes one all the same
            roles["bos"] = "bos"
        by_id: dict[int | None, str] = {i: word for word, i in words.items()}
        settings: dict[str, Any] = {
            f"{role}_token": by_id.get(self._id(name)) for role, name in roles.items()
        }
        tokenizer = {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": word, "special": kind == CONTROL, **flags}
                for i, word, kind in added
            ],
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[pre]},
            "post_processor": BYTES,
            "decoder": BYTES,
            "model": {
                "type": "BPE",
                "vocab": words,
                "merges": pairs,
                "ignore_merges": pre == "llama-bpe",
            },
        }
        settings["chat_template"] = header.metadata.get("tokenizer.chat_template")
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _hugging_face(name: str) -> str | None:
    """The name of a tensor in a Hugging Face folder, None for one that no model here has."""
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)", stem)
    owner = (
        f"model.layers.{match[1]}.{LAYER[match[2]]}"
        if match and match[2] in LAYER
        else TOP.get(stem)
    )
    return f"{owner}.{leaf}" if owner and leaf in ("weight", "bias") else None
