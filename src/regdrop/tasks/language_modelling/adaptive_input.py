"""The Adaptive Input Transformer (Baevski and Auli 2019) as a Hugging Face model."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    XGLMConfig,
    XGLMModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head, read_output
from regdrop.integrations.transformers import LabelledBatch, register_head
from regdrop.loss import adaptive_log_softmax, adaptive_softmax_terms
from regdrop.tasks.common.initialisation import initialise, initialise_module


class AdaptiveInputConfig(XGLMConfig):
    """XGLM's configuration (a decoder with sinusoidal positions, normalised first) with bands.

    Attributes:
        cutoffs: First class of every band of rarer words but the first band's, which begins at 0;
            classes are words by falling frequency.
        band_factor: By how much each band's embeddings are narrower than those before.
        tail_dropout: Dropout rate inside the tails of the output.
    """

    model_type = "adaptive-input"

    cutoffs: list[int] | tuple[int, ...] = (20_000, 60_000)
    band_factor: int = 4
    tail_dropout: float | int = 0.0
    tie_word_embeddings: bool = False  # tied by construction: there is no other matrix


class AdaptiveSoftmaxParts(NamedTuple):
    """The output as `regdrop.loss.AdaptiveSoftmax` has it."""

    cutoffs: Sequence[int]
    head: Callable[[Tensor], Tensor]
    tail: Sequence[Callable[[Tensor], Tensor]]


class AdaptiveEmbedding(nn.Module):
    """Embeddings by bands of frequency, narrower in each, projected to the model's width."""

    def __init__(self, config: AdaptiveInputConfig) -> None:
        super().__init__()
        self.bounds = [0, *config.cutoffs, config.vocab_size]
        if sorted(set(self.bounds)) != self.bounds:
            raise ValueError(
                f"cutoffs must rise and be between 1 and the vocabulary's {config.vocab_size} - 1, "
                f"got {list(config.cutoffs)}"
            )
        self.embed_scale = math.sqrt(config.d_model)
        widths = [config.d_model // config.band_factor**i for i in range(len(self.bounds) - 1)]
        if widths[-1] < 1:
            raise ValueError(
                f"d_model must be at least band_factor ** {len(widths) - 1} = "
                f"{config.band_factor ** (len(widths) - 1)}, got {config.d_model}"
            )
        sizes = [high - low for low, high in zip(self.bounds, self.bounds[1:], strict=False)]
        self.bands = nn.ModuleList(map(nn.Embedding, sizes, widths))
        self.projections = nn.ModuleList(
            nn.Linear(width, config.d_model, bias=False) for width in widths
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings times the root of the width, (..., d_model), of words (...)."""
        words = input_ids.reshape(-1)
        places, embeddings = [], []
        for i, (band, projection) in enumerate(zip(self.bands, self.projections, strict=True)):
            low, high = self.bounds[i], self.bounds[i + 1]
            inside = ((words >= low) & (words < high)).nonzero()[:, 0]
            places.append(inside)
            embeddings.append(projection(band(words[inside] - low)))
        ordered: Tensor = torch.cat(embeddings)[torch.cat(places).argsort()]
        return ordered.view(*input_ids.shape, -1) * self.embed_scale

    def scores(self, hidden: Tensor, band: int, dropout: float = 0.0) -> Tensor:
        """Return the products of hidden states with a band's embeddings, through its projection."""
        projection: Any = self.projections[band]
        embedding: Any = self.bands[band]
        narrow = F.linear(hidden, projection.weight.t())
        return F.linear(F.dropout(narrow, dropout, self.training), embedding.weight)


@dataclass
class AdaptiveInputOutput(CausalLMOutputWithPast):
    """A causal language model's output; `logits` are log-probabilities, where they are asked for.

    Attributes:
        softmax_states: (batch, length, d_model + tails), what the adaptive softmax reads: hidden
            states, and the logits of the tails.
    """

    softmax_states: Tensor | None = None


class AdaptiveInputModel(XGLMModel):
    """XGLM's decoder over adaptive embeddings, without a last norm, as in the paper's code."""

    config: AdaptiveInputConfig

    def __init__(self, config: AdaptiveInputConfig) -> None:
        body = deepcopy(config)
        body.vocab_size = 2  # its own embeddings, which the adaptive ones take the place of
        body.pad_token_id = None
        super().__init__(body)
        self.config = config
        self.add_module("embed_tokens", AdaptiveEmbedding(config))
        self.add_module("layer_norm", nn.Identity())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # the table of positions
        initialise_module(module)


class AdaptiveInputForCausalLM(PreTrainedModel, GenerationMixin):
    """A Transformer decoder whose input and output embeddings are adaptive, and one.

    Embeddings, their projections and the output share their weights, as in the paper.
    """

    config: AdaptiveInputConfig
    config_class = AdaptiveInputConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: AdaptiveInputConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveInputModel(config)
        self.tails = nn.Linear(config.d_model, len(config.cutoffs), bias=False)
        self._autocast_dtype: torch.dtype | None = None
        self.post_init()
        initialise(self)  # knows which linear layers are queries, keys and values

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise_module(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the adaptive embedding."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def adaptive_softmax(self) -> AdaptiveSoftmaxParts:
        """Return the output: the first band's words and the tails, then each tail's words.

        It computes in the autocast dtype of the last forward, which has ended when a trainer asks.
        """
        embedding: Any = self.model.embed_tokens
        dropout, width = float(self.config.tail_dropout), self.config.d_model

        def scores(states: Tensor, band: int, dropout: float) -> Tensor:
            dtype = self._autocast_dtype
            with torch.autocast(states.device.type, dtype=dtype, enabled=dtype is not None):
                result: Tensor = embedding.scores(states[..., :width], band, dropout)
            return result

        def head(states: Tensor) -> Tensor:
            return torch.cat([scores(states, 0, 0.0), states[..., width:]], dim=-1)

        tails = [
            partial(scores, band=band, dropout=dropout) for band in range(1, len(embedding.bands))
        ]
        return AdaptiveSoftmaxParts(embedding.bounds[1:], head, tails)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> AdaptiveInputOutput:
        """Return the softmax's states; with labels the loss; log-probabilities where asked for.

        Args:
            input_ids: (batch, length) words.
            attention_mask: (batch, length), 0 on padding.
            position_ids: (batch, length).
            past_key_values: Keys and values of the words before.
            inputs_embeds: (batch, length, d_model) instead of words.
            labels: (batch, length) words, moved by one here, -100 where none counts.
            use_cache: Whether keys and values are returned.
            return_logits: Whether log-probabilities of all words are computed, (batch, length,
                vocabulary); by default where there are no labels.
            logits_to_keep: Last positions that they are computed for; 0 for all.
            num_items_in_batch: Denominator of the loss; None for the words that count.
            kwargs: Taken by the decoder.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if self.training else use_cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        device = hidden.device.type
        is_cast = torch.is_autocast_enabled(device)
        self._autocast_dtype = torch.get_autocast_dtype(device) if is_cast else None
        # All weights are used in here, where several processes look for them.
        states = torch.cat([hidden, self.tails(hidden)], dim=-1)
        loss = logits = None
        if labels is not None:
            target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            terms = adaptive_softmax_terms(states, target, self.adaptive_softmax(), num_passes=1)
            count = terms.nll_count if num_items_in_batch is None else num_items_in_batch
            loss = terms.nll.sum() / count
        if return_logits or (return_logits is None and labels is None):
            kept = states[:, -logits_to_keep:] if logits_to_keep else states
            logits = adaptive_log_softmax(kept.flatten(0, 1), self.adaptive_softmax())
            logits = logits.view(*kept.shape[:2], -1)
        return AdaptiveInputOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            softmax_states=states,
        )


def register() -> None:
    """Let transformers' auto classes find the configuration and the model; once is enough."""
    AutoConfig.register(AdaptiveInputConfig.model_type, AdaptiveInputConfig, exist_ok=True)
    AutoModelForCausalLM.register(AdaptiveInputConfig, AdaptiveInputForCausalLM, exist_ok=True)


def _head(batch: LabelledBatch) -> Head:
    """The next word behind an adaptive softmax, whose full logits never exist."""
    batch.refuse_options("full logits, which an adaptive softmax never has")
    target = batch.pop_next_words()
    terms = partial(adaptive_softmax_terms, softmax=batch.model.adaptive_softmax())
    batch.inputs["return_logits"] = False
    return Head(batch.inputs, target, terms, lambda output: read_output(output, "softmax_states"))


register_head(AdaptiveInputForCausalLM, _head)
