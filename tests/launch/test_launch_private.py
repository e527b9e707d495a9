"""Each private name of another library that this project uses; a test fails when the library changes it.

This file is also the script of a process that leaves while threads of its process group still work.
"""

import atexit
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORLD, WORKS = 4, 50


@pytest.mark.slow
def test_threads_of_a_kept_group_do_not_abort_a_process_that_leaves(tmp_path):
    """With `sys.exit` 8 of 24 such processes of two ranks, and one of 12 of four, ended in SIGABRT; with `leave` none of 16."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")] for rank in range(WORLD)]
    ranks = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75] * WORLD, outputs
    assert outputs == ["the last line\nthe exit handler"] * WORLD  # no end of line: flushed nevertheless


@pytest.fixture
def group():
    """A process group of this process alone, and the store that it was given."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_muon_orthogonalizes_as_torch_does():
    """One step of torch's own Muon without momentum and decay is this direction times its learning rate."""
    from launch.private import muon_orthogonalize

    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(6, 10))
    p.grad = g.clone()
    torch.optim.Muon([p], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    torch.testing.assert_close(-p.detach(), muon_orthogonalize(g).float() * max(1, 6 / 10) ** 0.5)


def test_the_store_of_the_group_is_found_and_shared(group):
    from launch.private import connect_to_default_store

    connect_to_default_store("mine").set("key", "value")
    assert connect_to_default_store("mine").get("key") == b"value"


@pytest.mark.parametrize("keep", [False, True])
def test_ddp_keeps_its_buckets_only_if_it_is_told(keep, group):
    """Where the gradients lie is where they are in a bucket. Two micro-batches a step; the first sends nothing."""
    from launch.private import ddp_keep_buckets

    layers = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(3)))
    ddp = torch.nn.parallel.DistributedDataParallel(layers, gradient_as_bucket_view=True)
    orders = []
    for _ in range(3):
        ddp.zero_grad()
        for silent in (True, False):
            if keep:
                ddp_keep_buckets(ddp)
            with ddp.no_sync() if silent else nullcontext():
                ddp(torch.ones(2, 40)).sum().backward()
        gradients = [p.grad.data_ptr() for p in ddp.parameters()]
        orders.append(sorted(range(len(gradients)), key=gradients.__getitem__))
    assert (orders[0] == orders[1] == orders[2]) is keep


def test_the_timeout_reaches_every_group(group):
    from launch.private import set_collective_timeout

    dist.new_group([0])
    set_collective_timeout(7.0)
    backends = [found._get_backend(torch.device("cpu")) for found in dist.distributed_c10d._world.pg_map]
    assert len(backends) == 2 and [backend.options._timeout.total_seconds() for backend in backends] == [7.0, 7.0]


def test_a_dispatch_mode_sees_collectives_with_their_group(group):
    from launch.benchmark.traffic import Traffic, world_size

    seen = []

    class Seeing(Traffic):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.namespace, world_size(args)))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Seeing() as traffic:
        dist.all_reduce(torch.ones(3))
        dist.broadcast(torch.ones(3), 0)
    assert traffic.sent == {"allreduce": 0, "broadcast": 0}
    assert ("c10d", 1) in seen


ZERO = """
import sys
import deepspeed  # before the names are used
from launch.private import forbid_deepspeed_compilation
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
forbid_deepspeed_compilation(deepspeed)
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
for name in ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "_create_fp32_partitions"):
    assert callable(getattr(Stage3, name)), name
import inspect
assert ".device == self.device" in inspect.getsource(Stage3._create_fp32_partitions)
assert "ds_optim_param" in inspect.getsource(deepspeed.runtime.engine)
"""


def test_what_is_used_of_deepspeed_is_there():
    """What these names do, and the gradient's norm, is under test in test_train_distributed.py: resuming and clipping."""
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", ZERO], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def main(rank, path):
    from launch.private import leave

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    atexit.register(print, "the exit handler", end="")
    atexit.kept = dist.group.WORLD  # as DeepSpeed keeps it
    print("the last line")
    works = [dist.all_reduce(torch.ones(200_000), async_op=True) for _ in range(WORKS)]
    for work in works:
        work.wait()
    dist.destroy_process_group()
    leave(75)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
