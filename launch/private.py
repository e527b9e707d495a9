"""Private names of other libraries that this project cannot do without, each behind a function that says why.

Nothing else in `launch` uses private names. `celo2`, which may not import this module, uses four: DeepSpeed's `_hp_mapping` in
`celo2/distributed/deepspeed.py`, and torch's `_foreach_*`, `_disable_dynamo` and `_fsdp_flattened`.
tests/launch/test_launch_private.py fails when a library changes one of the names here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode

from launch.monitoring.signals import STOP_SIGNALS
from models.initialization import become

DispatchMode = TorchDispatchMode  # sees every torch operator, collectives included; module hooks do not


def connect_to_default_store(prefix: str) -> dist.Store:
    """A connection of its own to the store through which the ranks of the default process group found each other.

    It does not wait while the main thread waits for an answer of the store. A second store would need a second port. All keys get
    `prefix`.
    """
    store: Any = _get_default_store()
    return dist.PrefixStore(prefix, store.clone())


def set_collective_timeout(seconds: float) -> None:
    """Let a collective of any process group that exists now fail after `seconds`.

    A group that DeepSpeed or a DeviceMesh makes has a default of its own, with NCCL 600 s.
    """
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def leave(status: int) -> NoReturn:
    """End the process with `status`. Exit handlers run and output is flushed, but the interpreter does not run its shutdown.

    No signal changes the status any more: torchrun sends SIGTERM to all other ranks as soon as one has ended.

    Gloo's worker threads release a collective's tensors a moment after the collective is done. One that does so while the
    interpreter is being taken apart aborts the process (SIGABRT), and a run that has succeeded counts as failed. Taking down
    the process group ends the threads only where nothing refers to it any more, but DeepSpeed and a DeviceMesh always do.
    https://github.com/pytorch/pytorch/pull/179291
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads it, or the disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def zero_gradient_norm(zero: Any) -> torch.Tensor:
    """The norm of the whole gradient, which DeepSpeed's engine tells only after the update; `zero` is `engine.optimizer`."""
    return torch.as_tensor(zero._global_grad_norm)


def forget_accelerator() -> None:
    """Make Accelerate forget the precision of an earlier training run of this process, and its ranks if their group is gone."""
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())


def zero_end(engine: Any) -> None:
    """Let the memory of a training run go: what DeepSpeed hangs on modules and parameters keeps all of it alive otherwise."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for p in engine.module.parameters():
        vars(p).clear()
        p.data = p.new_empty(0)


def zero_forget_lost_groups(deepspeed: Any) -> None:
    """Make DeepSpeed forget the process groups of an earlier training run of this process, which ended with that run."""
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is not None and groups._WORLD_GROUP not in _world.pg_map:
        groups._release_process_group_references()


def zero_outline(deepspeed: Any, model: torch.nn.Module, options: dict[str, Any]) -> None:
    """Give the parameters of `model`, which is on the meta device, what DeepSpeed needs to divide them, and no values.

    Its own start takes them whole, sends them from the first rank to all, and copies them into flat vectors. Here the vectors
    exist first, and each rank then writes its part into them.
    """
    if options["zero_optimization"]["stage"] < 3:
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        for p in model.parameters():
            become(p, torch.empty(p.shape, dtype=p.dtype, device=device))  # on a CPU, pages that nothing writes take no memory
            p.ds_optim_param = True  # type: ignore[attr-defined]  # of a kind that is not sent
        return
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(deepspeed.accelerator.get_accelerator().communication_backend_name())
    zero = deepspeed.zero.Init(config_dict_or_path=options)
    # One number for all: no small one lies between large pieces that are freed.
    number = torch.zeros((), device=zero.local_device)
    for p in model.parameters():
        become(p, torch.empty(p.shape, dtype=p.dtype, device=zero.local_device))
        zero._convert_to_deepspeed_param(p)
        p.partition()  # type: ignore[attr-defined]
        p.ds_tensor.data = number.to(p.dtype).expand(p.ds_tensor.shape)  # type: ignore[attr-defined]
        p.data = number.to(p.dtype).expand(p.ds_shape)  # type: ignore[attr-defined]
        p.ds_status = type(p.ds_status).AVAILABLE  # type: ignore[attr-defined]  # whole: it is not gathered to get its hooks


@contextmanager
def zero_in_float32(deepspeed: Any, model: torch.nn.Module) -> Iterator[None]:
    """`deepspeed.initialize` in this context does not keep a copy of float32 weights in float32.

    Stage 3 means to (its comments say so), but compares a `torch.device` with a string, which are never equal.
    """
    stage3 = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    create = stage3._create_fp32_partitions

    def create_without_copies(self: Any) -> None:
        device, self.device = self.device, torch.device(self.device)
        create(self)
        self.device = device

    stage3._create_fp32_partitions = create_without_copies
    try:
        yield
    finally:
        stage3._create_fp32_partitions = create
        for p in model.parameters():
            p.__dict__.pop("ds_optim_param", None)


def zero3_refresh_weights(zero: Any) -> None:
    """Copy what stage 3's flat vectors hold into the model's parameters, as at the end of a step."""
    zero._partition_all_parameters()
    for i in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(i)
    if zero.persistent_parameters:  # small ones stay gathered
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def ddp_keep_buckets(ddp: Any) -> None:
    """Keep `DistributedDataParallel` from rearranging its buckets after its first backward pass; call it before every forward.

    With three ranks or more the order in which an all-reduce adds depends on an element's place in its bucket. A run that is
    continued begins with a first pass again, so only buckets that follow from the model alone give it the same bits. Resetting
    forgets the recorded order, and with it that a pass was not finished, hence the check.
    """
    ddp.reducer._check_reducer_finalized()
    ddp.reducer._reset_state()


def ignored_in_files(model: Any) -> list[str]:
    """Patterns of tensors that a folder of transformers may hold beside the weights of `model`, such as masks of old versions."""
    return list(model._keys_to_ignore_on_load_unexpected or [])


def forbid_deepspeed_compilation(deepspeed: Any) -> None:
    """Stop DeepSpeed from compiling C++ for CPU inference at its first start; training does not need it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def record_memory_history() -> None:
    """Note every allocation on the GPU with its stack from now on, the newest 100,000."""
    torch.cuda.memory._record_memory_history(max_entries=100_000)


def dump_memory_history(path: Path) -> None:
    """Write what was noted, and what the GPU's memory holds, to `path`; https://pytorch.org/memory_viz shows it."""
    torch.cuda.memory._dump_snapshot(str(path))


def muon_orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The Newton–Schulz of `torch.optim.Muon` on one matrix (R, C), so that sharded matrices get the same numbers."""
    return _muon._zeropower_via_newtonschulz(
        matrix, (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), _muon.DEFAULT_NS_STEPS, _muon.EPS
    )
