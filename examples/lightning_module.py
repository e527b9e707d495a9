"""Lightning. Run the command again, with more epochs if all are done, to resume from the last checkpoint:

pip install . -r examples/requirements.txt
python examples/lightning_module.py runs/lightning --epochs 4
"""

import argparse
from pathlib import Path

import lightning
import torch
from common import SmallGPT, text_sequences

from celo2 import Celo2, param_groups


class LanguageModel(lightning.LightningModule):
    def __init__(self, lr: float = 2e-3, adamw_lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = SmallGPT()

    def training_step(self, batch, index):
        loss = self.model(batch)
        print(f"step {self.global_step + 1}: loss {loss.item():.4f}", flush=True)
        return loss

    def configure_optimizers(self):
        groups = param_groups(self.model, **self.hparams)
        optimizer = Celo2(groups, lr=self.hparams.lr, rule="celo2-lm")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epoch-steps", type=int, default=50)
    args = parser.parse_args()
    every_epoch = lightning.pytorch.callbacks.ModelCheckpoint(args.folder, save_last=True, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        limit_train_batches=args.epoch_steps,
        gradient_clip_val=1.0,
        callbacks=[every_epoch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.utils.data.DataLoader(text_sequences(), batch_size=16)
    last = args.folder / "last.ckpt"
    trainer.fit(LanguageModel(), batches, ckpt_path=last if last.exists() else None)
