"""Learning rates that are tensors: of 16 bits, on a device, and one for each group."""

import pytest
import torch
from optimizer_kinds import random_rule
from torch import nn
from torch.optim import lr_scheduler

import celo2.optimizer
from celo2 import Celo2, param_groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_lr_of_16_bits_decays(dtype):
    """1 - lr * weight_decay is computed in float32: in bfloat16 it would be 1, and nothing would decay."""
    rate = torch.tensor(1e-2, dtype=dtype)
    decayed = []
    for lr in (rate, float(rate)):
        p = nn.Parameter(torch.ones(4, 4))
        p.grad = torch.zeros(4, 4)
        Celo2([p], lr=lr, weight_decay=0.1, rule=random_rule()).step()
        decayed.append(p.detach())
    torch.testing.assert_close(decayed[0], decayed[1], rtol=0, atol=2e-7)  # one rounding of float32


def test_tensor_lr_of_adamw_on_a_device_is_float32(monkeypatch):
    """torch's fused AdamW on GPUs reads no other dtype."""
    seen = []
    monkeypatch.setattr(celo2.optimizer, "adamw", lambda *args, lr, **options: seen.append(lr.dtype))
    p = torch.zeros(3, device="meta")
    p.grad, state = torch.zeros_like(p), {p: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "step")}}
    group = {"lr": torch.tensor(0.1, dtype=torch.bfloat16, device="meta"), "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}
    celo2.optimizer.adamw_([p], state, group, None, None)
    assert seen == [torch.float32]


def test_every_group_has_its_own_tensor_lr():
    """A scheduler fills the tensor of each group in place: one that groups share would fall once for each group."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 5))
    lr, adamw_lr = torch.tensor(0.1), torch.tensor(0.2)
    optimizer = Celo2(param_groups(model, lr, adamw_lr, 0.1), lr=lr)
    assert len(optimizer.param_groups) == 3
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.1, 0.1])
    assert (float(lr), float(adamw_lr)) == pytest.approx((0.1, 0.2))
