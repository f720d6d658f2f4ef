"""Tokenizers: round trips, end-of-text ids, and what loading refuses."""

import gzip
import json
import pathlib

import huggingface_hub
import numpy as np
import pytest
import tokenizers

from rlhf_jax.text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    encode_start,
    load_tokenizer,
)
from tests.text import chats


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


# A folder's own files by the class that reads them: the first two become Rust, the last does not.
SENTENCEPIECE = {
    "tokenizer.model": None,
    "spiece.model": {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"},
    "spiece.model.slow": {"tokenizer_class": "BertGenerationTokenizer", "eos_token": "</s>"},
}


@pytest.mark.data
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_folders(name, data_dir, tmp_path):
    with gzip.open(data_dir / "tokenizers/sentencepiece_cc32k/spm.model.gz") as packed:
        (tmp_path / name.removesuffix(".slow")).write_bytes(packed.read())
    if SENTENCEPIECE[name] is not None:
        config = SENTENCEPIECE[name] | {"chat_template": "{{ messages[0].content }}"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.chat is None) == (SENTENCEPIECE[name] is None)
    text = "37+8=45 and 45*2 = 90. It's é, ü!"  # its normalisation joins blanks and breaks
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_ids[0], tokenizer.vocab_size + 5]) == text
    assert tokenizer.eos_ids == (1,)
    texts = tokenizer.token_texts()
    assert len(texts) == tokenizer.vocab_size and texts[1] is None
    assert "".join(texts[i] or "" for i in ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.data
def test_a_vocabulary_and_merges_are_enough(data_dir, tmp_path):
    for packed, name in (("encoder.json.gz", "vocab.json"), ("vocab.bpe.gz", "merges.txt")):
        with gzip.open(data_dir / "tokenizers/gpt2" / packed) as content:
            (tmp_path / name).write_bytes(content.read())
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": chats.CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    text = "37+8=45\r\n\n 45*2 = 90.\n\t#### 90 é ü 数\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat is not None and tokenizer.chat.text == chats.CHATML
    assert tokenizer.eos_ids == (50256,)  # this vocabulary has no token for the end of a turn


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """And says clearly that it is not there, where the hub cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = "'org/name' is no local path, is not in the local cache .* hub, and the hub does not"
    with pytest.raises(ValueError, match=message):
        load_tokenizer("org/name")
    kept = tmp_path / "models--org--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    chats.folder(kept / "snapshots" / ("0" * 40))
    tokenizer = load_tokenizer("org/name")
    assert tokenizer.decode(tokenizer.encode("é <s>")) == "é "
    assert tokenizer.name == "org/name" and tokenizer.chat.origin == "org/name"


def test_special_tokens(tmp_path):
    """Missing padding is end-of-text; ends are the tokenizer's, the config's and the turn's."""
    path = chats.folder(tmp_path / "t")
    assert load_tokenizer(path).pad_id == chats.EOS
    assert load_tokenizer(chats.folder(tmp_path / "p", pad_token="<pad>")).pad_id == chats.PAD
    generation = tmp_path / "t" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [chats.PAD, chats.EOS]}))
    assert load_tokenizer(path).eos_ids == (chats.EOS, chats.PAD, chats.END)
    for value, message in (
        ([261], "eos_token_id 261 is not in the vocabulary of 261 ids"),
        ("</s>", "eos_token_id is '</s>'; wanted an id or a list"),
    ):
        generation.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)
    generation.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: not JSON"):
        load_tokenizer(path)


def test_the_beginning_token_is_written_once(tmp_path):
    path = chats.folder(tmp_path / "t", bos_token="<s>", adds_bos=True)
    plain, none = load_tokenizer(path), load_tokenizer(path, bos=False)
    assert plain.expects_bos and not none.expects_bos and plain.bos_id == chats.BOS
    assert encode_start(plain, "ab") == encode_start(none, "ab") == plain.encode("ab")
    begun = load_tokenizer(path, bos=True)
    assert encode_start(begun, "ab") == [chats.BOS, *plain.encode("ab")]
    assert encode_start(begun, "<s>ab") == encode_start(begun, "ab")
    # A file that names none but writes one.
    unnamed = load_tokenizer(chats.folder(tmp_path / "u", adds_bos=True))
    assert unnamed.bos_id == chats.BOS and unnamed.expects_bos
    # GLM-4 writes two, and something may stand behind the text.
    file = pathlib.Path(chats.folder(tmp_path / "g")) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> <s> $A </s>",
        special_tokens=[("<|im_start|>", chats.START), ("<s>", chats.BOS), ("</s>", chats.EOS)],
    )
    backend.save(str(file))
    two = load_tokenizer(str(file.parent), bos=True)
    assert encode_start(two, "ab") == [chats.START, chats.BOS, *plain.encode("ab")]
    quiet = chats.folder(tmp_path / "q")
    assert not load_tokenizer(quiet).expects_bos
    for name in (quiet, "byte"):
        with pytest.raises(ValueError, match=r"bos is set, but tokenizer .* no beginning-of-text"):
            load_tokenizer(name, bos=True)


def test_chat_templates_from_files(tmp_path):
    path = chats.folder(tmp_path / "t")
    file = tmp_path / "other.jinja"
    with pytest.raises(ValueError, match=r"chat_template='.*other.jinja' is no file; wanted"):
        load_tokenizer(path, chat_template=str(file))
    file.write_text(" \n")
    with pytest.raises(ValueError, match=r"other.jinja' is empty"):
        load_tokenizer("byte", chat_template=str(file))
    file.write_text("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"other.jinja refuses messages with the roles user, assi"):
        load_tokenizer(path, chat_template=str(file))
    # A folder's own one may want other messages than these: plain texts do not need it.
    assert load_tokenizer(chats.folder(tmp_path / "w", file.read_text())).eos_ids == (chats.EOS,)
    file.write_text("{{ messages[0].content + '</s>' }}")
    assert load_tokenizer(path, chat_template=str(file)).chat.origin == str(file)


def test_a_folder_without_a_tokenizer_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer, such as a tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ValueError, match=r"transformers loads no tokenizer.*wanted a tokenizer.js"):
        load_tokenizer(str(tmp_path))


@pytest.mark.data
def test_blanks_that_a_vocabulary_added_end_no_turn(data_dir, tmp_path):
    """GPT-NeoX has tokens of two and more blanks beside its special ones."""
    with gzip.open(data_dir / "tokenizers/neox20b/tokenizer.json.gz") as packed:
        (tmp_path / "tokenizer.json").write_bytes(packed.read())
    file = tmp_path / "chat.jinja"
    for end, eos_ids in (("  ", (0,)), ("  <|padding|>", (0, 1))):
        file.write_text("{% for m in messages %}{{ m.content + '" + end + "' }}{% endfor %}")
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), chat_template=str(file))
        assert tokenizer.eos_ids == eos_ids


def _with_image_token(folder, data_dir, rows, **changes):
    """GPT-2's tokenizer with one more token, 50257, beside a model that knows `rows` ids."""
    with gzip.open(data_dir / "tokenizers/gpt2/tokenizer.json.gz") as packed:
        spec = json.load(packed)
    (end,) = spec["added_tokens"]
    spec["added_tokens"].append(end | {"id": 50257, "content": "<image>"} | changes)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return load_tokenizer(str(folder))


@pytest.mark.data
def test_a_special_token_above_the_models_rows_is_refused_in_texts(data_dir, tmp_path):
    """As Gemma 3's models for text have one."""
    tokenizer = _with_image_token(tmp_path, data_dir, rows=50257)
    assert tokenizer.vocab_size == len(tokenizer.token_texts()) == 50257
    assert tokenizer.decode(tokenizer.encode("a picture")) == "a picture"
    with pytest.raises(ValueError, match=r"holds '<image>', token 50257 of .*ids below 50257 only"):
        tokenizer.encode("a picture: <image>")


@pytest.mark.data
@pytest.mark.parametrize(
    ("rows", "changes"), [(50258, {}), (50257, {"special": False}), (50256, {})]
)
def test_other_tokens_are_not_left_out(rows, changes, data_dir, tmp_path):
    """The model knows it, or it is an ordinary token, or the end-of-text token is one of them."""
    assert _with_image_token(tmp_path, data_dir, rows, **changes).vocab_size == 50258
