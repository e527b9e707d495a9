"""What Triton compiles every kernel to, for GPUs that are not here: no spills, wide loads, no more memory than there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which there is for Linux only, cannot be imported")
ROOT = Path(__file__).parents[2]

# KB of shared memory that a program may have, by compute capability: CUDA C++ Programming Guide, "Technical Specifications".
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Bytes of g, w, u and so on, and numbers of the state, that a pass reads for each weight; elements of each thread.
READ = {"accumulate_kernel": (8, 4, 16), "factor_kernel": (4, 3, 16), "emit_kernel": (8, 4, 8), "apply_kernel": (6, 0, 16)}
PRODUCTS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}


def compiled(which: str, cache: Path) -> list[dict]:
    """What tests/celo2/compiled_kernels.py prints."""
    paths = os.pathsep.join(map(os.fspath, (ROOT, Path(__file__).parent)))
    program = Path(__file__).with_name("compiled_kernels.py")
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": os.fspath(cache)}
    done = subprocess.run(
        [sys.executable, program, which], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(kernel: dict) -> None:
    loads, capability = kernel["loads"], kernel["capability"]
    assert kernel["spilled"] == 0, kernel
    assert kernel["shared"] <= SHARED[capability] * 1024, kernel
    assert not {"8", "16"} & loads.keys(), kernel  # a byte or two at a time
    if kernel["kernel"] == "symmetric_kernel":
        assert kernel["products"][PRODUCTS[capability]], kernel
        assert loads.keys() <= {"128", "tensor"} and loads, kernel
        assert ("tensor" in loads) == (capability in (90, 100)), kernel
    else:
        size, numbers, elements = READ[kernel["kernel"]]
        assert loads["128"] >= elements * (size + numbers * kernel["state"]) // 16, kernel


def test_kernels_that_compiled_badly(tmp_path):
    """The symmetric product before Hopper and on Blackwell, and the first pass on one matrix that is stored transposed."""
    kernels = compiled("fast", tmp_path)
    assert len(kernels) == 2 + 1
    for kernel in kernels:
        check(kernel)


@pytest.mark.slow
def test_every_kernel_for_every_gpu(tmp_path):
    kernels = compiled("all", tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == {*READ, "symmetric_kernel"}
    assert {(kernel["kernel"], kernel["capability"]) for kernel in kernels} == {
        *(("symmetric_kernel", capability) for capability in SHARED),
        *((name, capability) for name in READ for capability in (80, 90, 100)),
    }
    for kernel in kernels:
        check(kernel)
