"""Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  what it would take, without training [--gpu NAME]
    python train.py --help                                              every option with its default

From the configuration to the last checkpoint on one page, read from top to bottom; `pretrain` has the loop over the steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from celo2 import RuleError, ShardingError
from celo2.training.configuration import help_text, parse_arguments
from configs.load import ConfigError, load_written
from configs.schema import Config
from data import DataError
from launch.checkpoint.save import Saver
from launch.checkpoint.verify import CheckpointError
from launch.distributed.environment import check_environment
from launch.distributed.first_rank import on_first_rank
from launch.distributed.heartbeat import STATUS, Heartbeat, RankError, print_error
from launch.distributed.replicas import require_equal_replicas
from launch.distributed.setup import make_accelerator, make_strategy, memory, peak
from launch.distributed.verification import Verification
from launch.monitoring.display import Display, show_any_text
from launch.monitoring.guard import Diverged, Guard, Verdict
from launch.monitoring.launcher import say_after_launcher, tell_launcher
from launch.monitoring.metrics import Metrics
from launch.monitoring.signals import AT_ONCE, INTERRUPTED, STOPPED, StopSignals
from launch.monitoring.step_statistics import StepStatistics, hidden_names
from launch.optimizers.build import set_mode
from launch.planning.machines import machine_of
from launch.planning.plan import make_plan
from launch.private import leave
from launch.run.agreement import identity_of
from launch.run.branch import checkpoint_folders
from launch.run.check import check, prompt_notes
from launch.run.evaluation import Evaluator
from launch.run.grace import Grace
from launch.run.hooks import Hooks
from launch.run.mixture import epochs_record, fetch_data, mixture_notes, taken_notes
from launch.run.own_rule import settled
from launch.run.ranks import facts_of, require_same
from launch.run.restart import record_lost_rank, restart_event, restart_note
from launch.run.resume import find_start, resume, roll_back
from launch.run.schedule import dropout_seed, due, lr_factor, set_lr
from launch.run.setup import (
    describe_run,
    describe_training,
    lock_run,
    make_model,
    open_batches,
    open_data,
    run_folder,
)
from launch.run.state import RunState, to_saved
from launch.run.summary import Summary
from launch.run.weights import require_finite, require_same_files
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
    UnicodeError,  # a path that the file system's encoding lacks
)


def train(config: Config, hooks: Hooks, signals: StopSignals) -> int:
    """One training run, from the beginning or its newest checkpoint to its last step or a signal; returns the exit status."""

    def report(message: str) -> None:
        signals.hold()
        print_error(message)

    accelerator = make_accelerator(config)
    rank, world, summary = accelerator.process_index, accelerator.num_processes, None
    with ExitStack() as folder:
        with Heartbeat(rank, world, config.distributed.timeout, report) as heartbeat:
            signals.listener, signals.patience = heartbeat.signalled, heartbeat.until_named
            try:
                folder.enter_context(lock_run(config, accelerator, heartbeat.mark))
                if rank == 0:
                    heartbeat.record = partial(record_lost_rank, run_folder(config))
                summary = pretrain(config, accelerator, heartbeat, signals, hooks)
            finally:
                if summary is None:  # stopped, or an error: the first rank that ends makes torchrun signal the others
                    signals.hold()
            accelerator.wait_for_everyone()  # a process group that is taken down while another rank still works can block
        accelerator.end_training()
        if summary is not None and accelerator.is_main_process:  # no other rank waits for this
            summary.finish(accelerator.device)
    return 0 if summary is not None else STOPPED


def pretrain(
    config: Config, accelerator: Accelerator, heartbeat: Heartbeat, signals: StopSignals, hooks: Hooks
) -> Summary | None:
    """Setup and loop. Returns the summary of a run that is done, or None if a signal stopped it.

    `heartbeat` learns how far this rank is, so that a rank that dies or hangs is named.
    """
    steps, world, first = config.train.steps, accelerator.num_processes, accelerator.is_main_process

    # Data, and where the run stands: on all ranks the same, like everything else that they are about to do.
    heartbeat.mark("opening the data", disk=True)
    shards, validation = open_data(config)
    chosen, run_dir = settled(config), run_folder(config)
    start = find_start(config, run_dir, accelerator, heartbeat)
    heartbeat.mark("comparing the ranks")
    require_same(accelerator, lambda: facts_of(config, chosen, shards, start.checkpoint, run_dir))
    heartbeat.mark("building the model")

    # The model without memory, and where its weights come from; then model and optimizer as the strategy spreads them over the
    # processes, each of which makes or reads what it keeps. The global batch of a step is the same for every number of processes
    # and micro-batch size.
    set_seed(config.run.seed)
    model, weights, context, taken, files = make_model(config, shards, start.checkpoint, heartbeat.progress)
    require_same_files(accelerator, files, heartbeat.progress)
    evaluator = Evaluator(config, accelerator, validation, context, heartbeat.mark)
    flops, parameters, hidden = flops_per_token(model, context), model.num_parameters(), hidden_names(model)
    heartbeat.mark("sharding model and optimizer")
    strategy = make_strategy(chosen, accelerator, model, weights)
    require_finite(accelerator, weights, files)
    del weights
    optimizer = strategy.optimizer
    verification = Verification(strategy)
    statistics = StepStatistics(optimizer, [strategy.shards[name].weight for name in hidden], accelerator.device)
    peak_flops = peak(accelerator)
    peak_speed = peak_flops * world / flops if peak_flops else None  # tokens/s

    # The state of the run, and its folder.
    heartbeat.mark("loading the checkpoint", disk=True)
    identity = identity_of(config, shards, context, optimizer)
    state = resume(config, start, strategy, identity, heartbeat.progress)
    heartbeat.mark("writing the run's folder", disk=True)
    on_first_rank(accelerator, lambda: describe_run(config, run_dir, shards, optimizer, start), heartbeat.mark)
    folders, origin = checkpoint_folders(config, run_dir, start.origin), start.origin.step if start.origin else None
    grace, restart = Grace(strategy), restart_event(run_dir, state.step) if first and not start.event() else None
    display = Display(steps, state.step, first)
    metrics = Metrics(accelerator, config, run_dir, display.say)
    metrics.rewind(state.step, state.evaluated)
    summary = Summary(config, run_dir, shards.eot_id, context, display.say, lambda: signals.received, heartbeat.progress)
    guard = Guard(accelerator, config.train, signals)
    signals.wait = True  # from now on a signal waits for the end of the step and a checkpoint

    def tell(event: str, note: str) -> None:
        display.say(note)
        metrics.event({"event": event, "step": state.step, "note": note})

    def report(checkpoint: dict[str, Any]) -> None:
        if "error" in checkpoint:
            display.say(f"warning: {checkpoint['error']}")
        if warning := grace.saved(checkpoint):
            display.say(warning)
        metrics.event(checkpoint)

    with (
        metrics,
        display,
        Saver(
            folders, config.checkpoint, report, strategy.host, state.step, hooks.before_save_phase, origin, heartbeat.progress
        ) as saver,
    ):
        batches, stream = open_batches(config, shards, context, state, accelerator)
        start.notes.extend([*([taken] if taken and state.step == 0 else []), *saver.notes])
        start.notes.extend([*prompt_notes(config, shards, context), *mixture_notes(batches, shards, steps)])
        if restart:
            start.notes.append(restart_note(restart))
        for note in [*start.notes, describe_training(config, parameters, optimizer, batches, world)]:
            tell("start", note)
        if branch := start.event() or restart:
            metrics.event(branch)
        stop = False
        since = replace(state)  # the state at the last logged step

        while True:
            # Between two steps: evaluate, save, end.
            if not stop and evaluator.due(state):
                hooks.before_evaluation(state.step)
                found = evaluator.evaluate(strategy, state.step, guard.stopping)
                stop = found is None
                if found is not None:
                    if state.finish_evaluation(found.loss) and config.checkpoint.keep_best:
                        saver.ask(state.step)
                    metrics.write({"step": state.step, "tokens": state.tokens, **found.record})
                    display.evaluation(state.step, found.lines)
                    heartbeat.mark(f"step {state.step}: summary", disk=True)
                    if first and state.step < steps:  # the end has a summary of its own
                        summary.update(strategy.model if strategy.whole else None)
            scheduled = any(due(state.step, every, steps) for every in (config.checkpoint.every, config.checkpoint.keep_every))
            saving, between = saver.due(state.step, scheduled, stop), config.distributed.check_replicas
            if between and (saving or due(state.step, between, steps)):
                require_equal_replicas(strategy, state.step)
            if saving:
                heartbeat.mark(f"step {state.step}: writing the checkpoint before", disk=True)
                saver.wait()
                heartbeat.mark(f"step {state.step}: saving", disk=True)
                metrics.flush()
                set_mode(optimizer, "eval")
                state.sources = batches.taken(state.step)
                saver.save(strategy, to_saved(config, state, identity))
            if stop or state.step == steps:
                break

            # One step.
            step = state.step + 1
            heartbeat.mark(f"step {step}: begins")
            logged = step == 1 or due(step, config.log.every, steps)
            set_mode(optimizer, "train")
            statistics.begin(measure=logged)
            began = time.perf_counter()
            factor = lr_factor(config.schedule, state.step, steps)
            set_lr(optimizer, factor)
            hooks.before_step(step, strategy)
            n_targets = batches.n_targets(state.step)
            micro_batches = next(stream)
            heartbeat.mark(f"step {step}: batch loaded")
            loss = strategy.backward(micro_batches, n_targets, partial(dropout_seed, config.run.seed, state.step))
            hooks.after_backward(step, strategy, loss)
            heartbeat.mark(f"step {step}: gradient computed")
            # Clips, and updates if the verdict, on which all ranks agree, is that the step is healthy. It stays on the device.
            strategy.step(partial(guard.judge, step, loss, save=saver.overdue))
            # The host learns it a step later, but at once where this step is logged, verified, evaluated or saved.
            every = (config.eval.every, config.checkpoint.every, config.checkpoint.keep_every)
            guard.wait(newest=logged or not verification.done or any(due(step, n, steps) for n in every))
            state.finish_step(config.train.batch_size, n_targets, time.perf_counter() - began)
            display.advance(state.step)

            # Report what was learned, the last of it about this step or the one before.
            verdict: Verdict | None = None
            for verdict in guard.verdicts():
                verification.check(verdict.healthy)
                state.learn(batches.n_targets(verdict.step - 1), verdict.loss if verdict.healthy else None)
                stop, saver.asked = stop or verdict.stop, saver.asked or verdict.save
                if verdict.problem:
                    sequences = batches.sequences(verdict.step - 1).tolist()
                    event = {"event": "problem", "step": verdict.step, "problem": verdict.problem, "sequences": sequences}
                    metrics.event(event)
                    display.say(f"step {verdict.step}: {verdict.problem}")
            if stop:
                display.say(grace.stopping())
            if verdict is not None and verdict.roll_back:
                state = state.back_at(verdict.step, config.train.batch_size, batches.taken(verdict.step))
                state, left_out = roll_back(run_dir, state, strategy, saver, heartbeat)
                saver.save(strategy, to_saved(config, state, identity))
                metrics.rewind(state.step, state.evaluated)
                metrics.event({"event": "rollback", "step": state.step, "sequences_left_out": left_out})
                display.say(f"rolled back to step {state.step}; the {left_out} sequences since then are left out")
                batches, stream = open_batches(config, shards, context, state, accelerator)
                since = replace(state)
            elif verdict is not None and logged:
                record = training_record(state, since, verdict, config, factor, peak_speed) | memory(accelerator)
                record |= statistics.record() | epochs_record(batches, shards, state.step)
                metrics.write(record)
                display.training(record)
                state.begin_window()
                since = replace(state)

        heartbeat.mark("writing the last checkpoint", disk=True)
        saver.close()
        heartbeat.mark("the last checkpoint is written")
        for note in taken_notes(batches, shards, state.step):
            tell("data", note)
        if stop:
            line = f"stopped by a signal after step {state.step}, saved; the same command continues"
            display.say(line)
            metrics.event({"event": "stopped", "reason": "signal", "step": state.step})
            tell_launcher(line)
            if first:
                say_after_launcher(line)
        else:
            metrics.event({"event": "finished", "step": state.step})
    return None if stop else summary


def training_record(
    state: RunState, since: RunState, verdict: Verdict, config: Config, factor: float, peak_speed: float | None
) -> dict[str, Any]:
    """The line of metrics.jsonl for the step that is done; `since` is the state at the line before it.

    `loss` is the mean over the targets of the steps since then, `step_loss` that of the step alone.
    """
    optimizer = config.optimizer
    speed = (state.tokens - since.tokens) / (state.seconds - since.seconds)
    record = {"step": state.step, "tokens": state.tokens, "loss": state.window_loss, "step_loss": verdict.loss}
    record |= {"lr": optimizer.lr * factor, "grad_norm": verdict.grad_norm}
    record["adamw_lr"] = (optimizer.lr if optimizer.adamw_lr is None else optimizer.adamw_lr) * factor
    record |= {"tokens_per_second": speed, "seconds": state.seconds}
    if peak_speed:
        record["mfu"] = speed / peak_speed
    return record


def main(argv: list[str] | None = None, hooks: Hooks | None = None) -> int:
    """Exit status 0: done; 2: bad input or a run that cannot go on, said in one line; 70: another rank is gone;
    75: saved and stopped by a signal; 130: stopped at once by a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print parameters, routing, tokens, FLOPs, memory and time, and stop")
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --plan: h100 (default), h200, b200, a100, ... (launch/planning/machines.py)"
    )
    parser.epilog = help_text(Config)
    show_any_text()
    rank = os.environ.get("RANK", "0")
    with StopSignals() as signals:  # until the last line is printed
        try:
            args = parse_arguments(parser, argv)
            config, written = load_written(args.config, args.overrides)
            world = check_environment(config)
            if args.plan and "RANK" not in os.environ:
                world = config.distributed.replicas  # nothing was started: the fewest processes that will do
            notes = check(config, written, world)
            if rank == "0":
                print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
            if args.plan:
                plan = make_plan(settled(config), world, machine_of(args.gpu or "h100"))
                if rank == "0":
                    print(plan)
                return 0
            if args.gpu:
                raise ConfigError("--gpu is for --plan; training takes the GPUs that are here")
            fetch_data(config)
            return train(config, hooks or Hooks(), signals)
        except EXPECTED_ERRORS as error:
            print_error(str(error) if rank == "0" else f"rank {rank}: {error}")
            return 2
        except RankError as error:
            print_error(str(error))
            return STATUS
        except KeyboardInterrupt:
            if rank == "0":
                print_error(AT_ONCE)
                say_after_launcher(AT_ONCE)
            return INTERRUPTED


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # unexpected: print the traceback and end with 1 here, before torchrun ends this rank by a signal
        sys.excepthook(*sys.exc_info())
        status = 1
    leave(status)
