"""Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  what it would take, without training
    python train.py --help                                              every option with its default

config -> accelerator -> data, model, optimizer -> loop -> checkpoint: one page, read from top to bottom.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from celo2 import RuleError
from configs.load import ConfigError, load_config, options
from configs.schema import Config
from data import DataError
from data.batches import Batches, check_batch_size, prefetch
from launch.checkpoint import CheckpointError, save_checkpoint
from launch.evaluate import evaluate
from launch.finish import finish
from launch.metrics import Display, Metrics
from launch.optimizers import build_optimizer
from launch.plan import make_plan
from launch.run import build_from_config, folder_of, open_data, open_run, resume, saved_state, vocabulary
from launch.schedule import lr_factor, set_lr
from launch.strategy import make_accelerator, peak, prepare
from models import CausalLMLoss, LossMismatch, ModelError, flops_per_token


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step."""


def train(config: Config) -> None:
    """One run, from the beginning or from its newest checkpoint, to its last step."""
    accelerator = make_accelerator(config, str(folder_of(config)))
    rank, world, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    steps, micro = config.train.steps, config.train.micro_batch_size

    # Data, model, optimizer. The global batch of a step is the same for every number of processes and micro-batch size.
    check_batch_size(config.train.batch_size, world, micro)
    shards, validation = open_data(config)
    set_seed(config.run.seed)
    model, context = build_from_config(config, vocabulary(config, shards.vocab_size))
    model.to(accelerator.device)
    batches = Batches(shards, context, config.train.batch_size, config.run.seed)
    optimizer = build_optimizer(config.optimizer, model)
    flops, peak_flops = flops_per_token(model, context), peak(accelerator)

    run_dir = open_run(config, accelerator)
    state, notes = resume(config, run_dir, model, optimizer, shards)
    loss_model = prepare(accelerator, CausalLMLoss(model), config.train.compile)
    metrics = Metrics(accelerator, config, run_dir, state.step)
    stream = prefetch(batches, state.step, steps, rank, world, micro, pin_memory=accelerator.device.type == "cuda")

    with Display(steps, state.step, first) as display:
        for note in [*notes, describe(config, model, batches, world)]:
            display.say(note)
        clock, tokens_then = time.perf_counter(), state.tokens
        for step, micro_batches in zip(range(state.step, steps), stream, strict=True):
            torch.manual_seed(dropout_seed(config.run.seed, step, rank))
            factor = lr_factor(config.schedule, step, steps)
            set_lr(optimizer, factor)
            loss = backward(accelerator, loss_model, micro_batches, batches.n_targets(step))
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            state.step, state.tokens = step + 1, state.tokens + batches.n_targets(step)
            display.advance(state.step)
            log, check, save = (due(state.step, section.every, steps) for section in (config.log, config.eval, config.checkpoint))

            if log or check or save:  # the only steps in which the host waits for the device
                loss, grad_norm = accelerator.reduce(loss, "sum").item(), grad_norm.item()
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise TrainingError(f"step {state.step}: loss {loss}, gradient norm {grad_norm}; stopped, nothing saved")
                now = time.perf_counter()
                speed, state.seconds = (state.tokens - tokens_then) / (now - clock), state.seconds + now - clock
                clock, tokens_then = now, state.tokens
            if log:
                record = {"step": state.step, "tokens": state.tokens, "loss": loss, "lr": config.optimizer.lr * factor}
                record |= {"grad_norm": grad_norm, "tokens_per_second": speed, "seconds": state.seconds}
                if peak_flops:
                    record["mfu"] = speed * flops / (peak_flops * world)
                metrics.write(record)
                display.training(record)
            if check:
                val_loss = evaluate(accelerator, loss_model, validation, context, config)
                metrics.write({"step": state.step, "tokens": state.tokens, "val_loss": val_loss})
                display.say(f"step {state.step:>6}/{steps}  validation loss {val_loss:.4f}")
            if save:
                if first:
                    saved = saved_state(config, state, shards)
                    save_checkpoint(run_dir / "checkpoints", model, optimizer, saved, config.checkpoint.keep)
                accelerator.wait_for_everyone()
            if check or save:
                clock = time.perf_counter()  # training time is counted alone

        if first:
            finish(config, run_dir, model, shards.eot_id, display)
    accelerator.end_training()


def backward(
    accelerator: Accelerator, loss_model: nn.Module, micro_batches: list[tuple[torch.Tensor, torch.Tensor]], n_targets: int
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over the `n_targets` of the global batch; returns this rank's share of the loss.

    Every rank sums the losses of its tokens and divides by the global count; DDP averages over ranks, hence the factor.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, (inputs, targets) in enumerate(micro_batches):
        inputs = inputs.to(accelerator.device, non_blocking=True)  # (micro, T)
        targets = targets.to(accelerator.device, non_blocking=True)
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(loss_model):
            loss = loss_model(inputs, targets) / n_targets
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return total


def due(step: int, every: int, steps: int) -> bool:
    """Whether something happens after `step`: at every multiple of `every` (0: never), and at the last step."""
    return step == steps or (every > 0 and step % every == 0)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step on a rank follow from (seed, step, rank), so that there is no random state to save."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def describe(config: Config, model: nn.Module, batches: Batches, world: int) -> str:
    """The line that says what is trained, on what, with what."""
    parameters = sum(p.numel() for p in model.parameters())
    accumulation = config.train.batch_size // (world * config.train.micro_batch_size)
    return (
        f"{config.run.name}: {parameters:,} parameters, {config.optimizer.name}, {batches.tokens_per_epoch:,} tokens an epoch, "
        f"{config.train.batch_size} x {batches.context} tokens a step = {world} process(es) x {accumulation} micro-batch(es) "
        f"of {config.train.micro_batch_size}"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input, said in one line."""
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
            train(config)
    except (ConfigError, DataError, ModelError, LossMismatch, RuleError, CheckpointError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
