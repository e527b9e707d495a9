"""`python -m launch.benchmark search`: which search finds better settings in equally many trials, coordinate descent or Optuna's.

Each round draws a random loss surface over log2 of lr, weight decay and adamw_lr, with the shape of measured ones. It is steeper
above the best lr than below, up to an lr that diverges. The best lr depends on the other two keys, and theirs on lr. The start is
off the best values by a factor of up to 4 (lr), 6 (decay) and 16 (adamw_lr), and losses have the noise of one seed. With --real
TEXT, each search also tunes a small GPT on that text, once. The score is the true loss of the chosen setting minus the lowest, in
thousandths of a nat. Optuna is compared if it is installed.
"""

from __future__ import annotations

import argparse
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize

from celo2.baselines import hand_nesterov
from celo2.metatrain.evaluation.suite import ADAMW_LR, TASKS, USUAL_FIRST_LR, WEIGHT_DECAY, text_of, train
from celo2.training.search import Key, Search, Setting, begin, best, grid, next_setting
from launch.benchmark.measure import Column, Row

ROUNDS = 40
TRIALS = (10, 15, 20, 30)
NOISE = 0.003  # nats, SD of a seed
RANGES = {"lr": (-4.0, 4.0), "adamw_lr": (-4.0, 6.0), "weight_decay": (-4.0, 4.0)}  # log2 around the start, for the samplers
KEYS = tuple(Key(name, 1.0, factor) for name, factor in (("lr", 2.0), ("adamw_lr", 4.0), ("weight_decay", 4.0)))
REAL_STEPS, REAL_SEED = 60, 7
COLUMNS = (
    Column("where", "surface", "s"),
    Column("search", "search", "s"),
    *(Column(f"after {n}", f"after {n}", ".1f") for n in TRIALS),
)

Loss = Callable[[Setting], float]  # of a setting: factors on the start
Method = Callable[[Loss, int, int], list[Setting]]  # loss, trials, seed -> the settings in their order


def add_options(parser: argparse.ArgumentParser, device: torch.device) -> None:
    """Add the options of this subject."""
    parser.add_argument("--real", metavar="TEXT", help="also train gpt-tiny on this text, with each method once")


def coordinate_descent(loss: Loss, trials: int, seed: int) -> list[Setting]:
    """The search of launch.compare."""
    s = Search(KEYS)
    for setting in begin(KEYS, grid(1.0, 3)):
        s.losses[setting] = (loss(setting),)
    while s.trials < trials and (following := next_setting(KEYS, s.tried)) is not None:
        s.losses[following] = (loss(following),)
    return list(s.losses)


def sampler_of(name: str) -> Method | None:
    """A sampler of Optuna that begins where coordinate descent does; None where Optuna is missing."""
    try:
        import optuna
    except ImportError:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    make = {
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "TPE": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True),
    }[name]

    def sample(loss: Loss, trials: int, seed: int) -> list[Setting]:
        study, settings = optuna.create_study(sampler=make(seed)), []
        study.enqueue_trial(dict.fromkeys(RANGES, 0.0))
        for _ in range(trials):
            trial = study.ask()
            settings.append(tuple(2 ** trial.suggest_float(key, *ends) for key, ends in RANGES.items()))
            study.tell(trial, min(loss(settings[-1]), 99.0))
        return settings

    return sample


def surface(seed: int) -> tuple[Loss, float]:
    """A loss surface without noise, and its lowest loss."""
    rng = np.random.default_rng(seed)
    optimum = np.array([rng.uniform(-2, 2), rng.uniform(-1.5, 4), rng.uniform(-2.5, 2.5)])
    curvature = np.exp(rng.uniform(np.log([0.008, 0.003, 0.001]), np.log([0.03, 0.02, 0.012])))  # nats a factor of two away
    coupled, steep, edge = rng.uniform(0, [0.5, 0.8]), rng.uniform(0.25, 0.8), rng.uniform(2.5, 5)
    steepness = np.array([steep, steep, 0.3])

    def at(x: Sequence[float]) -> float:
        away = np.asarray(x) - optimum
        if away[0] > edge:
            return math.inf
        bowl = curvature @ ((np.exp(steepness * away) - steepness * away - 1) / steepness**2)
        pull = 2 * np.tanh(away / 2)
        return float(bowl + pull[0] * (coupled * np.sqrt(curvature[0] * curvature[1:]) @ pull[1:]))

    lowest = minimize(lambda x: min(at(x), 9.0), optimum, method="Nelder-Mead").fun
    return (lambda setting: at(np.log2(setting).tolist())), float(lowest)


def excesses(method: Method, seed: int) -> list[float]:
    """The true loss of the chosen setting above the lowest after each of TRIALS."""
    true, lowest = surface(seed)
    noise = np.random.default_rng([seed, 1])
    seen: dict[Setting, float] = {}

    def noisy(setting: Setting) -> float:
        seen[setting] = true(setting) + NOISE * float(noise.normal())
        return seen[setting]

    settings = method(noisy, TRIALS[-1], seed)
    chosen = [best({s: seen[s] for s in settings[:count]}) for count in TRIALS]
    return [true(setting) - lowest if setting is not None else math.inf for setting in chosen]


def real_losses(method: Method, text: torch.Tensor) -> list[float]:
    """The loss of gpt-tiny with the setting chosen after each of TRIALS, with a seed that the search did not see."""
    first = (USUAL_FIRST_LR, ADAMW_LR, WEIGHT_DECAY)
    known: dict[tuple[Setting, int], float] = {}

    def loss(setting: Setting, seed: int = 0) -> float:
        lr, adamw_lr, decay = (a * b for a, b in zip(setting, first, strict=True))
        if (setting, seed) not in known:
            found = train(TASKS["gpt-tiny"], text, hand_nesterov(), lr, seed, REAL_STEPS, adamw_lr=adamw_lr, weight_decay=decay)
            known[setting, seed] = float(str(found["loss"]))
        return known[setting, seed]

    settings = method(loss, TRIALS[-1], 0)
    chosen = [best({s: loss(s) for s in settings[:count]}) or settings[0] for count in TRIALS]
    return [loss(setting, REAL_SEED) for setting in chosen]


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each method, and for each on the real model."""
    text = text_of(args.real) if args.real else None
    methods: dict[str, Method] = {"coordinate descent": coordinate_descent}
    for name in ("TPE", "random"):
        sampler = sampler_of(name)
        if sampler is not None:
            methods[f"Optuna's {name}"] = sampler
    names = [f"after {count}" for count in TRIALS]
    rows: list[Row] = []
    for name, method in methods.items():
        excess = np.array([excesses(method, seed) for seed in range(args.rounds)])
        rows.append({"where": "drawn", "search": name} | dict(zip(names, (1e3 * excess.mean(0)).tolist(), strict=True)))
    if text is not None:
        losses = {name: real_losses(method, text) for name, method in methods.items()}
        least = min(map(min, losses.values()))
        for name, values in losses.items():
            above = [1e3 * (value - least) for value in values]
            rows.append({"where": "gpt-tiny", "search": name} | dict(zip(names, above, strict=True)))
    missing = "" if len(methods) > 1 else "; Optuna is not installed (pip install optuna)"
    return f"mean excess loss in thousandths of a nat, noise {NOISE:g}{missing}", rows
