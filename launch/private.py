"""Private names of other libraries that this project needs, each behind a function whose docstring gives the reason.

Nothing else in `launch` uses private names. `celo2` may not import this module, and uses four private names itself: DeepSpeed's
`_hp_mapping` in `celo2/distributed/deepspeed.py`, and torch's `_foreach_*`, `_disable_dynamo` and `_fsdp_flattened`.
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
    """Return a new connection to the store of the default process group, with `prefix` before all keys.

    A thread can use the new connection while the main thread waits for the store on its own connection. A second store would
    need a second port.
    """
    store: Any = _get_default_store()
    return dist.PrefixStore(prefix, store.clone())


def set_collective_timeout(seconds: float) -> None:
    """Make collectives fail after `seconds`, in every process group that exists now.

    Groups that DeepSpeed or a DeviceMesh created have a default of their own: 600 s with NCCL.
    """
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def leave(status: int) -> NoReturn:
    """End the process with `status`. Exit handlers run and output is flushed, but the interpreter does not shut down.

    Stop signals are ignored from here on: torchrun sends SIGTERM to all other ranks as soon as one has exited, and that must not
    change the status.

    Gloo's worker threads release the tensors of a collective a moment after the collective is done. If a thread does so while
    the interpreter shuts down, the process aborts (SIGABRT), and a successful run counts as failed. Destroying the process group
    ends these threads only if nothing refers to the group any more, but DeepSpeed and a DeviceMesh always keep a reference.
    https://github.com/pytorch/pytorch/pull/179291
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads the output, or the disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def zero_gradient_norm(zero: Any) -> torch.Tensor:
    """Return the norm of the whole gradient before the update. DeepSpeed's engine gives it only after the update.

    `zero` is `engine.optimizer`.
    """
    return torch.as_tensor(zero._global_grad_norm)


def forget_accelerator() -> None:
    """Make Accelerate forget the precision of an earlier training run in this process, and its ranks if their group is gone."""
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())


def zero_end(engine: Any) -> None:
    """Free the memory of a training run. The hooks and attributes that DeepSpeed adds to modules and parameters keep it alive."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for p in engine.module.parameters():
        vars(p).clear()
        p.data = p.new_empty(0)


def zero_forget_lost_groups(deepspeed: Any) -> None:
    """Make DeepSpeed forget the process groups of an earlier training run in this process. They ended with that run."""
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is not None and groups._WORLD_GROUP not in _world.pg_map:
        groups._release_process_group_references()


def zero_outline(deepspeed: Any, model: torch.nn.Module, options: dict[str, Any]) -> None:
    """Prepare the parameters of `model`, which is on the meta device, for DeepSpeed to shard them, without giving them values.

    DeepSpeed itself starts from whole parameters, broadcasts them from the first rank, and copies them into flat vectors. Here
    the flat vectors exist first, and each rank then writes its own part into them.
    """
    if options["zero_optimization"]["stage"] < 3:
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        for p in model.parameters():
            become(p, torch.empty(p.shape, dtype=p.dtype, device=device))  # on a CPU, pages that are never written take no memory
            p.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed does not broadcast parameters of this kind
        return
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(deepspeed.accelerator.get_accelerator().communication_backend_name())
    zero = deepspeed.zero.Init(config_dict_or_path=options)
    # One number serves as the value of all parameters, so that no small allocations lie between large ones that are freed.
    number = torch.zeros((), device=zero.local_device)
    for p in model.parameters():
        become(p, torch.empty(p.shape, dtype=p.dtype, device=zero.local_device))
        zero._convert_to_deepspeed_param(p)
        p.partition()  # type: ignore[attr-defined]
        p.ds_tensor.data = number.to(p.dtype).expand(p.ds_tensor.shape)  # type: ignore[attr-defined]
        p.data = number.to(p.dtype).expand(p.ds_shape)  # type: ignore[attr-defined]
        # As if whole, so that DeepSpeed does not gather it to add its hooks.
        p.ds_status = type(p.ds_status).AVAILABLE  # type: ignore[attr-defined]


@contextmanager
def zero_in_float32(deepspeed: Any, model: torch.nn.Module) -> Iterator[None]:
    """In this context, `deepspeed.initialize` does not make a float32 copy of weights that are float32 already.

    Stage 3 is meant to skip that copy (its comments say so), but it compares a `torch.device` with a string, and these are
    never equal.
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
    """Copy stage 3's flat vectors into the model's parameters, as DeepSpeed does at the end of a step."""
    zero._partition_all_parameters()
    for i in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(i)
    if zero.persistent_parameters:  # small ones stay gathered
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def ddp_keep_buckets(ddp: Any) -> None:
    """Keep `DistributedDataParallel` from rearranging its buckets after its first backward pass. Call it before every forward.

    With three ranks or more, the order of the additions in an all-reduce depends on an element's place in its bucket. A resumed
    run starts with a first pass again. So it gets the same bits only if the buckets depend on the model alone. The reset forgets
    the recorded order, but also that a pass was not finished, hence the check before it.
    """
    ddp.reducer._check_reducer_finalized()
    ddp.reducer._reset_state()


def ignored_in_files(model: Any) -> list[str]:
    """Return patterns of tensor names that a transformers folder may hold beside the weights of `model`, such as old masks."""
    return list(model._keys_to_ignore_on_load_unexpected or [])


def forbid_deepspeed_compilation(deepspeed: Any) -> None:
    """Stop DeepSpeed from compiling C++ for CPU inference at its first start; training does not need it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def record_memory_history() -> None:
    """Start recording GPU allocations with their stacks; the newest 100,000 are kept."""
    torch.cuda.memory._record_memory_history(max_entries=100_000)


def dump_memory_history(path: Path) -> None:
    """Write the recorded allocations and the contents of GPU memory to `path`; https://pytorch.org/memory_viz shows them."""
    torch.cuda.memory._dump_snapshot(str(path))


def muon_orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Apply the Newton–Schulz iteration of `torch.optim.Muon` to one matrix (R, C). Sharded matrices so get equal numbers."""
    return _muon._zeropower_via_newtonschulz(
        matrix, (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), _muon.DEFAULT_NS_STEPS, _muon.EPS
    )
