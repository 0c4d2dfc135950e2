"""The tokeniser of a spec: bytes, or any Hugging Face tokeniser."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import access
from trainer.bytecount import END_OF_TEXT
from trainer.errors import unloadable


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`bytes`, a directory, or a hub id. Raises SpecError, or TrainerError where the hub cannot be reached."""
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, **access.remote_code())
    except (OSError, ValueError) as error:
        raise unloadable("tokenizer", name, error) from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value, and 256 ends a document: a real Hugging Face tokeniser, so that exports carry it."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"eos_token": END_OF_TEXT})
    return fast


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019).

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and what follows, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def ends_of_text(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's own `config`, and the tokeniser's, which training has taught."""
    found = config.eos_token_id
    ends = [found] if isinstance(found, int) else list(found or [])
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
