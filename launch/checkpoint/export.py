"""Turns a checkpoint into a folder that transformers loads without this project: python -m models.export RUN OUT.

A GPT-3 becomes a stock GPT-2 that computes the same function. Any other architecture is saved as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from data import printable
from data.tokenizer import vocabulary_size
from launch.checkpoint.card import write_card
from launch.checkpoint.compatibility import add_names_of_transformers_4, change
from launch.checkpoint.folders import choose_checkpoint
from launch.checkpoint.load import load_model
from launch.checkpoint.permissions import usual_permissions
from launch.checkpoint.push import check_name, push
from launch.checkpoint.tokenizer import configure, export_tokenizer, trained_context, trained_data
from launch.checkpoint.trained import require_its_tokenizer
from launch.checkpoint.verify import CheckpointError
from launch.checkpoint.vocabulary import one_row_a_token
from models.experts import needs_loop
from models.gpt2 import to_gpt2
from models.gpt3 import GPT3LMHeadModel

DTYPES = ("float32", "bfloat16", "float16")
RETURNED = ("output_attentions", "output_hidden_states")  # outputs beside the logits; whoever loads the model chooses them


def export(
    run: str | Path,
    out: str | Path,
    note: Callable[[str], None] = lambda text: None,
    dtype: str | None = None,
    average: bool = False,
) -> Path:
    """Write the model and the tokenizer of `run` to the new folder `out`. Returns the exported checkpoint.

    AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") load `out`, which appears only when it is complete.

    Args:
        run: one checkpoint, or the folder of a training run, of which the newest whole checkpoint is exported.
        out: a folder that does not exist or is empty.
        note: called with a line on each damaged newer checkpoint, on an end of text that is a guess, and on vocabulary rows that
            cannot be dropped.
        dtype: one of DTYPES for the weights; by default the checkpoint's own.
        average: export the average of the weights (train.average).

    Raises:
        CheckpointError: no whole checkpoint, a model or tokenizer that cannot be read, or a folder that cannot be written.
    """
    for name, value in {"RUN": run, "OUT": out}.items():
        if not str(value).strip():  # an unset shell variable; Path("") would be the current folder
            raise CheckpointError(f"{name} is empty")
    out = Path(out).resolve()  # follows a link
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder")
    chosen = choose_checkpoint(Path(run).absolute())
    checkpoint = chosen.path
    for problem in chosen.problems:
        note(f"{problem}; taking {checkpoint.name} instead")
    require_its_tokenizer(checkpoint, chosen.run)
    trained = load_model(checkpoint, average=average)
    context = trained_context(checkpoint, trained.config)
    tokenizer = export_tokenizer(chosen.run, context, trained_data(checkpoint), note)
    model = one_row_a_token(trained, vocabulary_size(tokenizer.backend_tokenizer), note)
    rows = trained.config.get_text_config().vocab_size
    if isinstance(model, GPT3LMHeadModel):
        model = to_gpt2(model)
    configure(model, tokenizer, context)
    if dtype is not None:
        convert(model, dtype)

    mounted = os.path.ismount(out)  # a mount point cannot be replaced: files move into it one by one, config.json last
    name = f".{out.name}.{os.getpid()}.partial"
    partial = out / name if mounted else out.with_name(name)
    try:
        partial.mkdir(parents=True)
        save(model, partial, checkpoint)
        tokenizer.save_pretrained(partial)
        add_names_of_transformers_4(partial)
        write_card(partial, chosen, model, rows, average)
        usual_permissions(partial)
        if mounted:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, out / path.name)
        else:
            os.replace(partial, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def save(model: PreTrainedModel, folder: Path, checkpoint: Path) -> None:
    """Save the model as transformers does. Raises CheckpointError if transformers refuses the configuration of `checkpoint`."""
    for part in (model.config, model.config.get_text_config(), model.generation_config):
        for key in RETURNED:
            if getattr(part, key, False) is True:
                setattr(part, key, False)
    try:
        model.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # from several libraries
        raise CheckpointError(f"{checkpoint / 'config.json'} cannot be saved again: {' '.join(str(error).split())}") from error
    if needs_loop(model):  # from_pretrained() reads this entry, but save_pretrained() never writes it
        change(folder / "config.json", {"experts_implementation": "eager"})


def convert(model: PreTrainedModel, dtype: str) -> None:
    """Convert the weights to one of DTYPES. Raises CheckpointError if a weight is outside the range of that dtype."""
    model.to(getattr(torch, dtype))
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and weight.isinf().any():
            raise CheckpointError(f"{name} is beyond the range of {dtype}: export as bfloat16 or float32")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 after an error, which is printed in one line."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, or one checkpoint in it")
    parser.add_argument("out", help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="with --push: make a newly created repository private")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as they were saved)")
    parser.add_argument("--average", action="store_true", help="export the average of the weights (of a run with train.average)")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    if not torch.cuda.is_available():  # transformers imports DeepSpeed, which warns without this
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        if options.push is not None:
            check_name(options.push)
        elif options.private:
            raise CheckpointError("--private is for --push OWNER/NAME")
        note = lambda text: print(f"export: note: {printable(text)}", file=sys.stderr)  # noqa: E731
        checkpoint = export(options.run, options.out, note, options.dtype, options.average)
        print(f"exported {'the average of ' if options.average else ''}{checkpoint} to {options.out}")
        if options.push:
            print(f"pushed {options.out}: {push(Path(options.out), options.push, options.private)}")
    except (CheckpointError, OSError) as error:
        print(f"export: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
