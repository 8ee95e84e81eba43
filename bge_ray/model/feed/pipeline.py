"""Whether transformers reads texts as the file of a tokenizer says. Where it does not, the file wins.

transformers 5 rebuilds the pipeline of some classes (Llama, XLM-RoBERTa) from its own code, and takes over
from tokenizer.json little but the vocabulary: leading spaces, tabs and the like then make other tokens than
those that the model was trained with, and nothing says so.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_ray.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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


def read_tokenizer(path: Path) -> "Tokenizer":
    """Return the pipeline of a tokenizer.json, which neither cuts nor pads.

    Raises:
        ModelError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: is no tokenizer: {error}") from error
    raw.no_truncation()
    raw.no_padding()
    return raw


@dataclass(frozen=True)
class Expected:
    """What a model wants of its tokenizer.

    ``special_first``: a special token stands first, because it is pooled. ``last_token`` is what every text
    ends with, and ``vocab_size`` how many tokens the model knows; None if that is not known.
    """

    special_first: bool = False
    last_token: str | None = None
    vocab_size: int | None = None


NOTHING_EXPECTED = Expected()


def check_tokenizer(tokenizer: Any, folder: Path, expected: Expected) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ModelError: names what it makes and what is expected.
    """
    backend = tokenizer.backend_tokenizer
    probe = backend.encode("x")
    first, last = probe.tokens[:1], probe.tokens[-1:]
    if expected.special_first and (not first or probe.ids[0] not in tokenizer.all_special_ids):
        raise ModelError(
            f"{folder}: pooling cls takes the first token, and its tokenizer puts no special token there but "
            f"{first}; it is not the tokenizer of this model, or model.pooling is another one"
        )
    if expected.last_token is not None and last != [expected.last_token]:
        raise ModelError(
            f"{folder}: its tokenizer ends texts with {last}, and its card says {expected.last_token!r}: its "
            "tokenizer files are not whole, or another model's"
        )
    # Added tokens may lie beyond what the model knows: EmbeddingGemma has one for pictures.
    own = backend.get_vocab_size(with_added_tokens=False)
    if expected.vocab_size is not None and own > expected.vocab_size:
        raise ModelError(
            f"{folder}: its tokenizer has {own} tokens and its model {expected.vocab_size}: it is another "
            "model's"
        )
