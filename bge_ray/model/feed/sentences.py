"""Where sentences end in texts of any length and script, in time that grows with the length alone.

The library looks back from every full stop for the beginning of the word before it, which in a script without
spaces is the beginning of the text: 400,000 characters of Chinese in one line took it 30 s, and twice as many
four times that. It is handed windows of the text instead, so that it looks back no further than one of them.
"""

from collections.abc import Iterator

# Characters that the library sees at once.
WINDOW = 8_192
# What it says of a window's last characters is not believed: it has not seen where their quotations close.
AHEAD = 2_048
# A window begins this much before what is still to be found, at the end of a sentence if there is one:
# whether a full stop belongs to an abbreviation depends on all of the word before it.
BEHIND = 64


def sentence_ends(language: str, text: str) -> Iterator[int]:
    """Yield where sentences and paragraphs of a text end, in rising order, and last its length.

    These are the borders that the library finds in the whole text, except round what it must see all of:
    a quotation or parenthesis, in which no sentence ends, of more than AHEAD characters; a sentence of more
    than WINDOW - AHEAD; a list in one paragraph, of which a window holds only one sign. Where several line
    ends stand in a row, the border may be at another of them.
    """
    import sentencex  # only who cuts texts needs it

    start = done = 0
    while start + WINDOW < len(text):
        piece = text[start : start + WINDOW]
        believed = start + WINDOW - AHEAD
        found = [
            end
            for sentence in sentencex.get_sentence_boundaries(language, piece)
            if done < (end := start + sentence["end_index"]) <= believed
        ]
        yield from found
        done = believed
        if found:
            start = next((end for end in reversed(found) if end <= found[-1] - BEHIND), found[-1])
        else:
            start = believed - AHEAD
    for sentence in sentencex.get_sentence_boundaries(language, text[start:]):
        if (end := start + sentence["end_index"]) > done:
            yield end
