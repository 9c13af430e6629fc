"""R-Drop on labelled and unlabelled data in one batch, beside the labels alone.

python examples/unlabelled_data.py
"""

from statistics import mean

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from regdrop import RDropConfig, rdrop_step

UNLABELLED = -1
digits = load_digits()
pixels = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target)


def train(config: RDropConfig, unlabelled_batch: int, seed: int) -> tuple[float, float]:
    """Train on 50 labels and so many unlabelled digits a batch; return test accuracy and KL."""
    torch.manual_seed(seed)
    x, other_x, y, other_y = train_test_split(
        pixels, labels, train_size=50, stratify=labels, random_state=seed
    )
    # Labels of the rest are used for the test alone.
    pool, test_x, _, test_y = train_test_split(other_x, other_y, test_size=500, random_state=seed)
    no_label = torch.full((unlabelled_batch,), UNLABELLED)
    model = nn.Sequential(
        *(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        chosen = torch.randint(len(pool), (unlabelled_batch,))
        batch, target = torch.cat([x, pool[chosen]]), torch.cat([y, no_label])
        loss, _, kl = rdrop_step(model, batch, target, config=config, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()  # one pass, no dropout
    with torch.no_grad():
        return float((model(test_x).argmax(-1) == test_y).float().mean()), float(kl)


RDROP = RDropConfig(alpha=1.0, unlabelled_index=UNLABELLED)
for name, config, unlabelled_batch in (
    ("50 labels, two passes without the KL", RDropConfig(alpha=0.0), 0),
    ("50 labels, R-Drop", RDROP, 0),
    ("50 labels and 1,247 digits without, R-Drop", RDROP, 200),
):
    runs = [train(config, unlabelled_batch, seed) for seed in range(5)]
    accuracy, kl = (mean(values) for values in zip(*runs, strict=True))
    print(f"{name}: accuracy {accuracy:.3f} (five seeds), last kl {kl:.3f}")
