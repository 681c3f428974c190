"""Every test sees eight emulated CPU devices."""

import os

# Enough threads for all devices to wait in collectives (see launch.process.prepare).
os.environ["PJRT_NPROC"] = "64"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
