"""Optimizers of libraries: routed, refused in one line, and whole in a checkpoint."""

import sys
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from celo2 import Celo2
from celo2.distributed.shard import LocalShard
from configs.load import ConfigError
from configs.schema import OPTIMIZERS, Checkpoint, Config, Optimizer, Train
from launch.checkpoint.load import load_checkpoint
from launch.checkpoint.save import take_snapshot, write_checkpoint
from launch.distributed.setup import make_strategy
from launch.monitoring.step_statistics import StepStatistics, hidden_names
from launch.optimizers.build import Combined, build_optimizer, check_optimizer, optimizer_groups, set_mode
from launch.optimizers.decay import couples
from launch.optimizers.table import TABLE
from launch.optimizers.third_party import DECAY_BESIDE, ThirdParty, pack, unpack
from models import build_model

LIBRARIES = [name for name, entry in TABLE.items() if entry.third_party]


def tiny(seed=0):
    torch.manual_seed(seed)
    return build_model(layers=1, width=16, heads=2, context=8, vocab_size=64)


def optimizer_of(config, model):
    return build_optimizer(config, optimizer_groups(config, model))


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    set_seed(seed)  # as `backward` does, for optimizers that draw random numbers
    optimizer.step()


def config_of(name):
    if name in LIBRARIES:
        pytest.importorskip(TABLE[name].path.partition(".")[0])
    return Optimizer(name=name, lr=1e-3)


def strategy_of(config, seed, steps=1000):
    """A model and its optimizer as a run of one process has them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return make_strategy(Config(optimizer=config, train=Train(steps=steps)), Accelerator(cpu=True), tiny(seed))


class Listing(torch.optim.Optimizer):
    """Keeps numbers, lists, None and a counter in its group, as libraries do."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, kind="plain"):
        if kind not in ("plain", "other"):
            raise ValueError(f"kind {kind!r}\nis unknown")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "kind": kind})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("history", [[], torch.zeros_like(p)])
                state["history"][1] += p.grad * group["seen"]
                state["step"] = state.get("step", 0) + 1
                state["nothing"] = None
                p -= group["lr"] * state["history"][1] * state["step"]


def test_names_of_the_schema_are_those_that_are_built():
    assert list(TABLE) == list(OPTIMIZERS)
    for name in OPTIMIZERS:
        check_optimizer(config_of(name))


def test_what_the_table_says_of_an_optimizer_is_so():
    """Roles, classes and the state for each weight; tests/launch/test_train_distributed.py covers sharded parameters."""
    for name, entry in TABLE.items():
        model, config = tiny(), config_of(name)
        groups = optimizer_groups(config, model)
        assert ("other" in {group["role"] for group in groups}) != entry.all_hidden
        optimizer = build_optimizer(config, groups)
        assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)
        assert isinstance(optimizer, Celo2) == entry.takes_rule
        assert isinstance(optimizer, Combined) == (entry.route != "all" and not entry.takes_rule)
        set_mode(optimizer, "train")
        step(model, optimizer, seed=0)
        weight = model.model.layers[0].mlp.up_proj.weight
        numbers = sum(value.numel() for value in optimizer.state[weight].values() if value.numel() >= weight.numel())
        if not entry.third_party:
            assert numbers == entry.state_per_weight * weight.numel(), name


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_only_optimizers_with_a_rule_divide_their_state(name):
    config = config_of(name)
    with pytest.raises(ConfigError, match=f"divides the state of celo2 and celo2-base, not of {name}"):
        build_optimizer(config, optimizer_groups(config, tiny()), shard_state=True)


def test_unknown_optimizers_need_whole_parameters():
    config = Optimizer(name="torch.optim.NAdam")
    groups = optimizer_groups(config, tiny())
    p = groups[0]["params"][0]
    groups[0]["params"][0].local_shard = LocalShard(tuple(p.shape), 0, p.numel() // 2, group="some group")
    with pytest.raises(ConfigError, match=r"torch.optim.NAdam does not support sharded parameters: use distributed.strategy=ddp"):
        build_optimizer(config, groups)


def test_state_becomes_tensors_and_comes_back():
    state = {"exp_avg": torch.ones(2), "step": 3, "on": True, "x": 0.1, "none": None, "GG": [torch.eye(2), [], (1, 2.5)]}
    packed = pack(state)
    assert all(isinstance(value, torch.Tensor) for value in packed.values())
    back = unpack(dict(sorted(packed.items())))
    assert back["GG"][1:] == [[], (1, 2.5)] and torch.equal(back["GG"][0], torch.eye(2))
    assert torch.equal(back["exp_avg"], torch.ones(2))
    assert {key: back[key] for key in ("step", "on", "x", "none")} == {"step": 3, "on": True, "x": 0.1, "none": None}
    with pytest.raises(ConfigError, match=r"keeps a set \('seen'\)"):
        pack({"seen": {1}})


@pytest.mark.parametrize("name", [*LIBRARIES, "torch.optim.NAdam", "torch.optim.Adafactor", f"{__name__}.Listing"])
def test_a_library_behaves_as_without_the_adapter(name, monkeypatch):
    """The same steps on the library's own class, over the same groups, are the same bits."""
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Listing=Listing))
    config = config_of(name)
    ours, theirs = tiny(), tiny()
    optimizer = optimizer_of(config, ours)
    own = optimizer_of(config, theirs)
    parts = own.optimizers if isinstance(own, Combined) else (own,)
    bare = [part.inner if isinstance(part, ThirdParty) else part for part in parts]
    for part in (optimizer, *bare):
        set_mode(part, "train")
    for seed in range(3):
        step(ours, optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        set_seed(seed)
        for part in bare:
            part.step()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", [*LIBRARIES, "torch.optim.NAdam", f"{__name__}.Listing"])
def test_a_checkpoint_holds_all_that_a_library_remembers(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Listing=Listing))
    config = config_of(name)
    going, resumed = strategy_of(config, 0), strategy_of(config, 1)
    set_mode(going.optimizer, "train")
    steps = 11 if name == "soap" else 2  # beyond its 10 steps between eigenbases
    for seed in range(steps):
        step(going.model, going.optimizer, seed)
    set_mode(going.optimizer, "eval")
    path = write_checkpoint(tmp_path, take_snapshot(going, {"step": 11}), Checkpoint(keep=1))[0]
    load_checkpoint(path, resumed)
    for strategy in (going, resumed):
        set_mode(strategy.optimizer, "train")
        for seed in range(steps, 2 * steps + 1):
            step(strategy.model, strategy.optimizer, seed)
    for (key, a), b in zip(going.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), key
        assert set(going.optimizer.state[a]) == set(resumed.optimizer.state[b])


def test_the_average_of_schedule_free_is_what_is_evaluated():
    model = tiny()
    optimizer = optimizer_of(config_of("schedule-free"), model)
    optimizer.train()
    for seed in range(5):
        step(model, optimizer, seed)
    trained = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    assert any(not torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True))
    optimizer.train()
    worst = max((a - b).abs().max().item() for a, b in zip(trained, model.parameters(), strict=True))
    assert worst < 1e-6  # measured 6e-8: there and back again is rounding


def test_routes():
    everything = optimizer_of(Optimizer(name="torch.optim.NAdam", route="all", lr=1.0, adamw_lr=0.5), tiny())
    assert isinstance(everything, ThirdParty) and {group["lr"] for group in everything.param_groups} == {1.0, 0.5}
    hidden = optimizer_of(Optimizer(name="torch.optim.NAdam", lr=1.0, adamw_lr=0.5), tiny())
    library, adamw = hidden.optimizers
    assert {group["lr"] for group in library.param_groups} == {1.0}
    assert isinstance(adamw, torch.optim.AdamW) and {group["lr"] for group in adamw.param_groups} == {0.5}
    claimed = [p for group in hidden.param_groups for p in group["params"]]
    assert len(claimed) == len({id(p) for p in claimed}) == len(list(tiny().parameters()))


DECOUPLING = {
    "NAdam": {},
    "Adam": {},
    "RAdam": {},
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adagrad": {},
    "Adamax": {},
}


@pytest.mark.parametrize("name", DECOUPLING)
def test_the_decay_of_a_dotted_path_is_decoupled(name):
    """Each step is the one without decay, from weights that the decay has shrunk; without a gradient, 2 becomes 1.998."""
    arguments = DECOUPLING[name] or None
    path, lr, decay = f"torch.optim.{name}", 0.01, 0.1
    decayed, bare = tiny(), tiny()
    optimizer = optimizer_of(Optimizer(name=path, route="all", lr=lr, weight_decay=decay, arguments=arguments), decayed)
    plain = optimizer_of(Optimizer(name=path, route="all", lr=lr, weight_decay=0.0, arguments=arguments), bare)
    names = ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias")
    weight, bias = (decayed.model.get_parameter(key) for key in names)
    other, other_bias = (bare.model.get_parameter(key) for key in names)
    for seed in range(3):
        step(decayed, optimizer, seed)
        with torch.no_grad():
            other.mul_(1 - lr * decay)
        step(bare, plain, seed)
    torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)  # coupled decay is off by 3e-4 or more
    assert torch.equal(bias, other_bias)

    model = tiny()
    alone = optimizer_of(Optimizer(name=path, route="all", lr=lr, weight_decay=decay, arguments=arguments), model)
    weight = model.model.get_parameter(names[0])
    with torch.no_grad():
        weight.fill_(2.0)
    weight.grad = torch.zeros_like(weight)
    alone.step()
    torch.testing.assert_close(weight, torch.full_like(weight, 1.998), rtol=0, atol=1e-6)


def test_a_decay_in_the_gradient_can_be_asked_for_where_there_is_a_switch():
    config = Optimizer(name="torch.optim.NAdam", arguments={"decoupled_weight_decay": False})
    library = optimizer_of(config, tiny()).optimizers[0]
    assert [group["decoupled_weight_decay"] for group in library.param_groups] == [False]
    assert [group["weight_decay"] for group in library.param_groups] == [0.1]


def test_a_decay_beside_the_optimizer_leaves_parameters_without_a_gradient_alone():
    model = tiny()
    optimizer = optimizer_of(Optimizer(name="torch.optim.RMSprop", route="all", lr=1.0), model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_named_ones_have_a_decay_of_their_own(name):
    """Their authors' decay is decoupled, and stays in the library's hands."""
    optimizer = optimizer_of(config_of(name), tiny())
    library = getattr(optimizer, "optimizers", [optimizer])[0]
    assert not any(DECAY_BESIDE in group for group in library.param_groups)
    assert all(group["weight_decouple"] for group in library.param_groups if "weight_decouple" in group)


def test_a_decay_of_another_kind_is_left_alone():
    """A class that does not step on a parameter alone, or ignores the decay, is none that adds it to the gradient."""
    for cls in (Listing, Learned, torch.optim.Adafactor, torch.optim.Muon):
        assert not couples(cls, {}, torch.device("cpu")), cls
    assert not couples(torch.optim.SGD, {}, torch.device("cpu"))  # the same as decoupled decay
    assert couples(torch.optim.SGD, {"momentum": 0.9}, torch.device("meta"))


def test_a_trial_of_the_decay_leaves_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    couples(torch.optim.RMSprop, {}, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_lion_decays_three_times_as_much():
    lion = optimizer_of(config_of("lion"), tiny())
    assert [group["weight_decay"] for group in lion.param_groups] == pytest.approx([0.3, 0.3, 0.0])


# What each of the named ones updates itself, and what has optimizer.lr (1.0) where adamw_lr is 0.5: as its authors use it.
ROUTED = {
    "normuon": ("hidden", "hidden"), "soap": ("hidden", "hidden"), "mars": ("matrices", "matrices"),
    "scion": ("matrices", "matrices"),
    "lion": ("all", "all"), "kron": ("all", "all"), "adafactor": ("all", "all"), "ademamix": ("all", "hidden"),
    "schedule-free": ("all", "hidden"),
}  # fmt: skip
KINDS = {"layers.0.mlp.up_proj.weight": "hidden", "embed_tokens.weight": "matrices", "norm.bias": "all"}


@pytest.mark.parametrize("name", ROUTED)
def test_who_updates_what_with_which_learning_rate(name):
    config = config_of(name)
    config.lr, config.adamw_lr = 1.0, 0.5
    model = tiny()
    optimizer = build_optimizer(config, optimizer_groups(config, model), steps=77)
    own = getattr(optimizer, "optimizers", [optimizer])[0]
    rank = ("hidden", "matrices", "all").index
    for key, kind in KINDS.items():
        p = model.model.get_parameter(key)
        mine = [group for group in own.param_groups if any(q is p for q in group["params"])]
        assert bool(mine) == (rank(kind) <= rank(ROUTED[name][0])), key
        (group,) = [group for group in optimizer.param_groups if any(q is p for q in group["params"])]
        assert group["lr"] == (1.0 if rank(kind) <= rank(ROUTED[name][1]) else 0.5), key
    if name == "scion":
        assert [(group["norm_type"], group["scale"], group["constraint"]) for group in own.param_groups] == [
            (2, 50.0, True), (4, 3000.0, True)
        ]  # fmt: skip
    if name == "ademamix":
        assert {group["t_alpha_beta3"] for group in own.param_groups} == {77}


class Learned(torch.optim.Optimizer):
    """Of the same signatures and habits as PyLO's VeLO: `step(loss)`, the number of steps, state from the constructor, and memory
    in attributes, which its own state_dict alone would hold."""

    def __init__(self, params, lr=1e-3, num_steps=10000, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.num_steps, self.static = num_steps, torch.ones(2)
        self.loss_buffer = {"means": torch.zeros(3), "iteration": torch.tensor(0)}
        self.lstm_hidden_state = (torch.zeros(2), torch.zeros(2))
        for group in self.param_groups:
            group["step"] = 0
            for place, p in enumerate(group["params"]):
                self.state[p] |= {"layer_idx": place, "mom": torch.zeros((*p.shape, 3))}

    @torch.no_grad()
    def step(self, loss):
        iteration = self.loss_buffer["iteration"] + 1
        self.loss_buffer = {"means": self.loss_buffer["means"] * 0.9 + loss, "iteration": iteration}
        self.lstm_hidden_state = (self.lstm_hidden_state[0] + iteration, self.lstm_hidden_state[1] - loss)
        for group in self.param_groups:
            group["step"] += 1
            rate = group["lr"] * (1 - group["step"] / self.num_steps) * self.loss_buffer["means"].mean()
            for p in group["params"]:
                self.state[p]["mom"].lerp_(p.grad[..., None], 0.1)
                p -= rate * self.state[p]["mom"].mean(-1) + 1e-3 * self.lstm_hidden_state[0].mean()


class Closing(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def test_a_learned_optimizer_gets_loss_and_steps_and_keeps_its_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Learned=Learned, Closing=Closing))
    config = Optimizer(name=f"{__name__}.Learned", route="all", weight_decay=0.0, arguments={"num_steps": "train.steps"})
    going, resumed = strategy_of(config, 0, steps=50), strategy_of(config, 1, steps=50)
    twin = tiny(0)
    alone = Learned([{"params": list(twin.parameters())}], num_steps=50, lr=1e-3)

    def train(strategy, t):
        strategy.counter.loss = torch.tensor(1.0 + t)
        step(strategy.model, strategy.optimizer, t)

    for t in range(4):
        train(going, t)
        for p, q in zip(twin.parameters(), going.model.parameters(), strict=True):
            p.grad = q.grad
        alone.step(torch.tensor(1.0 + t))
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), going.model.parameters(), strict=True))
    path = write_checkpoint(tmp_path, take_snapshot(going, {"step": 4}), Checkpoint(keep=1))[0]
    load_checkpoint(path, resumed)
    for strategy in (going, resumed):
        train(strategy, 4)
    for (key, a), b in zip(going.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), key
    assert resumed.counter.inner.num_steps == 50 and int(resumed.counter.inner.loss_buffer["iteration"]) == 5
    with pytest.raises(ConfigError, match=r"is not supported: its step needs 'closure', and train.py provides only the loss"):
        check_optimizer(Optimizer(name=f"{__name__}.Closing"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Optimizer(name="no_such_package.Soap"), "cannot import 'no_such_package'"),
        (Optimizer(name="."), "optimizer .: cannot import ''"),
        (Optimizer(name=".local.Soap"), "optimizer .local.Soap: cannot import '.local'"),
        (Optimizer(name="torch.optim.Nadam"), "'torch.optim' has no Nadam; did you mean NAdam?"),
        (Optimizer(name="torch.nn.Linear"), "torch.nn.Linear is not a torch.optim.Optimizer"),
        (
            Optimizer(name="torch.optim.NAdam", arguments={"beta": 1}),
            "optimizer.arguments: torch.optim.nadam.NAdam has no argument",
        ),
        (Optimizer(name="torch.optim.NAdam", arguments={"beta": 1}), "has no argument 'beta'; did you mean 'betas'?"),
        (Optimizer(name="torch.optim.NAdam", arguments={"lr": 1}), "give it as optimizer.lr"),
        (
            Optimizer(name="torch.optim.NAdam", arguments={"betas": [2, 3]}),
            "optimizer.arguments: torch.optim.nadam.NAdam refuses its arguments: Invalid beta parameter",
        ),
        (Optimizer(name="lion", state_dtype="bf16"), "state_dtype bf16 is for celo2 and celo2-base, not for lion"),
        (Optimizer(name="torch.optim.Rprop"), "has no weight decay: set optimizer.weight_decay=0"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ConfigError) as error:
        check_optimizer(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamw", {"amsgrad": "on"}, "optimizer.arguments.amsgrad is 'on', expected true or false"),
        ("adamw", {"foreach": "on"}, "optimizer.arguments.foreach is 'on', expected true or false"),
        ("torch.optim.Adam", {"betas": 0.9}, "optimizer.arguments.betas is 0.9, expected 2 numbers, such as [0.9, 0.999]"),
        ("torch.optim.Adam", {"betas": [0.9]}, "optimizer.arguments.betas is [0.9], expected 2 numbers, such as [0.9, 0.999]"),
        ("torch.optim.Adam", {"betas": [0.9, "b"]}, "optimizer.arguments.betas is [0.9, 'b'], expected 2 numbers, "),
        (
            "torch.optim.Adam",
            {"betas": {"a": 1}},
            "optimizer.arguments.betas is {'a': 1}, expected 2 numbers, such as [0.9, 0.999]",
        ),
        ("torch.optim.Adam", {"betas": None}, "optimizer.arguments.betas is None, expected 2 numbers, such as [0.9, 0.999]"),
        ("torch.optim.Adam", {"eps": "small"}, "optimizer.arguments.eps is 'small', expected a number, such as 1e-08"),
        ("torch.optim.Adam", {"eps": True}, "optimizer.arguments.eps is True, expected a number, such as 1e-08"),
        ("muon", {"ns_steps": 2.5}, "optimizer.arguments.ns_steps is 2.5, expected a whole number, such as 5"),
        ("celo2", {"betas": 0.9}, "optimizer.arguments.betas is 0.9, expected 2 numbers, such as [0.9, 0.95]"),
        ("celo2", {"orthogonalize": "no"}, "optimizer.arguments.orthogonalize is 'no', expected true or false"),
        ("soap", {"data_format": 3}, "optimizer.arguments.data_format is 3, expected text"),
    ],
)
def test_an_argument_of_another_type_than_its_default_is_named(name, arguments, message):
    if name in LIBRARIES:
        pytest.importorskip(TABLE[name].path.partition(".")[0])
    with pytest.raises(ConfigError) as error:
        check_optimizer(Optimizer(name=name, arguments=arguments))
    assert message in str(error.value) and "\n" not in str(error.value)


class Loose(torch.optim.SGD):
    """Without annotations, and with numbers of any length."""

    def __init__(self, params, lr=1e-3, weight_decay=0, clip=False, scales: tuple[float, ...] = (1.0,), name=None):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torch.optim.Adam", {"betas": [0.0, 0.5], "eps": 1, "fused": None, "foreach": True}),
        ("torch.optim.Adafactor", {"eps": [None, 0.1]}),
        ("torch.optim.Adafactor", {"eps": [1e-30, 0.1]}),
        ("muon", {"adjust_lr_fn": "original"}),
        ("test_launch_optimizers.Loose", {"clip": 1.0, "scales": [1, 2, 3], "name": "mine"}),
        ("test_launch_optimizers.Loose", {"clip": True, "name": [1]}),
    ],
)
def test_arguments_that_fit_are_taken(name, arguments):
    check_optimizer(Optimizer(name=name, arguments=arguments))


def test_a_missing_library_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match="pip install schedulefree"):
        check_optimizer(Optimizer(name="schedule-free"))


def test_arguments_reach_the_built_in_ones():
    assert optimizer_of(Optimizer(name="adamw", arguments={"betas": [0.8, 0.9]}), tiny()).defaults["betas"] == (0.8, 0.9)
    with pytest.raises(ConfigError, match="has no argument 'momentun'; did you mean 'momentum'"):
        optimizer_of(Optimizer(name="muon", arguments={"momentun": 0.9}), tiny())


def test_statistics_of_time_and_change():
    weight = nn.Parameter(torch.full((300, 300), 2.0))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    statistics = StepStatistics(optimizer, [weight], torch.device("cpu"))
    assert statistics.record() == {}
    statistics.begin(measure=False)
    optimizer.step()
    assert set(statistics.record()) == {"optimizer_seconds"}
    statistics.begin(measure=True)
    optimizer.step()
    optimizer.step()  # DeepSpeed steps group by group
    record = statistics.record()
    assert record["update_rms"] == pytest.approx(1.0) and record["update_ratio"] == pytest.approx(1.0 / 1.5)
    assert 0 < record["optimizer_seconds"] < 1
    assert statistics.record() == {}


def test_hidden_matrices_of_a_gpt():
    names = hidden_names(tiny())
    assert len(names) == 6 and all((".layers.0." in name and name.endswith("_proj.weight")) or ".mlp" in name for name in names)
