"""A recurrent translator: stacked encoder and decoder, global attention.

Source: Luong et al., arXiv 1508.04025 ("general" score), over the stacks of Sutskever et al., arXiv
1409.3215: four layers of 1000 cells. Token 0 is padding; it never receives attention.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

CELLS = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


class Seq2Seq(nn.Module):
    """(source (batch, S), target so far (batch, T)) int32 to scores of the next token (batch, T, outputs)."""

    outputs: int = 50_000  # target vocabulary
    source_vocabulary: int | None = None  # None: as many as outputs
    cell: str = "lstm"
    layers: int = 4
    hidden: int = 1000
    dropout: float = 0.2

    @nn.compact
    def __call__(self, inputs: tuple[Array, Array], train: bool = False) -> Array:
        source, target = inputs
        is_token = source > 0
        vocabulary = self.source_vocabulary or self.outputs
        x = nn.Embed(vocabulary, self.hidden, name="source_embedding")(source)
        y = nn.Embed(self.outputs, self.hidden, name="target_embedding")(target)
        lengths = is_token.sum(axis=1)
        for i in range(self.layers):
            encoder, decoder = (self._recurrent(f"{side}{i + 1}") for side in ("encoder", "decoder"))
            last, x = encoder(self._drop(x, train), seq_lengths=lengths)
            _, y = decoder(self._drop(y, train), initial_carry=last)
        y = self._attend(y, x, is_token)
        return nn.Dense(self.outputs, name="classifier")(self._drop(y, train))

    def _recurrent(self, name: str) -> nn.RNN:
        cell = CELLS[self.cell](self.hidden, name=f"{name}_cell")
        return nn.RNN(cell, return_carry=True, name=name)

    def _drop(self, x: Array, train: bool) -> Array:
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _attend(self, y: Array, x: Array, is_token: Array) -> Array:
        """Decoder states y (batch, T, hidden) joined with the encoder states x that they attend to."""
        keys = nn.Dense(self.hidden, use_bias=False, name="score")(x)
        scores = jnp.einsum("bth,bsh->bts", y, keys)
        weights = nn.softmax(jnp.where(is_token[:, None], scores, -1e9))
        context = jnp.einsum("bts,bsh->bth", weights, x)
        joined = jnp.concatenate([context, y], axis=-1)
        return nn.tanh(nn.Dense(self.hidden, use_bias=False, name="combine")(joined))


def small(outputs: int, cell: str) -> Seq2Seq:
    """Two layers of 96 cells."""
    return Seq2Seq(outputs, cell=cell, layers=2, hidden=96, dropout=0.1)
