"""Settings and fixtures every test shares."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Small programs run once: compiling them is most of the time. Set before jax
# is imported; processes that tests start inherit it.
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
)

# Threads of an interpreted kernel that wait hold threads of XLA's pool, which
# has as many as there are processors: too few on a small machine.
os.environ.setdefault("NPROC", "8")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny_llama  # noqa: E402
from command_line import digests  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 4)  # for the sharding tests

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu` unless the first device is a Hopper GPU."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if not marked:
    return
  device = jax.devices()[0]
  if getattr(device, "compute_capability", None) == "9.0":
    return
  reason = f"needs a Hopper GPU, jax has {device.device_kind}"
  for item in marked:
    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
  """Frees compiled programs: thousands exhaust a process's memory maps."""
  yield
  jax.clear_caches()


@pytest.fixture
def shared() -> Path:
  """The folder of trained models and texts beside the project's."""
  if not SHARED.is_dir():
    pytest.skip(f"needs the models and texts of {SHARED}, which is absent")
  return SHARED


@pytest.fixture
def make_hf_checkpoint(tmp_path: Path) -> Callable[..., Path]:
  """Returns a function that writes a random Llama folder of under 1 MB.

  Its arguments are `name` of the folder, `seed`, `dtype` of the weights,
  `shards`, `tokenizer` (a byte-level one), and those of
  `tiny_llama.hf_config`: `style` 4 or 5, `rope`, and any key of config.json.
  """

  def make(
    name: str = "hf",
    *,
    seed: int = 0,
    dtype: Any = "bfloat16",
    shards: int = 1,
    tokenizer: bool = False,
    **config: Any,
  ) -> Path:
    config = tiny_llama.hf_config(**config)
    tensors = {
      key: values.astype(np.dtype(dtype))
      for key, values in tiny_llama.hf_tensors(config, seed).items()
    }
    path = tiny_llama.write_checkpoint(
      tmp_path / name, config, tensors, shards=shards
    )
    if tokenizer:
      tiny_llama.write_tokenizer(path)
    return path

  return make


@pytest.fixture
def source(make_hf_checkpoint: Callable[..., Path]) -> Iterator[Path]:
  """A float model with a byte-level tokenizer; must never change."""
  folder = make_hf_checkpoint("source", tokenizer=True)
  before = digests(folder)
  yield folder
  assert digests(folder) == before


@pytest.fixture
def calib(tmp_path: Path) -> Path:
  """Token ids to calibrate on."""
  path = tmp_path / "tokens.npy"
  np.save(path, np.random.default_rng(0).integers(0, 256, 200))
  return path
