"""R-Drop in a loop of your own: the two marked lines are all that changes.

python examples/plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from regdrop import rdrop_cross_entropy, repeat_batch

torch.manual_seed(0)
digits = load_digits()
pixels = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target)
train_x, test_x, train_y, test_y = train_test_split(
    pixels, labels, train_size=300, stratify=labels, random_state=0
)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(40):
    model.train()
    for x, y in loader:
        # loss = F.cross_entropy(model(x), y)
        loss, nll, kl = rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=1.0, scale="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 9:
        model.eval()  # one pass, no dropout, the ordinary loss
        with torch.no_grad():
            logits = model(test_x)
        accuracy = (logits.argmax(-1) == test_y).float().mean()
        print(
            f"epoch {epoch + 1}: train nll {nll:.3f} kl {kl:.3f}, "
            f"test nll {F.cross_entropy(logits, test_y):.3f} accuracy {accuracy:.3f}"
        )
