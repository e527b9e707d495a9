"""Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  what it would take, without training
    python train.py --help                                              every option with its default

config -> accelerator -> data, model, optimizer -> loop -> checkpoint: one page, read from top to bottom.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from celo2 import Celo2, RuleError, ShardingError
from configs.load import ConfigError, load_config, options
from configs.schema import Config
from data import DataError
from data.batches import Batches, check_batch_size, prefetch
from launch.checkpoint.save import CheckpointError, Saver, due
from launch.distributed.heartbeat import STATUS, Heartbeat, RankError, print_error
from launch.distributed.leave import leave
from launch.distributed.setup import make_accelerator, make_strategy, peak
from launch.distributed.verification import Proof
from launch.monitoring.guard import STOPPED, TrainingError, Watch
from launch.monitoring.metrics import Display, Metrics
from launch.monitoring.step_statistics import StepProbe, hidden_names
from launch.optimizers.build import set_mode
from launch.planning.plan import make_plan
from launch.run.evaluation import evaluate
from launch.run.schedule import lr_factor, set_lr
from launch.run.setup import (
    build_from_config,
    describe_run,
    folder_of,
    open_data,
    open_run,
    resume,
    roll_back,
    saved_state,
    vocabulary,
)
from launch.run.summary import finish
from models import LossMismatch, ModelError, flops_per_token


def train(config: Config) -> int:
    """One run, from the beginning or from its newest checkpoint, to its last step or a signal; returns the exit status."""
    accelerator = make_accelerator(config, str(folder_of(config)))
    with Heartbeat(accelerator.process_index, accelerator.num_processes, config.distributed.timeout) as heartbeat:
        status = pretrain(config, accelerator, heartbeat)
    if status == 0 and accelerator.is_main_process:
        finish(config, folder_of(config), accelerator.device)
    accelerator.wait_for_everyone()  # a process group that is taken down while another rank still works can block
    accelerator.end_training()
    return status


def pretrain(config: Config, accelerator: Accelerator, heartbeat: Heartbeat) -> int:
    """The run itself; `heartbeat` is told how far it is, so that a rank that dies or hangs is named."""
    rank, world, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    steps, micro = config.train.steps, config.train.micro_batch_size

    # Data and model; then model and optimizer as the strategy spreads them over the processes. The global batch of a step is
    # the same for every number of processes and micro-batch size.
    check_batch_size(config.train.batch_size, world, micro)
    shards, validation = open_data(config)
    set_seed(config.run.seed)
    model, context = build_from_config(config, vocabulary(config, shards.vocab_size))
    flops, peak_flops, parameters = flops_per_token(model, context), peak(accelerator), model.num_parameters()
    heartbeat.mark("model built")
    hidden = hidden_names(model)
    strategy = make_strategy(config, accelerator, model)
    optimizer, proof = strategy.optimizer, Proof(strategy)
    probe = StepProbe(optimizer, [strategy.shards[name].weight for name in hidden], accelerator.device)

    # The run's folder, and where the run stands.
    run_dir = open_run(config, accelerator)
    heartbeat.mark("sharded")
    state, notes = resume(config, run_dir, strategy, shards)
    heartbeat.mark("loaded")
    if first:
        describe_run(config, run_dir)
    metrics = Metrics(accelerator, config, run_dir, state.tracker_ids)
    metrics.rewind(state.step, state.evaluated)

    def open_batches() -> tuple[Batches, Iterator]:
        batches = Batches(shards, context, config.train.batch_size, config.run.seed, state.skipped)
        pin = accelerator.device.type == "cuda"
        return batches, prefetch(batches, state.step, steps, rank, world, micro, pin_memory=pin)

    def logged(step: int) -> bool:
        return step == 1 or due(step, config.log.every, steps)

    def report(checkpoint: dict) -> None:
        if "error" in checkpoint:
            display.say(f"warning: {checkpoint['error']}")
        metrics.event(checkpoint)

    with (
        metrics,
        Display(steps, state.step, first) as display,
        Saver(run_dir / "checkpoints", config.checkpoint, report, write=first, saved=state.step) as saver,
        Watch(accelerator, config.train) as watch,
    ):
        batches, stream = open_batches()
        for note in [*notes, describe(config, parameters, optimizer, batches, world)]:
            display.say(note)
            metrics.event({"event": "start", "step": state.step, "note": note})
        stop = False
        since = replace(state)  # the state at the last logged step

        while True:
            if not stop and state.evaluated < state.step and due(state.step, config.eval.every, steps):
                set_mode(optimizer, "eval")
                val_loss = evaluate(strategy, validation, context, config, watch.stopping, heartbeat.mark)
                stop = val_loss is None
                if not stop:
                    state.evaluated = state.step
                    metrics.write({"step": state.step, "tokens": state.tokens, "val_loss": val_loss})
                    display.say(f"step {state.step:>6}/{steps}  validation loss {val_loss:.4f}")
            if saver.due(state.step, steps, stop):
                heartbeat.mark(f"step {state.step}: saving")
                metrics.flush()
                set_mode(optimizer, "eval")
                saver.save(strategy, saved_state(config, state, shards))
            if stop or state.step == steps:
                break

            set_mode(optimizer, "train")
            probe.begin(measure=logged(state.step + 1))
            start = time.perf_counter()
            torch.manual_seed(dropout_seed(config.run.seed, state.step, rank))
            factor = lr_factor(config.schedule, state.step, steps)
            set_lr(optimizer, factor)
            n_targets = batches.n_targets(state.step)
            micro_batches = next(stream)
            heartbeat.mark(f"step {state.step + 1}: batch loaded")
            loss = strategy.backward(micro_batches, n_targets)
            heartbeat.mark(f"step {state.step + 1}: gradient computed")
            # Clips, asks for the verdict (agreed over all ranks; waits for the device), and updates if the step is healthy.
            verdict = strategy.step(lambda grad_norm, loss=loss: watch.judge(loss, grad_norm, saver.overdue))
            if verdict.healthy:
                proof.check()
            state.finish_step(n_targets, time.perf_counter() - start, verdict.healthy)
            stop, saver.asked = verdict.stop, verdict.save
            display.advance(state.step)

            if verdict.problem:
                sequences = batches.sequences(state.step - 1).tolist()
                metrics.event({"event": "problem", "step": state.step, "problem": verdict.problem, "sequences": sequences})
                display.say(f"step {state.step}: {verdict.problem}")
            if verdict.roll_back:
                state = roll_back(run_dir, state, batches, strategy, saver)
                saver.save(strategy, saved_state(config, state, shards))
                metrics.rewind(state.step, state.evaluated)
                display.say(f"rolled back to step {state.step}; batches {state.skipped[-1]} are left out")
                batches, stream = open_batches()
                since = replace(state)
            elif logged(state.step):
                speed = (state.tokens - since.tokens) / (state.seconds - since.seconds)
                record = {"step": state.step, "tokens": state.tokens, "loss": verdict.loss, "lr": config.optimizer.lr * factor}
                record |= {"grad_norm": verdict.grad_norm, "tokens_per_second": speed, "seconds": state.seconds}
                record |= probe.record()
                if peak_flops:
                    record["mfu"] = speed * flops / (peak_flops * world)
                metrics.write(record)
                display.training(record)
                since = replace(state)

        saver.close()
        if stop:
            display.say(f"stopped by a signal after step {state.step}, saved; the same command continues")
    return STOPPED if stop else 0


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step on a rank follow from (seed, step, rank), so that there is no random state to save."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def describe(config: Config, parameters: int, optimizer: torch.optim.Optimizer, batches: Batches, world: int) -> str:
    """The line that says what is trained, on what, with what."""
    rule = f" ({optimizer.rule.description})" if isinstance(optimizer, Celo2) else ""
    accumulation = config.train.batch_size // (world * config.train.micro_batch_size)
    return (
        f"{config.run.name}: {parameters:,} parameters, {config.optimizer.name}{rule}; "
        f"{batches.tokens_per_epoch:,} tokens an epoch, {config.train.batch_size} x {batches.context} tokens a step = "
        f"{world} process(es) x {accumulation} micro-batch(es) of {config.train.micro_batch_size}"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input or a run that cannot go on, said in one line; 75: saved and stopped by a signal;
    70: another rank is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print parameters, routing, tokens, FLOPs and memory, and stop")
    parser.epilog = "options:\n" + "\n".join(f"  {name} = {default!r}: {doc}" for name, default, doc in options())
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        if args.plan:
            print(make_plan(config))
        else:
            return train(config)
    except (
        ConfigError,
        DataError,
        ModelError,
        LossMismatch,
        RuleError,
        CheckpointError,
        TrainingError,
        ShardingError,
        OSError,
    ) as error:
        rank = os.environ.get("RANK", "0")
        print_error(str(error) if rank == "0" else f"rank {rank}: {error}")
        return 2
    except RankError as error:
        print_error(str(error))
        return STATUS
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
