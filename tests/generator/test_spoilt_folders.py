"""Folders of a generator that hold something else than its weights: refused, never half used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.fingerprint import weights_fingerprint
from dragkit.generator.load import check_generator, load_generator
from tests.generator.families import family_model

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with the tokenizer of the bundled generator."""
    family_model("llama", vocab_size=2048).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_generator_path() / name, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> None:
    load_generator(GeneratorConfig(lora_rank=2), CPU, name=str(folder))


def put_in(folder: Path, place: str) -> None:
    """Moves the weights to a place relative to the folder, and lists them there."""
    file = folder / "model.safetensors"
    names = list(load_file(file))
    (folder / place).parent.mkdir(exist_ok=True)
    file.rename(folder / place)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)})
    )


def test_an_adapter_beside_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """The library would load it, and the model that it names instead of this one."""
    from peft import LoraConfig, get_peft_model

    other = family_model("llama", vocab_size=2048)
    other.config._name_or_path = str(folder)
    adapted = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(MissingInputError, match=r"adapter_config\.json: .*Merge the adapter"):
        check_generator(GeneratorConfig(), CPU, name=str(folder))


@pytest.mark.parametrize("place", ["../other.safetensors", "sub/../../other.safetensors"])
def test_a_list_of_weights_that_leads_out_of_the_folder_is_refused(
    folder: Path, place: str
) -> None:
    (folder / "sub").mkdir()
    put_in(folder, place)
    with pytest.raises(MissingInputError, match=r"other\.safetensors, which is not in the model's"):
        check_generator(GeneratorConfig(), CPU, name=str(folder))


def test_weights_in_a_sub_folder_are_part_of_the_fingerprint(folder: Path) -> None:
    put_in(folder, "sub/part.safetensors")
    before = weights_fingerprint(folder)
    tensors = load_file(folder / "sub/part.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in tensors.items()},
        folder / "sub/part.safetensors",
        metadata={"format": "pt"},
    )
    assert weights_fingerprint(folder) != before
    load(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"weight_map": {"a": 5}}', '{"weight_map": {}, "weight_map": {"a": 1}}'],
)
def test_a_broken_list_of_weights_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(MissingInputError, match="the list of the weight files cannot be read"):
        check_generator(GeneratorConfig(), CPU, name=str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_weights_of_integers_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(MissingInputError, match=rf"{name} \(its numbers are of type [IU]\d+"):
        load(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """The library makes one without any, which reads all texts as nothing."""
    family_model("gpt2", vocab_size=2048).save_pretrained(tmp_path / "model")
    with pytest.raises(MissingInputError, match="tells no texts apart|tokenizer cannot be read"):
        check_generator(GeneratorConfig(), CPU, name=str(tmp_path / "model"))


def test_a_misspelt_folder_is_named_with_those_like_it(folder: Path) -> None:
    for name in (folder.with_name("modell"), folder / "config.json"):
        with pytest.raises(MissingInputError) as caught:
            check_generator(GeneratorConfig(), CPU, name=str(name))
        expected = "Similar names in" if name.name == "modell" else "This is a file, not a folder"
        assert expected in str(caught.value)
    with pytest.raises(MissingInputError, match="hf download 'two words'"):
        check_generator(GeneratorConfig(), CPU, name="two words")


def test_weights_of_bytes_under_other_names_are_no_fault(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    mask = torch.ones(4, dtype=torch.bool)
    save_file(tensors | {"attn.bias": mask}, file, metadata={"format": "pt"})
    load(folder)


@pytest.mark.parametrize(
    "end", [', "rms_norm_eps": 0.5}', ', "x": ' + "[" * 100_000, ', "x": ' + "9" * 5000 + "}"]
)
def test_a_configuration_that_is_no_plain_json_is_refused(folder: Path, end: str) -> None:
    """Of a key given twice, the library takes the last value."""
    file = folder / "config.json"
    file.write_text(file.read_text().rstrip().removesuffix("}").rstrip() + end)
    with pytest.raises(MissingInputError, match=r"config\.json: the model's configuration cannot"):
        check_generator(GeneratorConfig(), CPU, name=str(folder))
