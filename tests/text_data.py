"""Small text data sets and checkpoints of the hub's shapes, made without a hub."""

import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from regdrop.tasks.understanding.glue import GLUE

WORDS = ["good", "bad", "the", "film", "was", "a", "dog", "cat", "runs", "sleeps", "very", "not"]
SIZES = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "electra": {
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_glue(folder, task, train=60, test=20):
    """Write a task of GLUE whose label can be read off its last sentence."""
    glue = GLUE[task]
    generator = torch.Generator().manual_seed(0)

    def row():
        texts = {}
        for column in glue.sentences:
            chosen = torch.randint(2, len(WORDS), (5,), generator=generator).tolist()
            texts[column] = " ".join(WORDS[i] for i in chosen)
        label = int(torch.randint(max(2, glue.num_labels), (1,), generator=generator))
        texts[glue.sentences[-1]] += " " + (["good", "bad", "not"][label] + " ") * 3
        return {**texts, "label": float(label * 5) if glue.is_regression else label}

    write_rows(folder / "train.jsonl", [row() for _ in range(train)])
    for name in glue.tests.values():
        write_rows(folder / f"{name}.jsonl", [row() for _ in range(test)])
    return folder


def write_tokenizer(folder):
    """Write a tokenizer of whole words and return their number."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    names = ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_input_names=names,
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_encoder(folder, kind="bert", **options):
    """Write a tiny pretrained encoder of some class, with its tokenizer."""
    sizes = {**SIZES[kind], **({} if kind == "xlnet" else {"intermediate_size": 16})}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=write_tokenizer(folder), pad_token_id=0, **{**sizes, **options}
    )
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_encoder_decoder(folder, kind="bart"):
    """Write a tiny pretrained encoder-decoder of some class, with its tokenizer."""
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    else:
        sizes = {"d_model": 16}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 1, f"{side}_ffn_dim": 16, f"{side}_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=write_tokenizer(folder),
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


def write_translation(folder, train=200, test=12):
    """Write pairs whose target is the source word by word, in capitals."""
    generator = torch.Generator().manual_seed(0)

    def row():
        length = int(torch.randint(2, 6, (1,), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        text = " ".join(WORDS[i] for i in chosen)
        return {"de": text, "en": " ".join(f"{word}x" for word in text.split()) + "."}

    for name, size in (("train", train), ("validation", test), ("test", test)):
        write_rows(folder / f"{name}.jsonl", [row() for _ in range(size)])
    return folder
