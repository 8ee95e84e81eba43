"""Writes the vocabularies of the tests' WordPiece and Unigram tokenizers.

Their trainers break ties differently in each process, and a random model over another vocabulary is another
model.

``PYTHONPATH=. python tests/goldens/vocabularies.py``
"""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.support.models import SENTENCES, UNIGRAM_SPECIALS, VOCABULARIES, WORDPIECE_SPECIALS


def wordpiece() -> list[str]:
    """Train and return the pieces in the order of their ids."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(WORDPIECE_SPECIALS))
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def unigram() -> list[tuple[str, float]]:
    """Train and return the pieces with their logarithmic probabilities in the order of their ids."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(UNIGRAM_SPECIALS), unk_token="<unk>"
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return json.loads(tokenizer.to_str())["model"]["vocab"]


if __name__ == "__main__":
    kept = {"wordpiece": wordpiece(), "unigram": unigram()}
    VOCABULARIES.write_text(json.dumps(kept, ensure_ascii=False, indent=0) + "\n")
