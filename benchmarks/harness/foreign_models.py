"""Models of installed libraries, unmodified, as apply functions of parameters and data.

Sizes are small: what is shown is that a model's every product is found and its gradients are right. Inputs
come from fixed keys. Libraries are imported where they are used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Model(NamedTuple):
    """What `apt_quantize` gets, and what it is called with."""

    fn: Callable  # fn(parameters, *args): a pytree of arrays
    parameters: Any  # float leaves
    args: tuple = ()


class Case(NamedTuple):
    """A model by name, with the package on PyPI that it comes from."""

    name: str
    package: str
    build: Callable[[], Model]


CASES: list[Case] = []


def _case(package: str, name: str):
    def add(build: Callable[[], Model]) -> Callable[[], Model]:
        CASES.append(Case(name, package, build))
        return build

    return add


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _tokens(batch: int, length: int, vocabulary: int) -> jax.Array:
    return jax.random.randint(jax.random.key(9), (batch, length), 0, vocabulary)


# Flax Linen


def _linen(module, *args, rngs=(), train=(), **options) -> Model:
    """A Linen module; collections beside the parameters are passed in and, where mutable, dropped again."""
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", *rngs))}
    variables = dict(jax.jit(lambda: module.init(keys, *args, **options))())
    parameters = variables.pop("params")
    options |= {"rngs": {name: keys[name] for name in rngs}} if rngs else {}

    def fn(parameters, others, *args):
        out = module.apply({"params": parameters, **others}, *args, mutable=list(train), **options)
        return out[0]

    return Model(fn, parameters, (variables, *args))


@_case("flax", "linen.MultiHeadDotProductAttention, causal, dropout")
def linen_attention() -> Model:
    from flax import linen as nn

    x = _normal(1, 2, 8, 16)
    attention = nn.MultiHeadDotProductAttention(num_heads=4, dropout_rate=0.1)
    mask = nn.make_causal_mask(x[..., 0])
    return _linen(attention, x, rngs=["dropout"], mask=mask, deterministic=False)


@_case("flax", "linen.Bidirectional RNN of LSTMCell")
def linen_lstm() -> Model:
    from flax import linen as nn

    rnns = [nn.RNN(nn.OptimizedLSTMCell(12)) for _ in range(2)]
    return _linen(nn.Bidirectional(*rnns), _normal(1, 3, 6, 8))


@_case("flax", "linen.RNN of GRUCell")
def linen_gru() -> Model:
    from flax import linen as nn

    return _linen(nn.RNN(nn.GRUCell(12)), _normal(1, 3, 6, 8))


@_case("flax", "linen.RNN of ConvLSTMCell")
def linen_conv_lstm() -> Model:
    from flax import linen as nn

    return _linen(nn.RNN(nn.ConvLSTMCell(6, (3, 3))), _normal(1, 2, 4, 6, 6, 3))


@_case("flax", "linen.SpectralNorm of Dense")
def linen_spectral_norm() -> Model:
    from flax import linen as nn

    module = nn.SpectralNorm(nn.Dense(12))
    return _linen(module, _normal(1, 5, 8), update_stats=True, train=["batch_stats"])


# Flax NNX


def _nnx(module, *args, **options) -> Model:
    from flax import nnx

    graph, parameters, others = nnx.split(module, nnx.Param, ...)

    def fn(parameters, others, *args):
        return nnx.merge(graph, parameters, others, copy=True)(*args, **options)

    return Model(fn, parameters, (others, *args))


@_case("flax", "nnx.MultiHeadAttention, dropout")
def nnx_attention() -> Model:
    from flax import nnx

    attention = nnx.MultiHeadAttention(4, 16, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(0))
    return _nnx(attention, _normal(1, 2, 8, 16), deterministic=False)


@_case("flax", "nnx.RNN of LSTMCell")
def nnx_lstm() -> Model:
    from flax import nnx

    rngs = nnx.Rngs(0)
    return _nnx(nnx.RNN(nnx.LSTMCell(8, 12, rngs=rngs), rngs=rngs), _normal(1, 3, 6, 8))


@_case("flax", "nnx.RNN of GRUCell")
def nnx_gru() -> Model:
    from flax import nnx

    rngs = nnx.Rngs(0)
    return _nnx(nnx.RNN(nnx.GRUCell(8, 12, rngs=rngs), rngs=rngs), _normal(1, 3, 6, 8))


# Haiku


def _haiku(function: Callable, *args) -> Model:
    import haiku as hk

    transformed, key = hk.transform_with_state(function), jax.random.key(0)
    parameters, state = jax.jit(transformed.init)(key, *args)

    def fn(parameters, state, key, *args):
        return transformed.apply(parameters, state, key, *args)[0]

    return Model(fn, parameters, (state, key, *args))


@_case("dm-haiku", "nets.ResNet18, training")
def haiku_resnet18() -> Model:
    import haiku as hk

    def network(x):
        return hk.nets.ResNet18(10, resnet_v2=True)(x, is_training=True)

    return _haiku(network, _normal(1, 8, 32, 32, 3))


@_case("dm-haiku", "nets.MobileNetV1, training")
def haiku_mobilenet() -> Model:
    import haiku as hk

    def network(x):
        strides, channels = (1, 2, 1, 2), (16, 24, 24, 32)
        return hk.nets.MobileNetV1(strides, channels, num_classes=10)(x, is_training=True)

    return _haiku(network, _normal(1, 4, 16, 16, 3))


@_case("dm-haiku", "nets.MLP, dropout")
def haiku_mlp() -> Model:
    import haiku as hk

    def network(x):
        return hk.nets.MLP([32, 32, 10])(x, dropout_rate=0.1, rng=hk.next_rng_key())

    return _haiku(network, _normal(1, 16, 20))


@_case("dm-haiku", "nets.VectorQuantizer between two Linear")
def haiku_vector_quantizer() -> Model:
    import haiku as hk

    def network(x):
        quantized = hk.nets.VectorQuantizer(embedding_dim=8, num_embeddings=16, commitment_cost=0.25)(
            hk.Linear(8)(x), is_training=True
        )
        return hk.Linear(5)(quantized["quantize"]), quantized["loss"]

    return _haiku(network, _normal(1, 32, 12))


@_case("dm-haiku", "MultiHeadAttention and LSTM over time")
def haiku_attention_and_lstm() -> Model:
    import haiku as hk

    def network(x):
        x = hk.MultiHeadAttention(4, 4, w_init=hk.initializers.VarianceScaling(1.0))(x, x, x)
        core = hk.LSTM(12)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0]

    return _haiku(network, _normal(1, 3, 6, 16))


# Equinox


def _equinox(module, call: Callable, *args) -> Model:
    import equinox as eqx

    parameters, static = eqx.partition(module, eqx.is_inexact_array)
    return Model(lambda parameters, *args: call(eqx.combine(parameters, static), *args), parameters, args)


@_case("equinox", "nn.MLP under vmap")
def equinox_mlp() -> Model:
    import equinox as eqx

    module = eqx.nn.MLP(8, 5, width_size=16, depth=2, key=jax.random.key(0))
    return _equinox(module, lambda module, x: jax.vmap(module)(x), _normal(1, 16, 8))


@_case("equinox", "nn.GRUCell in a scan")
def equinox_gru() -> Model:
    import equinox as eqx

    def unroll(cell, xs):
        def one(xs):
            step = jnp.zeros(cell.hidden_size)
            return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, step, xs)[1]

        return jax.vmap(one)(xs)

    return _equinox(eqx.nn.GRUCell(8, 12, key=jax.random.key(0)), unroll, _normal(1, 3, 6, 8))


@_case("equinox", "nn.MultiheadAttention, rotary, dropout")
def equinox_attention() -> Model:
    import equinox as eqx

    rotary = eqx.nn.RotaryPositionalEmbedding(4)

    def heads(query, key, value):
        return jax.vmap(rotary, 1, 1)(query), jax.vmap(rotary, 1, 1)(key), value

    def attend(module, x, key):
        def one(x, key):
            return module(x, x, x, key=key, process_heads=heads)

        return jax.vmap(one)(x, jax.random.split(key, len(x)))

    module = eqx.nn.MultiheadAttention(4, 16, dropout_p=0.1, key=jax.random.key(0))
    return _equinox(module, attend, _normal(1, 2, 8, 16), jax.random.key(3))


@_case("equinox", "nn.Conv2d, ConvTranspose2d, MaxPool2d, GroupNorm in a Sequential")
def equinox_convolutions() -> Model:
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 8),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 8, 3, groups=4, key=keys[1]),
            eqx.nn.ConvTranspose2d(8, 4, 2, stride=2, key=keys[2]),
        ]
    )
    return _equinox(module, lambda module, x: jax.vmap(module)(x), _normal(1, 4, 3, 12, 12))


# Other packages


@_case("transformers", "FlaxBertForSequenceClassification, dropout")
def transformers_bert() -> Model:
    from transformers import BertConfig
    from transformers.models.bert.modeling_flax_bert import FlaxBertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    return _transformers(FlaxBertForSequenceClassification(config, input_shape=(1, 8)))


@_case("transformers", "FlaxGPT2LMHeadModel, tied embedding, dropout")
def transformers_gpt2() -> Model:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return _transformers(FlaxGPT2LMHeadModel(config, input_shape=(1, 8)))


def _transformers(model) -> Model:
    def fn(parameters, ids, key):
        return model(ids, params=parameters, dropout_rng=key, train=True).logits

    return Model(fn, model.params, (_tokens(2, 8, 50), jax.random.key(3)))


@_case("mlp-gpt-jax", "TransformedMLPGpt (gMLP with attention)")
def gmlp() -> Model:
    from mlp_gpt_jax import TransformedMLPGpt

    model = TransformedMLPGpt(num_tokens=50, dim=32, seq_len=8, depth=2, attn_dim=16)
    ids, key = _tokens(2, 8, 50), jax.random.key(0)
    parameters = model.init(key, ids[0])
    return Model(jax.vmap(model.apply, (None, None, 0)), parameters, (key, ids))


@_case("penzai", "Llama, grouped queries")
def penzai_llama() -> Model:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=8,
        mlp_hidden_dim=32,
        num_decoder_blocks=2,
        vocab_size=50,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    model = llamalike.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    slots, values = pz.unbind_params(model, freeze=True)

    def fn(parameters, ids):
        bound = [pz.ParameterValue(value=x, label=label, metadata={}) for label, x in parameters.items()]
        logits = pz.bind_variables(slots, bound, unfreeze_as_copy=True)(pz.nx.wrap(ids).tag("batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return Model(fn, {x.label: x.value for x in values}, (_tokens(2, 8, 50),))


@_case("attnax", "TransformerDecoder, rotary, grouped queries, memory-efficient attention")
def attnax_decoder() -> Model:
    import attnax
    from flax import nnx

    config = attnax.TransformerConfig(
        vocab_size=50,
        d_model=32,
        num_heads=4,
        num_layers=2,
        d_ff=64,
        max_len=16,
        num_kv_heads=2,
        pos_emb_type="rope",
        ff_activation="swiglu",
        attention_type=attnax.AttentionType.MEMORY_EFFICIENT,
        attention_block_size=4,
    )
    return _nnx(attnax.TransformerDecoder(nnx.Rngs(0), config), _tokens(2, 8, 50))


@_case("mamba2-jax", "Mamba2ForCausalLM")
def mamba2() -> Model:
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=8, head_dim=8, chunk_size=4, num_hidden_layers=2
    )
    model = _nnx(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), _tokens(2, 8, 50))
    return model._replace(fn=lambda *args: model.fn(*args)["logits"])


@_case("jax-resnet", "ResNeXt-like ResNet, training")
def jax_resnet() -> Model:
    from functools import partial

    import jax_resnet as library

    block = partial(library.resnet.ResNetBottleneckBlock, groups=4, base_width=16)
    model = library.ResNet50(n_classes=10, stage_sizes=[1, 1], hidden_sizes=(16, 32), block_cls=block)
    return _linen(model, _normal(1, 2, 32, 32, 3), train=["batch_stats"])


@_case("flash-attention-jax", "causal_flash_attention (custom_vjp) between two products")
def flash_attention() -> Model:
    from flash_attention_jax import causal_flash_attention

    def fn(parameters, x):
        q, k, v = jnp.einsum("bnd,tdhe->tbhne", x, parameters["qkv"])
        return jnp.einsum("bhne,hed->bnd", causal_flash_attention(q, k, v), parameters["out"])

    parameters = {"qkv": _normal(0, 3, 16, 2, 8) / 4, "out": _normal(2, 2, 8, 16) / 4}
    return Model(fn, parameters, (_normal(1, 2, 8, 16),))


@_case("equimo", "VisionTransformer")
def equimo_vit() -> Model:
    from equimo.models import VisionTransformer

    module = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=4,
        depths=[2],
        num_classes=10,
        key=jax.random.key(0),
    )
    return _equinox(module, lambda module, x: jax.vmap(module)(x), _normal(1, 2, 3, 16, 16))


@_case("inox", "nn.MultiheadAttention between two Linear")
def inox_attention() -> Model:
    from inox import nn

    keys = jax.random.split(jax.random.key(0), 3)
    module = nn.Sequential(
        nn.Linear(16, 16, key=keys[0]),
        nn.MultiheadAttention(16, heads=4, causal=True, key=keys[1]),
        nn.Linear(16, 8, key=keys[2]),
    )
    static, parameters, others = module.partition(nn.Parameter)
    return Model(lambda p, others, x: static(p, others)(x), parameters, (others, _normal(1, 2, 8, 16)))
