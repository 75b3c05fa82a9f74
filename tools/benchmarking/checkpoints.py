"""Write what the contenders load: random weights, and GGUF files in the formats of llama.cpp.

This module does not depend on tasks or timing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minimas import Config, Qwen3

from .contenders import QWEN3_06B, Entry, LlamaCpp, quiet_llama


def write_random(folder: Path, layers: int, vocab_size: int = QWEN3_06B["vocab_size"]) -> None:
    """Write a checkpoint in the shape of Qwen3-0.6B with random bf16 weights.

    Matrices have entries of about 1 / sqrt(fan_in), which keeps activations near 1.
    """
    raw = QWEN3_06B | {"num_hidden_layers": layers, "vocab_size": vocab_size}
    with torch.device("meta"):
        state = Qwen3(Config.from_dict(raw)).state_dict()
    torch.manual_seed(0)
    for name, meta in state.items():
        if meta.ndim == 1:
            weight = torch.ones(meta.shape)
        else:
            weight = torch.randn(meta.shape) * meta.shape[1] ** -0.5
        state[name] = weight.bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def write_source(folder: Path, entry: Entry, work: Path) -> Path:
    """Return the path that a contender loads: the folder, or for llama.cpp a GGUF file in `work`.

    llama.cpp itself quantizes the file. Raises ValueError if that fails.
    """
    if entry.make is not LlamaCpp:
        return folder
    whole, wanted = work / "bf16.gguf", work / f"{entry.format}.gguf"
    if not whole.exists():
        write_gguf(folder, whole)
    if not wanted.exists():
        c = quiet_llama()
        params = c.llama_model_quantize_default_params()
        params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{entry.format}")
        params.nthread = torch.get_num_threads()
        if c.llama_model_quantize(str(whole).encode(), str(wanted).encode(), params):
            raise ValueError(f"{whole}: llama.cpp cannot quantize it to {entry.format}")
    return wanted


def write_gguf(folder: Path, out: Path) -> None:
    """Write the weights of a Qwen folder as a bf16 GGUF file.

    The vocabulary holds placeholder names, because the benchmark passes only ids. Raises
    ValueError for the Llama layout, whose queries and keys have another order in GGUF.
    """
    import gguf

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = Config.from_dict(raw)
    if config.model_type not in ("qwen2", "qwen3"):
        raise ValueError(
            f"{folder}: model_type: found {config.model_type!r}, expected qwen2 or qwen3 to write "
            "a GGUF file"
        )
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    file = gguf.GGUFWriter(out, config.model_type)
    add_metadata(file, config)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():
                if config.tie_word_embeddings and key == "lm_head.weight":
                    continue
                tensor = weights.get_tensor(key)
                name = str(names.get_name(key, try_suffixes=(".weight", ".bias")))
                if tensor.ndim == 1:
                    file.add_tensor(name, tensor.float().numpy())
                else:
                    data = tensor.bfloat16().view(torch.uint8).numpy()
                    file.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def add_metadata(file: Any, config: Config) -> None:
    """Add the fields of a config and a placeholder vocabulary to a GGUFWriter."""
    import gguf

    file.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    file.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    file.add_token_merges(["t 0"])
    file.add_eos_token_id(config.vocab_size - 1)
