"""`--plan`: what a training run would need, without training: parameters, routing, tokens, FLOPs, memory, cost on N GPUs."""

from __future__ import annotations

import os
from dataclasses import replace

from celo2 import routing_table
from celo2.orthogonalize import newton_schulz_flops
from celo2.whitening import whitening_flops
from configs.length import batch_sizes
from configs.schema import Config
from data.batches import Batches
from launch.distributed.blocks import required_blocks
from launch.optimizers.build import check_matrices, optimizer_groups, routed_groups
from launch.optimizers.width import at_width_of, width_note
from launch.planning.activations import activation_elements, loss_elements, recomputed_share
from launch.planning.cost import ASSUMED_STATE, setup_of, workload_of
from launch.planning.machines import Machine
from launch.planning.memory import phases
from launch.planning.remedies import remedy_lines
from launch.planning.table import WORLDS, cost_lines
from launch.planning.units import size
from launch.run.check import prompt_notes
from launch.run.evaluation import open_sets, open_tasks
from launch.run.initialize import check_files
from launch.run.mixture import mixture_notes
from launch.run.schedule import lr_factor, warmup_steps
from launch.run.setup import build_from_config, open_data, run_folder, vocabulary
from models import flops_per_token

MANY_EPOCHS = 4  # up to here repeated tokens are nearly as good as new ones (arXiv 2305.16264)
GPT2_VOCABULARY = 50257  # assumed where neither model.vocab_size nor data.dir says


def make_plan(config: Config, world: int, machine: Machine) -> str:
    """The plan as text, for a configuration that `launch.run.check` has passed.

    Raises what training would raise before its first step for this configuration, this data, and the headers of `model.init`'s
    files. The plan reads no weights and makes no forward pass, so that only training itself refuses a model that is not causal.
    """
    shards, tokenizer_size = None, config.model.vocab_size or (1 if config.model.init else GPT2_VOCABULARY)
    assumed = "the vocabulary of model.init" if config.model.init else f"a vocabulary of {tokenizer_size:,}"
    folders = [config.data.dir] if config.data.mix is None else [source["dir"] for source in config.data.mix]
    names = ", ".join(folder or "data.dir" for folder in folders)
    data = f"{names} is not prepared yet; {assumed} is assumed"
    if all(folder is not None and os.path.isdir(folder) for folder in folders):
        shards, validation = open_data(config)
        tokenizer_size, data = shards.vocab_size, names
    check_files(config, run_folder(config))
    model, context = build_from_config(config, vocabulary(config, tokenizer_size), device="meta")
    if config.distributed.strategy == "fsdp2":
        required_blocks(model)

    optimizer = at_width_of(model, config.optimizer)
    groups = optimizer_groups(optimizer, model)
    check_matrices(optimizer, groups)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = batch_sizes(vars(config.train))
    batch = sizes.at(config.train.steps - 1)  # of the last step
    step_tokens = batch * context
    tokens = sizes.between(0, config.train.steps) * context
    per_token = flops_per_token(model, context)
    setup = setup_of(replace(config, train=replace(config.train, batch_size=batch)), world)
    workload, recomputed = (
        workload_of(
            model,
            groups,
            context,
            per_token,
            activation_elements(model, 1, context, again),
            loss_elements(model, setup.micro_batch * context),
            recomputed_share(again),
        )
        for again in (config.model.gradient_checkpointing, "true")
    )
    largest = replace(setup, micro_batch=config.train.micro_batch_size)
    memory = phases(workload, setup)
    orthogonalized = workload.hidden if setup.entry.orthogonalizes else ()
    of_update = {"Newton-Schulz": sum(newton_schulz_flops(rows, cols) for rows, cols in orthogonalized)}
    if setup.whitens:
        of_update["whitening"] = sum(whitening_flops(rows, cols) for rows, cols in orthogonalized)
    added = " and ".join(f"{name} {flops / (per_token * step_tokens):.2%}" for name, flops in of_update.items())
    epoch_tokens = shards.n_tokens - 1 if shards is not None else None
    epochs = f", {tokens / epoch_tokens:.2f} epochs of {epoch_tokens:,}" if epoch_tokens else ""
    begin = config.schedule.start
    warmup = begin + max(0, warmup_steps(config.schedule, config.train.steps) - 1)  # the first step at the peak
    last = lr_factor(config.schedule, config.train.steps - 1, config.train.steps)
    mean = f"{step_tokens:,}"
    if sizes.at(0) != batch:  # memory and the seconds of a step are those of the last size
        mean = f"{tokens / config.train.steps:,.0f} on average (train.batch_size {sizes.text()})"
    lines = [
        f"run         {config.run.name}",
        f"model       {parameters:,} parameters, context {context}, vocabulary {model.get_input_embeddings().weight.shape[0]:,}",
        f"data        {data}",
        f"batch       {batch} x {context} = {step_tokens:,} tokens a step = {world} process(es) x "
        f"{setup.accumulation} micro-batch(es) x {setup.micro_batch} sequences (at most {config.train.micro_batch_size})",
        f"tokens      {config.train.steps:,} steps x {mean} = {tokens:,}{epochs}; "
        f"{tokens / parameters:.1f} a parameter (about 20 are compute-optimal)",
    ]
    if epoch_tokens and tokens > MANY_EPOCHS * epoch_tokens:
        lines.append(
            f"warning     more than {MANY_EPOCHS} epochs: tokens teach less when seen again (arXiv 2305.16264); take more data, "
            f"or train.steps={sizes.steps_for(MANY_EPOCHS * epoch_tokens // context + 1) - 1 or 1}"
        )
    lines += [
        f"FLOPs       {per_token * tokens:.3g} in all, {per_token:.3g} a token; added in a step: {added}",
        f"schedule    {config.schedule.kind}, peak after step {warmup + 1}, last at {last:g} of the peak",
        f"memory      a process under {config.distributed.strategy} with {world} process(es), at the peak of",
        *(f"  {name:<10}{size(memory[name].on_device)} ({listed(memory[name].device)})" for name in ("start", "step")),
        f"  host      {size(memory['save'].on_host)} in a save ({listed(memory['save'].host)}), beside the training; "
        f"{size(memory['start'].on_host)} at the start. On a CPU device and host add up",
    ]
    if setup.entry.state_per_weight is None:
        lines.append(
            f"unknown     {optimizer.name}: its state is counted as {ASSUMED_STATE} numbers a weight, its time as AdamW's"
        )
    lines += [
        f"machine     {machine.name}: {size(machine.memory)}, {machine.peak(setup.bf16) / 1e12:g} TFLOP/s in "
        f"{config.train.precision}, of which {machine.efficiency:.0%} are assumed (the MFU without waiting), "
        f"{size(machine.memory_bandwidth)}/s; nodes of {machine.gpus_per_node} with {size(machine.host_memory)}, "
        f"{size(machine.intra_node_bandwidth)}/s in one, {size(machine.inter_node_bandwidth)}/s between",
    ]
    worlds = tuple(n for n in WORLDS if all(size % n == 0 for size in sizes.sizes))  # training refuses others from the start
    lines += ["", *cost_lines(workload, largest, batch, machine, worlds, -(-tokens // step_tokens))]
    lines += remedy_lines(workload, recomputed, largest, batch, machine, worlds)
    if shards is not None:
        open_sets(config, validation, fetch=False)
        without = replace(config, eval=replace(config.eval, lm_eval=[]))  # lm-eval takes long to list its tasks
        open_tasks(without, validation, context)
        batches = Batches(shards, context, sizes, config.run.seed)
        notes = [*prompt_notes(config, shards, context), *mixture_notes(batches, shards, config.train.steps)]
        lines += [f"note: {note}" for note in notes]
    lines += [f"note: {note}" for note in width_note(config.optimizer, optimizer)]
    lines += ["", routing_table(routed_groups(optimizer, groups))]
    return "\n".join(lines)


def listed(memory: dict[str, float]) -> str:
    """The sizes by purpose, in words."""
    return ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count)
