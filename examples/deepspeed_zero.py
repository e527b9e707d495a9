"""DeepSpeed ZeRO 1, 2 or 3. Run the same command again to resume from the last checkpoint:

torchrun --nproc_per_node 2 examples/deepspeed_zero.py runs/zero --stage 2 --steps 200
"""

import argparse
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from common import SmallGPT, end_process, text_sequences

from celo2 import Celo2, param_groups
from celo2.distributed.deepspeed import ZeroClient

LR, ADAMW_LR, BATCH = 2e-3, 1e-2, 16

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise the first start compiles C++ for minutes
deepspeed.init_distributed()
rank, world = dist.get_rank(), dist.get_world_size()
config = {"train_micro_batch_size_per_gpu": BATCH // world, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
config["zero_optimization"] = {"stage": args.stage}
model = SmallGPT()
client = ZeroClient(param_groups(model, LR, ADAMW_LR, weight_decay=0.1))
engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config)
optimizer = client.bind(engine.optimizer, lambda groups: Celo2(groups, lr=LR, rule="celo2-lm"))

# DeepSpeed saves the weights. Each rank saves its state of Celo2 in a file; only the same number of processes can load them.
own_state = f"celo2_rank{rank}.pt"
step = 0
if (args.folder / "latest").exists():
    path, client_state = engine.load_checkpoint(args.folder, load_lr_scheduler_states=False)
    optimizer.load_state_dict(torch.load(Path(path).parent / own_state, map_location=engine.device))
    step = client_state["step"]

batches = text_sequences().to(engine.device).split(BATCH)
while step < args.steps:
    batch = batches[step % len(batches)][rank::world]
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
    step += 1
    dist.all_reduce(mean := loss.detach() / world)
    if rank == 0:
        print(f"step {step}: loss {mean.item():.4f}", flush=True)
    if step % args.save_every == 0:
        engine.save_checkpoint(args.folder, tag=f"step_{step:06d}", client_state={"step": step})
        torch.save(optimizer.state_dict(), args.folder / f"step_{step:06d}" / own_state)
end_process()
