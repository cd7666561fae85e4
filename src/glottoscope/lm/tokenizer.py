"""A byte-level BPE tokenizer for a language model that is trained from scratch on a bilingual corpus.

Text is cut before BPE sees it wherever the script changes (Han, Hiragana, Katakana, Latin, any other letters), every
digit stands alone, and bytes are the alphabet: no token mixes scripts, no number is a token of its own, and nothing is
unknown, so decode(encode(text)) == text for every text that does not spell out a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from glottoscope.atomic import atomic_path
from glottoscope.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, BOS, EOS)  # ids 0, 1, 2
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# GPT-2's pattern with one alternative per script. The prolonged sound mark belongs to both kana but to neither
# script in Unicode's tables; combining marks stay with their letter.
SCRIPT_PATTERN = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)(?!\p{L})",
        r" ?\p{Han}+",
        r" ?[\p{Hiragana}ー][\p{Hiragana}\p{M}ー]*",
        r" ?[\p{Katakana}ー][\p{Katakana}\p{M}ー]*",
        r" ?\p{Latin}[\p{Latin}\p{M}]*",
        r" ?\p{N}",
        r" ?(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Latin}])[\p{L}\p{M}])+",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s+(?!\S)|\s+",
    )
)


def train_tokenizer(texts: Iterable[str], out_dir: Path, *, vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts` and write it to `out_dir` as an ordinary Hugging Face tokenizer directory.

    The result depends on the texts alone (BPE breaks ties by token id). Special tokens: <pad> 0, <bos> 1, <eos> 2;
    <bos> is put in front of a text unless `add_special_tokens=False`. The vocabulary is smaller than `vocab_size`
    where the texts do not hold enough repeated pairs.

    Source: BPE, Sennrich et al. 2016; byte-level alphabet, Radford et al. 2019; the `tokenizers` library.

    Raises:
        InputError: `vocab_size` does not hold the special tokens and the 256 bytes, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"tokenizer vocab_size {vocab_size} is too small: at least {MIN_VOCAB_SIZE} (256 bytes and the special tokens)"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(SCRIPT_PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer=trainer)
    if not seen.characters:
        raise InputError("the tokenizer has no text to train on: give a corpus with at least one non-empty document")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,  # it would join "word ." and break the round trip
    )
    with atomic_path(Path(out_dir)) as temporary:
        fast.save_pretrained(str(temporary))
    return fast


class _Counted:
    """Passes texts on and counts their characters, so that an empty iterable is noticed without reading it twice."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text
