"""R-Drop in a training loop of timm: the task with another name, and a model with dropout.

python examples/timm_task.py
"""

import timm
import timm.optim
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from regdrop import RDropConfig
from regdrop.integrations.timm import RDropTask

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1, digits.target
train_x, test_x, train_y, test_y = train_test_split(
    images, torch.from_numpy(labels), train_size=300, random_state=0
)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=8,
    patch_size=4,
    in_chans=1,
    num_classes=10,
    embed_dim=64,
    depth=2,
    num_heads=4,
    proj_drop_rate=0.1,  # 0 by default in timm: R-Drop needs dropout
)
# task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1})
task = RDropTask(model, criterion_kwargs={"smoothing": 0.1}, rdrop=RDropConfig(alpha=1.0))
optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3)

for _ in range(30):
    task.train()
    for x, y in loader:
        result = task(x, y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
print(f"nll {result['nll']:.3f} kl {result['kl']:.3f}")
task.eval()  # one pass, the ordinary loss
with torch.no_grad():
    accuracy = (model(test_x).argmax(-1) == test_y).float().mean()
print(f"test accuracy {accuracy:.3f}")
