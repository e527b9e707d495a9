"""Output layers of every kind: of transformers, timm, one's own modules around them, and plain ones."""

import pytest
import torch
import transformers as T
from routed_models import by_name, update_of
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers import BertConfig, BertModel

from celo2 import param_groups


def by_adamw(model: nn.Module) -> set[str]:
    """Names of what takes AdamW and is no vector."""
    groups = by_name(param_groups(model, 1e-3, 2e-2))
    return {name for name, (p, group) in groups.items() if group["update"] == "adamw" and p.numel() > max(p.shape, default=1)}


def bert(vocab: int = 50) -> nn.Module:
    sizes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes))


class Own(nn.Module):
    """Layers of one's own on a pretrained model, in whatever order."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def block() -> nn.Module:
    return Own(norm=nn.LayerNorm(16), fc=nn.Linear(16, 64), act=nn.GELU(), proj=nn.Linear(64, 16))


def resnet() -> nn.Module:
    def stage(n: int) -> nn.Module:
        return nn.Sequential(*(Own(conv1=nn.Conv2d(n, n, 3), bn1=nn.BatchNorm2d(n), conv2=nn.Conv2d(n, n, 3)) for _ in range(2)))

    return Own(conv1=nn.Conv2d(3, 8, 7), layer1=stage(8), layer2=stage(8), fc=nn.Linear(8, 5))


def alexnet() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return Own(features=features, classifier=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5)))


class Timm(Own):
    """The interface of timm: the head is what `get_classifier` says, wherever it stands."""

    def get_classifier(self) -> nn.Module:
        return self.head


EMBEDDED = {"bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"}
EMBEDDED |= {"bert.embeddings.token_type_embeddings.weight"}
LM = {"wte": nn.Embedding(500, 16), "wpe": nn.Embedding(64, 16)}
BLOCKS = nn.ModuleList(block() for _ in range(2))
CASES = {
    "heads on BERT": (
        Own(bert=bert(), lm_head=nn.Linear(16, 50), out=nn.Linear(16, 5)),
        EMBEDDED | {"lm_head.weight", "out.weight"},
    ),
    "heads before BERT": (Own(out=nn.Linear(16, 5), bert=bert()), EMBEDDED | {"out.weight"}),
    "a head of two layers on BERT": (
        Own(bert=bert(), top=nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))),
        EMBEDDED | {"top.0.weight", "top.2.weight"},
    ),
    "blocks on BERT": (Own(bert=bert(), more=BLOCKS, out=nn.Linear(16, 5)), EMBEDDED | {"out.weight"}),
    "BERT in a wrapper": (
        nn.ModuleDict({"module": Own(bert=bert(), out=nn.Linear(16, 5))}),
        {f"module.{n}" for n in EMBEDDED | {"out.weight"}},
    ),
    "untied": (Own(**LM, h=BLOCKS, lm_head=nn.Linear(16, 500)), {"wte.weight", "wpe.weight", "lm_head.weight"}),
    "untied, GPT-2's linear layer": (
        Own(**LM, h=BLOCKS, result=T.pytorch_utils.Conv1D(500, 16)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "head first": (
        Own(result=nn.Linear(16, 500), **LM, h=BLOCKS, norm=nn.LayerNorm(16)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "padded": (Own(**LM, h=BLOCKS, result=nn.Linear(16, 512)), {"wte.weight", "wpe.weight", "result.weight"}),
    "padded, head first": (
        Own(result=nn.Linear(16, 512), **LM, h=BLOCKS, norm=nn.LayerNorm(16)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "padded, no blocks": (
        Own(**LM, c_fc=nn.Linear(16, 64), c_proj=nn.Linear(64, 16), result=nn.Linear(16, 512)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "vocabulary as wide as the blocks": (
        Own(wte=nn.Embedding(64, 16), h=BLOCKS, result=nn.Linear(16, 64)),
        {"wte.weight", "result.weight"},
    ),
    "one block": (
        Own(wte=nn.Embedding(64, 16), h=nn.ModuleList([block()]), result=nn.Linear(16, 64)),
        {"wte.weight", "result.weight"},
    ),
    "factorized": (
        Own(wte=nn.Embedding(500, 4), up=nn.Linear(4, 16), h=BLOCKS, result=nn.Linear(16, 500)),
        {"wte.weight", "result.weight"},
    ),
    "no head": (Own(**LM, h=BLOCKS, norm=nn.LayerNorm(16)), {"wte.weight", "wpe.weight"}),
    "classifier of tokens": (
        Own(**LM, h=BLOCKS, norm=nn.LayerNorm(16), result=nn.Linear(16, 5)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "several tasks": (Own(h=BLOCKS, one=nn.Linear(16, 5), two=nn.Linear(16, 7)), {"one.weight", "two.weight"}),
    "several tokens ahead": (
        Own(**LM, h=BLOCKS, ahead=nn.ModuleList(nn.Linear(16, 500) for _ in range(3))),
        {"wte.weight", "wpe.weight", *(f"ahead.{i}.weight" for i in range(3))},
    ),
    "called a head, norm after it": (Own(h=BLOCKS, head=nn.Linear(16, 5), norm=nn.LayerNorm(5)), {"head.weight"}),
    "head of two layers": (Own(h=BLOCKS, head=nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))), {"head.2.weight"}),
    "called a head inside a block": (Own(h=nn.ModuleList(Own(head=nn.Linear(16, 16), b=block()) for _ in range(2))), set()),
    "resnet": (resnet(), {"fc.weight"}),
    "alexnet": (alexnet(), {"classifier.3.weight"}),
    "point convolution": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)), {"2.weight"}),
    "lstm": (Own(wte=nn.Embedding(50, 16), lstm=nn.LSTM(16, 32), result=nn.Linear(32, 50)), {"wte.weight", "result.weight"}),
    "torch's encoder": (
        Own(
            wte=nn.Embedding(50, 16),
            body=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1),
            result=nn.Linear(16, 50),
        ),
        {"wte.weight", "result.weight"},
    ),
    "an encoder layer alone": (nn.TransformerEncoderLayer(16, 2, 32), set()),
    "attention alone": (nn.MultiheadAttention(16, 2), set()),
    "a layer alone": (nn.Linear(16, 16), set()),
    "blocks alone": (BLOCKS, set()),
    "timm": (Timm(head=nn.Linear(16, 5), blocks=BLOCKS), {"head.weight"}),
    "timm, no classes": (Timm(head=nn.Identity(), blocks=BLOCKS, reduction=nn.Linear(16, 8)), set()),
    "head on timm": (
        Own(body=Timm(head=nn.Identity(), blocks=BLOCKS, norm=nn.LayerNorm(16)), result=nn.Linear(16, 5)),
        {"result.weight"},
    ),
    "hidden layer of the embedding's shape": (
        Own(wte=nn.Embedding(64, 16), one=nn.Linear(16, 64), two=nn.Linear(64, 64), result=nn.Linear(64, 4)),
        {"wte.weight", "result.weight"},
    ),
    "hidden layer of the padded shape": (
        Own(wte=nn.Embedding(60, 16), one=nn.Linear(16, 64), two=nn.Linear(64, 64), result=nn.Linear(64, 4)),
        {"wte.weight", "result.weight"},
    ),
    "two hidden layers of the shape of the positions": (
        Own(wpe=nn.Embedding(16, 16), h=BLOCKS, one=nn.Linear(16, 16), two=nn.Linear(16, 16), result=nn.Linear(16, 3)),
        {"wpe.weight", "result.weight"},
    ),
    "hidden layer of the embedding's shape before an LSTM": (
        Own(wte=nn.Embedding(64, 16), one=nn.Linear(16, 64), lstm=nn.LSTM(64, 8), result=nn.Linear(8, 4)),
        {"wte.weight", "result.weight"},
    ),
    "head first, another layer last": (
        Own(result=nn.Linear(16, 500), **LM, h=BLOCKS, last=nn.Linear(16, 16)),
        {"wte.weight", "wpe.weight", "result.weight"},
    ),
    "head, then a block that predicts further ahead": (
        Own(wte=nn.Embedding(500, 16), h=BLOCKS, result=nn.Linear(16, 500), both=nn.Linear(32, 16)),
        {"wte.weight", "result.weight"},
    ),
    "adaptive softmax": (
        Own(wte=nn.Embedding(50, 16), h=BLOCKS, loss=nn.AdaptiveLogSoftmaxWithLoss(16, 50, [10, 20], div_value=2.0)),
        {"wte.weight", "loss.head.weight", *(f"loss.tail.{i}.{j}.weight" for i in (0, 1) for j in (0, 1))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_takes_adamw(case):
    model, expected = CASES[case]
    assert by_adamw(model) == expected


def test_bodies_keep_their_rule():
    """The layers between embeddings and heads take the rule, in BERT inside one's own module as in BERT itself."""
    own, alone = Own(bert=bert(), out=nn.Linear(16, 5)), bert()
    hidden = {n.removeprefix("bert.") for n, u in update_of(param_groups(own, 1, 1)).items() if u == "celo2"}
    assert hidden == {n for n, u in update_of(param_groups(alone, 1, 1)).items() if u == "celo2"} != set()


@pytest.mark.parametrize(
    ("name", "config", "heads"),
    [
        ("CLIPForImageClassification", "CLIPConfig", {"classifier.weight"}),
        ("SiglipForImageClassification", "SiglipConfig", {"classifier.weight"}),
        ("T5ForQuestionAnswering", "T5Config", {"qa_outputs.weight"}),
        ("WhisperForAudioClassification", "WhisperConfig", {"classifier.weight", "projector.weight"}),
        ("T5ForConditionalGeneration", "T5Config", set()),  # tied
        ("DINOv3ViTModel", "DINOv3ViTConfig", set()),
        ("PerceiverForMaskedLM", "PerceiverConfig", set()),  # names a parameter as its input embedding
    ],
)
def test_models_of_transformers_that_are_their_own_base(name, config, heads):
    config = getattr(T, config)()
    for key in ("num_hidden_layers", "num_layers", "encoder_layers", "num_self_attends_per_block"):
        if hasattr(config, key):
            setattr(config, key, 2)
    with torch.device("meta"):
        model = getattr(T, name)(config)
    updates = update_of(param_groups(model, 1, 1))
    for head in heads:
        assert updates[head] == "adamw"
    outside = {n for n in updates if n.endswith(".weight") and "." not in n.removesuffix(".weight") and "norm" not in n}
    assert not [n for n in outside if updates[n] == "celo2"]


def parametrized() -> nn.Module:
    p = parametrizations
    return nn.ModuleDict(
        {
            "conv": p.weight_norm(nn.Conv2d(3, 8, 3)),
            "depthwise": p.weight_norm(nn.Conv2d(8, 8, 3, groups=8)),
            "emb": p.weight_norm(nn.Embedding(50, 8)),
            "linear": p.spectral_norm(nn.Linear(8, 16)),
            "turned": p.orthogonal(nn.Linear(16, 16)),
            "lstm": p.weight_norm(nn.LSTM(8, 4), "weight_hh_l0"),
            "old": weight_norm(nn.Conv1d(8, 8, 3)),
            "older": spectral_norm(nn.Linear(8, 8)),
            "head": p.weight_norm(nn.Linear(8, 50, bias=False)),
        }
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights_are_routed_as_the_layer_that_they_parametrize():
    groups = by_name(param_groups(parametrized(), 1e-3, 2e-2, 0.1))
    found = {n: g["matrices"][2] if g["matrices"] else None for n, (_, g) in groups.items() if g["update"] == "celo2"}
    one = "parametrizations.weight.original"
    assert found == {
        f"conv.{one}1": (1, 8, 27),
        f"linear.{one}": None,
        f"turned.{one}": None,
        "lstm.weight_ih_l0": (4, 4, 8),
        "lstm.parametrizations.weight_hh_l0.original1": (4, 4, 4),
        "old.weight_v": (1, 8, 24),
        "older.weight_orig": None,
    }
    decays = {n: g["weight_decay"] for n, (_, g) in groups.items()}
    assert decays[f"emb.{one}1"] == decays[f"head.{one}1"] == decays[f"conv.{one}1"] == 0.1
    assert decays[f"conv.{one}0"] == decays["old.weight_g"] == decays[f"depthwise.{one}1"] == 0.0
