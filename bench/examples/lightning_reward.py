"""A reward model trained with Lightning: gradient accumulation over pairs of which some don't count.

    python bench/examples/lightning_reward.py

A batch of the loader is one optimizer step, cut into micro-batches. Pairs whose answers are equally good are masked,
and every other pair weighs the same, whatever micro-batch or process it is in: the loss is divided by the pairs that
count in the whole step (``num_items``).
"""

import lightning
import torch
from torch.utils.data import DataLoader

from pyalign import pairwise_preference_loss  # instead of -F.logsigmoid(chosen - rejected).mean()
from pyalign.nn import RewardHead

LENGTH, PAD = 24, 256


def encode(text: str) -> list[int]:
    tokens = list(text.encode())[:LENGTH]
    return tokens + [PAD] * (LENGTH - len(tokens))


class RewardModel(lightning.LightningModule):
    def __init__(self, micro_batch: int, width: int = 32) -> None:
        super().__init__()
        self.automatic_optimization = False  # a training step is a whole optimizer step
        self.micro_batch, self.losses = micro_batch, []
        layer = torch.nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.token, self.place = torch.nn.Embedding(257, width), torch.nn.Embedding(LENGTH, width)
        self.body = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = RewardHead(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, LENGTH) -> (B,)
        mask = tokens != PAD
        hidden = self.body(self.token(tokens) + self.place.weight, src_key_padding_mask=~mask)
        return self.head(hidden, mask=mask)  # read at the last token

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        optimizer, total = self.optimizers(), 0.0
        num_items = self.all_gather(batch["counts"].sum()).sum()  # of the step, over all processes
        parts = [batch[name].split(self.micro_batch) for name in ("chosen", "rejected", "counts")]
        for chosen, rejected, counts in zip(*parts, strict=True):
            scores = self(torch.cat([chosen, rejected])).chunk(2)
            loss = pairwise_preference_loss(*scores, mask=counts, num_items=num_items)
            # Data-parallel training averages gradients over processes, and they should be added up.
            self.manual_backward(loss * self.trainer.world_size)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(self.all_gather(total).sum().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def collate(pairs: list[tuple[str, str, bool]]) -> dict[str, torch.Tensor]:
    chosen, rejected, counts = zip(*pairs, strict=True)
    ids = {"chosen": [encode(x) for x in chosen], "rejected": [encode(x) for x in rejected], "counts": counts}
    return {name: torch.tensor(x) for name, x in ids.items()}


def train(micro_batch: int = 8, epochs: int = 3) -> RewardModel:
    """A model that prefers sums that are right, where one of the two is."""
    torch.manual_seed(0)
    sums = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    pairs = [(f"{a}+{b}={a + b}", f"{a}+{b}={a + b + (a * b) % 3}", (a * b) % 3 != 0) for a, b in sums]
    loader = DataLoader(pairs, batch_size=32, shuffle=True, collate_fn=collate)
    model = RewardModel(micro_batch)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=epochs, enable_model_summary=False, log_every_n_steps=1, **quiet)
    trainer.fit(model, loader)
    return model


if __name__ == "__main__":
    for step, loss in enumerate(train().losses):
        print(f"step {step + 1}: {loss:.6f}")
