"""Whether transformers reads texts as the file of a tokenizer says. Where it does not, the file wins.

transformers 5 rebuilds the pipeline of some classes (Llama, XLM-RoBERTa) from its own code, and takes over
from tokenizer.json little but the vocabulary: leading spaces, tabs and the like then make other tokens than
those that the model was trained with, and nothing says so.
"""

import logging
from pathlib import Path
from typing import Any

from bge_ray.errors import ModelError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# What pipelines were seen to differ on, and plain text.
PROBES = (
    "Hello world",
    " lead",
    "tail ",
    "tail\n",
    "a\tb",
    "two  spaces",
    "ﬁ",
    "a</s> b",
    "\n",
    "🙂",
    "为这个句子生成表示",
    "",
)


def take_file(tokenizer: Any, folder: Path) -> str | None:
    """Let a tokenizer of transformers go by its file, if it reads texts in another way.

    Args:
        tokenizer: its backend is replaced in place.
        folder: of the model.

    Returns:
        What was found and done, for a person; None if the two agree, or there is no file.

    Raises:
        ModelError: the file cannot be read.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    raw = read_tokenizer(path)
    built = tokenizer.backend_tokenizer
    built.no_truncation()
    built.no_padding()
    differing = [probe for probe in PROBES if raw.encode(probe).ids != built.encode(probe).ids]
    if not differing:
        return None
    # The property has no setter; everything that transformers offers goes by this attribute.
    tokenizer._tokenizer = raw
    note = (
        f"transformers makes other tokens of {len(differing)} of {len(PROBES)} probe texts, such as "
        f"{differing[0]!r}, than {TOKENIZER_FILE} says, and {TOKENIZER_FILE} is gone by"
    )
    logger.warning("%s: %s", folder, note)
    return note


def read_tokenizer(path: Path) -> Any:
    """Return the pipeline of a tokenizer.json, which neither cuts nor pads.

    Raises:
        ModelError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: {error}") from error
    raw.no_truncation()
    raw.no_padding()
    return raw


def check_first_token(tokenizer: Any, folder: Path) -> None:
    """Refuse CLS pooling of a tokenizer that puts no special token first: it would read a word.

    Raises:
        ModelError: names what stands first.
    """
    first = tokenizer.backend_tokenizer.encode("x").ids[:1]
    if not first or first[0] not in tokenizer.all_special_ids:
        raise ModelError(
            f"{folder}: pooling cls takes the first token, and its tokenizer puts no special token there but "
            f"{tokenizer.convert_ids_to_tokens(first)}; it is not the tokenizer of this model, or "
            "model.pooling is another one"
        )


def check_last_token(tokenizer: Any, folder: Path, expected: str) -> None:
    """Refuse a tokenizer that ends texts with another token than the model was trained with.

    Raises:
        ModelError: names both.
    """
    tokens = tokenizer.backend_tokenizer.encode("x").tokens
    if tokens[-1:] != [expected]:
        raise ModelError(
            f"{folder}: its tokenizer ends texts with {(tokens or ['nothing'])[-1]!r}, and its card says "
            f"{expected!r}: its tokenizer files are not whole, or another model's"
        )


def check_vocabulary(tokenizer: Any, folder: Path, vocab_size: int | None) -> None:
    """Refuse a tokenizer whose vocabulary is larger than the model's; added tokens may be.

    Raises:
        ModelError: names both sizes.
    """
    own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if vocab_size is not None and own > vocab_size:
        raise ModelError(
            f"{folder}: its tokenizer has {own} tokens and its model {vocab_size}: it is another model's"
        )
