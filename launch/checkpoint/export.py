"""Turns a checkpoint into a folder that transformers loads without this project: python -m models.export RUN OUT.

A GPT-3 becomes a stock GPT-2, which is the same function; any other architecture is saved as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from launch.checkpoint.load import load_model
from launch.checkpoint.permissions import usual_permissions
from launch.checkpoint.tokenizer import export_tokenizer, trained_context
from launch.checkpoint.verify import CheckpointError, choose_checkpoint
from models.gpt2 import to_gpt2
from models.gpt3 import GPT3LMHeadModel


def export(run: str | Path, out: str | Path, note: Callable[[str], None] = lambda text: None) -> Path:
    """Write the model and the tokenizer of `run` to the new folder `out`; returns the checkpoint that was taken.

    AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") load `out`, which appears only when it is complete.

    Args:
        run: the folder of a training run, whose newest whole checkpoint is taken, or one of its checkpoints.
        out: a folder that does not exist, or is empty.
        note: is told of damaged checkpoints that are newer than the one that was taken.

    Raises:
        CheckpointError: no whole checkpoint, a model or tokenizer that cannot be read, or a folder that cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder")
    checkpoint, problems = choose_checkpoint(Path(run).absolute())
    for problem in problems:
        note(f"{problem}; taking {checkpoint.name} instead")
    model = load_model(checkpoint)
    if isinstance(model, GPT3LMHeadModel):
        model = to_gpt2(model)
    tokenizer = export_tokenizer(checkpoint.parent.parent, model, trained_context(checkpoint, model.config))

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        usual_permissions(partial)
        os.replace(partial, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Export as the command line says. Exit status 2: an error, in one line."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, or one checkpoint in it")
    parser.add_argument("out", help="the folder to write; it must not exist, or be empty")
    options = parser.parse_args(arguments)
    try:
        checkpoint = export(options.run, options.out, note=lambda text: print(f"export: note: {text}", file=sys.stderr))
    except CheckpointError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"exported {checkpoint} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
