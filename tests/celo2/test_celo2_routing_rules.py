"""What a user says with `rules`, what the table notes, and what is refused: flattened weights."""

import pytest
import torch
from routed_models import MODELS, by_name, gpt2, stacked, star, update_of
from torch import nn

from celo2 import Celo2, ShardingError, param_groups, routing_table


@pytest.mark.parametrize(
    ("name", "rules", "changed"),
    [
        ("mixtral", {"*.mlp.gate": "adamw"}, {"model.layers.*.mlp.gate.weight"}),
        ("gpt2", {"transformer.h.*.mlp": "adamw"}, {f"transformer.h.*.mlp.{n}.weight" for n in ("c_fc", "c_proj")}),
        ("gpt2", {"*c_attn.weight": "adamw"}, {"transformer.h.*.attn.c_attn.weight"}),
        ("gpt2", {"lm_head": "celo2"}, {"transformer.wte.weight"}),  # tied: any name of the parameter counts
        ("gpt2", {"*": "adamw", "transformer.h": "celo2", "*.bias": "adamw", "*ln_*": "adamw"}, set()),  # the last one decides
    ],
)
def test_rules_overrule_and_the_table_says_so(name, rules, changed):
    plain, groups = (param_groups(MODELS[name](), 1e-3, 2e-2, 0.1, rules=r) for r in (None, rules))
    before, after = ({star(n): u for n, u in update_of(g).items()} for g in (plain, groups))
    assert {n for n in before if before[n] != after[n]} == changed
    for n, (_, group) in by_name(groups).items():
        assert group["lr"] == (1e-3 if group["update"] == "celo2" else 2e-2)
        assert group["weight_decay"] == by_name(plain)[n][1]["weight_decay"]
    lines = routing_table(groups).splitlines()
    assert {line.split()[0] for line in lines if line.endswith("overruled")} >= changed
    optimizer = Celo2(groups, lr=0.0)
    assert routing_table(optimizer.param_groups) == routing_table(groups)


def test_overruled_weight_keeps_its_matrices():
    groups = by_name(param_groups(gpt2(), 1e-3, 2e-2, rules={"*.c_attn": "celo2", "*wpe": "celo2"}))
    assert stacked(*groups["transformer.h.0.attn.c_attn.weight"]) == (3, 16, 16)
    assert stacked(*groups["transformer.wpe.weight"]) == (1, 32, 16)


def test_overruling_changes_neither_decay_nor_the_matrices_of_adamw():
    model = nn.ModuleDict({"mixer": nn.ParameterDict({"A_log": torch.zeros(8, 4)}), "conv": nn.Conv1d(8, 8, 3)})
    groups = by_name(param_groups(model, 1, 1, 0.1, rules={"mixer.A_log": "celo2", "conv": "adamw"}))
    assert [groups[n][1]["weight_decay"] for n in ("mixer.A_log", "conv.weight", "conv.bias")] == [0.0, 0.1, 0.0]
    assert groups["mixer.A_log"][1]["update"] == "celo2" and groups["conv.weight"][1]["matrices"] is None


def test_adamw_for_everything_is_said():
    model = gpt2()
    model.transformer.h.requires_grad_(False)
    with pytest.warns(UserWarning, match="no trainable parameter of this model takes the rule"):
        param_groups(model, 1e-3, 2e-2)


def test_rules_apply_to_a_base_rule_and_through_wrappers():
    model = nn.ModuleDict({"module": gpt2()})  # as in DistributedDataParallel
    groups = param_groups(model, 1e-3, 2e-2, variant="celo2-base", rules={"transformer.wte": "adamw"})
    assert {n for n, update in update_of(groups).items() if update == "adamw"} == {"module.transformer.wte.weight"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lm_haed": "adamw"}, r"'lm_haed'.*lm_head"),
        ({"transformer.wte.weigth": "adamw"}, r"transformer\.wte\.weight"),
        ({"zzz": "adamw"}, r"no parameter or module of the model matches 'zzz'$"),
        ({"lm_head": "muon"}, r"rules\['lm_head'\].*celo2, adamw.*'muon'"),
    ],
)
def test_rules_that_are_wrong(rules, message):
    with pytest.raises(ValueError, match=message):
        param_groups(gpt2(), 1e-3, 2e-2, rules=rules)


def test_without_notes_the_table_has_no_column_for_them():
    assert "note" not in routing_table(param_groups(gpt2(), 1e-3, 2e-2))
    assert all("notes" not in group for group in param_groups(gpt2(), 1e-3, 2e-2))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}) for _ in range(2))
        self.thing = nn.Parameter(torch.zeros(4, 8))


def test_what_is_not_known_is_noted_once():
    """A weight that looks fused in a class that no table knows, and a parameter of an unknown kind."""
    groups = param_groups(Odd(), 1e-3, 2e-2)
    noted = [line for line in routing_table(groups).splitlines() if "fused" in line or "not recognized" in line]
    assert [line.split()[0] for line in noted] == ["blocks.*.qkv.weight", "thing"]
    assert update_of(groups)["thing"] == "adamw"
    assert update_of(groups)["blocks.0.qkv.weight"] == "celo2"


@pytest.mark.parametrize("shape", [(64,), (0,), (37,)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Embedding(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_flattened_weight_is_refused(make, shape):
    """What FSDP1 with original parameters leaves of a weight: its piece of the flat parameter, perhaps empty."""
    model = nn.Sequential(nn.Linear(8, 8), make())
    model[1].weight = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ShardingError, match=r"'1\.weight'.*fully_shard"):
        param_groups(model, 1e-3, 2e-2)


def test_several_weights_in_one_are_a_stack_or_a_table():
    """Subclasses of layers whose weight has more axes: an ensemble, and several codebooks."""

    def of(layer: nn.Module, *shape: int) -> nn.Module:
        layer.weight = nn.Parameter(torch.zeros(shape))
        return layer

    layers = [of(nn.Linear(4, 5), 3, 5, 4), of(nn.Conv2d(3, 5, 2), 7, 5, 3, 2, 2), of(nn.Embedding(4, 5), 3, 4, 5)]
    groups = by_name(param_groups(nn.Sequential(*layers, nn.Linear(5, 2)), 1e-3, 2e-2, 0.1))
    assert stacked(*groups["0.weight"]) == (3, 5, 4) and stacked(*groups["1.weight"]) == (7, 5, 12)
    assert [groups[f"{i}.weight"][1]["update"] for i in range(4)] == ["celo2", "celo2", "adamw", "adamw"]


def test_lazy_layer_is_refused():
    with pytest.raises(ValueError, match=r"'1\.weight' has no shape yet"):
        param_groups(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3)), 1e-3, 2e-2)


def test_quantized_frozen_weight_is_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    assert "0.weight" not in update_of(param_groups(model, 1e-3, 2e-2))


def test_a_model_in_which_nothing_is_trainable_gets_a_warning():
    for model in (nn.ReLU(), nn.Linear(4, 4).requires_grad_(False)):
        with pytest.warns(UserWarning, match="this model has no trainable parameter"):
            assert param_groups(model, lr=1e-3, adamw_lr=1e-3) == []


def test_a_pattern_of_frozen_parameters_alone_gets_a_warning():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="rules: '1' matches only frozen parameters"):
        groups = param_groups(model, lr=1e-3, adamw_lr=1e-3, rules={"1": "adamw"})
    assert all(not name.startswith("1.") for group in groups for name in group["param_names"])
