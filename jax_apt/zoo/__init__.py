"""Networks and tasks to try Adaptive Precision Training on, and the comparison with float32.

Needs the extra `jax-apt[cli]`; nothing in the core imports it.
"""
