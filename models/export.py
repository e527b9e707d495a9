"""Turns a checkpoint into a folder that transformers loads without this project: python -m models.export RUN OUT.

A GPT-3 becomes a stock GPT-2, which is the same function; any other architecture is saved as it is.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from models.gpt3 import LAYER_NORM_EPS, GPT3LMHeadModel

END_OF_TEXT = "<|endoftext|>"


class ExportError(ValueError):
    """A run that cannot be exported, or a place that it cannot be exported to. The message is one line."""


def export(run: str | Path, out: str | Path) -> Path:
    """Write the model and the tokenizer of `run` to the new folder `out`; -> the checkpoint's folder that was taken.

    `run` is a run's folder (its newest complete checkpoint is taken) or one of its checkpoints. AutoModelForCausalLM,
    AutoTokenizer and pipeline("text-generation") load `out`, which appears only when it is whole; else ExportError.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder")
    checkpoint = find_checkpoint(Path(run))
    model = load_checkpoint(checkpoint)
    if isinstance(model, GPT3LMHeadModel):
        model = to_gpt2(model)
    tokenizer = _load_tokenizer(checkpoint.parent.parent / "tokenizer.json", model.config)
    end = tokenizer.eos_token_id
    model.config.bos_token_id = model.config.eos_token_id = end
    # A batch pads with the end of text, and a pipeline, which asks for 256 new tokens, stays inside a small context.
    context = getattr(model.config, "max_position_embeddings", None)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, max_length=context)

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def find_checkpoint(run: Path) -> Path:
    """`run` if it is a checkpoint, or the newest complete one in run/checkpoints. Complete: it has a manifest.json."""
    run = run.absolute()
    if (run / "model.safetensors").exists():
        if not (run / "manifest.json").exists():
            raise ExportError(f"{run} is not complete: it has no manifest.json")
        return run
    if not run.is_dir():
        raise ExportError(f"there is no folder {run}")
    complete = [path.parent for path in run.glob("checkpoints/step_*/manifest.json") if path.parent.name[5:].isdigit()]
    if not complete:
        raise ExportError(f"{run} holds no complete checkpoint (checkpoints/step_*/manifest.json)")
    return max(complete, key=lambda path: int(path.name[5:]))


def load_checkpoint(checkpoint: Path) -> PreTrainedModel:
    """The model of config.json and model.safetensors (parameters by name, a tied weight once), in evaluation mode."""
    for name in ("config.json", "model.safetensors"):
        if not (checkpoint / name).is_file():
            raise ExportError(f"{checkpoint} has no {name}")
    try:
        config = AutoConfig.from_pretrained(checkpoint / "config.json")
        weights = load_file(checkpoint / "model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(f"cannot read {checkpoint}: {' '.join(str(error).split())}") from error
    model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())
    for problem, names in (
        ("lacks", parameters.keys() - weights.keys()),
        ("has unknown", weights.keys() - parameters.keys()),
        ("has misshapen", {n for n in parameters.keys() & weights.keys() if parameters[n].shape != weights[n].shape}),
    ):
        if names:
            raise ExportError(f"{checkpoint / 'model.safetensors'} {problem} weights: {', '.join(sorted(names)[:3])}")
    for name, parameter in parameters.items():
        parameter.data = weights[name]  # takes the checkpoint's dtype
    return model.eval()


def to_gpt2(model: GPT3LMHeadModel) -> GPT2LMHeadModel:
    """The same function as a stock GPT-2, a copy: q, k, v fused, matrices transposed, as Conv1D stores (in, out)."""
    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_new",
            layer_norm_epsilon=LAYER_NORM_EPS,
            initializer_range=config.initializer_range,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).to(model.dtype)
    modules = {
        "transformer.wte": model.model.embed_tokens,
        "transformer.wpe": model.model.embed_positions,
        "transformer.ln_f": model.model.norm,
        "lm_head": model.lm_head,
    }
    weights = {}
    for i, block in enumerate(model.model.layers):
        h = f"transformer.h.{i}"
        modules |= {f"{h}.ln_1": block.norm_1, f"{h}.ln_2": block.norm_2}
        qkv = (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        weights[f"{h}.attn.c_attn.weight"] = torch.cat([proj.weight.T for proj in qkv], dim=1)  # 3 x (D, D) -> (D, 3D)
        weights[f"{h}.attn.c_attn.bias"] = torch.cat([proj.bias for proj in qkv])  # (3D,)
        for name, linear in (
            ("attn.c_proj", block.attn.o_proj),
            ("mlp.c_fc", block.mlp.up_proj),
            ("mlp.c_proj", block.mlp.down_proj),
        ):
            weights[f"{h}.{name}.weight"] = linear.weight.T  # (out, in) -> (in, out)
            weights[f"{h}.{name}.bias"] = linear.bias
    for name, module in modules.items():
        weights |= {f"{name}.{key}": value for key, value in module.named_parameters()}
    gpt2.load_state_dict(weights)
    return gpt2.train(model.training)


def _load_tokenizer(path: Path, config) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise ExportError(f"the run has no {path}")
    try:
        known = Tokenizer.from_file(str(path)).token_to_id(END_OF_TEXT) is not None
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) if known else {}
        context = getattr(config, "max_position_embeddings", None)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=context, **special)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ExportError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if len(tokenizer) > config.vocab_size:
        raise ExportError(f"{path} has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, or one checkpoint in it")
    parser.add_argument("out", help="the folder to write; it must not exist, or be empty")
    options = parser.parse_args(arguments)
    try:
        checkpoint = export(options.run, options.out)
    except ExportError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"exported {checkpoint} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
