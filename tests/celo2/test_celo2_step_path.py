"""What one reads to follow a step: the files of `celo2` with a function that runs in it, as docs/architecture.md lists them."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

import celo2
from celo2 import Celo2, param_groups

FOLDER = Path(celo2.__file__).parent
OVER_RANKS = {"distributed/owners.py", "distributed/collectives.py"}


def files_of(run) -> set[str]:
    """Files of `celo2`, by their path in it, with a function that `run` calls."""
    seen = set()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {str(Path(name).relative_to(FOLDER)) for name in seen if name.startswith(f"{FOLDER}/")}


def lines_of(files: set[str]) -> int:
    return sum((FOLDER / name).read_text().count("\n") for name in files)


def listed() -> set[str]:
    """The files in the table "How to read the step"."""
    text = (FOLDER.parent / "docs" / "architecture.md").read_text()
    section = text[text.index("### How to read the step") : text.index("## A batch's way")]
    return set(re.findall(r"^\|.*`celo2/([a-z_/]+\.py)` \|", section, re.MULTILINE))


def test_one_device():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8))
    optimizer = Celo2(param_groups(model, 1e-3, 1e-3), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    files = files_of(optimizer.step)
    assert files == listed() - OVER_RANKS
    assert len(files) <= 6 and lines_of(files) <= 1060
    assert lines_of(listed()) <= 1600  # under FSDP2
    text = (FOLDER.parent / "docs" / "architecture.md").read_text()
    assert f"6 files and {lines_of(files):,} lines on one device, 8\nfiles and {lines_of(listed()):,} lines under FSDP2" in text
