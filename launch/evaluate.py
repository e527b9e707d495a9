"""Loss, perplexity and bits per byte of a trained model: python -m launch.evaluate RUN|CHECKPOINT|EXPORT DATA.

DATA is a folder that `data.prepare` wrote with the model's own tokenizer, or a URL of one. If `--sequences` equals
`eval.sequences` of the training run, the loss of a checkpoint equals the `val_loss` of its step, because it is computed in the
run's `train.precision`. An exported folder does not store that precision and is evaluated in the dtype that it loads with.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys

import torch

from configs.schema import Config
from data import DataError
from data.batches import validation_batches
from data.shards import EmptySplit, TokenShards
from data.tokenizer import PROBE, encode_alike, load_tokenizer
from launch.checkpoint.trained import TrainedModel, open_trained
from launch.checkpoint.verify import CheckpointError
from launch.command import at_least, carry_out, default_device, device
from launch.run.evaluation import add_up, evaluation, lengths_of_tokens
from launch.run.mixture import local_data_folder
from models import CausalLMLoss, choose_loss


@torch.no_grad()
def evaluate(options: argparse.Namespace) -> None:
    """Print loss, perplexity and bits per byte of the model on the data.

    Raises:
        CheckpointError: there is no model, its tokenizer is not the data's, or its loss is not finite.
        DataError: there is no such data.
        LossMismatch: the loss of this architecture is not known.
    """
    try:
        shards = TokenShards(local_data_folder(Config(), options.data), options.split)
    except EmptySplit as error:
        advice = "; take its split train: --split train" if options.split == "val" else ""
        raise DataError(f"{error.found}{advice}") from None
    trained = open_trained(options.model, options.average)
    for text in trained.notes:
        print(f"evaluate: note: {text}; taking {trained.path.name} instead", file=sys.stderr)
    require_same_tokenizer(trained, shards)
    context = trained.context_of(options.context)
    choose_loss(trained.model.to(options.device))
    loss = CausalLMLoss(trained.model).eval()
    batches = validation_batches(shards, context, 1, options.sequences, micro_batch_size=options.batch_size)
    with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=trained.bf16):
        sums = add_up(
            lambda inputs, targets: loss(inputs.to(options.device), targets.to(options.device)),
            batches,
            lengths_of_tokens(shards),
            lambda: True,
        )
    assert sums is not None
    found = evaluation(*sums)
    if not math.isfinite(found.loss):
        dtype = str(trained.model.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"the loss of {trained.path} is {found.loss}: its activations overflow {dtype}, or the training diverged"
        )
    precision = ", in bfloat16" if trained.bf16 else ""
    counted = f"{found.tokens:,} tokens in sequences of {context}{precision}"
    print(f"{trained.path} on the split {shards.split} of {shards.folder}: {counted}")
    print(f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.4f}", end="")
    print(f", {found.bits_per_byte:.4f} bits per byte of {found.bytes:,} bytes" if found.bytes else "")


def require_same_tokenizer(trained: TrainedModel, shards: TokenShards) -> None:
    """Raise CheckpointError unless the model's tokenizer encodes the data as the data's own does, with the same end of text.

    Each token of the data must have the same id for the model. If the model's end of text is a guess and the data has another,
    print a note.
    """
    remedy = "prepare the data with the model's own tokenizer (data.prepare --tokenizer)"
    ours = trained.tokenizer.get_vocab(with_added_tokens=True)
    own = load_tokenizer(shards.folder)
    vocabulary = own.get_vocab(with_added_tokens=True)
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if ours.get(token) != number:
            here = "does not exist" if token not in ours else f"has the number {ours[token]}"
            raise CheckpointError(
                f"{shards.folder} was prepared with another tokenizer: its token {token!r} has the number {number}, "
                f"in the tokenizer of {trained.path} it {here}; {remedy}"
            )
    if not encode_alike(own, trained.tokenizer, shards.read(0, min(PROBE, shards.n_tokens)).tolist()):
        found = f"that of {trained.path} tokenizes the data differently"
        raise CheckpointError(f"{shards.folder} was prepared with another tokenizer: {found}; {remedy}")
    if trained.end == shards.eot_id:
        return
    theirs, end = (trained.tokenizer.id_to_token(number) for number in (shards.eot_id, trained.end))
    if not trained.guess:
        raise CheckpointError(
            f"{shards.folder} ends its documents with {theirs!r}, {trained.path} was trained with {end!r}: prepare the data with "
            f"--end-token {shlex.quote(str(end))}"
        )
    found = f"it is not known which token ended documents in the training of {trained.path}"
    print(f"evaluate: note: {found}; {shards.folder} ends them with {theirs!r}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 after an error, which is printed in one line."""
    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run's folder, one checkpoint in it, or a folder that models.export wrote")
    parser.add_argument("data", help="a folder that data.prepare wrote, or a URL of one")
    parser.add_argument("--split", default="val", help="train or val (val)")
    parser.add_argument(
        "--sequences", type=at_least(1), help="number of sequences, evenly spread over the split; without it, all"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences in one forward pass (8)")
    parser.add_argument("--context", type=at_least(1), help="tokens of a sequence; without it, as in training")
    parser.add_argument("--average", action="store_true", help="use the average of the weights (of a run with train.average)")
    parser.add_argument(
        "--device", type=device, default=default_device(), help="cpu, cuda, cuda:1, ... (default: cuda if available)"
    )
    options = parser.parse_args(arguments)
    return carry_out("evaluate", lambda: evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
