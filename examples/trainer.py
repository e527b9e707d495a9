"""The Trainer of transformers. Run the same command again to resume from the last checkpoint:

pip install . -r examples/requirements.txt
python examples/trainer.py runs/trainer --steps 200
"""

import argparse
from pathlib import Path

from common import text_sequences
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from celo2 import Celo2, param_groups


class Celo2Trainer(Trainer):
    """Trainer with param groups from `param_groups`; Trainer's own groups only separate weight decay, not hidden matrices."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            lr, adamw_lr = self.args.learning_rate, 5 * self.args.learning_rate
            groups = param_groups(model or self.model, lr, adamw_lr, self.args.weight_decay)
            self.optimizer = Celo2(groups, lr=lr, rule="celo2-lm")
        return self.optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    args = parser.parse_args()
    arguments = TrainingArguments(
        output_dir=args.folder,
        learning_rate=2e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        per_device_train_batch_size=16,
        max_steps=args.steps,
        save_steps=args.save_every,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
    )
    set_seed(0)
    size = {"vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**size))
    examples = [{"input_ids": row, "labels": row} for row in text_sequences()]
    trainer = Celo2Trainer(model, arguments, train_dataset=examples)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.folder) if Path(args.folder).exists() else None)
