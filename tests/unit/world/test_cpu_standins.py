"""The CPU stand-ins: they change nothing where CUDA is present, and refuse a megatron-core nobody checked."""

from __future__ import annotations

import subprocess
import sys

SNAPSHOT = """
import importlib.metadata, sys
import torch

torch.cuda.is_available = lambda: {cuda}

def snapshot():
    found = dict()
    for name, module in list(sys.modules.items()):
        if name == "torch.cuda" or name.startswith("megatron."):
            # The import system itself adds submodules as attributes: those are not changes.
            found[name] = {{k: id(v) for k, v in vars(module).items() if type(v) is not type(sys)}}
            found[name] |= {{k: id(v) for k, v in vars(module).items() if k == "torch"}}
    return found
"""

PRESENT = (
    SNAPSHOT.format(cuda=True)
    + """
import types
# Without triton megatron's own import would fail, as it would on any GPU machine that lacks it.
name = "megatron.core.transformer.moe.ops.paged_stash"
sys.modules[name] = types.ModuleType(name)
for constant in ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel"):
    setattr(sys.modules[name], constant, None)
from parallel.world import cpu_standins
from parallel.world.late_compile import late
with late():
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.tensor_parallel.random

before = snapshot()
assert len(before) > 20 and "torch.cuda" in before
assert cpu_standins.install() is False
assert cpu_standins.install() is False
assert snapshot() == before
import parallel.world.groups
after = snapshot()
assert all(after[module] == found for module, found in before.items())
assert megatron.core.pipeline_parallel.schedules.torch is torch
print("untouched")
"""
)

ABSENT = (
    SNAPSHOT.format(cuda=False)
    + """
from parallel.world import cpu_standins
from parallel.world.late_compile import late

before = snapshot()
with late():
    assert cpu_standins.install() is True
after = snapshot()
changed = {k for k in before["torch.cuda"] if after["torch.cuda"][k] != before["torch.cuda"][k]}
assert changed == set(cpu_standins._cpu_stand_ins()), changed
import megatron.core.pipeline_parallel.schedules as schedules
assert schedules.torch is not torch
assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
again = snapshot()
assert cpu_standins.install() is True
assert snapshot() == again
print("installed once")
"""
)

UNKNOWN = (
    SNAPSHOT.format(cuda=False)
    + """
importlib.metadata.version = lambda name: "0.99.0"
from parallel.world import cpu_standins
from parallel.errors import LongspanError

before = snapshot()
try:
    cpu_standins.install()
except LongspanError as error:
    assert snapshot() == before
    print(error)
"""
)


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_changes_where_cuda_is_present() -> None:
    assert run(PRESENT) == "untouched"


def test_only_the_listed_attributes_change_on_a_cpu_and_only_once() -> None:
    assert run(ABSENT) == "installed once"


def test_an_unchecked_megatron_is_refused_untouched() -> None:
    said = run(UNKNOWN)
    assert said.startswith("megatron-core 0.99.0 was never checked on CPU; install megatron-core==")
    assert "\n" not in said
