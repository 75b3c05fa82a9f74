"""A config.json is read completely, or refused with the name of the field.

No field that changes the mathematics is ignored.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimas import Config
from minimas.core.config import FAMILIES, UNSUPPORTED, read_json, token_ids

from ..models import config_dict, tiny_config

QWEN3 = config_dict(tiny_config())
NUMBERS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads"
).split()
NUMBERS += ["max_position_embeddings", "head_dim", "rms_norm_eps", "rope_theta"]
FIELDS = [
    *QWEN3,
    *UNSUPPORTED,
    "torch_dtype",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "attention_bias",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_equals_its_json(family: str) -> None:
    """Each field has one source: gpt-fast has a bug that overwrites head_dim with hidden_size //
    heads.
    """
    config = tiny_config(family, tie_word_embeddings=True, eos_token_ids=(3, 5))
    assert Config.from_dict(config_dict(config)) == config
    assert config.head_dim != config.hidden_size // config.num_attention_heads


@given(st.sampled_from(FIELDS), json_values)
def test_any_value_is_read_or_refused_with_its_field_name(field: str, value: Any) -> None:
    """Elsewhere a field of the wrong type gave a wrong number, or a traceback from deep inside
    torch.
    """
    try:
        config = Config.from_dict(QWEN3 | {field: value})
    except ValueError as error:
        assert str(error).startswith("config.json: ")
        assert (
            field in str(error) or field == "num_attention_heads"
        )  # num_attention_heads must be divisible by num_key_value_heads, which is named then
    else:
        assert all(
            type(value) is type(getattr(tiny_config(), name))
            for name, value in vars(config).items()
        )


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", [None, 0, -4, "16", True, float("nan"), float("inf"), [16], {}], ids=repr
)
def test_a_size_that_is_not_a_positive_number_is_refused(field: str, value: Any) -> None:
    """Python's int() accepts `"16"` and true, and nearly every comparison with nan is false."""
    with pytest.raises(ValueError, match=rf"^here: {field}: found .*, expected a positive"):
        Config.from_dict(QWEN3 | {field: value}, "here")


@pytest.mark.parametrize("field", ["vocab_size", "rms_norm_eps", "rope_theta"])
def test_a_number_too_large_for_a_float_is_refused(field: str) -> None:
    """JSON allows integers of any length. math.isfinite raises OverflowError for those that no
    float can hold.
    """
    with pytest.raises(ValueError, match=f"{field}: found"):
        Config.from_dict(QWEN3 | {field: 10**400})


@pytest.mark.parametrize("field", [*NUMBERS, "model_type"])
def test_a_missing_field_is_named(field: str) -> None:
    """A default in its place would make it another model."""
    with pytest.raises(ValueError, match=rf"{field}: found (nothing|None), expected"):
        Config.from_dict({name: value for name, value in QWEN3.items() if name != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", "qwen3_moe"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e6}),
        (
            "rope_parameters",
            {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
        ),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("tie_word_embeddings", "no"),
        ("dtype", "int8"),
        ("torch_dtype", "int8"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [-1]),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused(field: str, value: Any) -> None:
    """mlx-lm ignores unknown keys, such as an unknown RoPE type, and computes something else."""
    raw = QWEN3 | {field: value}
    if field == "torch_dtype":
        del raw["dtype"]
    with pytest.raises(ValueError, match=f"^config.json: {field}: found .*, expected "):
        Config.from_dict(raw)


@pytest.mark.parametrize(
    "off",
    [
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},  # Qwen2.5
        {"rope_scaling": None, "layer_types": ["full_attention"] * 2, "num_experts": None},
        {"rope_scaling": {"type": "default"}, "mlp_bias": False, "partial_rotary_factor": 1.0},
    ],
)
def test_a_feature_that_is_switched_off_is_not_refused(off: dict[str, Any]) -> None:
    """Qwen2.5 sets sliding_window to 32768 and does not use it."""
    assert Config.from_dict(QWEN3 | off) == tiny_config()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"rope_scaling": {"factor": 8.0}}, "factor 8.0"),
        ({"extra": {"deeper": {"final_logit_softcapping": 30.0}}}, "final_logit_softcapping 30"),
        ({"decoder": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
    ],
)
def test_a_nested_field_that_changes_the_mathematics_is_refused(
    raw: dict[str, Any], named: str
) -> None:
    """A scaling per layer type was ignored, because only the outer object was read."""
    [field] = raw
    with pytest.raises(ValueError, match=f"^config.json: {field}: found .*{named}.*, expected "):
        Config.from_dict(QWEN3 | raw)


@pytest.mark.parametrize(
    "field", ["logits_scaling", "attn_logit_softcapping", "rope_interleaved", "rope_ratio"]
)
def test_scaling_fields_of_related_families_are_refused(field: str) -> None:
    """As unknown fields they gave only a warning, and other logits."""
    with pytest.raises(ValueError, match=f"^config.json: {field}: found 8, expected"):
        Config.from_dict(QWEN3 | {field: 8})


def test_of_two_rotary_objects_the_one_that_transformers_reads_is_used() -> None:
    """The base of the other object gives other logits."""
    both = {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5e5}}
    assert Config.from_dict(QWEN3 | both).rope_theta == 10000.0
    assert Config.from_dict(QWEN3 | both | {"rope_scaling": {}}).rope_theta == 5e5


def test_null_means_the_same_as_a_missing_field() -> None:
    """Exporters write null for every field that they do not set."""
    raw = QWEN3 | {"tie_word_embeddings": None, "dtype": None, "torch_dtype": "float32"}
    assert Config.from_dict(raw) == tiny_config()


def test_swish_is_another_name_for_silu() -> None:
    """transformers has both names for one function."""
    assert Config.from_dict(QWEN3 | {"hidden_act": "swish"}) == tiny_config()


def test_the_rotary_base_is_read_where_transformers_5_writes_it() -> None:
    """If it is read only at the top level, a base of 1,000,000 silently becomes 10,000."""
    raw = {name: value for name, value in QWEN3.items() if name != "rope_theta"}
    block = {"rope_type": "default", "rope_theta": 1e6}
    assert Config.from_dict(raw | {"rope_parameters": block}).rope_theta == 1e6
    assert Config.from_dict(raw | {"model_type": "llama"}).rope_theta == 10000.0


def test_fields_that_older_families_leave_out_have_their_defaults() -> None:
    """Llama checkpoints may leave out num_key_value_heads, and Qwen2 and Llama checkpoints
    head_dim.
    """
    raw = {
        name: value
        for name, value in QWEN3.items()
        if name not in ("num_key_value_heads", "head_dim")
    }
    llama = Config.from_dict(raw | {"model_type": "llama"})
    assert (llama.num_key_value_heads, llama.head_dim) == (4, 4)
    assert Config.from_dict(raw | {"model_type": "qwen2", "num_key_value_heads": 2}).head_dim == 4


@pytest.mark.parametrize(
    ("value", "said"), [(True, True), ({"a": 1}, True), (None, False), (0, False)]
)
def test_an_unknown_field_gives_a_warning_unless_it_is_off(
    value: Any, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Fields of future models should be neither refused nor ignored silently."""
    with caplog.at_level(logging.WARNING):
        assert Config.from_dict(QWEN3 | {"hyper_connection": value}) == tiny_config()
    assert ("hyper_connection" in caplog.text) is said


@pytest.mark.parametrize("content", ["null", "[]", '"config"', "3"])
def test_json_that_is_not_an_object_is_refused(content: str, tmp_path: Path) -> None:
    """`[]` is valid JSON."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: found .*, expected a JSON object"):
        read_json(tmp_path / "config.json")


def test_a_config_is_hashable_and_frozen() -> None:
    """If a config could change, the slots of a live cache would change their meaning."""
    assert len({tiny_config(), tiny_config(), tiny_config(rope_theta=1e6)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().head_dim = 8  # type: ignore[misc]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{} {}"])
def test_a_broken_json_file_is_named(content: bytes, tmp_path: Path) -> None:
    """A partial download is invalid JSON, and 100,000 brackets raise a RecursionError in Python's
    parser.
    """
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_json(path)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*nowhere\.json"):
        read_json(tmp_path / "nowhere.json")


@given(st.integers(0, 10**6) | st.lists(st.integers(0, 10**6)) | st.none())
def test_a_model_may_have_one_or_many_end_tokens(value: Any) -> None:
    """Llama 3 has three end tokens. With only the first one, generation never stops."""
    assert list(token_ids(value, "x")) == (
        [] if value is None else value if isinstance(value, list) else [value]
    )
