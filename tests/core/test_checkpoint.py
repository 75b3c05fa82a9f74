"""Checkpoints that transformers loads must load here too, with equal logits.

Examples are a tied matrix under either name, and an index that disagrees with its files.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimas.core import load_model
from minimas.core.checkpoint import EMBEDDING, HEAD, INDEX
from minimas.core.config import FAMILIES

from ..models import apart, random_ids, remember, tiny_model, write_folder, write_tensors

UP = "model.layers.1.mlp.up_proj.weight"
SECOND = "model-00002-of-00002.safetensors"


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits of transformers for the same folder."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model.eval()(ids).logits
    return logits


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    model = load_model(folder)
    return model.logits(remember(model, ids)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_matrix_stored_only_as_the_lm_head_is_found(family: str, tmp_path: Path) -> None:
    """It was refused with: tensor model.embed_tokens.weight: found nothing."""
    model = tiny_model(family, dtype=torch.float32, tie_word_embeddings=True)
    folder = write_folder(tmp_path, model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors[HEAD] = tensors.pop(EMBEDDING)
    write_tensors(folder, tensors)
    ids = random_ids(model, 2, 7)
    ours = our_logits(folder, ids)
    assert torch.equal(ours, model.logits(remember(model, ids)[0]))
    assert apart(ours, their_logits(folder, ids)) < 1e-5


def test_an_untied_model_needs_both_matrices(tmp_path: Path) -> None:
    """The LM head must not be used as the embedding unless config.json says so."""
    model = tiny_model(dtype=torch.float32)
    tensors = dict(model.state_dict())
    del tensors[EMBEDDING]
    write_tensors(write_folder(tmp_path, model), tensors)
    with pytest.raises(ValueError, match=f"tensor {EMBEDDING}: found nothing"):
        load_model(tmp_path)


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lists one that is not there": lambda index: index.update(ghost=SECOND),
    "misses one that is there": lambda index: index.pop(UP),
    "names another shard": lambda index: index.update({UP: SECOND}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_that_disagrees_with_its_files_only_warns(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was refused, although all tensors are there and transformers loads them."""
    model = tiny_model(dtype=torch.float32)
    folder = write_folder(tmp_path, model, shards=2)
    path = folder / INDEX
    index = json.loads(path.read_text())
    place = index["weight_map"][UP]
    FAULTS[fault](index["weight_map"])
    if index["weight_map"].get(UP) == place and "ghost" not in index["weight_map"]:
        index["weight_map"][UP] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    ids = random_ids(model, 1, 6)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(our_logits(folder, ids), model.logits(remember(model, ids)[0]))
    assert str(path) in caplog.text and ("ghost" if "lists" in fault else UP) in caplog.text
    assert apart(our_logits(folder, ids), their_logits(folder, ids)) < 1e-5


def test_of_two_shards_with_the_same_tensor_the_last_one_by_name_counts(tmp_path: Path) -> None:
    """Shards were read in the order of a set, which differs between two processes."""
    model = tiny_model(dtype=torch.float32)
    folder = write_folder(tmp_path, model, shards=3)
    for number in (1, 2, 3):
        shard = folder / f"model-0000{number}-of-00003.safetensors"
        with safe_open(shard, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        save_file(tensors | {UP: torch.full_like(model.state_dict()[UP], number)}, shard)
    assert load_model(folder).state_dict()[UP].unique().tolist() == [3.0]
    ids = random_ids(model, 1, 6)
    assert apart(our_logits(folder, ids), their_logits(folder, ids)) < 1e-5


def test_a_correct_index_does_not_warn_and_a_missing_tensor_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If a correct index warned too, the warning would mean nothing."""
    model = tiny_model(dtype=torch.float32)
    folder = write_folder(tmp_path, model, shards=3)
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert not caplog.records
    tensors = dict(model.state_dict())
    del tensors[UP]
    write_tensors(folder, tensors, shards=3)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][UP] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"tensor {UP}: found nothing"):
        load_model(folder)
