"""GPUs and the links between them, for estimates.

Peaks in bf16 are those of `models.flops`; the rest is from the makers' data sheets: NVIDIA H100, H200, A100 80GB and 40GB (SXM),
L40S, L4, A40, A10, DGX A100, DGX H100, DGX B200, GeForce RTX 3090 and 4090; AMD Instinct MI300X.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from celo2.training.configuration import close
from configs.load import ConfigError
from models import peak_flops


@dataclass(frozen=True)
class Machine:
    """GPUs and the links between them. Defaults: H100 SXM in DGX H100 nodes."""

    flops: float = 989e12  # bf16 peak without sparsity, FLOP/s
    efficiency: float = 0.4  # of the peak in forward and backward passes: 0.33 to 0.5 in published GPT runs on H100
    newton_schulz_efficiency: float = 0.6  # large square products alone: 62 TFLOP of a 1.3B model take about 0.1 s
    memory: float = 80e9  # bytes of a GPU
    memory_bandwidth: float = 3.35e12  # bytes/s
    gpus_per_node: int = 8
    intra_node_bandwidth: float = 450e9  # bytes/s that a GPU sends: NVLink 4, 900 GB/s for both directions
    inter_node_bandwidth: float = 50e9  # bytes/s that a GPU sends: one 400 Gb/s adapter for each GPU
    latency: float = 10e-6  # s for one hop of a tree of ranks, launch of the kernel included
    host_memory: float = 2e12  # bytes of a node
    host_bandwidth: float = 300e9  # bytes/s of a node's memory, an assumption
    host_link: float = 25e9  # bytes/s between a GPU and the memory of its host: PCIe 4.0 with 16 lanes, an assumption
    fp32_flops: float = 67e12  # fp32 peak, FLOP/s; torch does not use TF32 by itself
    name: str = "h100"

    def ring(self, world: int) -> float:
        """Bytes/s of a rank in ring collectives; between nodes a ring uses all adapters of a node for one copy of the data."""
        if world <= self.gpus_per_node:
            return self.intra_node_bandwidth
        return min(self.intra_node_bandwidth, self.gpus_per_node * self.inter_node_bandwidth)

    def all_to_all(self, world: int) -> float:
        """Bytes/s of a rank in an all-to-all, most of which goes to other nodes."""
        return self.intra_node_bandwidth if world <= self.gpus_per_node else self.inter_node_bandwidth

    def peak(self, bf16: bool) -> float:
        """FLOP/s in bf16 or fp32."""
        return self.flops if bf16 else self.fp32_flops


def gpu(
    device: str, memory: float, bandwidth: float, fp32: float, link: float = 32, adapter: float = 12.5, host: float = 512
) -> Machine:
    """A GPU in nodes of eight, from GB, GB/s and TFLOP/s.

    `link` and `adapter` are what the GPU sends to the others of its node and to other nodes. `host` is the memory of a node: that
    of the makers' own nodes, or an assumption. Defaults without NVLink: PCIe 4.0 with 16 lanes and, since such nodes differ,
    100 Gb/s for each GPU as an assumption.
    """
    flops = peak_flops(device, torch.bfloat16)
    assert flops is not None, device
    return Machine(
        flops=flops,
        memory=memory * 1e9,
        memory_bandwidth=bandwidth * 1e9,
        intra_node_bandwidth=link * 1e9,
        inter_node_bandwidth=adapter * 1e9,
        host_memory=host * 1e9,
        fp32_flops=fp32 * 1e12,
    )


MACHINES = {
    "h100": gpu("H100", 80, 3350, 67, 450, 50, 2000),
    "h200": gpu("H200", 141, 4800, 67, 450, 50, 2000),
    "b200": gpu("B200", 180, 8000, 75, 900, 50, 2000),
    "a100": gpu("A100", 80, 2039, 19.5, 300, 25, 2000),
    "a100-40gb": gpu("A100", 40, 1555, 19.5, 300, 25, 1000),
    "mi300x": gpu("MI300X", 192, 5300, 163.4, 448, 50, 2000),
    "l40s": gpu("L40S", 48, 864, 91.6),
    "a40": gpu("A40", 48, 696, 37.4),
    "l4": gpu("L4", 24, 300, 30.3),
    "a10": gpu("A10", 24, 600, 31.2),
    "rtx-4090": gpu("RTX 4090", 24, 1008, 82.6),
    "rtx-3090": gpu("RTX 3090", 24, 936, 35.6),
}


def machine_of(name: str) -> Machine:
    """The machine of a GPU. Raises ConfigError for one that is not in the table."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in MACHINES:
        near = [*(known for known in MACHINES if known in key or key in known), *close(key, MACHINES)]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--gpu {name} is unknown, expected one of {', '.join(MACHINES)}{hint}")
    return replace(MACHINES[key], name=key)
