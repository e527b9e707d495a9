"""How far a step of AdamW, Muon and Celo2 moves a weight: the numbers of "Choosing the learning rates" in docs/optimizer.md.

pytest tests/examples/test_learning_rates.py -s
"""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from celo2 import Celo2

SHAPES = ((64, 64), (256, 64), (64, 256))
LR = 1e-3
SmallGPT, text_sequences = (
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "common.py"))[name] for name in ("SmallGPT", "text_sequences")
)


def change_in_one_step(make, shape):
    """The RMS change of a weight of a matrix, over lr."""
    w = nn.Parameter(torch.zeros(shape))
    w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    make([w]).step()
    return w.detach().square().mean().sqrt().item() / LR


def test_one_step_of_celo2_and_muon():
    """Celo2 moves a weight by lr, Muon by lr / √inputs, or by 0.2 lr where it is made to match AdamW."""
    for shape in SHAPES:
        celo2 = change_in_one_step(lambda p: Celo2(p, lr=LR, rule="celo2-lm"), shape)
        muon, matched = (
            change_in_one_step(lambda p, how=how: torch.optim.Muon(p, lr=LR, weight_decay=0, adjust_lr_fn=how), shape)
            for how in ("original", "match_rms_adamw")
        )
        scaled = muon * shape[1] ** 0.5
        print(f"{shape}: celo2 {celo2:.3f}, muon {muon:.4f} = {scaled:.2f} / √inputs, match_rms_adamw {matched:.3f}")
        assert celo2 == pytest.approx(1, abs=1e-3)
        assert 0.8 < scaled < 1.1 and 0.16 < matched < 0.22  # Muon's singular values are 0.7 to 1.2; 0.87 to 0.94 on average


def test_steps_of_adamw():
    """In training AdamW moves the weights of hidden matrices by a fraction of its lr."""
    model = SmallGPT()
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    changes = []
    for batch in text_sequences().split(16)[:100]:
        model(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in hidden]
        optimizer.step()
        optimizer.zero_grad()
        changes.append(torch.cat([(p - b).flatten() for p, b in zip(hidden, before, strict=True)]).square().mean().sqrt() / LR)
    means = [torch.stack(changes[i : i + 20]).mean().item() for i in range(0, 100, 20)]
    print("AdamW, mean of 20 steps each:", ", ".join(f"{mean:.2f}" for mean in means))
    assert all(0.15 < mean < 0.75 for mean in means)
