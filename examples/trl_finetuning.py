"""R-Drop in TRL's supervised fine-tuning: the trainer with another name.

python examples/trl_finetuning.py
"""

import tempfile
import this  # a text that is everywhere: the Zen of Python
from codecs import decode

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from regdrop import RDropConfig
from regdrop.integrations.trl import RDropSFTTrainer

set_seed(0)
lines = [line for line in decode(this.s, "rot13").splitlines() if len(line) > 20]

# A small model from nothing; yours is the name of one on the hub.
tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
special = ["<pad>", "<unk>", "<end>"]
tokenizer.train_from_iterator(lines, trainers.WordLevelTrainer(special_tokens=special))
names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
config = GPT2Config(vocab_size=len(processing), **sizes)  # dropout is 0.1 by default in GPT-2

# trainer = SFTTrainer(
trainer = RDropSFTTrainer(
    rdrop=RDropConfig(alpha=1.0),
    model=GPT2LMHeadModel(config),
    args=SFTConfig(
        tempfile.mkdtemp(),
        max_steps=120,
        per_device_train_batch_size=len(lines),
        learning_rate=3e-3,
        logging_steps=40,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_dict({"text": lines}),
    processing_class=processing,
)
trainer.train()  # logs loss, nll, kl and alpha beside TRL's entropy and token accuracy
log = trainer.state.log_history[-2]
print(f"nll {log['nll']:.3f} kl {log['kl']:.3f} token accuracy {log['mean_token_accuracy']:.3f}")
