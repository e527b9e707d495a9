"""`--plan`: what a training run would take, without training: parameters, routing, tokens, FLOPs, memory, cost on N GPUs."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from celo2 import routing_table
from celo2.orthogonalize import newton_schulz_flops
from configs.schema import Config
from data.batches import check_batch_size
from launch.optimizers.build import as_celo2_groups, optimizer_groups
from launch.optimizers.table import entry_of
from launch.planning.cost import Machine, cost_lines, memory_per_rank, setup_of, workload_of
from launch.run.schedule import lr_factor
from launch.run.setup import build_from_config, open_data, vocabulary
from models import flops_per_token
from models.loss import CHUNK_TOKENS

GB = 1e9
GPT2_VOCABULARY = 50257  # assumed where neither model.vocab_size nor data.dir says


def make_plan(config: Config) -> str:
    """The plan as text. Raises what training would raise for the same configuration before its first step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_batch_size(config.train.batch_size, world, config.train.micro_batch_size)
    epoch_tokens = None
    if config.data.dir is not None and os.path.isdir(config.data.dir):
        shards, _ = open_data(config)
        tokenizer_size, epoch_tokens, data = shards.vocab_size, shards.n_tokens - 1, config.data.dir
    else:
        tokenizer_size = config.model.vocab_size or (1 if config.model.init else GPT2_VOCABULARY)
        assumed = "the vocabulary of model.init" if config.model.init else f"a vocabulary of {tokenizer_size:,}"
        data = f"{config.data.dir} is not prepared yet; {assumed} is assumed"
    model, context = build_from_config(config, vocabulary(config, tokenizer_size), device="meta")

    optimizer = config.optimizer
    groups = optimizer_groups(optimizer, model)
    parameters = sum(p.numel() for p in model.parameters())
    step_tokens = config.train.batch_size * context
    tokens = step_tokens * config.train.steps
    per_token = flops_per_token(model, context)
    one = activation_elements(model, 1, context, config.model.gradient_checkpointing)
    workload = workload_of(model, groups, context, per_token, one, loss_elements(model), config.model.gradient_checkpointing)
    setup = setup_of(config, world)
    memory = {name: size for name, size in memory_per_rank(workload, setup).items() if size}
    orthogonalized = workload.hidden if entry_of(optimizer).orthogonalizes else ()
    newton_schulz = sum(newton_schulz_flops(rows, cols) for rows, cols in orthogonalized)
    epochs = f", {tokens / epoch_tokens:.2f} epochs of {epoch_tokens:,}" if epoch_tokens else ""
    warmup = next((s for s in range(config.train.steps) if lr_factor(config.schedule, s, config.train.steps) == 1), 0)
    lines = [
        f"run         {config.run.name}",
        f"model       {parameters:,} parameters, context {context}, vocabulary {model.get_input_embeddings().weight.shape[0]:,}",
        f"data        {data}",
        f"batch       {config.train.batch_size} x {context} = {step_tokens:,} tokens a step = {world} process(es) x "
        f"{setup.accumulation} micro-batch(es) x {config.train.micro_batch_size} sequences",
        f"tokens      {config.train.steps:,} steps x {step_tokens:,} = {tokens:,}{epochs}; "
        f"{tokens / parameters:.1f} a parameter (about 20 are compute-optimal)",
        f"FLOPs       {per_token * tokens:.3g} in all, {per_token:.3g} a token; "
        f"Newton-Schulz adds {newton_schulz / (per_token * step_tokens):.2%} a step",
        f"schedule    {config.schedule.kind}, peak after step {warmup + 1}, last at {config.schedule.final:g} of the peak",
        f"memory      {sum(memory.values()) / GB:.2f} GB a process under {config.distributed.strategy}: "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in memory.items()),
        "",
        *cost_lines(workload, setup, config.train.batch_size, Machine()),
        "",
        routing_table(as_celo2_groups(groups)),
    ]
    return "\n".join(lines)


def activation_elements(model: PreTrainedModel, micro_batch: int, context: int, checkpointing: bool) -> int:
    """Elements that the forward pass keeps for the backward pass, about: 16 widths a token and layer for a GPT with flash
    attention (two norms, q, k, v, attention's output, projection, 4 + 4 in the feed-forward part), one with checkpointing."""
    config = model.config.get_text_config()
    per_layer = 1 if checkpointing else 16
    return micro_batch * context * config.hidden_size * (config.num_hidden_layers * per_layer + (16 if checkpointing else 0))


def loss_elements(model: PreTrainedModel) -> int:
    """Float32 elements that the chunked loss holds: three chunks of logits and the gradient of the output projection."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    return 3 * CHUNK_TOKENS * vocabulary + vocabulary * width
