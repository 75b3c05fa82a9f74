"""Check that a complete cache of the hub is used and an interrupted download is continued.

Errors say how to proceed.
"""

import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import load
from minimas.load import resolve

from .models import tiny_model, write_folder

OPTIONAL = "tokenizer_config.json"


class Hub:
    """A repository `remote` on the hub and its cache `local`. It is offline if `remote` is None."""

    def __init__(self, local: Path, remote: Path | None, listed: bool = False) -> None:
        self.local, self.remote, self.listed, self.online = local, remote, listed, 0

    def __call__(self, repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        """Imitate snapshot_download. `listed` is the check of newer versions of huggingface_hub."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not local_files_only:
            self.online += 1
            if self.remote is None:
                raise OSError("no network\nat all")
            for path in self.remote.rglob("*"):
                name = path.relative_to(self.remote).as_posix()
                if path.is_file() and any(fnmatch(name, each) for each in allow_patterns):
                    (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.local / name).write_bytes(path.read_bytes())
        elif not self.local.is_dir():
            raise LocalEntryNotFoundError("not here")
        elif self.listed and any(fnmatch(OPTIONAL, each) for each in allow_patterns):
            raise LocalEntryNotFoundError(f"{OPTIONAL} is listed, and missing")
        return str(self.local)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(remote: Path | None, **options: Any) -> Hub:
        made = Hub(tmp_path / "cache", remote, **options)
        monkeypatch.setattr("huggingface_hub.snapshot_download", made)
        return made

    return make


def repository(path: Path, shards: int) -> Path:
    return write_folder(path, tiny_model(dtype=torch.float32), shards)


@pytest.mark.parametrize(
    "there",
    [
        ["config.json", "*.index.json"],
        ["config.json", "*.index.json", "model-00001-*"],
        ["config.json", "*.index.json", "model-0000[13]-*"],
        ["config.json", "model-*.safetensors"],
        ["*.safetensors", "*.index.json"],
        [],
    ],
)
def test_an_interrupted_download_is_continued(
    there: list[str], hub: Callable[..., Hub], tmp_path: Path
) -> None:
    """A partial download was taken for a whole model in every later call."""
    made = hub(repository(tmp_path / "remote", 3))
    (tmp_path / "cache").mkdir()
    for pattern in there:
        for path in (tmp_path / "remote").glob(pattern):
            (tmp_path / "cache" / path.name).write_bytes(path.read_bytes())
    assert load("org/m").model.fingerprint() == tiny_model(dtype=torch.float32).fingerprint()
    assert made.online == 1
    load("org/m")
    assert made.online == 1  # now the copy is complete


def test_an_incomplete_copy_offline_says_how_to_download_the_rest(
    hub: Callable[..., Hub], tmp_path: Path
) -> None:
    """The error named the missing shard, but not how to get it."""
    hub(None)
    repository(tmp_path / "cache", 3)
    (tmp_path / "cache" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"hf download org/m \(the hub: no network\)"):
        load("org/m")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_complete_copy_offline_may_lack_an_optional_file(
    listed: bool, shards: int, hub: Callable[..., Hub], tmp_path: Path
) -> None:
    """Newer versions of huggingface_hub expect a file for every pattern, which failed here."""
    made = hub(None, listed=listed)
    repository(tmp_path / "cache", shards)
    assert resolve("org/m") == tmp_path / "cache"
    assert made.online == (1 if listed else 0)


def test_info_downloads_no_weights(hub: Callable[..., Hub], tmp_path: Path) -> None:
    """Users ask what a model of 16 GB needs before they download it."""
    hub(repository(tmp_path / "remote", 2))
    assert resolve("org/m", only_config=True) == tmp_path / "cache"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["config.json"]


GGUF_FILES = """
    m-Q8_0.gguf m-bf16.gguf m-q4_k_m.gguf big/F16/m-F16-00001-of-00002.gguf
    big/F16/m-F16-00002-of-00002.gguf
""".split()


@pytest.mark.parametrize(
    ("name", "expected", "downloaded"),
    [
        ("Q8_0", "m-Q8_0.gguf", 1),
        ("q8_0", "m-Q8_0.gguf", 1),
        ("Q4_K_M", "m-q4_k_m.gguf", 1),
        ("BF16", "m-bf16.gguf", 1),
        ("F16", GGUF_FILES[3], 2),
        ("m-bf16.gguf", "m-bf16.gguf", 1),
        (GGUF_FILES[3], GGUF_FILES[3], 2),
        (GGUF_FILES[4], GGUF_FILES[3], 2),
    ],
)
def test_a_gguf_file_is_found_by_its_path_and_by_its_type(
    name: str,
    expected: str,
    downloaded: int,
    hub: Callable[..., Hub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file in a folder and llama.cpp's form `repo:Q8_0` were not accepted as hub ids."""
    monkeypatch.setattr(sys.modules["minimas.load"], "read_header", lambda path: None)
    for file in GGUF_FILES:
        path = tmp_path / "remote" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    made = hub(tmp_path / "remote")
    assert resolve(f"org/m-GGUF:{name}") == tmp_path / "cache" / expected
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == downloaded
    resolve(f"org/m-GGUF:{name}")
    assert made.online == 1


@pytest.mark.parametrize("name", ["Q3_K_S", "none.gguf", "folder/none.gguf"])
def test_a_missing_gguf_file_is_an_error_that_names_the_accepted_forms(
    name: str, hub: Callable[..., Hub], tmp_path: Path
) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "cache").mkdir()
    hub(tmp_path / "remote")
    with pytest.raises(FileNotFoundError, match=r"org/m:FOLDER/FILE\.gguf .*org/m:Q8_0"):
        resolve(f"org/m:{name}")
    with pytest.raises(FileNotFoundError, match=r"ORG/REPO:FOLDER/FILE\.gguf or ORG/REPO:Q8_0"):
        resolve("org/m:/etc/passwd")


def test_a_gguf_file_with_a_missing_shard_is_downloaded_again(
    hub: Callable[..., Hub], tmp_path: Path
) -> None:
    """The first shard alone was taken for the whole file."""
    pytest.importorskip("gguf")
    from .formats.test_gguf import sharded

    remote = tmp_path / "remote" / "Q8_0"
    remote.mkdir(parents=True)
    model = tiny_model("llama", dtype=torch.float32)
    first, *_ = sharded(remote, model)
    (tmp_path / "cache" / "Q8_0").mkdir(parents=True)
    (tmp_path / "cache" / "Q8_0" / first.name).write_bytes(first.read_bytes())
    made = hub(tmp_path / "remote")
    loaded = load(f"org/m:Q8_0/{first.name}", device="cpu").model
    assert made.online == 1
    assert loaded.state_dict().keys() == model.state_dict().keys()
