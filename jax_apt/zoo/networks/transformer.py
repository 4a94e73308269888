"""Transformer (base): attention alone, one embedding for source, target and output.

Source: Vaswani et al., arXiv 1706.03762. Token 0 is padding.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array


class Transformer(nn.Module):
    """(source (batch, S), target so far (batch, T)) int32 to scores of the next token (batch, T, outputs)."""

    outputs: int = 37_000  # joint vocabulary
    layers: int = 6
    size: int = 512
    hidden: int = 2048
    heads: int = 8
    dropout: float = 0.1

    @nn.compact
    def __call__(self, inputs: tuple[Array, Array], train: bool = False) -> Array:
        source, target = inputs
        embed = nn.Embed(
            self.outputs, self.size, embedding_init=nn.initializers.normal(self.size**-0.5), name="embedding"
        )
        source_mask = nn.make_attention_mask(source > 0, source > 0)
        cross_mask = nn.make_attention_mask(target >= 0, source > 0)
        target_mask = nn.make_causal_mask(target)
        x, y = self._embed(embed, source, train), self._embed(embed, target, train)
        for i in range(self.layers):
            x = self._attention(x, x, source_mask, train, f"encoder{i + 1}_self")
            x = self._feed_forward(x, train, f"encoder{i + 1}")
        for i in range(self.layers):
            y = self._attention(y, y, target_mask, train, f"decoder{i + 1}_self")
            y = self._attention(y, x, cross_mask, train, f"decoder{i + 1}_cross")
            y = self._feed_forward(y, train, f"decoder{i + 1}")
        return embed.attend(y)

    def _embed(self, embed: nn.Embed, tokens: Array, train: bool) -> Array:
        return self._drop(self.size**0.5 * embed(tokens) + positions(tokens.shape[1], self.size), train)

    def _attention(self, x: Array, memory: Array, mask: Array, train: bool, name: str) -> Array:
        attend = nn.MultiHeadDotProductAttention(self.heads, deterministic=True, name=name)
        return nn.LayerNorm(name=f"{name}_norm")(x + self._drop(attend(x, memory, mask=mask), train))

    def _feed_forward(self, x: Array, train: bool, name: str) -> Array:
        y = nn.Dense(self.size, name=f"{name}_out")(nn.relu(nn.Dense(self.hidden, name=f"{name}_in")(x)))
        return nn.LayerNorm(name=f"{name}_norm")(x + self._drop(y, train))

    def _drop(self, x: Array, train: bool) -> Array:
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def positions(length: int, size: int) -> Array:
    """Sines and cosines of geometric wavelengths: float32 (1, length, size)."""
    rates = 10_000.0 ** (-np.arange(0, size, 2) / size)
    angles = np.arange(length)[:, None] * rates
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, size)
    return jnp.asarray(table[None], jnp.float32)


def small(outputs: int) -> Transformer:
    """Two layers of size 96."""
    return Transformer(outputs, layers=2, size=96, hidden=256, heads=4)
