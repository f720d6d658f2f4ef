"""Tokenizers: round trips, end-of-text ids, and what loading refuses."""

import gzip
import json

import numpy as np
import pytest

from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer


def test_bytes():
    tokenizer = load_tokenizer("byte")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("aé\n") == [97, 195, 169, 10]
    assert tokenizer.decode([97, 256, 195, 169, 257, 10]) == "aé\n"
    assert tokenizer.decode(np.array([195], np.int32)) == "\ufffd"  # half a character
    assert len(tokenizer.token_texts()) == tokenizer.vocab_size == 258
    assert tokenizer.token_texts()[97] == "a" and tokenizer.token_texts()[256] is None


def test_characters():
    tokenizer = load_tokenizer("chars:0123+=\\n")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("1+2\n") == [3, 6, 4, 8]
    assert tokenizer.decode([3, 6, 4, 8, 1, 0, 0, 99]) == "1+2\n"
    assert tokenizer.vocab_size == 9 and tokenizer.eos_ids == (1,) and tokenizer.pad_id == 0
    assert tokenizer.token_texts() == [None, None, *"0123+=\n"]
    with pytest.raises(ValueError, match=r"\['x'\].*not in"):
        tokenizer.encode("1x")
    with pytest.raises(ValueError, match="exactly once"):
        CharTokenizer("aba")


def test_unknown_name_says_what_is_possible():
    with pytest.raises(ValueError, match=r"neither 'byte'.*folder nor a tokenizer.json"):
        load_tokenizer("no/such/folder")


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "neox20b", "deepseek_r1"])
def test_published_files_round_trip(name, data_dir, tmp_path):
    path = tmp_path / "tokenizer.json"
    with gzip.open(data_dir / "tokenizers" / name / "tokenizer.json.gz") as packed:
        path.write_bytes(packed.read())
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, Tokenizer)
    text = "37+8=45\r\n\n 45*2 = 90.\n\t#### 90 é ü 数\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_ids[0], tokenizer.vocab_size + 5]) == text
    assert (name, tokenizer.eos_ids) in {
        ("gpt2", (50256,)),
        ("neox20b", (0,)),
        ("deepseek_r1", (1,)),
    }
    texts = tokenizer.token_texts()
    assert len(texts) == tokenizer.vocab_size
    assert "".join(texts[i] for i in tokenizer.encode("37 + 8\n= 45")) == "37 + 8\n= 45"
    assert texts[tokenizer.eos_ids[0]] is None
    assert tokenizer.decode(list(range(256, 300))) == tokenizer.decode(np.arange(256, 300))


@pytest.mark.data
def test_folder_names_its_special_tokens(data_dir, tmp_path):
    with gzip.open(data_dir / "tokenizers/gpt2/tokenizer.json.gz") as packed:
        spec = json.loads(packed.read())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "stride": 0}
    spec["truncation"]["strategy"] = "LongestFirst"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 50256]}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_ids == (50256, 7) and tokenizer.pad_id == 50256
    # A file's own truncation is off: texts come back whole.
    text = "a sentence that is longer than two tokens"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.data
def test_no_end_of_text_is_an_error(data_dir, tmp_path):
    spec = json.loads((data_dir / "tokenizers/tiny_test/tokenizer.json").read_text("utf-8"))
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {t: i for t, i in vocab.items() if not t.startswith("<")}
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="names no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_byte_tokenizer_ids_are_distinct():
    special = {ByteTokenizer.pad_id, *ByteTokenizer.eos_ids}
    assert len(special) == 2 and min(special) > 255
