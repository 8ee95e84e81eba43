"""Which special tokens a text begins and ends with, by the files of a tokenizer. No transformers here.

Last-token pooling reads what stands last, and transformers 5 goes by the post-processor of tokenizer.json
alone, where version 4 let ``add_eos_token`` of tokenizer_config.json decide for some classes. Where the two
disagree, vectors of one version are not those of the other, and nothing says so.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bge_ray.errors import ModelError
from bge_ray.model.feed.pipeline import TOKENIZER_FILE, read_tokenizer
from bge_ray.model.modules import read_object

logger = logging.getLogger(__name__)

# Classes whose version of transformers 4 puts tokens where the two flags say, and not the post-processor.
HEEDING = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"}
PROBE = "x"


@dataclass(frozen=True)
class Ends:
    """Tokens that every text begins and ends with; None where the folder puts none there."""

    first: str | None
    last: str | None


@dataclass(frozen=True)
class _Flag:
    """One of the flags of tokenizer_config.json, and the token that it speaks of."""

    name: str
    value: bool | None
    token: str | None
    heeded: bool


def settle_ends(folder: Path, asked: str | None, known: str | None) -> Ends:
    """Settle what the texts of an embedder that pools the last token begin and end with.

    Args:
        folder: a model folder.
        asked: by ``model.last_token``; an empty string for whatever stands last.
        known: by the card.

    Returns:
        Tokens of the vocabulary, or None where nothing is to stand. What the tokenizer does not put there by
        itself is logged, because it is added.

    Raises:
        ModelError: a token is not in the vocabulary, the files contradict each other, or a word would stand
            last.
    """
    tokenizer = _raw(folder)
    by_file = _by_file(tokenizer)
    config = _config(folder)
    last = _settle_last(folder, by_file, config, asked, known)
    if last is not None and last != by_file.last:
        logger.warning(
            "%s: its tokenizer.json puts nothing behind a text; %s is added, which is what is pooled",
            folder,
            last,
        )
    first = _settle_first(folder, by_file, config)
    if first is not None and first != by_file.first:
        logger.warning("%s: its tokenizer.json puts nothing before a text; %s is added", folder, first)
    for token in (first, last):
        if token is not None and tokenizer.token_to_id(token) is None:
            raise ModelError(
                f"{folder}: its vocabulary has no {token}, with which every text is to begin or end; "
                "model.last_token names another one to pool"
            )
    return Ends(first, last)


def _settle_last(
    folder: Path, by_file: Ends, config: dict[str, Any], asked: str | None, known: str | None
) -> str | None:
    wanted = known if asked is None else asked
    if wanted is not None:
        if by_file.last not in (None, wanted):
            who, way = (
                ("its card", "set model.last_token to the one that the model was trained with")
                if asked is None
                else ("model.last_token", "change one of the two")
            )
            raise ModelError(
                f"{folder}: {who} says that texts end with {wanted!r}, and its tokenizer.json puts "
                f"{by_file.last!r} there; {way}"
            )
        return wanted or None
    flag = _flag("eos", config)
    if by_file.last is not None:
        if flag.heeded and flag.value is False:
            raise ModelError(
                f"{folder}: its tokenizer.json ends texts with {by_file.last}, and its tokenizer_config.json "
                f"says {flag.name}: false; set model.last_token to {by_file.last} if it was trained with that"
            )
        return by_file.last
    if flag.value and flag.heeded and flag.token is not None:
        return flag.token
    why = f", though tokenizer_config.json says {flag.name}: true" if flag.value else ""
    raise ModelError(
        f"{folder}: last-token pooling would read a word: its tokenizer.json puts nothing behind a "
        f"text{why}. Set model.last_token to the token that the model was trained with (such as "
        f"{flag.token or '</s>'}), or to '' if it was trained to pool a word"
    )


def _settle_first(folder: Path, by_file: Ends, config: dict[str, Any]) -> str | None:
    flag = _flag("bos", config)
    if not flag.heeded or flag.value is None or flag.value == (by_file.first is not None):
        return by_file.first
    if flag.value:
        return flag.token
    raise ModelError(
        f"{folder}: its tokenizer.json begins texts with {by_file.first}, and its tokenizer_config.json says "
        f"{flag.name}: false; make the two agree"
    )


def _flag(kind: str, config: dict[str, Any]) -> _Flag:
    token = config.get(f"{kind}_token")
    if isinstance(token, dict):  # an AddedToken as it is written down
        token = token.get("content")
    name = f"add_{kind}_token"
    value = config.get(name)
    heeded = str(config.get("tokenizer_class", "")).removesuffix("Fast") in HEEDING
    return _Flag(name, value if isinstance(value, bool) else None, token, heeded)


def _by_file(tokenizer: Tokenizer) -> Ends:
    """Return what the post-processor puts around a text."""
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    whole = tokenizer.encode(PROBE)
    own = [
        token for token, special in zip(whole.tokens, whole.special_tokens_mask, strict=True) if not special
    ]
    if own != plain.tokens or not plain.tokens:
        raise ModelError(
            f"its tokenizer.json makes {whole.tokens} of {PROBE!r}, in which the text is not found"
        )
    mask = whole.special_tokens_mask
    return Ends(whole.tokens[0] if mask[0] else None, whole.tokens[-1] if mask[-1] else None)


def _raw(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: has no tokenizer.json, which says what its texts end with")
    return read_tokenizer(path)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}
