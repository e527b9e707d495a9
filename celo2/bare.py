"""Classify parameters that no layer of torch explains, by the words of their names: as matrices, tables or vectors."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

from celo2.holders import class_names

STATE_SPACE = re.compile(
    "(log_)?[A-D](_logs?|_real|_imag)|log_[A-D]|a_log|Ds?|d_skip|(inv_|log_)?dt|dt_bias"
)  # whole names, as in Mamba
GENERIC = re.compile("weights?|params?|parameters?")  # carries no information at the end of a name
# The last word tells what a parameter is: "gate_proj" is a projection, "proj_gate" a gate.
VECTOR = re.compile("gates?|gating|scales?|scaling|gamma|beta|alpha|lambda|temperature|tau|decay|mix|slopes?|norm|gains?")
GATE = re.compile("gates?|gating")
MATRIX = re.compile("proj|projection|projector|kernel|matrix|linear|dense|fc|mlp|router|lora")
LETTER = re.compile(r"w[a-z]?\d*|w?(qkv|kv|[qkvour])\d*|up|down|in|out|hidden|recurrent")  # of hand-written layers: W_q, w1, up
# Words beside such a letter: a scale (norm_q), a bias (b_Q; B_q is a low-rank factor), or a parameter that is no weight.
ADDED = re.compile("norms?|scales?|scaling|gains?|gamma|beta|alpha|temperature|tau|slopes?")
BIAS = re.compile(r"b\d*(_|[A-Z])")
NO_WEIGHT = re.compile("[hcs]0|init|inits|initial|mix|decay|lambda")  # h0_in, init_hidden
BOUNDARY = re.compile(r"(model\.|module\.)*W_[EU]")  # embedding and unembedding, where the model itself holds them
# If any word of a name matches, the rows of the parameter are positions, types, tokens or classes.
TABLE = re.compile(
    "emb|embs|embeds?|embeddings?|encodings?|pos|positions?|positional|rel|relpos|ape|pe|types?|tokens?|quer(y|ies)|probe|latents?|"
    "registers?|cls|class|classes|mask|prompts?|prefix|pad|level|segment|seg|table|codebooks?|codevectors|prototypes?|anchors?|"
    "memory|heads?|classifier|logits|unembed|unembedding|wte|wpe|tok|vocab|vocabulary|lookup"
)

# Compared with the last word of the module's class, or of the name under which the module that holds a `weight` is known. All
# words of TABLE count there, unless a word of these names is that of a layer (NO_NORM); the following count for layers, too.
HOLDS_TABLE = re.compile(
    "emb|embs|embeds?|embeddings?|encodings?|pos|positions?|positional|ape|pe|wte|wpe|codebooks?|heads?|classifier|unembed|unembedding"
)
PROJECTIONS = {"query"}  # of these words, those under which attention holds a projection
# Compared with the same words: modules that scale their inputs, also per head with a `weight` of two axes.
HOLDS_NORM = re.compile(r"[a-z]*norm\d*")
NO_NORM = re.compile(f"conv.*|weight|{MATRIX.pattern}")  # any word: a layer with a norm (LinearNorm, WeightNorm)

Kind = Literal["vector", "table", "matrix", "unknown"]


def kind_of(module: nn.Module, attribute: str, p: Tensor, name: str) -> Kind:
    """The kind of a parameter `p` of two or more axes, which `module` holds as `attribute`; `name` is its full name."""
    if STATE_SPACE.fullmatch(attribute) or getattr(p, "_no_weight_decay", False):
        return "vector"
    holder = name.rpartition(".")[0].rpartition(".")[2]
    holders = [words_of(part) for part in (*class_names(module), holder) if words_of(part)]
    kinds = [words[-1] for words in holders]
    is_layer = any(NO_NORM.fullmatch(word) for words in holders for word in words)
    is_table = any(map(HOLDS_TABLE.fullmatch, kinds)) or (not is_layer and any(map(TABLE.fullmatch, {*kinds} - PROJECTIONS)))
    words = words_of(attribute)
    if not words and not is_table and not is_layer and any(map(HOLDS_NORM.fullmatch, kinds)):
        return "vector"
    if not words and not is_table and p.ndim == 2 and not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return "matrix"  # `weight` of a module like a linear layer: a router, a quantized layer
    while not words and "." in name:  # the names of the modules around it tell more
        name = name.rpartition(".")[0]
        words = words_of(name.rpartition(".")[2])
    last = words[-1] if words else ""
    is_kernel_of_depth_1 = p.ndim >= 3 and p.shape[1] == 1 and any(word.startswith("conv") for word in words)
    makes_gate = GATE.fullmatch(last) and GENERIC.fullmatch(attribute.rpartition("_")[2]) and words_of(attribute)
    if makes_gate and p.ndim >= 3 and min(p.shape[-2:]) > 1:
        return "matrix"  # input_gate_weight: the weight that computes the gate, for each head
    if VECTOR.fullmatch(last) or {"bias", "biases"} & set(words) or is_kernel_of_depth_1:
        return "vector"
    if MATRIX.fullmatch(last) or "lora" in words:
        return "matrix"
    if is_table or any(map(TABLE.fullmatch, words)) or BOUNDARY.fullmatch(name):
        return "table"
    others = [] if last.startswith("w") or "w" in words else words[:-1]  # w_q, decay_w1: the w says that it is a weight
    if not LETTER.fullmatch(last) or any(map(NO_WEIGHT.fullmatch, others)):
        return "unknown"
    is_vector = any(map(ADDED.fullmatch, others)) or BIAS.match(name.rpartition(".")[2])
    return "vector" if is_vector else "matrix"


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, without GENERIC words at its end."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)]
    while words and GENERIC.fullmatch(words[-1]):
        words.pop()
    return words
