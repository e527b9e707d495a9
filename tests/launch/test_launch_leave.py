"""A process that leaves while threads of its process group still work. This file is also the script of such a process."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

WORLD, WORKS = 4, 50


def test_threads_of_a_kept_group_do_not_abort_a_process_that_leaves(tmp_path):
    """With `sys.exit` 8 of 24 such processes of two ranks, and one of 12 of four, ended in SIGABRT; with `leave` none of 16."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")] for rank in range(WORLD)]
    ranks = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75] * WORLD, outputs
    assert outputs == ["the last line\nthe exit handler"] * WORLD  # no end of line: flushed nevertheless


def main(rank, path):
    import torch
    import torch.distributed as dist

    from launch.distributed.leave import leave

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
