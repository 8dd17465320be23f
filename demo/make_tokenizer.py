"""The demo's tokenizer: byte-level BPE of 2,048 pieces, trained on the world's teacher split and nothing
else.

Digits stand alone and a space before an identifier stands alone, so that an order id has the same pieces in
a request and in an answer. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.world import canonical, case

VOCAB_SIZE = 2048
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
#: identifiers' space · digit · Chinese run · word with its space · punctuation run · other space
PIECES = r" (?=[A-H]-\d|[A-Z]+\d|[a-z]+\d\d@)|\p{N}|\p{Han}+| ?[\p{Latin}_]+| ?[^\s\p{L}\p{N}_]+|\s+|\p{L}+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% elif message['role'] == 'system' %}<|system|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _texts(rows: int) -> Iterator[str]:
    for index in range(rows):
        one = case("teacher", index)
        yield one.text
        yield canonical(one.answer)


def make_tokenizer(rows: int = 40_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same rows give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_texts(rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train and write the tokenizer where AutoTokenizer finds it."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer
