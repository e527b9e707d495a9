"""Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  memory, time and FLOPs, without training [--gpu NAME]
    python train.py --help                                              every option with its default

This page is a whole training run; read it from top to bottom. `train` connects the processes and watches over them. `pretrain`
sets the run up (data, model, optimizer, checkpoint) and contains the loop over the steps. `main` is the command line.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from configs.schema import Config
from launch.checkpoint.save import Saver
from launch.distributed.first_rank import on_first_rank
from launch.distributed.heartbeat import Heartbeat, print_error
from launch.distributed.replicas import require_equal_replicas
from launch.distributed.setup import deterministic, make_accelerator, make_strategy, memory, peak
from launch.distributed.verification import Verification
from launch.monitoring.display import Display
from launch.monitoring.guard import Guard, Verdict
from launch.monitoring.launcher import say_after_launcher, tell_launcher
from launch.monitoring.metrics import Metrics
from launch.monitoring.signals import STOPPED, StopSignals
from launch.monitoring.step_statistics import StepStatistics, hidden_names
from launch.optimizers.build import set_mode
from launch.optimizers.width import at_width_of, width_note
from launch.private import leave
from launch.run.agreement import identity_of
from launch.run.branch import config_of_line
from launch.run.check import prompt_notes
from launch.run.diagnostics import Diagnostics, check_device
from launch.run.evaluation import Evaluator
from launch.run.grace import Grace
from launch.run.hooks import Hooks
from launch.run.mixture import epochs_record, mixture_notes, taken_notes
from launch.run.pinned_rule import with_pinned_rule
from launch.run.ranks import facts_of, require_same
from launch.run.record import training_record
from launch.run.restart import record_lost_rank, restart_event, restart_note
from launch.run.resume import find_start, folders_of_line, resume, roll_back
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
from launch.run.state import to_saved
from launch.run.summary import Summary
from launch.run.weights import require_finite, require_same_files
from launch.train_command import command
from models import flops_per_token


def train(config: Config, signals: StopSignals, hooks: Hooks) -> int:
    """Run from step 0 or from a checkpoint until the last step or a stop signal. Return the exit status."""

    def report(message: str) -> None:
        signals.hold()
        print_error(message)

    accelerator = make_accelerator(config)
    check_device(config, accelerator.device.type == "cuda")
    rank, world, summary = accelerator.process_index, accelerator.num_processes, None
    with deterministic(config.train.deterministic), ExitStack() as folder:
        with Heartbeat(rank, world, config.distributed.timeout, report) as heartbeat:
            signals.listener, signals.patience = heartbeat.signalled, heartbeat.until_named
            try:
                folder.enter_context(lock_run(config, accelerator, heartbeat.mark))
                if rank == 0:
                    heartbeat.record = partial(record_lost_rank, run_folder(config))
                summary = pretrain(config, accelerator, heartbeat, signals, hooks)
            finally:
                # Without a summary, a signal or an error ended the run. When one rank exits, torchrun sends SIGTERM to the
                # others; from here on, that signal does not change the exit status.
                if summary is None:
                    signals.hold()
            accelerator.wait_for_everyone()  # destroying the process group while another rank still works can block
        accelerator.end_training()
        if summary is not None and accelerator.is_main_process:  # the other ranks do not wait for this
            summary.finish(accelerator.device)
    return 0 if summary is not None else STOPPED


def pretrain(
    config: Config, accelerator: Accelerator, heartbeat: Heartbeat, signals: StopSignals, hooks: Hooks
) -> Summary | None:
    """Set the run up and train. Return the summary of a finished run, or None if a signal stopped it.

    `heartbeat.mark` records how far this rank is, so that an error message can name a rank that died or hangs.
    """
    world, first = accelerator.num_processes, accelerator.is_main_process

    # Open the data, and choose the start: step 0 or a checkpoint. Then check that all ranks have the same configuration, data,
    # start and code.
    heartbeat.mark("opening the data", disk=True)
    shards, validation = open_data(config)
    run_dir = run_folder(config)
    start = find_start(config, run_dir, accelerator, heartbeat)
    config = config_of_line(config, start.origin)
    steps = config.train.steps
    # `resolved` is what trains: with the pinned rule and, further below, with the learning rates and weight decay scaled to the
    # model's width. Checkpoints store `config`.
    resolved = with_pinned_rule(config)
    heartbeat.mark("comparing the ranks")
    require_same(accelerator, lambda: facts_of(config, resolved, shards, start.checkpoint, run_dir))
    heartbeat.mark("building the model")

    # Build the model without memory for its parameters, and find out where its weights come from. Then the strategy spreads model
    # and optimizer over the processes, and each process makes or reads only the weights that it keeps. The global batch of a step
    # does not depend on the number of processes or on the micro-batch size.
    set_seed(config.run.seed)
    model, weights, context, taken, files = make_model(config, shards, start.checkpoint, heartbeat.progress)
    require_same_files(accelerator, files, heartbeat.progress)
    evaluator = Evaluator(config, accelerator, validation, context, heartbeat.mark)
    flops, parameters, hidden = flops_per_token(model, context), model.num_parameters(), hidden_names(model)
    heartbeat.mark("sharding model and optimizer")
    resolved = replace(resolved, optimizer=at_width_of(model, resolved.optimizer))
    strategy = make_strategy(resolved, accelerator, model, weights)
    strategy.host.waits = heartbeat.waits
    require_finite(accelerator, weights, files)
    del weights
    optimizer = strategy.optimizer
    verification = Verification(strategy)
    statistics = StepStatistics(optimizer, [strategy.shards[name].weight for name in hidden], accelerator.device)
    peak_flops = peak(accelerator)
    peak_speed = peak_flops * world / flops if peak_flops else None  # tokens/s

    # Load the checkpoint, if there is one, and write the run's folder. Then make the parts that report, save and guard.
    heartbeat.mark("loading the checkpoint", disk=True)
    identity = identity_of(config, shards, context, optimizer)
    state = resume(config, start, strategy, identity, heartbeat.progress)
    heartbeat.mark("writing the run's folder", disk=True)
    progress = heartbeat.progress
    on_first_rank(accelerator, lambda: describe_run(config, run_dir, shards, optimizer, start, progress), heartbeat.mark)
    folders = folders_of_line(config, run_dir, start, accelerator, heartbeat)
    branched_at = start.origin.step if start.origin else None
    grace = Grace(strategy)
    restart = restart_event(run_dir, state.step) if first and not start.event() else None
    display = Display(steps, state.step, first)
    diagnostics = Diagnostics(config, strategy, run_dir, display.say)
    metrics = Metrics(accelerator, config, run_dir, display.say)
    metrics.rewind(state.step, state.evaluated)
    summary = Summary(config, run_dir, folders, shards.eot_id, context, display.say, lambda: signals.received, heartbeat.progress)
    guard = Guard(accelerator, config.train, signals)
    guard.go_on(state.recent_losses, has_checkpoint=start.checkpoint is not None)
    signals.wait = True  # from now on a signal stops the run only after the current step is done and saved

    def tell(event: str, note: str) -> None:
        display.say(note)
        metrics.event({"event": event, "step": state.step, "note": note})

    def report_checkpoint(checkpoint: dict[str, Any]) -> None:
        if "error" in checkpoint:
            display.say(f"warning: {checkpoint['error']}")
        if warning := grace.saved(checkpoint):
            display.say(warning)
        metrics.event(checkpoint)

    with (
        strategy,
        metrics,
        display,
        diagnostics,
        Saver(
            folders,
            config.checkpoint,
            report_checkpoint,
            strategy.host,
            state.step,
            hooks.before_save_phase,
            branched_at,
            heartbeat.progress,
        ) as saver,
    ):
        batches, stream = open_batches(config, shards, context, state, accelerator)
        start.notes.extend([*([taken] if taken and state.step == 0 else []), *saver.notes])
        start.notes.extend([*prompt_notes(config, shards, context), *mixture_notes(batches, shards, steps)])
        start.notes.extend(evaluator.notes(state))
        start.notes.extend(width_note(config.optimizer, resolved.optimizer))
        if restart:
            start.notes.append(restart_note(restart))
        for note in [*start.notes, describe_training(config, parameters, optimizer, batches, world)]:
            tell("start", note)
        if branch := start.event() or restart:
            metrics.event(branch)
        if start.changes and state.step < steps:
            metrics.event({"event": "changed", "step": state.step, "options": start.changes})
        stop = False
        since = replace(state)  # the state at the last logged step

        while True:
            # Between two steps: evaluate, save, and leave the loop if the run is done or a signal came.
            if not stop and evaluator.due(state):
                hooks.before_evaluation(state.step)
                found = evaluator.evaluate(strategy, state.step, guard.stopping)
                stop = found is None
                if found is not None:
                    if state.finish_evaluation(found.loss, evaluator.validation) and config.checkpoint.keep_best:
                        saver.ask(state.step)
                    metrics.write({"step": state.step, "tokens": state.tokens, **found.record})
                    display.evaluation(state.step, found.lines)
                    heartbeat.mark(f"step {state.step}: summary", disk=True)
                    if first and state.step < steps:  # after the last step, `summary.finish` writes it
                        summary.update(strategy.model if strategy.whole else None)
            scheduled = any(due(state.step, every, steps) for every in (config.checkpoint.every, config.checkpoint.keep_every))
            saving = saver.due(state.step, scheduled, stop)
            check_every = config.distributed.check_replicas
            if check_every and (saving or due(state.step, check_every, steps)):
                require_equal_replicas(strategy, state.step)
            if saving:
                heartbeat.mark(f"step {state.step}: writing the checkpoint before", disk=True)
                saver.wait()
                heartbeat.mark(f"step {state.step}: saving", disk=True)
                metrics.flush()
                set_mode(optimizer, "eval")
                state.sources, state.recent_losses = batches.taken(state.step), list(guard.losses)
                saver.save(strategy, to_saved(config, state, identity))
                guard.has_checkpoint = True
            if stop or state.step == steps:
                break

            # One step: set the learning rate, load the batch, compute the gradient, update the weights.
            step = state.step + 1
            heartbeat.mark(f"step {step}: begins")
            logged = step == 1 or any(due(step, every, steps) for every in (config.log.every, config.log.layers))
            set_mode(optimizer, "train")
            statistics.begin(measure=logged)
            began = time.perf_counter()
            factor = lr_factor(config.schedule, state.step, steps)
            set_lr(optimizer, factor)
            strategy.look_ahead(state.step / steps)
            hooks.before_step(step, strategy)
            n_targets = batches.n_targets(state.step)
            micro_batches = next(stream)
            heartbeat.mark(f"step {step}: batch loaded")
            diagnostics.begin(step, micro_batches)
            loss = strategy.backward(micro_batches, n_targets, partial(dropout_seed, config.run.seed, state.step))
            hooks.after_backward(step, strategy, loss)
            heartbeat.mark(f"step {step}: gradient computed")
            # Clip the gradient, and update the weights if the verdict says that the step is healthy. All ranks have the same
            # verdict, and it stays on the device.
            strategy.step(partial(guard.judge, step, loss, save=saver.overdue))
            # The host reads the verdict one step later, or now if this step is logged, verified, evaluated or saved.
            every = (config.eval.every, config.checkpoint.every, config.checkpoint.keep_every)
            guard.wait(newest=logged or not verification.done or any(due(step, n, steps) for n in every))
            state.finish_step(batches.sizes.at(step - 1), n_targets, time.perf_counter() - began)
            display.advance(state.step)

            # Act on the verdicts that the host has read. The newest is about this step or the step before.
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
                # Load the newest checkpoint, and continue with the sequences that come after those taken so far.
                state = state.back_at(verdict.step, batches)
                state, left_out = roll_back(run_dir, state, strategy, saver, heartbeat)
                saver.save(strategy, to_saved(config, state, identity))
                metrics.rewind(state.step, state.evaluated)
                metrics.event({"event": "rollback", "step": state.step, "sequences_left_out": left_out})
                display.say(f"rolled back to step {state.step}; the {left_out} sequences since then are left out")
                batches, stream = open_batches(config, shards, context, state, accelerator)
                since = replace(state)
            elif verdict is not None and logged:
                record = training_record(state, since, verdict, resolved, factor, peak_speed) | memory(accelerator)
                record |= statistics.record() | diagnostics.record(verdict.grad_norm) | epochs_record(batches, shards, state.step)
                metrics.write(record)
                display.training(record)
                state.begin_window()
                since = replace(state)

        # After the last step or a signal: wait for the last checkpoint, and say how the run ended.
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


def main(argv: list[str] | None = None, hooks: Hooks | None = None) -> int:
    """Run the command line. Return the exit status; `launch.train_command` lists them."""
    return command(argv, __doc__, partial(train, hooks=hooks or Hooks()))


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # unexpected: print the traceback and exit with status 1, before torchrun ends this rank by a signal
        sys.excepthook(*sys.exc_info())
        status = 1
    leave(status)
