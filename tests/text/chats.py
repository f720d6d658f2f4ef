"""A small tokenizer folder with chat tokens, and chat templates of the published kinds."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

NAMES = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")  # ids 256 to 260
BOS, EOS, PAD, START, END = range(256, 261)

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + BODY + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = _CHATML.replace("BODY", "m.content")
# As Llama's: a beginning token, and contents stripped.
WITH_BOS = "{{ bos_token }}" + _CHATML.replace("BODY", "m.content | trim")
# As Qwen3's: what was thought is dropped from a turn once others follow.
FORGETS = _CHATML.replace(
    "BODY",
    "(m.content if loop.last or m.role != 'assistant' else m.content.split('</think>') | last)",
)
# As DeepSeek-R1's: the words that begin an answer are not those that stand in a conversation.
THINKS = CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}")
# As those for training: blocks around what the assistant writes.
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TALK = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "no\n"},
]
THOUGHT = [
    dict(m, content="<think>so</think>" + m["content"]) if m["role"] == "assistant" else m
    for m in TALK
]


def folder(path: pathlib.Path, template: str | None = CHATML, **config) -> str:
    """A folder with a byte vocabulary and the special tokens; `config` is its tokenizer_config."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(NAMES))
    if config.pop("adds_bos", False):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | config
    if template is not None:
        values["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return str(path)
