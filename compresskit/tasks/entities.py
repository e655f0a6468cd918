"""Named entities in tags, and their F1.

Source: Tjong Kim Sang and Buchholz, CoNLL-2000, and the rules of its evaluation program conlleval: an entity is
right if its type and both its ends are. The schemes IOB1, IOB2, IOE and IOBES are read alike.
"""

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]
"""Type, first word, last word + 1."""


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities in the tags of one sentence; tags without a prefix are types of their own."""
    found: set[Entity] = set()
    start = 0
    before, kind_before = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = _parts(tag)
        if before != "O" and _ends(before, prefix, kind_before, kind):
            found.add((kind_before, start, i))
        if prefix != "O" and _starts(before, prefix, kind_before, kind):
            start = i
        before, kind_before = prefix, kind
    return found


def _parts(tag: str) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in "BIESUL" else ("I", tag)


def _ends(before: str, prefix: str, kind_before: str, kind: str) -> bool:
    """Whether an entity ends before this tag."""
    return before in "ESUL" or prefix in "BSUO" or kind_before != kind


def _starts(before: str, prefix: str, kind_before: str, kind: str) -> bool:
    """Whether an entity starts with this tag."""
    return prefix in "BSU" or before in "ESULO" or kind_before != kind


def entity_scores(predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]]) -> tuple[float, float, float]:
    """Precision, recall and F1 over all entities of all sentences; 0 where there is nothing to divide by."""
    right = found = wanted = 0
    for tags, true_tags in zip(predicted, expected, strict=True):
        mine, theirs = entities(tags), entities(true_tags)
        right, found, wanted = right + len(mine & theirs), found + len(mine), wanted + len(theirs)
    precision, recall = (right / n if n else 0.0 for n in (found, wanted))
    return precision, recall, 2 * right / (found + wanted) if found + wanted else 0.0
