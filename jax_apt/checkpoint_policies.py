"""Policies for `jax.checkpoint` and `flax.linen.remat`, to stand beside `jax.checkpoint_policies`.

`save_codes` keeps the integer codes of every product, one byte an element at 8 bits, and what was measured.
The backward pass computes the floats between products again from them: no tensor is quantized or measured
twice. It combines with others through `jax.checkpoint_policies.save_from_both_policies`.
"""

import jax

from jax_apt.ops import CODES_NAME

save_codes = jax.checkpoint_policies.save_only_these_names(CODES_NAME)
