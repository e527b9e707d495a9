"""A plain training loop. Run the same command again to resume from the last checkpoint:

pip install .
python examples/plain.py runs/plain --steps 200
"""

import argparse
from pathlib import Path

import torch
from common import SmallGPT, text_sequences

from celo2 import Celo2, param_groups, routing_table

LR, ADAMW_LR, WARMUP, BATCH = 2e-3, 1e-2, 20, 16

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = SmallGPT().to(device)
groups = param_groups(model, lr=LR, adamw_lr=ADAMW_LR, weight_decay=0.1)
print(routing_table(groups))
optimizer = Celo2(groups, lr=LR, rule="celo2-lm")
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP))

step = 0
if saved := sorted(args.folder.glob("step_*.pt")):
    checkpoint = torch.load(saved[-1], map_location=device)
    step = checkpoint["step"]
    for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(checkpoint[name])

batches = text_sequences().to(device).split(BATCH)
while step < args.steps:
    batch = batches[step % len(batches)]
    loss = model(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    step += 1
    print(f"step {step}: loss {loss.item():.4f}", flush=True)
    if step % args.save_every == 0:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({"step": step, **parts}, args.folder / f"step_{step:06d}.pt")
