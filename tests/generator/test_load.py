"""What is checked when a generator is loaded: its files, weights, tokens, positions and logits."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dragkit.config import GeneratorConfig, resolve_config
from dragkit.errors import ConfigError, MissingInputError
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.conformance import check_conformance, packed, relative_error
from dragkit.generator.generator import Generator
from dragkit.generator.load import check_generator, load_generator, within_positions
from dragkit.generator.lora.adapters import add_adapters, lora_targets
from dragkit.generator.nemotron_h import decoder
from dragkit.generator.weight_files import read_tokenizer
from tests.generator.families import family_model
from tests.nemotron_cases import toy_model

CPU = torch.device("cpu")
ROWS = 2048


def save(folder: Path, family: str = "llama", **settings: object) -> Path:
    """A model of a family with the tokenizer of the bundled generator."""
    family_model(family, vocab_size=ROWS, **settings).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_generator_path() / name, folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def load(folder: Path, **settings: object) -> Generator:
    return load_generator(GeneratorConfig(lora_rank=2, **settings), CPU, name=str(folder))


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.layers.0.self_attn.q_proj.weight", float("inf")),
        # No prompt of the probe has this token.
        ("model.embed_tokens.weight", float("-inf")),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_its_name(
    copied: Path, weight: str, value: float
) -> None:
    def spoil(tensors: dict) -> dict:
        tensors[weight][-1, -1] = value
        return tensors

    rewrite(copied, spoil)
    with pytest.raises(MissingInputError) as error:
        load(copied)
    assert f"the weight {weight} holds NaN or infinity" in str(error.value)
    assert str(copied) in str(error.value)


def test_weights_whose_logits_overflow_are_refused_as_such(copied: Path) -> None:
    norm = {"model.norm.weight": 1e38, "lm_head.weight": 1e5}
    rewrite(copied, lambda tensors: {n: x * norm.get(n, 1) for n, x in tensors.items()})
    with pytest.raises(MissingInputError, match="weights are finite, but its logits hold NaN"):
        load(copied)


def test_large_weights_are_finite() -> None:
    """Their float32 sum is not."""
    model = family_model("llama", vocab_size=ROWS)
    with torch.no_grad():
        model.get_input_embeddings().weight[-20:] = 1e37
    check_conformance(Generator(model, read_tokenizer(tiny_generator_path())), "toy")


def test_a_missing_weight_is_refused_by_its_name(copied: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    rewrite(copied, lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(
        MissingInputError, match="1 weights of the model are not in its files: " + gone
    ):
        load(copied)


def test_renamed_weights_are_refused_with_both_names(copied: Path) -> None:
    rewrite(copied, lambda tensors: {f"module.{k}": v for k, v in tensors.items()})
    with pytest.raises(
        MissingInputError, match=r"not in its files: .*and not in the model: module\."
    ):
        load(copied)


def test_weights_of_another_shape_are_refused_with_both_shapes(copied: Path) -> None:
    name = "model.norm.weight"
    rewrite(copied, lambda tensors: tensors | {name: torch.ones(16)})
    with pytest.raises(MissingInputError, match=rf"{name} \(its shape is \[16\] instead of \[32\]"):
        load(copied)


def test_weights_that_no_model_takes_are_named_and_left_out(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(copied, lambda tensors: tensors | {"vision.weight": torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        load(copied)
    assert "1 others are in the files and not in the model: vision.weight" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["cut", "pointer", "empty"])
def test_a_file_that_cannot_be_read_is_named_before_any_weight_is_read(
    copied: Path, name: str, kind: str
) -> None:
    file = copied / name
    if kind == "pointer":
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\n")
    else:
        os.truncate(file, file.stat().st_size // 2 if kind == "cut" else 0)
    with pytest.raises(MissingInputError, match=name) as caught:
        check_generator(GeneratorConfig(), CPU, name=str(copied))
    assert ("Git LFS" in str(caught.value).partition("Fetch")[0]) == (kind == "pointer")


def test_a_missing_part_of_the_weights_is_named(copied: Path) -> None:
    part = "model-00002-of-00002.safetensors"
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    index = copied / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": part}})
    )
    with pytest.raises(MissingInputError, match=f"{part}: this weight file is missing"):
        check_generator(GeneratorConfig(), CPU, name=str(copied))
    index.write_text("[1]")
    with pytest.raises(MissingInputError, match=r"index\.json: the list of the weight files"):
        check_generator(GeneratorConfig(), CPU, name=str(copied))
    index.unlink()
    (copied / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"no \*\.safetensors file"):
        check_generator(GeneratorConfig(), CPU, name=str(copied))


def test_tokens_that_prompts_hold_must_have_an_embedding(tmp_path: Path) -> None:
    last = len(read_tokenizer(tiny_generator_path())) - 1
    few = save(tmp_path / "few")
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"vocab_size": last}))
    with pytest.raises(MissingInputError, match=rf"1 tokens .* table of {last} rows .*\({last}\)"):
        check_generator(GeneratorConfig(), CPU, name=str(few))


def test_a_control_token_without_an_embedding_is_refused_only_as_end_token(tmp_path: Path) -> None:
    folder = save(tmp_path / "added")
    tokenizer = read_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    tokenizer.save_pretrained(folder)
    assert check_generator(GeneratorConfig(), CPU, name=str(folder)) == str(folder)
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(MissingInputError, match="'<stop>'"):
        check_generator(GeneratorConfig(), CPU, name=str(folder))


def phase2(folder: Path, **settings: object):
    values = {"run.phase": 2, "generator.model": str(folder)}
    return resolve_config("tiny", None, values | settings)[0]


def test_prompts_keep_within_the_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "opt", "opt", max_position_embeddings=128)
    config = phase2(folder, **{"generator.max_prompt_tokens": 128})
    assert within_positions(config) is config
    with caplog.at_level(logging.WARNING):
        kept = within_positions(phase2(folder, **{"generator.max_prompt_tokens": 129}))
    assert kept.generator.max_prompt_tokens == 128 and "128 instead of 129" in caplog.text
    long = {"generator.max_prompt_tokens": 500, "run.val_max_new_tokens": 128}
    with pytest.raises(ConfigError, match="answers of 128 tokens .* has 128 positions"):
        within_positions(phase2(folder, **long))


def test_settings_beside_the_model_take_no_part_in_decoding(llama: Path, copied: Path) -> None:
    GenerationConfig(
        repetition_penalty=9.0,
        do_sample=True,
        temperature=5.0,
        return_dict_in_generate=True,
        bad_words_ids=[[7]],
        min_new_tokens=3,
    ).save_pretrained(copied)
    assert "repetition_penalty" in (copied / "generation_config.json").read_text()
    draw = torch.Generator().manual_seed(2)
    prompts = [(torch.randint(3, ROWS, (n,), generator=draw).tolist(), []) for n in (5, 9, 31)]
    vectors = torch.zeros(3, 32)
    answers = [load(f).greedy_tokens(packed(prompts, CPU), vectors, 20) for f in (llama, copied)]
    assert answers[0] == answers[1]


def test_layers_of_gpt2_are_adapted_by_default(tmp_path: Path) -> None:
    state = load(save(tmp_path / "gpt2", "gpt2")).adapter_state()
    assert state and all("c_attn" in name for name in state)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt_neox", ["query_key_value"]),
        ("rwkv", ["key", "output", "receptance", "value"]),
        ("codegen", ["qkv_proj"]),
        # Its feed-forward layers are called 0 and 2. A block is called 0, too.
        ("ctrl", ["2", "Wk", "Wq", "Wv", "dense"]),
        ("biogpt", ["q_proj", "k_proj", "v_proj"]),
        ("openai-gpt", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_default_targets_of_families_with_other_names(family: str, targets: list[str]) -> None:
    model = family_model(family)
    assert lora_targets(model, None) == targets
    assert add_adapters(model, GeneratorConfig(lora_rank=2)).peft_config


def test_the_probe_of_a_nemotron_h_costs_one_forward_of_each_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = toy_model(std=0.2, vocab_size=ROWS)
    generator = Generator(model, read_tokenizer(tiny_generator_path()))
    calls = {"own": 0, "ours": 0}
    count = model.model.norm_f.register_forward_hook
    count(lambda *_: calls.__setitem__("own", calls["own"] + 1))
    run_blocks = decoder.run_blocks

    def counted(*args, **options):
        calls["ours"] += 1
        return run_blocks(*args, **options)

    monkeypatch.setattr(decoder, "run_blocks", counted)
    check_conformance(generator, "toy")
    assert calls == {"own": 1, "ours": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("scale", r"\(family nemotron_h\) cannot be used: our logits .* for token ids, too: "),
        ("batch", r"in a batch with a longer prompt"),
        ("vector", r"where a vector replaces the embedding"),
        ("nan", r"for token ids, too: nan"),
    ],
)
def test_logits_that_differ_are_refused_with_what_changes_them(
    fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(
        toy_model(std=0.2, vocab_size=ROWS), read_tokenizer(tiny_generator_path())
    )
    right = generator.target_logits

    def wrong(prompt, vectors):
        logits = torch.cat(list(right(prompt, vectors)))
        faulty = {
            "scale": True,
            "nan": True,
            "batch": len(prompt.ptr) > 2,
            "vector": vectors is not None,
        }[fault]
        factor = float("nan") if fault == "nan" else 1.01
        return iter([logits * factor if faulty else logits])

    monkeypatch.setattr(generator, "target_logits", wrong)
    with pytest.raises(MissingInputError, match=message):
        check_conformance(generator, "toy")


def test_the_relative_error_ignores_what_all_logits_share() -> None:
    own = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert relative_error(own + 5.0, own) < 1e-6
    assert abs(relative_error(1.5 * own, own) - 0.5) < 1e-6
    assert relative_error(torch.zeros(1, 3), torch.zeros(1, 3)) == 0.0


def test_a_model_that_reads_padding_decodes_one_prompt_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        generator = load(save(tmp_path / "rwkv", "rwkv", context_length=4096))
    assert "(family rwkv) decodes one prompt at a time" in caplog.text
    with pytest.raises(ConfigError, match="generator_fsdp"):
        generator.coordinate_passes(None)
    assert not load_generator(GeneratorConfig(), CPU, name="tiny").causal_lm.decodes_alone
