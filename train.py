"""Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  what it would take, without training
    python train.py --help                                              every option with its default

From the configuration to the last checkpoint on one page, read from top to bottom; `pretrain` has the loop over the steps.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from celo2 import RuleError, ShardingError
from configs.load import ConfigError, load_config, options
from configs.schema import Config
from data import DataError
from data.batches import check_batch_size
from launch.checkpoint.save import Saver
from launch.checkpoint.verify import CheckpointError
from launch.distributed.heartbeat import STATUS, Heartbeat, RankError, print_error
from launch.distributed.setup import make_accelerator, make_strategy, peak
from launch.distributed.verification import Verification
from launch.monitoring.guard import STOPPED, Diverged, Guard, Verdict
from launch.monitoring.metrics import Display, Metrics
from launch.monitoring.step_statistics import StepStatistics, hidden_names
from launch.optimizers.build import set_mode
from launch.planning.plan import make_plan
from launch.private import leave
from launch.run.agreement import identity_of
from launch.run.evaluation import evaluate
from launch.run.hooks import Hooks
from launch.run.resume import resume, roll_back
from launch.run.schedule import dropout_seed, due, lr_factor, set_lr
from launch.run.setup import (
    describe_run,
    describe_training,
    make_model,
    open_batches,
    open_data,
    open_run,
    run_folder,
)
from launch.run.state import RunState, to_saved
from launch.run.summary import finish
from models import LossMismatch, ModelError, flops_per_token

# Errors that the user can fix: bad input, a full disk, a run that diverged. Each is printed in one line.
EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    ModelError,
    LossMismatch,
    RuleError,
    CheckpointError,
    Diverged,
    ShardingError,
    OSError,
)


def train(config: Config, hooks: Hooks) -> int:
    """One training run, from the beginning or its newest checkpoint to its last step or a signal; returns the exit status."""
    accelerator = make_accelerator(config, str(run_folder(config)))
    with Heartbeat(accelerator.process_index, accelerator.num_processes, config.distributed.timeout) as heartbeat:
        status = pretrain(config, accelerator, heartbeat, hooks)
    if status == 0 and accelerator.is_main_process:
        finish(config, run_folder(config), accelerator.device)
    accelerator.wait_for_everyone()  # a process group that is taken down while another rank still works can block
    accelerator.end_training()
    return status


def pretrain(config: Config, accelerator: Accelerator, heartbeat: Heartbeat, hooks: Hooks) -> int:
    """Setup and loop. `heartbeat` learns how far this rank is, so that a rank that dies or hangs is named."""
    steps, world, first = config.train.steps, accelerator.num_processes, accelerator.is_main_process

    # Data and model; then model and optimizer as the strategy spreads them over the processes. The global batch of a step is
    # the same for every number of processes and micro-batch size.
    check_batch_size(config.train.batch_size, world, config.train.micro_batch_size)
    shards, validation = open_data(config)
    set_seed(config.run.seed)
    model, context, taken = make_model(config, shards)
    flops, parameters, hidden = flops_per_token(model, context), model.num_parameters(), hidden_names(model)
    heartbeat.mark("model built")
    strategy = make_strategy(config, accelerator, model)
    optimizer = strategy.optimizer
    verification = Verification(strategy)
    statistics = StepStatistics(optimizer, [strategy.shards[name].weight for name in hidden], accelerator.device)
    peak_flops = peak(accelerator)
    peak_speed = peak_flops * world / flops if peak_flops else None  # tokens/s

    # The run's folder, and where the run stands.
    run_dir = open_run(config, accelerator)
    heartbeat.mark("sharded")
    identity = identity_of(config, shards, context, optimizer)
    state, notes = resume(config, run_dir, strategy, identity)
    heartbeat.mark("loaded")
    if first:
        describe_run(config, run_dir, shards, optimizer)
    metrics = Metrics(accelerator, config, run_dir, state.tracker_ids)
    metrics.rewind(state.step, state.evaluated)

    def report(checkpoint: dict[str, Any]) -> None:
        if "error" in checkpoint:
            display.say(f"warning: {checkpoint['error']}")
        metrics.event(checkpoint)

    with (
        metrics,
        Display(steps, state.step, first) as display,
        Saver(run_dir / "checkpoints", config.checkpoint, report, first, state.step, hooks.before_save_phase) as saver,
        Guard(accelerator, config.train) as guard,
    ):
        batches, stream = open_batches(config, shards, context, state, accelerator)
        notes += taken if state.step == 0 else []
        for note in [*notes, describe_training(config, parameters, optimizer, batches, world)]:
            display.say(note)
            metrics.event({"event": "start", "step": state.step, "note": note})
        stop = False
        since = replace(state)  # the state at the last logged step

        while True:
            # Between two steps: evaluate, save, end.
            if not stop and state.evaluated < state.step and due(state.step, config.eval.every, steps):
                hooks.before_evaluation(state.step)
                set_mode(optimizer, "eval")
                val_loss = evaluate(strategy, validation, context, config, guard.stopping, heartbeat.mark)
                stop = val_loss is None
                if not stop:
                    state.evaluated = state.step
                    metrics.write({"step": state.step, "tokens": state.tokens, "val_loss": val_loss})
                    display.say(f"step {state.step:>6}/{steps}  validation loss {val_loss:.4f}")
            if saver.due(state.step, due(state.step, config.checkpoint.every, steps), stop):
                heartbeat.mark(f"step {state.step}: saving")
                metrics.flush()
                set_mode(optimizer, "eval")
                saver.save(strategy, to_saved(config, state, identity))
            if stop or state.step == steps:
                break

            # One step.
            step = state.step + 1
            logged = step == 1 or due(step, config.log.every, steps)
            set_mode(optimizer, "train")
            statistics.begin(measure=logged)
            start = time.perf_counter()
            torch.manual_seed(dropout_seed(config.run.seed, state.step, accelerator.process_index))
            factor = lr_factor(config.schedule, state.step, steps)
            set_lr(optimizer, factor)
            hooks.before_step(step, strategy)
            n_targets = batches.n_targets(state.step)
            micro_batches = next(stream)
            heartbeat.mark(f"step {step}: batch loaded")
            loss = strategy.backward(micro_batches, n_targets)
            hooks.after_backward(step, strategy, loss)
            heartbeat.mark(f"step {step}: gradient computed")
            # Clips, asks for the verdict (agreed over all ranks; waits for the device), and updates if the step is healthy.
            verdict = strategy.step(partial(guard.judge, loss, save=saver.overdue))
            if verdict.healthy:
                verification.check()
            state.finish_step(config.train.batch_size, n_targets, time.perf_counter() - start, verdict.healthy)
            stop, saver.asked = verdict.stop, verdict.save
            display.advance(state.step)

            # Report the step.
            if verdict.problem:
                sequences = batches.sequences(state.step - 1).tolist()
                metrics.event({"event": "problem", "step": state.step, "problem": verdict.problem, "sequences": sequences})
                display.say(f"step {state.step}: {verdict.problem}")
            if verdict.roll_back:
                state, left_out = roll_back(run_dir, state, strategy, saver)
                saver.save(strategy, to_saved(config, state, identity))
                metrics.rewind(state.step, state.evaluated)
                metrics.event({"event": "rollback", "step": state.step, "sequences_left_out": left_out})
                display.say(f"rolled back to step {state.step}; the {left_out} sequences since then are left out")
                batches, stream = open_batches(config, shards, context, state, accelerator)
                since = replace(state)
            elif logged:
                record = training_record(state, since, verdict, config.optimizer.lr * factor, peak_speed)
                record |= statistics.record()
                metrics.write(record)
                display.training(record)
                since = replace(state)

        saver.close()
        if stop:
            display.say(f"stopped by a signal after step {state.step}, saved; the same command continues")
    return STOPPED if stop else 0


def training_record(state: RunState, since: RunState, verdict: Verdict, lr: float, peak_speed: float | None) -> dict[str, Any]:
    """The line of metrics.jsonl for the step that is done; `since` is the state at the line before it."""
    speed = (state.tokens - since.tokens) / (state.seconds - since.seconds)
    record = {"step": state.step, "tokens": state.tokens, "loss": verdict.loss, "lr": lr, "grad_norm": verdict.grad_norm}
    record |= {"tokens_per_second": speed, "seconds": state.seconds}
    if peak_speed:
        record["mfu"] = speed / peak_speed
    return record


def main(argv: list[str] | None = None, hooks: Hooks | None = None) -> int:
    """Exit status 0: done; 2: bad input or a run that cannot go on, said in one line; 75: saved and stopped by a signal;
    70: another rank is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print parameters, routing, tokens, FLOPs and memory, and stop")
    parser.epilog = "keys of the configuration, with their defaults:\n" + "\n".join(
        f"  {name} = {default!r}: {doc}" for name, default, doc in options()
    )
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        if args.plan:
            print(make_plan(config))
            return 0
        return train(config, hooks or Hooks())
    except EXPECTED_ERRORS as error:
        rank = os.environ.get("RANK", "0")
        print_error(str(error) if rank == "0" else f"rank {rank}: {error}")
        return 2
    except RankError as error:
        print_error(str(error))
        return STATUS
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    leave(main())
