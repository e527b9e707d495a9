"""Cautious weight decay and EMA-Nesterov around every optimizer, against plain loops; refused steps; checkpoints."""

import pytest
import torch
from test_launch_optimizers import config_of, optimizer_of, step, strategy_of, tiny

from celo2.training.idle import refuse_idle
from configs.load import ConfigError
from configs.schema import Checkpoint, Config, Distributed, Optimizer
from launch.checkpoint.load import load_checkpoint
from launch.checkpoint.save import take_snapshot, write_checkpoint
from launch.optimizers.additions import EMA, WINDOW
from launch.optimizers.build import build_optimizer, optimizer_groups
from launch.optimizers.idle import IDLE
from launch.optimizers.table import TABLE, chooses_route
from launch.run.agreement import optimizer_differences

STEPS, LR, GAMMA, BETA = 8, 1e-2, 0.9, 0.6
WITHOUT = [name for name, entry in TABLE.items() if not entry.averages and name != "kron"]  # kron draws random numbers


def gradient(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", WITHOUT)
def test_both_are_what_a_plain_loop_makes_of_the_optimizer_alone(name):
    config_of(name)  # skips where the library is missing
    ours, theirs = tiny(), tiny()
    both = Optimizer(name=name, lr=LR, cautious_weight_decay=True, ema_nesterov=BETA, ema_nesterov_decay=GAMMA)
    optimizer = build_optimizer(both, optimizer_groups(both, ours), steps=STEPS)
    plain = Optimizer(name=name, lr=LR, weight_decay=0.0)
    alone = build_optimizer(plain, optimizer_groups(plain, theirs), steps=STEPS)
    names = {p: key for key, p in ours.named_parameters()}
    rate_of = {names[p]: LR * group["cautious_weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert rate_of["model.layers.0.mlp.up_proj.weight"] == pytest.approx(LR * 0.1 * TABLE[name].decay)
    rates = [rate_of[key] for key, _ in theirs.named_parameters()]
    weights = list(theirs.parameters())
    m = [torch.zeros_like(p) for p in weights]
    for t in range(STEPS):
        optimizer.lookahead.enter(t / STEPS)
        gradient(ours, t)
        optimizer.step()
        assert not optimizer.lookahead.leave()
        beta = BETA if WINDOW[0] <= t / STEPS < WINDOW[1] else 0.0
        x = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p, average in zip(weights, m, strict=True):
                p += beta * average
        y = [p.detach().clone() for p in weights]
        gradient(theirs, t)
        alone.step()
        with torch.no_grad():
            for p, before, at, average, rate in zip(weights, x, y, m, rates, strict=True):
                toward_zero = (at - p) * at >= 0
                p -= rate * at * toward_zero
                average.copy_(GAMMA * average + (1 - GAMMA) * (p - before))
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5, key  # measured: 3e-7 at most


def test_decay_acts_where_the_update_agrees_and_nowhere_else():
    """One SGD-like step by hand: W = 2, u = ±1 and 0."""
    model = tiny()
    config = Optimizer(name="torch.optim.SGD", route="all", lr=0.1, weight_decay=0.5, cautious_weight_decay=True)
    optimizer = optimizer_of(config, model)
    w = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        w.fill_(2.0)
    w.grad = torch.zeros_like(w)
    w.grad[0], w.grad[1] = 1.0, -1.0
    optimizer.step()
    assert torch.allclose(w[:3, 0], torch.tensor([2 - 0.1 - 0.1, 2 + 0.1, 2 - 0.1]))


@pytest.mark.parametrize("name", ["celo2", "adamw", "muon"])
def test_a_refused_step_changes_nothing(name):
    """On the device (`found_inf`), or by no step at all; the lookahead is gone after it."""
    model = tiny()
    config = Optimizer(name=name, lr=LR, cautious_weight_decay=True, ema_nesterov=BETA)
    optimizer = optimizer_of(config, model)
    for t in range(5):
        optimizer.lookahead.enter(0.5)
        step(model, optimizer, t)
        optimizer.lookahead.leave()
    everything = lambda: [*model.parameters()] + [v for s in optimizer.state.values() for v in s.values()]  # noqa: E731
    before = [value.detach().clone() for value in everything()]
    assert optimizer.lookahead.enter(0.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    if name != "muon":
        optimizer.found_inf = torch.ones(())
        optimizer.step()
    optimizer.lookahead.leave()
    for a, b in zip(before, everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["celo2", "muon", "soap", "torch.optim.SGD"])
def test_a_checkpoint_holds_the_average(name, tmp_path):
    config = config_of(name)
    config.ema_nesterov, config.cautious_weight_decay = BETA, True
    going, resumed = strategy_of(config, 0), strategy_of(config, 1)

    def train(strategy, t):
        strategy.look_ahead(0.5)
        step(strategy.model, strategy.optimizer, t)
        strategy.lookahead.leave()

    for t in range(4):
        train(going, t)
    path = write_checkpoint(tmp_path, take_snapshot(going, {"step": 4}), Checkpoint(keep=1))[0]
    load_checkpoint(path, resumed)
    for strategy in (going, resumed):
        for t in range(4, 8):
            train(strategy, t)
    for (key, a), b in zip(going.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), key
        states = going.optimizer.state[a], resumed.optimizer.state[b[1]]
        assert states[0].keys() == states[1].keys() and torch.equal(states[0][EMA], states[1][EMA])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "schedule-free", "ema_nesterov": 0.6}, "ema_nesterov cannot be combined with schedule-free, which averages"),
        ({"name": "schedule-free", "cautious_weight_decay": True}, "cautious_weight_decay cannot be combined with schedule-free"),
        ({"cautious_weight_decay": True, "weight_decay": 0.0}, "has no effect, since optimizer.weight_decay is 0"),
    ],
)
def test_what_cannot_be_combined_is_said(config, message):
    config_of(config.get("name", "celo2"))
    with pytest.raises(ConfigError, match=message):
        optimizer_of(Optimizer(**config), tiny())


def test_divided_state_is_refused_with_a_lookahead():
    config = Config(optimizer=Optimizer(ema_nesterov=0.6), distributed=Distributed(shard_state=True))
    with pytest.raises(
        ConfigError, match=r"shard_state has no effect with optimizer.ema_nesterov 0.6, .*whole optimizer state: leave it out"
    ):
        refuse_idle(config, IDLE)


def test_the_lookahead_and_the_route_stay_when_a_run_continues(tmp_path):
    """A state.json of before there were these options has neither, and the route that did nothing for named optimizers."""
    before = {"name": "lion", "lr": 1e-3, "route": "hidden"}
    saved = {"config": {"optimizer": before}, "identity": {}}
    now = Config(optimizer=Optimizer(name="lion", ema_nesterov=0.6))
    found = {d.key: (d.there, d.here) for d in optimizer_differences(tmp_path, saved, now, {"rule": None})}
    assert found == {"optimizer.route": ("hidden", "all"), "optimizer.ema_nesterov": (0.0, 0.6)}
    before["name"] = "adamw"
    assert not chooses_route(Optimizer(name="adamw"))
    assert not list(optimizer_differences(tmp_path, saved, Config(optimizer=Optimizer(name="adamw")), {"rule": None}))
