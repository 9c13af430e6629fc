"""R-Drop in Lightning: the mixin, listed first, stands for the training step.

python examples/lightning_module.py
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from regdrop import RDropConfig
from regdrop.integrations.lightning import RDropMixin


# class Digits(pl.LightningModule):
class Digits(RDropMixin, pl.LightningModule):
    """A network for images of digits; batches are pairs (images, labels)."""

    rdrop = RDropConfig(alpha=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test accuracy", (self(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    pl.seed_everything(0)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, test_x, y, test_y = train_test_split(x.float() / 16, y, train_size=300, random_state=0)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    trainer = pl.Trainer(
        max_epochs=40, accelerator="auto", logger=False, enable_checkpointing=False
    )
    model = Digits()
    trainer.fit(model, loader)
    nll, kl = (float(trainer.callback_metrics[name]) for name in ("nll", "kl"))
    test_set = TensorDataset(test_x, test_y)
    (found,) = trainer.test(model, DataLoader(test_set, batch_size=len(test_set)))
    print(f"nll {nll:.3f} kl {kl:.3f} test accuracy {found['test accuracy']:.3f}")


if __name__ == "__main__":
    main()
