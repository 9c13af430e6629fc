"""The weights that a Transformer trained from scratch begins with: those of fairseq's code."""

import torch
from torch import nn

# Projections of an attention by the names that BART's, Marian's and XGLM's classes give them. The
# three are one matrix in the original code, whose Xavier bound is smaller by this factor.
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_GAIN = 2**-0.5


def initialise(model: nn.Module) -> nn.Module:
    """Draw the weights of a model anew, in place, as fairseq's Transformer does.

    Deep layers that are normalised last hardly learn from wider weights; those that are normalised
    first do, and the plain decoder of language models here keeps its normal ones. Embeddings that
    are not trained, such as a table of sinusoids, and other kinds of modules are left as they are.

    Args:
        model: A model of BART's, Marian's or XGLM's class, or one whose attentions name their
            projections alike. Its output is tied to its embeddings or a linear layer that
            `get_output_embeddings` returns.

    Returns:
        The model.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None

    def initialise_own(module: nn.Module) -> None:
        if id(getattr(module, "weight", None)) in embeddings and isinstance(module, nn.Linear):
            return  # tied: drawn as an embedding
        initialise_module(module)
        if module is output and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    return model.apply(initialise_own)


@torch.no_grad()
def initialise_module(module: nn.Module) -> None:
    """Draw the weights of one module, after those of the modules inside it.

    Embeddings are normal with the deviation of their width to the power of -0.5, so that they have
    unit variance once they are scaled by its root, and 0 at the padding; linear layers have
    Xavier's uniform weights and no bias; those of queries, keys and values are smaller by the root
    of 2.
    """
    if isinstance(module, nn.Embedding) and module.weight.requires_grad:
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif all(isinstance(getattr(module, name, None), nn.Linear) for name in _QUERY_KEY_VALUE):
        for name in _QUERY_KEY_VALUE:
            nn.init.xavier_uniform_(getattr(module, name).weight, gain=_GAIN)
