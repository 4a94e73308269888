"""Aligned sentences, one a line in each of two files, tokens separated by spaces.

Subword tokens are made beforehand with whatever tool made them for the published result.
"""

import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PAD, START, END, UNKNOWN = range(4)


def read_lines(path) -> list[list[str]]:
    return [line.split() for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def build_vocabulary(sentences: Iterable[Sequence[str]], size: int) -> tuple[str, ...]:
    """The special tokens and the most frequent others, `size` at most, ties in alphabetical order."""
    counts = Counter(token for sentence in sentences for token in sentence)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return (*SPECIAL, *ranked[: size - len(SPECIAL)])


class ParallelText:
    """`source[i]`: "source", "begun", "target", int32 (length,): the sentence, its translation after a start
    token, and the same before an end token. Pairs with a longer or an empty side are left out.

    Args:
      source, target: files of as many lines.
      vocabulary: of both languages; None: built from the files, 37,000 tokens at most.
      length: tokens at most, start or end included.

    Raises:
      ValueError: the files do not have as many lines, or no pair is left.
    """

    def __init__(self, source, target, vocabulary: Sequence[str] | None = None, length: int = 64):
        lines, translations = read_lines(source), read_lines(target)
        if len(lines) != len(translations):
            raise ValueError(f"{source} has {len(lines)} lines, {target} has {len(translations)}")
        self.vocabulary = tuple(vocabulary or build_vocabulary([*lines, *translations], 37_000))
        self.numbers = {token: i for i, token in enumerate(self.vocabulary)}
        self.length = length
        self.pairs = [
            pair for pair in zip(lines, translations, strict=True) if all(0 < len(s) < length for s in pair)
        ]
        if not self.pairs:
            raise ValueError(f"{source} and {target} have no pair of 1 to {length - 1} tokens")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        sentence, translation = (self._encode(s) for s in self.pairs[i])
        return {
            "source": self._padded([*sentence, END]),
            "begun": self._padded([START, *translation]),
            "target": self._padded([*translation, END]),
        }

    def decode(self, tokens: np.ndarray) -> str:
        """Up to the end token, joined by spaces."""
        ends = np.flatnonzero(tokens == END)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        return " ".join(self.vocabulary[t] for t in tokens if t not in (PAD, START))

    def _encode(self, sentence: Sequence[str]) -> list[int]:
        return [self.numbers.get(token, UNKNOWN) for token in sentence]

    def _padded(self, tokens: list[int]) -> np.ndarray:
        return np.array(tokens + [PAD] * (self.length - len(tokens)), np.int32)
