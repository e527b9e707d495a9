"""Compile the Triton kernels for GPUs that are not here, and read what the code has. A program: it prints JSON.

    python tests/celo2/compiled_kernels.py fast|all

ptxas, cuobjdump and nvdisasm come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
import triton
from optimizer_kinds import directions_
from test_celo2_kernels import cut_stack, random_rule
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from celo2.kernels import passes, symmetric

TRANSPOSED = ((256, 512), (1, 0), (1, 512, 256))  # one matrix, stored transposed, as of transformers' Conv1D
BF16, FP32 = torch.bfloat16, torch.float32
HALVES = (256 * 512 // 2,)  # where a row shard ends
# What to compile, by compute capability: sides (S, L) of products, with and without addend; (layout, cuts, state) of the passes.
SIDES = [(256, 264), (264, 1032), (2048, 8192), (2056, 4104), (4096, 16384)]
PASSES = [(layout, cuts, state) for layout, cuts in ((None, ()), (TRANSPOSED, ()), (None, HALVES)) for state in (FP32, BF16)]
SETS = {
    "fast": ({80: [(2048, 2048)], 100: [(2048, 2048)]}, {90: [(TRANSPOSED, (), BF16)]}),
    "all": (
        {80: SIDES, 90: SIDES, 100: SIDES} | dict.fromkeys((86, 89, 120), SIDES[1:3]),
        {80: [PASSES[0], PASSES[3]], 90: PASSES, 100: [PASSES[0], PASSES[3]]},
    ),
}


class Target:
    """A driver without a GPU. The number of the device is the compute capability: Triton keeps code by device."""

    capability = 0

    @classmethod
    def get_current_target(cls):
        return GPUTarget("cuda", cls.capability, 32)

    @classmethod
    def get_current_device(cls):
        return cls.capability

    @staticmethod
    def get_current_stream(device):
        return 0


def read(kernel) -> dict:
    """Registers, spilled bytes a thread, shared memory, and the loads from global memory by their bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool.path, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in ((triton.knobs.nvidia.cuobjdump, "-res-usage"), (triton.knobs.nvidia.nvdisasm, "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loads = Counter()
    for kind, modifiers in re.findall(r"\b(LDG|LDGSTS|UTMALDG)\b((?:\.\w+)*)", code):
        bits = re.search(r"\.[SU]?(8|16|64|128)\b", modifiers)
        loads["tensor" if kind == "UTMALDG" else bits[1] if bits else "32"] += 1
    products = {name: name in kernel.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma")}
    return {"registers": registers, "spilled": stack, "shared": kernel.metadata.shared, "loads": loads, "products": products}


def compile_all(which: str) -> list[dict]:
    """What the code of each kernel has, with the capability, and the 16-byte loads that its fields need at least."""
    found, run, about = [], JITFunction.run, {}

    def only_compile(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append({"kernel": kernel.name, "capability": Target.capability, **about, **read(kernel)})
        return kernel

    JITFunction.run = only_compile
    driver.set_active(Target())
    products, of_passes = SETS[which]
    for Target.capability, sides in products.items():
        for side, inner in sides:
            tile = symmetric.tile_for(side, divmod(Target.capability, 10))
            for addend in (None, 1.0) if side < inner else (1.0,):
                about = {"what": f"S = {side}, {'with' if addend else 'without'} addend"}
                u = torch.zeros(1, side, inner if addend is None else side, dtype=BF16)
                symmetric.symmetric_product(u, 1.0, tile, addend=addend)
    for Target.capability, configurations in of_passes.items():
        for layout, cuts, state in configurations:
            stack = cut_stack("cpu", (256, 512), layout, 0, cuts, state)
            about = {"what": f"layout {layout}, {len(stack.pieces)} pieces, {state}", "state": state.itemsize}
            u = torch.empty(stack.shape, dtype=BF16)
            if which == "fast":
                passes.accumulate_(random_rule(), [stack])
                continue
            directions_(random_rule(), [stack], u, passes.TRITON)
            for lr in (0.1, torch.tensor(0.1)) if state is FP32 else (0.1,):
                passes.apply_(stack.pieces[0].w, u, torch.ones(1, 1, 1), {"lr": lr, "weight_decay": 0.1})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compile_all(sys.argv[1])))
