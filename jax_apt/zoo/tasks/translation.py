"""Number words from English to German, for numbers that were held out.

German puts the ones before the tens ("zweiundvierzig": two-and-forty) and writes a number below a million
as one word. The target tokens are that word's parts. Source of the words: num2words.

Of the English words some are lost, other ones in each epoch, so that no network can know all of the German:
without that a network that has learnt to translate makes hardly a mistake.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_apt.zoo.metrics import bleu
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task

TRAIN, TEST = 1024, 400  # numbers; with 512 to learn from an LSTM's score depends on the seed
REPEATS = 4  # of each in an epoch
LOST_SHARE = 0.05  # of the source's words
DIGITS = 9  # numbers are below 10**9, equally many with each count of digits from 4 on
LENGTH = 19  # tokens at most, start and end included
PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")


# Words


def english(number: int) -> list[str]:
    """["forty", "two"] for 42."""
    from num2words import num2words

    return re.findall(r"[a-z]+", num2words(number, lang="en"))


def german(number: int) -> list[str]:
    """["zwei", "und", "vierzig"] for 42: the word's parts, each the longest that fits."""
    from num2words import num2words

    words = num2words(number, lang="de")
    parts = _german_part().findall(words)
    if "".join(parts) != words.replace(" ", ""):
        raise ValueError(f"{words!r} has parts that are not among the known number words")
    return parts


@functools.cache
def _german_part() -> re.Pattern:
    return re.compile("|".join(sorted(_german_parts(), key=len, reverse=True)))


@functools.cache
def _german_parts() -> tuple[str, ...]:
    from num2words import num2words

    simple = [num2words(n, lang="de") for n in (*range(21), *range(30, 100, 10))]
    return (*simple, "ein", "eine", "und", "hundert", "tausend", "Million", "Millionen")


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """The tokens of both languages; a token's number is its place here."""
    numbers = (*range(21), *range(30, 100, 10), 100, 1000, 10**6, 101)
    words = {word for number in numbers for word in english(number)}
    return (*SPECIAL, *sorted(words), *sorted(_german_parts()))


@functools.cache
def _numbers_of_words() -> dict[str, int]:
    return {word: i for i, word in enumerate(vocabulary())}


def encode(sentences: list[list[str]], start: bool = False) -> np.ndarray:
    """int32 (sentences, LENGTH): tokens, an end, padding; a start before them if wanted."""
    table = np.full((len(sentences), LENGTH), PAD, np.int32)
    for row, words in zip(table, sentences, strict=True):
        tokens = [START] * start + [_numbers_of_words()[word] for word in words] + [END]
        row[: len(tokens)] = tokens
    return table


def decode(tokens: np.ndarray) -> list[str]:
    """Sentences, up to the end token, of int (sentences, length)."""
    return [" ".join(vocabulary()[t] for t in _until_end(row)) for row in tokens]


def _until_end(row: np.ndarray) -> list[int]:
    ends = np.flatnonzero(row == END)
    row = row[: ends[0]] if len(ends) else row
    return [int(t) for t in row if t not in (PAD, START)]


# Data


def load(seed: int) -> Dataset:
    """Distinct numbers for training and test, and what is lost of the latter; the seed draws them."""
    rng = np.random.default_rng([seed, DIGITS])
    numbers = _draw(TRAIN + TEST, rng)
    source = encode([english(n) for n in numbers])
    target = [german(n) for n in numbers]
    begun, ended = encode(target, start=True)[:, :-1], encode(target)[:, :-1]
    begun[begun == END] = PAD  # nothing is to be predicted after the end
    train, test = np.arange(TRAIN).repeat(REPEATS), slice(TRAIN, None)
    heard = lose_words(source[test], rng)
    return Dataset(
        (source[train], begun[train]), ended[train], (heard, begun[test]), ended[test], _lose_words_of_source
    )


def lose_words(source: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tokens like those given, some words among them made unknown."""
    is_lost = (source > UNKNOWN) & (rng.random(source.shape) < LOST_SHARE)
    return np.where(is_lost, np.int32(UNKNOWN), source)


def _lose_words_of_source(inputs, labels, rng):
    source, begun = inputs
    return (lose_words(source, rng), begun), labels


def _draw(count: int, rng: np.random.Generator) -> list[int]:
    digits = np.resize(np.arange(4, DIGITS + 1), 2 * count)
    numbers = np.unique(rng.integers(10 ** (digits - 1), 10**digits))
    return rng.permutation(numbers)[:count].tolist()


# Loss and predictions


def token_cross_entropy(logits: Array, target: Array) -> Array:
    """Mean over the tokens (batch, T) that are not padding."""
    counts = target != PAD
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1)


def translate(apply, inputs: tuple[Array, Array]) -> Array:
    """Greedy translations int32 (batch, T); the target in the inputs gives their length alone.

    The network runs anew at every token: the same program, with the same layers, as in training.
    """
    source, target = inputs
    length = target.shape[1]
    begun = jnp.full_like(target, PAD).at[:, 0].set(START)

    def step(t, carry):
        begun, out = carry
        logits = apply((source, begun))[:, t]
        token = jnp.where(jnp.all(jnp.isfinite(logits), -1), jnp.argmax(logits, -1), END)
        token = token.astype(begun.dtype)
        return begun.at[:, t + 1].set(token, mode="drop"), out.at[:, t].set(token)

    return jax.lax.fori_loop(0, length, step, (begun, jnp.zeros_like(target)))[1]


def score(predicted: np.ndarray, target: np.ndarray) -> float:
    return bleu(decode(predicted), decode(target))


TRANSLATION = Task(
    name="translation",
    kind="translation",
    metric="BLEU",
    networks=("seq2seq-lstm", "seq2seq-gru", "transformer"),
    recipe=Recipe(epochs=24, batch_size=64, learning_rate=3e-3, warmup=0.05),
    load=load,
    outputs=71,  # words of the joint vocabulary
    loss=token_cross_entropy,
    score=score,
    predict=translate,
)
