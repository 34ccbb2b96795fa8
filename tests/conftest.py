"""What every test runs under: eight CPU devices, and a strict jax.

No persistent compilation cache: a clean checkout has none to read, and on CPU
an entry is machine code for the processor that wrote it, so a cache that moves
with a folder is a crash far from its cause.
"""

import importlib.metadata
import os

# Read once, when jax is first imported; subprocesses of a test inherit both.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  # Tests compile much and compute little.
  ' --xla_backend_optimization_level=0'
  # On a busy machine a device may be late; that is no deadlock yet.
  ' --xla_cpu_collective_call_terminate_timeout_seconds=300'
).strip()
if importlib.metadata.version('jax').startswith('0.10.'):
  # The older way from loops to LLVM compiles a step in a third of the time. An
  # XLA that has this flag no more would end the process.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

import hypothesis  # noqa: E402
import jax  # noqa: E402

# A product of [B, T, D] and [D] that was meant says so: `scale_D[None, None]`.
# Promotion of types stays 'standard': optax itself multiplies int32 by float.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# The first example compiles, so a deadline would measure the compiler.
hypothesis.settings.register_profile('dev', deadline=None)
hypothesis.settings.register_profile('ci', deadline=None, derandomize=True)
hypothesis.settings.load_profile('ci' if os.environ.get('CI') else 'dev')
