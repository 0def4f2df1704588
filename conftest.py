"""Numerics and Hypothesis profiles shared by `tests` and `proofs_checks`."""

import itertools
import os
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Annotations are checked where users' mistakes do not reach: those are for `ValueError`s to name.
_CHECKED = (
    "_curvature.base",
    "_curvature.newton_step",
    "_effect",
    "_gradients",
    "_jacobian",
    "_response",
    "_scale",
    "_solver",
)
install_import_hook([f"influx.{module}" for module in _CHECKED], "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Small problems: compiling them well costs more than running them badly, and emitters of fusions are
# slow to compile. XLA stops at a flag that it does not know, hence the version. It reads flags once,
# at `jax.devices()`: processes that tests start, such as notebooks' kernels, run without this one.
jax.config.update("jax_disable_most_optimizations", True)
if version("jaxlib").startswith("0.10."):
    with pytest.MonkeyPatch.context() as patch:
        flags = os.environ.get("XLA_FLAGS", "")
        patch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_use_fusion_emitters=false")
        jax.devices()

_quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("dev", max_examples=10, **_quiet)
settings.register_profile("ci", max_examples=10, derandomize=True, print_blob=True, **_quiet)
settings.register_profile("deep", max_examples=300, **_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Every compiled program maps memory. Linux allows a process 65,530 maps, and XLA crashes beyond.
_MAPS, _MOST = Path("/proc/self/maps"), 30_000
_test = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
    yield
    if next(_test) % 8 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST:
        jax.clear_caches()
