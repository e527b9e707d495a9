"""Which matrices one weight holds: fused projections, gates of recurrent layers, groups of convolutions, stacks of experts.

What counts is how a module's own code cuts the outputs of a projection. The tables record this for torch, transformers and timm,
and a test recomputes the modules' outputs from the split matrices. A class is also recognized by its base classes, because
`fully_shard` and `torch.nn.utils.parametrize` rename it. A projection that is fused but not split gets a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from celo2.holders import INPUT_FACTOR, Base, Parents, base_of, class_names, uses_of
from celo2.layout import Layout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OUTPUTS = ("out_features", "out_channels", "nf", "num_embeddings")  # attributes of layers that say how many outputs they have
GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))
OF_GATES = re.compile(r"weight_[ih]h(_l\d+(_reverse)?)?")

NOT_SPLIT = "fused, in one piece"
IN_UNITS = "fused, unequal parts: {} pieces as large as the smallest"


class Split(NamedTuple):
    """The order of a projection's outputs: the parts one after the other, and this sequence `repeats` times."""

    repeats: int
    parts: tuple[int, ...]  # outputs of each part


Splitter = Callable[[Any, int], Split]  # takes the module that uses the projection, and the projection's number of outputs


class Matrices(NamedTuple):
    """A weight as a stack of (outputs, inputs) matrices; without a layout the weight is one such matrix."""

    layout: Layout | None = None
    note: str = ""


# --- how modules cut their projections --------------------------------------------------------------------------------------


def equal(n: int) -> Splitter:
    """`n` equal parts one after the other, as for `chunk(n, dim=-1)`."""
    return lambda module, outputs: Split(1, (outputs // n,) * n)


def per_head(n: int) -> Splitter:
    """For each head `n` equal parts one after the other, as for `view(..., heads, n * width)`."""
    return lambda module, outputs: Split(heads(module), (outputs // (n * heads(module)),) * n)


def interleaved(n: int) -> Splitter:
    """The outputs of `n` equal parts alternate, one output of each part at a time."""
    return lambda module, outputs: Split(outputs // n, (1,) * n)


def heads(module: Any) -> int:
    """The number of attention heads of a module."""
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
    found = next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)
    return found or module.config.num_attention_heads


def query_then(kv: Callable[[Any], int]) -> Splitter:
    """[q; k; v], where k and v have `kv(module)` outputs and q the rest."""
    return lambda module, outputs: Split(1, (outputs - 2 * kv(module), kv(module), kv(module)))


def falcon(m: Any, outputs: int) -> Split:
    """Grouped: [queries; key; value] of each group. Multi-query: [all queries; one key; one value]. Otherwise per head."""
    if m.new_decoder_architecture:
        return Split(m.num_kv_heads, ((m.num_heads // m.num_kv_heads) * m.head_dim, m.head_dim, m.head_dim))
    return query_then(lambda m: m.head_dim)(m, outputs) if m.multi_query else per_head(3)(m, outputs)


def gpt_bigcode(m: Any, outputs: int) -> Split:
    """Multi-query: [q; k; v] with one key and one value head. Otherwise per head; [k; v] in cross-attention."""
    if m.is_cross_attention:
        return equal(2)(m, outputs)
    return query_then(lambda m: m.kv_dim)(m, outputs) if m.multi_query else per_head(3)(m, outputs)


def gpt2(m: Any, outputs: int) -> Split:
    """[q; k; v], or [k; v] in cross-attention."""
    return equal(outputs // m.split_size)(m, outputs) if outputs >= m.split_size else in_one_piece(m, outputs)


def timm_attention(m: Any, outputs: int) -> Split:
    """[q; k; v]; per head in MaxViT (`head_first`); as `levit` where keys and values differ in width."""
    if hasattr(m, "key_dim") and hasattr(m, "val_dim"):
        return levit(m, outputs)
    return per_head(3)(m, outputs) if getattr(m, "head_first", False) else equal(3)(m, outputs)


def grouped_by_key(m: Any, outputs: int) -> Split:
    """[q; k; v; z] for each key head; several value heads share a key head."""
    values = m.value_dim // m.num_k_heads
    return Split(m.num_k_heads, (m.head_k_dim, m.head_k_dim, values, values))


def levit(m: Any, outputs: int) -> Split:
    """[query, if there is one; key; wider value] of each head."""
    values = int(m.attention_ratio * m.key_dim) if hasattr(m, "attention_ratio") else m.val_dim
    keys = outputs // heads(m) - values
    return Split(heads(m), (*[m.key_dim] * (keys // m.key_dim), values))


def key_then_value(m: Any, outputs: int) -> Split:
    """Multi-head latent attention: [key without position; value] of each head."""
    return Split(outputs // (m.qk_nope_head_dim + m.v_head_dim), (m.qk_nope_head_dim, m.v_head_dim))


def in_one_piece(m: Any, outputs: int) -> Split:
    """Not split: no stack of equal matrices can hold the parts, as [z; x; B; C; dt] of a state-space model."""
    return Split(1, (outputs, 0))


# (attribute of the projection, how it is cut, classes of the modules that use it). A class whose name several packages use is
# given with its package.
FUSED: list[tuple[str, Splitter, str]] = [
    (
        "qkv",
        equal(3),
        "Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention Dots3NoteVisionAttention "
        "Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention Florence2VisionWindowAttention Glm4vMoeVisionAttention "
        "Glm4vVisionAttention Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention "
        "HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention PPFormulaNetVisionAttention "
        "PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention "
        "Qwen3OmniMoeVisionAttention Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen3_5MoeVisionAttention "
        "Qwen3_5VisionAttention Qwen4ExpVisionAttention SLANeXtVisionAttention Sam2MultiScaleAttention SamHQVisionAttention "
        "SamVisionAttention SegGptAttention TimesformerSelfAttention UnlimitedOcrSamVisionAttention VitDetAttention "
        "transformers.VisionAttention timm.ChannelAttention timm.ChannelAttentionV2 timm.CrossCovarianceAttn timm.DiffAttention "
        "timm.FactorAttnConvRelPosEnc timm.LocallyGroupedAttn timm.MHSA timm.MaskUnitAttention timm.MultiScaleAttention "
        "timm.AttentionPool2d timm.RotAttentionPool2d timm.RelPosAttention timm.TalkingHeadAttn timm.WindowAttention "
        "timm.WindowMultiHeadAttention timm.XCA timm.AttentionRope timm.EvaAttention",
    ),
    ("qkv", timm_attention, "timm.Attention timm.Attention2d timm.AttentionCl"),
    ("qkv", lambda m, n: equal(n // (m.num_heads * m.head_dim))(m, n), "timm.WindowAttentionGlobal"),  # or [k; v]
    ("qkv", query_then(lambda m: m.kv_dim), "Exaone4_5_VisionAttention"),
    ("queries_keys_values", levit, "LevitAttention"),
    ("keys_values", levit, "LevitAttentionSubsample"),
    ("kv", levit, "timm.AttentionDownsample"),
    ("qkv_linear", equal(3), "LayoutLMv2SelfAttention"),
    ("qkv_proj", query_then(lambda m: m.num_key_value_heads * m.head_dim), "Phi3Attention Phi4MultimodalAttention"),
    ("qkv_proj", lambda m, n: Split(4, (n // 12,) * 3), "CodeGenAttention"),  # [q; v; k] of each of four devices
    ("qkv_proj", per_head(3), "MiniMaxLightningAttention"),
    ("qkv_proj", in_one_piece, "MobileViTV2LinearSelfAttention"),
    ("Wqkv", equal(3), "ModernBertAttention MptAttention"),
    ("Wqkv", query_then(lambda m: m.num_key_value_heads * m.head_dim), "DbrxAttention"),
    ("c_attn", gpt2, "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention transformers.Attention"),
    ("c_attn", gpt_bigcode, "GPTBigCodeAttention"),
    ("query_key_value", per_head(3), "GPTNeoXAttention GPTNeoXJapaneseAttention BloomAttention PersimmonAttention"),
    ("query_key_value", falcon, "FalconAttention"),
    ("q_proj", per_head(2), "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention"),  # query and gate
    ("in_proj", per_head(3), "DisentangledSelfAttention"),  # DeBERTa
    ("in_proj", equal(2), "MambaMixer FalconMambaMixer JambaMambaMixer"),
    ("in_proj", interleaved(2), "ZambaMambaMixer"),
    ("in_proj", equal(3), "Lfm2ShortConv Lfm2MoeShortConv Lfm3ShortConv Lfm3VlVisionShortConv"),
    (
        "in_proj",
        in_one_piece,
        "Mamba2Mixer BambaMixer GraniteMoeHybridMambaLayer NemotronHMamba2Mixer Zamba2MambaMixer FalconH1Mixer "
        "timm.ParallelScalingBlock timm.DiffParallelScalingBlock",
    ),
    ("x_proj", in_one_piece, "MambaMixer FalconMambaMixer JambaMambaMixer"),
    ("in_proj_qkvz", grouped_by_key, "Qwen3NextGatedDeltaNet"),
    ("in_proj_ba", lambda m, n: Split(m.num_k_heads, (n // (2 * m.num_k_heads),) * 2), "Qwen3NextGatedDeltaNet"),
    (
        "in_proj_qkv",
        lambda m, n: Split(1, (m.key_dim, m.key_dim, m.value_dim)),
        "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet",
    ),
    ("to_kv", equal(2), "GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention EvollaSequenceCompressorAttention"),
    ("kv_proj", equal(2), "JetMoeAttention"),
    ("linear_kv", per_head(2), "EsmFoldInvariantPointAttention"),
    (
        "gate_up_proj",
        equal(2),
        "DiaMLP Dots3NoteAudioMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP MiniMaxM3VLDenseMLP "
        "Phi3MLP Phi4MultimodalAudioMLP Phi4MultimodalMLP Zamba2MLP",
    ),
    ("Wi", equal(2), "ModernBertMLP ModernBertDecoderMLP"),
    ("input_linear", equal(2), "GraniteMoeSWAMLP GraniteMoeHybridMLP GraniteMoeSharedMLP JetMoeMoE"),
    ("fc1", equal(2), "MoonshineDecoderMLP MoonshineStreamingDecoderMLP timm.GluMlp"),
    ("proj", equal(2), "ClvpGatedLinearUnit"),
    (  # what `glu` reads
        "pointwise_conv1",
        equal(2),
        "FastSpeech2ConformerConvolutionModule LasrEncoderConvolutionModule NemotronAsrStreamingEncoderConvolutionModule "
        "ParakeetEncoderConvolutionModule SeamlessM4TConformerConvolutionModule SeamlessM4Tv2ConformerConvolutionModule "
        "Wav2Vec2BertConvolutionModule Wav2Vec2ConformerConvolutionModule",
    ),
    ("pointwise_lin1", equal(2), "GraniteSpeech5EncoderConvolutionModule"),
    ("linear_start", equal(2), "Gemma3nAudioConformerLightConv1d Gemma4AudioLightConv1d"),
    ("up_conv", equal(2), "GraniteSpeechConformerConvModule GraniteSpeechPlusConformerConvModule"),
    ("conv", equal(2), "Data2VecAudioAdapterLayer Wav2Vec2AdapterLayer Wav2Vec2ConformerAdapterLayer WavLMAdapterLayer"),
    ("conv_layers", equal(2), "transformers.Conv1dSubsampler"),
    ("linear_1", equal(2), "AyaVisionMultiModalProjector Cohere2VisionMultiModalProjector"),
]
SPLITTERS = {(name, attribute): cut for attribute, cut, classes in FUSED for name in classes.split()}
# Weights of three axes, the last two heads and head width: the outputs are these two ("behind") or the first axis ("in front").
HEADED = {("XLNetRelativeAttention", name): "behind" for name in "qkvr"}
HEADED |= {("XLNetRelativeAttention", "o"): "in front", ("FunnelRelMultiheadAttention", "r_kernel"): "behind"}
LOOKS_FUSED = re.compile(r"qkv|query_key_value|gate_up|c_attn$|kv_a_proj_with_mqa")

# Experts (E, outputs, inputs), or (E, inputs, outputs) where transposed, with gate and up projection one after the other.
# Modules that carry `is_transposed` and `is_concatenated` say it themselves.
EXPERTS = {
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
}


def split_of(module: Any, attribute: str, outputs: int, parents: Parents) -> tuple[Split | None, str]:
    """How the outputs of a projection are cut, if a table or the module says so; else None and, if it looks fused, a note."""
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return equal(3)(module, outputs), ""
    if gates := next((n for cls, n in GATES if isinstance(module, cls) and OF_GATES.fullmatch(attribute)), 0):
        return equal(gates)(module, outputs), ""
    if "DeepseekV4GroupedLinear" in class_names(module) and attribute == "weight":
        return equal(module.n_groups)(module, outputs), ""
    looks_fused = attribute != "weight" and LOOKS_FUSED.search(attribute)
    for parent, name in () if INPUT_FACTOR.fullmatch(attribute) else uses_of(module, parents):
        cut = next((SPLITTERS[c, name] for c in class_names(parent) if (c, name) in SPLITTERS), None)
        if cut is None and name == "kv_b_proj" and hasattr(parent, "qk_nope_head_dim") and hasattr(parent, "v_head_dim"):
            cut = key_then_value
        if cut is not None:
            split = cut(parent, outputs) if attribute == "weight" else None
            return (split, "") if split and split.repeats * sum(split.parts) == outputs else (None, NOT_SPLIT)
        looks_fused = looks_fused or (attribute == "weight" and LOOKS_FUSED.search(name))
    return None, NOT_SPLIT if looks_fused else ""


# --- layouts ----------------------------------------------------------------------------------------------------------------


def units_of(split: Split) -> tuple[int, int] | None:
    """The parts of a split as equal units: (units in a repeat, outputs of a unit). None if they have no common unit size."""
    size = min(split.parts)
    return (sum(split.parts) // size, size) if size and not any(part % size for part in split.parts) else None


def projection(outputs: int, inputs: int, split: Split | None, note: str, transposed: bool = False, experts: int = 0) -> Matrices:
    """The matrices of a weight (outputs, inputs), or (inputs, outputs) if `transposed`; with an axis in front for `experts`."""
    units = units_of(split) if split else (1, outputs)
    if split is None or units is None:
        repeats, count, size = 1, 1, outputs
        note = note or (NOT_SPLIT if split else "")
    else:
        repeats, (count, size) = split.repeats, units
        if len(set(split.parts)) > 1:
            note = IN_UNITS.format(count)
    fused = (count, size) if repeats == 1 else (repeats, count, size)
    by_outputs = (0, 1) if repeats == 1 else (1, 0, 2)
    lead = (experts,) if experts else ()
    first = len(lead) + (1 if transposed else 0)  # the first axis of the outputs in `dims`
    dims = (*lead, inputs, *fused) if transposed else (*lead, *fused, inputs)
    axis_of_inputs = len(lead) if transposed else len(dims) - 1
    order = (*range(len(lead)), *(first + axis for axis in by_outputs), axis_of_inputs)
    layout = dims, order, (max(experts, 1) * count, repeats * size, inputs)
    plain = not transposed and not lead and count == 1
    return Matrices(None if plain else layout, note)


def stack(count: int, rows: int, cols: int, order: tuple[int, int, int] = (0, 1, 2)) -> Matrices:
    """A weight of `count` matrices (rows, cols), with these three axes permuted by `order`."""
    dims = count, rows, cols
    return Matrices((dims, order, (dims[order[0]], dims[order[1]], dims[order[2]])))


def matrices_of(module: Any, attribute: str, shape: tuple[int, ...], parents: Parents) -> Matrices:
    """The weight of a layer, of two or more axes, as a stack of (outputs, inputs) matrices."""
    names = class_names(module)
    base = base_of(module, attribute, parents)
    if base and len(shape) == 2:
        return factor_matrices(base, shape, parents)
    if isinstance(module, CONVOLUTIONS) and len(shape) >= len(module.kernel_size) + 2:
        lead = len(shape) - len(module.kernel_size) - 2
        if lead:  # several such weights
            return stack(math.prod(shape[:lead]), shape[lead], math.prod(shape[lead + 1 :]))
        if module.groups > 1 and attribute == "weight":
            return stack(module.groups, shape[0] // module.groups, math.prod(shape[1:]))
        split, note = (None, "") if base else split_of(module, attribute, shape[0], parents)
        found = projection(shape[0], math.prod(shape[1:]), split, note)
        return (
            found
            if found.layout
            else Matrices((shape, tuple(range(len(shape))), (1, shape[0], math.prod(shape[1:]))), found.note)
        )
    if is_experts(module) and len(shape) == 3:
        return expert_matrices(module, attribute, shape, parents)
    if "DbrxExpertGLU" in names:  # (experts × inner, width); the inner side is the input of w2
        experts = module.moe_num_experts
        return stack(experts, shape[0] // experts, shape[1], (0, 2, 1) if attribute == "w2" else (0, 1, 2))
    if by_head := next((HEADED[name, attribute] for name in names if (name, attribute) in HEADED), ""):
        return stack(1, shape[0], math.prod(shape[1:]), (0, 2, 1) if by_head == "behind" else (0, 1, 2))
    if len(shape) > 2:
        return stack(math.prod(shape[:-2]), shape[-2], shape[-1])
    transposed = "Conv1D" in names and attribute == "weight"  # transformers' linear layer of GPT-2, (inputs, outputs)
    inputs, outputs = shape if transposed else reversed(shape)
    return projection(outputs, inputs, *split_of(module, attribute, outputs, parents), transposed)


def factor_matrices(base: Base, shape: tuple[int, ...], parents: Parents) -> Matrices:
    """A low-rank factor of two axes: (outputs, rank) or (rank, outputs) is split like the weight of its layer, others are not."""
    outputs = next((n for name in OUTPUTS if isinstance(n := getattr(base.layer, name, None), int)), 0)
    if base.reads_inputs or outputs not in shape:
        return Matrices()
    transposed = shape[0] != outputs
    return projection(outputs, shape[0 if transposed else 1], *split_of(base.layer, "weight", outputs, parents), transposed)


def is_experts(module: nn.Module) -> bool:
    """Whether each parameter of a module holds the weights of several experts."""
    says_so = hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")
    return says_so or any(name in EXPERTS for name in class_names(module))


def expert_matrices(module: Any, attribute: str, shape: tuple[int, ...], parents: Parents) -> Matrices:
    """The weights of all experts. A fused gate and up projection is [gate; up], or gate and up alternate."""
    experts, *sides = shape
    name = next((name for name in class_names(module) if name in EXPERTS), "")
    transposed = module.is_transposed if hasattr(module, "is_transposed") else EXPERTS[name]
    outputs, inputs = reversed(sides) if transposed else sides
    split, note = split_of(module, attribute, outputs, parents)  # JetMoE: the module that holds the parallel experts decides
    if attribute.startswith("gate_up") and not INPUT_FACTOR.fullmatch(attribute):
        cut = equal if getattr(module, "is_concatenated", True) else interleaved
        split, note = cut(2)(module, outputs), ""
    return projection(outputs, inputs, split, note, transposed, experts)
