"""What a person looks at when a training run is done: a picture of the loss and a sample of the model's text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from celo2.training.metrics import read_metrics
from configs.schema import Config
from launch.checkpoint.load import load_model
from launch.checkpoint.verify import list_checkpoints
from launch.run.setup import open_data


def finish(config: Config, run_dir: Path, device: torch.device) -> None:
    """Draw the loss, write and print a sample of the last checkpoint, and print the losses."""
    records = read_metrics(run_dir / "metrics.jsonl")
    curve = draw_losses(records, run_dir / "loss.png", config.run.name)
    if config.log.sample_tokens:
        model = load_model(list_checkpoints(run_dir / "checkpoints")[-1]).to(device)
        eot = open_data(config)[0].eot_id
        tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer.json"))
        text = sample_text(model, tokenizer, eot, config.log.sample_prompt, config.log.sample_tokens, config.run.seed)
        (run_dir / "sample.txt").write_text(text + "\n")
        print(f"\na sample of {config.log.sample_tokens} tokens ({run_dir / 'sample.txt'}):\n{text}\n")
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    validation = [r["val_loss"] for r in records if "val_loss" in r]
    if losses and validation:
        seconds = next(r["seconds"] for r in reversed(records) if "seconds" in r)
        print(
            f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}, validation loss {validation[-1]:.3f}, "
            f"{seconds:.0f} s in training steps; curve: {curve}"
        )


def draw_losses(records: list[dict], path: Path, title: str) -> Path | None:
    """A picture of training and validation loss over tokens; None if nothing was logged."""
    training = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    if not training:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), linewidth=1, color="#9ecae1", label="training")
    if validation:
        label = f"validation, last {validation[-1][1]:.3f}"
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, color="#08519c", label=label)
    axes.set(title=title, xlabel="tokens", ylabel="cross-entropy per token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    return path


@torch.no_grad()
def sample_text(model: PreTrainedModel, tokenizer: Tokenizer, eot: int, prompt: str, length: int, seed: int) -> str:
    """`prompt`, or the start of a document, continued by `length` tokens.

    Drawn at temperature 0.7 from the 50 likeliest tokens. No six tokens come twice, as small models repeat themselves otherwise.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eot]
    room = getattr(model.config, "max_position_embeddings", len(ids) + length) - len(ids)
    training = model.training
    model.eval()
    torch.manual_seed(seed)
    tokens = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=max(1, min(length, room)),
        do_sample=True,
        temperature=0.7,
        top_k=50,
        no_repeat_ngram_size=6,
        eos_token_id=None,
        pad_token_id=eot,
    )
    model.train(training)
    return tokenizer.decode([token for token in tokens[0].tolist() if token != eot])
