"""FSDP2 with torch's distributed checkpoints. Run the command again to resume, also with another number of processes:

torchrun --nproc_per_node 2 examples/fsdp2.py runs/fsdp2 --steps 200
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import SmallGPT, end_process, text_sequences
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from celo2 import Celo2, param_groups

LR, ADAMW_LR, BATCH = 2e-3, 1e-2, 16

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh(device, (world,))  # sets the GPU of this process by LOCAL_RANK

model = SmallGPT().to(device)
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = Celo2(param_groups(model, LR, ADAMW_LR, weight_decay=0.1), lr=LR, rule="celo2-lm")

step = 0
if saved := sorted(args.folder.glob("step_*/.metadata")):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=saved[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    step = int(saved[-1].parent.name.removeprefix("step_"))

batches = text_sequences().to(device).split(BATCH)
while step < args.steps:
    batch = batches[step % len(batches)][rank::world]
    loss = model(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    dist.all_reduce(mean := loss.detach() / world)
    if rank == 0:
        print(f"step {step}: loss {mean.item():.4f}", flush=True)
    if step % args.save_every == 0:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(parts, checkpoint_id=args.folder / f"step_{step:06d}")
end_process()
