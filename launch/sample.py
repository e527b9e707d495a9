"""Text from a trained model: python -m models.sample RUN|CHECKPOINT|EXPORT [--prompt TEXT].

The same seed gives the same text. With the defaults, tokens are drawn as in the samples of a training run.
"""

from __future__ import annotations

import argparse
import sys

from launch.checkpoint.trained import open_trained
from launch.command import at_least, carry_out, default_device, device, number
from launch.run.sampling import Drawing, sample_text


def sample(options: argparse.Namespace) -> None:
    """Print the samples that the command line asks for.

    Raises:
        CheckpointError: there is no model, or it is damaged.
    """

    def note(text: str) -> None:
        print(f"sample: {text}", file=sys.stderr)

    trained = open_trained(options.model, options.average)
    for text in trained.notes:
        note(f"note: {text}; taking {trained.path.name} instead")
    if trained.guess:
        note(f"note: {trained.guess}")
    context = trained.context_of(options.context)
    model = trained.model.to(options.device)
    drawing = Drawing(0.0 if options.greedy else options.temperature, options.top_k, options.top_p)
    for i in range(options.samples):
        text = sample_text(
            model,
            trained.tokenizer,
            trained.end,
            context,
            options.prompt,
            options.tokens,
            options.seed + i,
            drawing,
            stop_at_end=True,
            note=note,
        )
        if options.samples > 1:
            print(f"--- seed {options.seed + i}")
        print(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 after an error, which is printed in one line."""
    usual = Drawing()
    parser = argparse.ArgumentParser(prog="python -m models.sample", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run's folder, one checkpoint in it, or a folder that models.export wrote")
    parser.add_argument("--prompt", default="", help="text to continue; empty: the start of a document")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="largest number of tokens to write (200)")
    parser.add_argument(
        "--samples", type=at_least(1), default=1, help="number of samples, with the seeds SEED, SEED + 1, ... (1)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed (0)")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument(
        "--temperature", type=number(0, 100), default=usual.temperature, help=f"temperature of the softmax ({usual.temperature})"
    )
    parser.add_argument(
        "--top-k",
        type=at_least(0),
        default=usual.top_k,
        help=f"draw from this many likeliest tokens; 0: from all ({usual.top_k})",
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1),
        default=usual.top_p,
        help=f"draw from the likeliest tokens with this total probability ({usual.top_p})",
    )
    parser.add_argument("--context", type=at_least(2), help="tokens that the model may see; without it, as many as in training")
    parser.add_argument("--average", action="store_true", help="use the average of the weights (of a run with train.average)")
    parser.add_argument(
        "--device", type=device, default=default_device(), help="cpu, cuda, cuda:1, ... (default: cuda if available)"
    )
    options = parser.parse_args(arguments)
    return carry_out("sample", lambda: sample(options))


if __name__ == "__main__":
    sys.exit(main())
