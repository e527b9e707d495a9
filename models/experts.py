"""Compute experts one after the other if torch's grouped product refuses their sizes."""

from torch import nn
from transformers import PreTrainedModel

ALIGNED = 8  # numbers: a row in a grouped product must be a multiple of 16 bytes, in bfloat16, too


def fit_experts(model: PreTrainedModel) -> None:
    """Make experts run if, in their weights (experts, R, C), R or C is no multiple of ALIGNED. Call it before sharding.

    transformers computes all experts in one grouped product, which fails then with "strides should be multiple of 16 bytes".
    Its loop over the experts gives the same to within rounding.
    """
    if model.config._experts_implementation == "grouped_mm" and needs_loop(model):
        model.set_experts_implementation("eager")


def needs_loop(model: PreTrainedModel) -> bool:
    """Whether `model` has experts that the grouped product, the default of transformers, refuses."""
    if model.get_correct_experts_implementation(None) != "grouped_mm":  # no experts, or of a kind that has no such product
        return False
    modules = [module for module in model.modules() if not isinstance(module, nn.Conv1d)]
    stacks = [p.shape for module in modules for p in module.parameters(recurse=False) if p.ndim == 3]
    return any(size % ALIGNED for shape in stacks for size in shape[1:])
