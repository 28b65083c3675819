"""Settings of every test: strict promotion, two CPU devices, fresh random numbers with a printed seed."""

import secrets

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def rng(request):
    """A generator with a fresh seed, which a failing test prints."""
    seed = secrets.randbits(32)
    print(f"rng seed of {request.node.name}: {seed}")
    return np.random.default_rng(seed)
