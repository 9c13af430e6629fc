"""R-Drop in a Hugging Face Trainer script: the two marked lines are all that changes.

python examples/transformers_trainer.py
"""

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer

set_seed(0)
digits = load_digits()
dataset = Dataset.from_dict(
    {
        "pixel_values": (digits.images[:, None] / 8 - 1).astype("float32"),
        "labels": digits.target,
    }
).with_format("torch")
splits = dataset.train_test_split(train_size=300, seed=0)

config = ViTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=10,
    hidden_dropout_prob=0.1,  # 0 by default in ViT: R-Drop needs dropout
)
# trainer = Trainer(
trainer = RDropTrainer(
    rdrop=RDropConfig(alpha=1.0),
    model=ViTForImageClassification(config),
    args=TrainingArguments(
        output_dir="runs/example",
        max_steps=150,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=splits["train"],
    eval_dataset=splits["test"],
    compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
)
trainer.train()  # logs loss, nll, kl and alpha
print(trainer.evaluate())
