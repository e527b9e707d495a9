"""Accelerate, with one process or several. Run the same command again to resume from the last checkpoint:

torchrun --nproc_per_node 2 examples/accelerate_loop.py runs/accelerate --steps 200
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from common import SmallGPT, text_sequences

from celo2 import Celo2, param_groups

LR, ADAMW_LR, WARMUP, BATCH = 2e-3, 1e-2, 20, 16

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False)
model = SmallGPT()
# Under DDP `replicas` makes each process orthogonalize a part of the matrices. FSDP2's parameters show how they are sharded.
ddp = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
replicas = torch.distributed.group.WORLD if ddp else None
optimizer = Celo2(param_groups(model, LR, ADAMW_LR, weight_decay=0.1), lr=LR, rule="celo2-lm", replicas=replicas)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP))
loader = torch.utils.data.DataLoader(text_sequences(), BATCH // accelerator.num_processes)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

step = 0
if saved := sorted(args.folder.glob("step_*")):
    accelerator.load_state(str(saved[-1]))
    step = int(saved[-1].name.removeprefix("step_"))

while step < args.steps:
    for batch in accelerator.skip_first_batches(loader, step % len(loader)):
        loss = model(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}", flush=True)
        if step % args.save_every == 0:
            accelerator.save_state(str(args.folder / f"step_{step:06d}"))
        if step == args.steps:
            break
accelerator.end_training()
