"""The published GPT-3 sizes, and small ones for CPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A decoder's shape: layers, width of the residual stream, heads, context in tokens. Feed-forward is 4 x width."""

    layers: int
    width: int
    heads: int
    context: int


# "Language Models are Few-Shot Learners", arXiv 2005.14165, table 2.1. Two rows differ from the printed table, whose
# heads do not divide the width there: for 1.3B it prints 24 heads of 128 and a width of 2048 (here 16 heads of 128), for
# 13B 40 heads of 128 and a width of 5140 (here 5120).
SIZES = {
    "gpt3-125m": Size(layers=12, width=768, heads=12, context=2048),
    "gpt3-350m": Size(layers=24, width=1024, heads=16, context=2048),
    "gpt3-760m": Size(layers=24, width=1536, heads=16, context=2048),
    "gpt3-1.3b": Size(layers=24, width=2048, heads=16, context=2048),
    "gpt3-2.7b": Size(layers=32, width=2560, heads=32, context=2048),
    "gpt3-6.7b": Size(layers=32, width=4096, heads=32, context=2048),
    "gpt3-13b": Size(layers=40, width=5120, heads=40, context=2048),
    "gpt3-175b": Size(layers=96, width=12288, heads=96, context=2048),
    # Not in the paper: for tests, a laptop's demonstration, and a CPU overnight. Nano to midi are a ladder.
    "gpt3-nano": Size(layers=2, width=32, heads=2, context=256),
    "gpt3-micro": Size(layers=3, width=64, heads=4, context=256),
    "gpt3-milli": Size(layers=4, width=96, heads=6, context=256),
    "gpt3-tiny": Size(layers=2, width=64, heads=4, context=128),
    "gpt3-mini": Size(layers=4, width=128, heads=4, context=256),
    "gpt3-midi": Size(layers=6, width=256, heads=8, context=256),
}
