"""R-Drop in a loop with Accelerate: the marked lines are all that changes.

python examples/accelerate_loop.py          # or: accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regdrop import rdrop_cross_entropy, repeat_batch

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
digits = load_digits()
pixels = torch.from_numpy(digits.data).float() / 16
train_x, test_x, train_y, test_y = train_test_split(
    pixels, torch.from_numpy(digits.target), train_size=300, stratify=digits.target, random_state=0
)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(40):
    model.train()
    for x, y in loader:
        with accelerator.accumulate(model):
            # loss = F.cross_entropy(model(x), y)
            loss, nll, kl = rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=1.0, scale="mean")
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if epoch % 10 == 9:
        model.eval()  # one pass, no dropout, the ordinary loss
        with torch.no_grad():
            logits = model(test_x.to(accelerator.device)).cpu()
        accuracy = (logits.argmax(-1) == test_y).float().mean()
        accelerator.print(f"epoch {epoch + 1}: nll {nll:.3f} kl {kl:.3f} accuracy {accuracy:.3f}")
