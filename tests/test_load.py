"""Check that `load` returns a complete model, or fails with one line.

The line names the file, the field, what was found and what was expected.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimas import Aligner, Qwen3, load, think
from minimas.core.config import FAMILIES
from minimas.info import describe
from minimas.load import resolve

from .models import (
    TINY,
    apart,
    random_ids,
    remember,
    tiny_config,
    tiny_model,
    write_folder,
    write_tensors,
)


def python(code: str, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Return the output of a program in its own process, where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    environment = {
        "PYTHONPATH": str(cwd or root),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        **variables,
    }
    done = subprocess.run(
        command, cwd=cwd or root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- valid folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_loaded_model_equals_the_one_that_was_saved(
    family: str, tied: bool, shards: int, tmp_path: Path
) -> None:
    """Tensors are equal bit for bit, from one file or from shards, tied or not."""
    model = tiny_model(family, tie_word_embeddings=tied)
    lm = load(write_folder(tmp_path, model, shards))
    assert lm.tokenizer is None
    assert not lm.model.training
    assert lm.model.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in lm.model.state_dict().items()
    )
    ids = random_ids(model, 2, 5)
    assert torch.equal(remember(lm.model, ids, [5, 2])[0], remember(model, ids, [5, 2])[0])
    assert lm.model.fingerprint() == model.fingerprint()


def test_the_repr_of_a_model_describes_it(tmp_path: Path) -> None:
    """In a notebook, the address of an object is not useful."""
    lm = load(write_folder(tmp_path, tiny_model()), device="cpu", dtype="float32")
    assert repr(lm) == f"LM({tmp_path}: Linear, torch.float32, cpu)"
    quantized = load(TINY, device="cpu", dtype="bfloat16", quantize="q8")
    assert repr(quantized) == f"LM({TINY}: Q8Linear, torch.bfloat16, cpu)"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", ["auto", "float32", "bf16", "fp16", torch.float64])
def test_tensors_have_the_requested_dtype(
    stored: torch.dtype, asked: str | torch.dtype, tmp_path: Path
) -> None:
    """ "auto" is the dtype of the checkpoint. A bf16 model in float32 needs twice the memory."""
    named = {
        "auto": stored,
        "float32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    expected = named.get(str(asked), torch.float64)
    model = tiny_model(dtype=stored)
    loaded = load(write_folder(tmp_path, model), dtype=asked).model
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(expected))
    assert loaded.dtype == loaded.new_cache(1).dtype == expected


@pytest.mark.parametrize("shards", [1, 2])
def test_known_extra_tensors_are_ignored(shards: int, tmp_path: Path) -> None:
    """Some checkpoints have tensors that are not needed.

    Qwen3-0.6B has a copy of its tied embedding, and old Llama checkpoints have rotary frequencies.
    """
    model = tiny_model("llama", tie_word_embeddings=True)
    spare = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    spare["lm_head.weight"] = model.state_dict()["model.embed_tokens.weight"].clone()
    write_folder(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path, model.state_dict() | spare, shards)
    ids = random_ids(model, 1, 4)
    assert torch.equal(remember(load(tmp_path).model, ids)[0], remember(model, ids)[0])


def test_the_folder_is_not_needed_after_loading(tmp_path: Path) -> None:
    """If a download overwrites a mapped file, a running model changes or crashes."""
    model = tiny_model()
    folder = write_folder(tmp_path / "model", model)
    loaded, ids = load(folder).model, random_ids(model, 1, 4)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    shutil.rmtree(folder)
    assert torch.equal(remember(loaded, ids)[0], remember(model, ids)[0])


# -- invalid folders -------------------------------------------------------------------------------

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOREIGN = f"{FILE}: found a damaged file or another format, expected safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Return a function that changes the tensors in model.safetensors."""

    def damage(folder: Path) -> None:
        with safe_open(folder / FILE, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
        change(found)
        save_file(found, folder / FILE)

    return damage


def content(change: Callable[[bytes], bytes], name: str = FILE) -> Callable[[Path], Any]:
    """Return a function that changes the bytes of one file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def config(**fields: Any) -> Callable[[Path], Any]:
    """Return a function that changes fields of config.json."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | fields))

    return damage


def sharded(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Return a function that splits the weights into two shards and changes their index."""

    def damage(folder: Path) -> None:
        (folder / FILE).unlink()
        write_tensors(folder, tiny_model().state_dict(), 2)
        raw = json.loads((folder / INDEX).read_text())
        change(raw["weight_map"])
        (folder / INDEX).write_text(json.dumps(raw))

    return damage


def index(text: str) -> Callable[[Path], None]:
    """Return a function that replaces the weights with an index of this text."""

    def damage(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / INDEX).write_text(text)

    return damage


def renamed(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / FILE).rename(folder / name)


def pickled(folder: Path) -> None:
    (folder / FILE).unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")


BAD = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "No such file or directory: .*config.json",
    ),
    "half a config": (content(lambda b: b[:40], "config.json"), "config.json: not valid JSON"),
    "a config of a list": (
        content(lambda b: b"[]", "config.json"),
        "config.json: found list, expected a JSON object",
    ),
    "another family": (
        config(model_type="gpt2"),
        "config.json: model_type: found 'gpt2', expected one of qwen3",
    ),
    "no weights": (
        lambda folder: (folder / FILE).unlink(),
        "found config.json.*, expected model.safetensors or",
    ),
    "renamed": (
        renamed("weights.safetensors"),
        "found .*weights.safetensors, expected model.safetensors or",
    ),
    "pickled": (
        pickled,
        "found .*pytorch_model.bin.*, expected model.safetensors .*nothing is ever unpickled",
    ),
    "pickled under a right name": (lambda folder: torch.save({}, folder / FILE), FOREIGN),
    "empty": (content(lambda b: b""), FOREIGN),
    "truncated": (content(lambda b: b[:-8]), FOREIGN),
    "truncated in its header": (content(lambda b: b[:100]), FOREIGN),
    "oversized": (content(lambda b: b + bytes(8)), FOREIGN),
    "a page of HTML": (content(lambda b: b"<!DOCTYPE html><html>" * 99), FOREIGN),
    "a pointer of git lfs": (
        content(lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
        FOREIGN,
    ),
    "a header of 2^60 bytes": (content(lambda b: (2**60).to_bytes(8, "little") + b[8:]), FOREIGN),
    "a folder for a file": (
        lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()),
        "expected model.safetensors",
    ),
    "missing": (
        tensors(lambda t: t.pop(UP)),
        rf"tensor {UP}: found nothing, expected shape \(24, 16\)",
    ),
    "no embedding": (
        tensors(lambda t: t.pop("model.embed_tokens.weight")),
        "tensor model.embed_tokens.weight: found nothing",
    ),
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight: found nothing"),
    "unknown": (
        tensors(lambda t: t.update(extra=torch.ones(2))),
        "tensor extra: unexpected",
    ),
    "a bias": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)})),
        "tensor model.layers.0.self_attn.q_proj.bias: unexpected",
    ),
    "misshapen": (
        tensors(lambda t: t.update({UP: torch.ones(23, 16)})),
        rf"tensor {UP}: found shape \(23, 16\), expected shape \(24, 16\)",
    ),
    "transposed": (
        tensors(lambda t: t.update({UP: torch.ones(16, 24)})),
        r"found shape \(16, 24\), expected shape \(24, 16\)",
    ),
    "integer": (
        tensors(lambda t: t.update({UP: torch.ones(24, 16).long()})),
        f"{FILE}: tensor {UP}: found I64, expected",
    ),
    "eight bits": (
        tensors(lambda t: t.update({UP: torch.ones(24, 16).char()})),
        f"{FILE}: tensor {UP}: found I8, expected",
    ),
    "fewer layers than said": (
        config(num_hidden_layers=3),
        "tensor model.layers.2.*: found nothing, expected shape",
    ),
    "more layers than said": (
        config(num_hidden_layers=1),
        "tensor model.layers.1.*: unexpected",
    ),
    "a million layers": (
        config(num_hidden_layers=10**6),
        "num_hidden_layers: found 1000000, expected .*at most 1,000",
    ),
    "a billion layers": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers: found 1000000000, expected",
    ),
    "a wide claim": (
        config(hidden_size=10**7),
        r"tensor model\..*: found shape .*, expected .*10000000",
    ),
    "a claim beyond 64 bits": (
        config(vocab_size=10**14, hidden_size=10**14),
        "vocab_size|hidden_size|tensor model",
    ),
    "a size beyond 64 bits": (config(vocab_size=10**30), "vocab_size|tensor model"),
    "a second, different head": (
        config(tie_word_embeddings=True),
        "tie_word_embeddings: found true in config.json, but lm_head.weight",
    ),
    "broken index": (index("{"), f"{INDEX}: not valid JSON"),
    "index of a list": (index("[]"), f"{INDEX}: .*found (None|list), expected"),
    "empty index": (
        index('{"weight_map": {}}'),
        f"{INDEX}: weight_map: found {{}}, expected tensor names",
    ),
    "index of numbers": (
        index('{"weight_map": {"a": 3}}'),
        f"{INDEX}: weight_map: found '?3'?, expected a .safetensors file",
    ),
    "index of lists": (index('{"weight_map": {"a": ["b"]}}'), f"{INDEX}: weight_map: found"),
    "index to nowhere": (
        index('{"weight_map": {"a": "b.safetensors"}}'),
        "found 'b.safetensors', expected a .safetensors file in this folder, which has none",
    ),
    "index to a pickle": (
        index('{"weight_map": {"a": "b.bin"}}'),
        "found 'b.bin', expected a .safetensors file",
    ),
}
BAD |= {
    f"index to {path}": (
        index(json.dumps({"weight_map": {"a": path}})),
        "expected a .safetensors file in this folder",
    )
    for path in (
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
    )
}


@pytest.mark.parametrize(("damage", "said"), BAD.values(), ids=BAD)
def test_an_incomplete_or_damaged_folder_is_refused(
    damage: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    """Incomplete downloads are common.

    The error is one line within seconds, before anything large is built.
    """
    folder = write_folder(tmp_path / "model", tiny_model())
    shutil.copy(folder / FILE, tmp_path / FILE)  # what a path out of the folder would reach
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (
            {"name": "/nowhere/at/all"},
            FileNotFoundError,
            "/nowhere/at/all: no such folder, and not a hub id",
        ),
        ({"name": "weights/nothing here"}, FileNotFoundError, "no such folder, and not a hub id"),
        ({"name": TINY / "config.json"}, ValueError, "found a file, expected a model folder"),
        (
            {"device": "cuda:99"},
            ValueError,
            "device.*found 'cuda:99', expected auto, cpu, or cuda",
        ),
        ({"device": "mps"}, ValueError, "device.*found 'mps', expected auto, cpu, or cuda"),
        ({"device": "toaster"}, ValueError, "device.*found 'toaster', expected auto, cpu"),
        ({"dtype": "int8"}, ValueError, "dtype.*found 'int8', expected auto or one of bfloat16"),
        ({"dtype": torch.int64}, ValueError, "dtype.*expected auto or one of"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_flag(
    arguments: Any, kind: type[Exception], said: str
) -> None:
    """A typo must not start a download or give a traceback."""
    with pytest.raises(kind, match=said):
        load(**({"name": TINY} | arguments))


def test_a_model_that_cannot_be_found_is_an_error_that_says_how_to_download_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the error names the missing file, its place, and the command that downloads it."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(_: str, local_files_only: bool = False, **__: Any) -> str:
        raise LocalEntryNotFoundError("not here") if local_files_only else OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError) as caught:
        load("Some/Model")
    for part in (
        "Some/Model",
        "config.json",
        "model.safetensors",
        str(tmp_path),
        "hf download Some/Model",
    ):
        assert part in str(caught.value)


def test_the_default_model_loads_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Python line of the README must work in any folder."""
    monkeypatch.chdir(tmp_path)
    assert resolve("weights/tiny").samefile(TINY)
    assert load().model.name == "weights/tiny"


@pytest.mark.parametrize("name", ["up_proj.weight", "model.norm.weight", "embed_tokens.weight"])
def test_nan_weights_are_reported_with_the_name_of_the_model(name: str, tmp_path: Path) -> None:
    """They can be loaded, because checking 16 GB would take as long as loading.

    The first state that is not finite raises an error that names the model.
    """
    model = tiny_model()
    folder = write_folder(tmp_path, model)
    tensors(lambda t: [w.fill_(torch.nan) for key, w in t.items() if key.endswith(name)])(folder)
    broken = load(folder).model
    hidden, cache = remember(broken, random_ids(broken, 1, 3))
    with pytest.raises(ValueError, match=f"{folder}: found a state that is not finite"):
        think(broken, Aligner(), hidden[:, -1:], cache, 1)


# -- memory use and imports ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_keeps_only_one_copy_of_the_weights(tmp_path: Path) -> None:
    """A state dict beside the model would need twice the memory, 32 GB for an 8B model."""
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    cfg = tiny_config(**shape, head_dim=128, num_hidden_layers=6, vocab_size=4000, dtype="bfloat16")
    with torch.device("meta"):
        wanted = Qwen3(cfg).state_dict()
    folder = write_folder(tmp_path, tiny_model(dtype=torch.bfloat16))
    config(**{key: value for key, value in vars(cfg).items() if key not in ("eos_token_ids",)})(
        folder
    )
    save_file(
        {name: torch.full(w.shape, 0.01, dtype=torch.bfloat16) for name, w in wanted.items()},
        folder / FILE,
    )
    size = (folder / FILE).stat().st_size
    assert size > 150e6
    code = """
        import sys, torch
        from minimas import load
        model = load(sys.argv[1]).model
        hidden = model(model.embed(torch.ones(1, 16, dtype=torch.int64)))
        assert bool(torch.isfinite(model.logits(hidden)).all())
        status = open("/proc/self/status")
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
        status.close()
    """
    assert int(python(code, folder)) * 1024 <= 1.2 * size + 300e6


def test_the_core_loads_a_model_under_another_name(tmp_path: Path) -> None:
    """A copied core imports none of tokenizers, jinja2 and transformers."""
    core = Path(__file__).resolve().parents[1] / "minimas" / "core"
    shutil.copytree(core, tmp_path / "theirs")
    model = tiny_model()
    folder = write_folder(tmp_path / "model", model)
    code = """
        import sys
        for name in ("minimas", "tokenizers", "transformers", "huggingface_hub", "tqdm", "jinja2"):
            sys.modules[name] = None  # importing it is an ImportError
        import torch
        from theirs import load_model
        model = load_model(sys.argv[1])
        hidden = model(model.embed(torch.arange(4)[None]))
        print(None, model.fingerprint(), float(hidden.sum()))
    """
    found = python(code, folder, cwd=tmp_path).split()
    assert found[:2] == ["None", model.fingerprint()]
    assert float(found[2]) == pytest.approx(
        float(remember(model, torch.arange(4)[None])[0].sum()), abs=1e-9
    )


@pytest.mark.parametrize("first", ["", "import transformers.utils"])
def test_importing_needs_only_the_core(first: str) -> None:
    """The authors' method cannot be imported without vllm.

    The second case proves that this check can fail.
    """
    if first:
        pytest.importorskip("transformers")
    code = f"""
        import sys
        {first}
        import minimas, minimas.__main__
        heavy = "transformers bitsandbytes matplotlib gguf vllm accelerate datasets".split()
        heavy.append("huggingface_hub")
        print(*[name for name in heavy if name in sys.modules])
    """
    found = python(code).split()
    assert "transformers" in found if first else found == []


# -- info ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_info_counts_parameters_without_the_weights(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Users ask what a model needs before they download 16 GB."""
    model = tiny_model(family, tie_word_embeddings=tied, dtype=torch.float32)
    folder = write_folder(tmp_path, model)
    (folder / FILE).unlink()
    lines = describe(folder)
    assert lines["parameters"].startswith(f"{sum(w.numel() for w in model.parameters()):,} ")
    cache = model.new_cache(1)
    model(model.embed(random_ids(model, 1, 8)), cache)
    assert lines["memory"].startswith(f"{cache.nbytes / 8 / 1024:,.1f} KiB per token")
    assert lines["alignment"].startswith(
        "tied: W_a is the identity" if tied else "untied: W_a is a 16 × 16 map"
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [BAD["no config"], BAD["another family"]],
    ids=["no config", "another family"],
)
def test_info_raises_the_same_errors_as_load(
    damage: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    """The error has the same text."""
    folder = write_folder(tmp_path, tiny_model())
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        describe(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_full_disk_keeps_the_older_memory(tmp_path: Path) -> None:
    """The error is real: the process may write at most 4 KiB to any file."""
    folder = write_folder(tmp_path / "model", tiny_model())
    code = """
        import resource, sys, torch
        from pathlib import Path
        from minimas import KVCache, load
        model, path = load(sys.argv[1]).model, Path(sys.argv[2])
        cache = model.new_cache(1)
        model(model.embed(torch.ones(1, 3, dtype=torch.int64)), cache)
        cache.save(path)
        model(model.embed(torch.ones(1, 90, dtype=torch.int64)), cache)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            cache.save(path)
        except OSError as error:
            named = f"{path}: cannot write" in str(error)
            kept = [int(length) for length in KVCache.load(path, model).lengths]
            print(named, kept, len(list(path.parent.iterdir())))
    """
    (tmp_path / "memories").mkdir()
    assert python(code, folder, tmp_path / "memories" / "m") == "True [3] 1\n"


def test_apart_detects_a_difference() -> None:
    """The measure of all parity tests is relative, and far from 0 for different tensors."""
    assert apart(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5


def test_an_aligner_excludes_padding_rows_of_the_embeddings() -> None:
    """`lm.aligner` takes the number of rows from the tokenizer, not from the embeddings."""
    lm = load(TINY)
    assert lm.tokenizer is not None
    h = torch.ones(1, lm.model.config.hidden_size)
    expected = Aligner.from_model(lm.model, "ridge", lm.tokenizer.size)
    assert torch.equal(lm.aligner("ridge")(h), expected(h))
    assert lm.aligner("ridge") is lm.aligner("ridge")


@pytest.mark.parametrize("kind", [None, 3, ["ridge"], torch.eye(40)], ids=str)
def test_an_align_kind_that_is_not_a_string_is_refused(kind: Any) -> None:
    """`lm.aligner(None)` ended in a TypeError of pathlib."""
    with pytest.raises(ValueError, match=r"^align: found (.|\n)*, expected one of ridge, identity"):
        load(TINY).aligner(kind)


def test_a_map_is_reloaded_when_its_file_or_the_tokenizer_has_changed(tmp_path: Path) -> None:
    """The map of the first call was returned in all later calls."""
    lm, path = load(TINY), tmp_path / "map.safetensors"
    h = torch.randn(3, lm.model.config.hidden_size)
    for kind in ("identity", "random"):
        lm.aligner(kind).save(path)
        os.utime(path, ns=(0, len(kind)))  # a clock may be too coarse to tell two writes apart
        assert torch.equal(lm.aligner(str(path))(h), lm.aligner(kind)(h))
        assert lm.aligner(str(path)) is lm.aligner(str(path))
    before = lm.aligner("ridge")
    lm.tokenizer = None
    assert lm.aligner("ridge") is not before


class Terminal(io.StringIO):
    """A standard error stream that is a terminal or not."""

    def __init__(self, on_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: on_terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("on_terminal", "quiet", "shown"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_loading_shows_a_progress_bar_only_on_a_terminal(
    on_terminal: bool, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds of loading showed no progress."""
    screen = Terminal(on_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    load(TINY, device="cpu", quiet=quiet)
    assert (f"loading {TINY}" in screen.getvalue()) == shown == bool(screen.getvalue())


def test_loading_works_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without a console has no standard error."""
    monkeypatch.setattr("sys.stderr", None)
    assert load(TINY, device="cpu").model.name == str(TINY)
