"""R-Drop in sentence-transformers: RDropLoss around the loss. Finds the other half of a sentence.

python examples/sentence_embeddings.py
"""

import tempfile
import this  # a text that is everywhere: the Zen of Python
from codecs import decode

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from regdrop.integrations.sentence_transformers import RDropLoss

set_seed(0)
lines = [line.split() for line in decode(this.s, "rot13").splitlines() if len(line) > 20]
first, second = ([" ".join(part) for part in halves] for halves in zip(
    *((words[: len(words) // 2], words[len(words) // 2 :]) for words in lines), strict=True
))  # fmt: skip

# A small model from nothing; yours is SentenceTransformer("name on the hub").
folder = tempfile.mkdtemp()
tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
special = ["[PAD]", "[UNK]"]
tokenizer.train_from_iterator(first + second, trainers.WordLevelTrainer(special_tokens=special))
names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BertModel(BertConfig(vocab_size=200, intermediate_size=64, **sizes)).save_pretrained(folder)
model = SentenceTransformer(modules=[modules.Transformer(folder), modules.Pooling(64)])

# loss = losses.MultipleNegativesRankingLoss(model)
loss = RDropLoss(losses.MultipleNegativesRankingLoss(model), alpha=1.0)
arguments = SentenceTransformerTrainingArguments(
    folder,
    max_steps=60,
    per_device_train_batch_size=len(lines),
    learning_rate=2e-3,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
data = Dataset.from_dict({"anchor": first, "positive": second})
trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
trainer.train()
scores = model.similarity(model.encode(first), model.encode(second))
right = (scores.argmax(-1) == torch.arange(len(lines))).float().mean()
print(f"halves found among {len(lines)}: accuracy {right:.3f}")
