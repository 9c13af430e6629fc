"""Every class of transformers that a head names, small enough that a test takes no time.

A config is shrunk by the names of its fields: widths, heads, layers, words. What names do not tell
stands in the table of exceptions.
"""

import re
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import torch
import transformers
import transformers.models.auto.modeling_auto as auto
from transformers import PreTrainedConfig, PreTrainedModel

WIDTH, HEADS, HEAD_WIDTH, LAYERS, LABELS = 32, 2, 16, 2, 3
VOCABULARY, POSITIONS, LENGTH, END = 99, 64, 8, 2
IMAGE, PATCH = 32, 8
DROPOUT, SPREAD = 0.3, 0.2
# Other special tokens, such as those of pictures, are the last ten of the vocabulary.
TOKENS = {"pad": 0, "bos": 1, "cls": 1, "eos": END, "sep": END, "decoder_start": 3, "mask": 4}

KEPT = object()
# The first pattern found in a field's name tells the largest number it may have; None: any.
_LIMITS: tuple[tuple[str, int | None], ...] = (
    (r"kernel|stride|^type_vocab|pre_attn_scalar|chunk_size_feed|ignore_index|_buckets$", None),
    (r"vocab_size", VOCABULARY),
    (r"positions?$|position_embeddings|pos_emb|max_seq_len|n_ctx|seq_len", POSITIONS),
    (r"top_?k$|experts_per_tok|^moe_k$", 2),
    (r"^n_groups?$|topk_group|shared_experts", 1),
    (r"experts$|expert_num$", 4),
    (r"head_(dim|size)$|d_kv$|kv_channels|d_head$|dim_head$", HEAD_WIDTH),
    (r"heads?$", HEADS),
    (r"layers?$|depth$|num_\w*blocks$", LAYERS),
    (r"^ima?ge?_size", IMAGE),
    (r"(^|_)patch_size$", PATCH),
    (r"rank$", 8),
    (r"size|dim|width|channels|hidden|inner|embd|units|dff|^d_", WIDTH),
)
_LIST_LIMITS: tuple[tuple[str, int | None], ...] = (
    (r"ignore|position|kernel|stride|window|scales|dilation|kv|block_size", None),
    (r"depths|blocks|numb_of_layers|repeats", 1),
    (r"heads", HEADS),
    (r"^image_size", IMAGE),
    (r"(^|_)patch_size$", PATCH),
    (r"hidden_sizes|embed_dims?$|(conv|tdnn)_dim|channels$|dims$|intermediate_size", WIDTH),
)
_RATE = re.compile(r"drop(out)?(_prob|_rate|_p|_path_rate)?$|pdrop$|drop_(path|out|prob|\w+_rate)")
_INHERITED = {field.name for field in fields(PreTrainedConfig)}
_NOTHING_GIVEN = {"head_dim": HEAD_WIDTH, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY}


def class_names(suffixes: tuple[str, ...]) -> list[str]:
    """Return the classes of the library's own mappings whose names end so."""
    found: set[str] = set()
    for mapping in vars(auto):
        if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", mapping):
            for entry in getattr(auto, mapping).values():
                found.update([entry] if isinstance(entry, str) else entry)
    return sorted(name for name in found if name.endswith(suffixes))


def tiny_model(class_name: str, **options: Any) -> PreTrainedModel:
    """Return a model of a class, its weights drawn from seed 0.

    Args:
        class_name: Name in `transformers`.
        options: Entries of the config.
    """
    kind = getattr(transformers, class_name)
    given = dict(_OF_A_CLASS.get(class_name, {}))
    if class_name.endswith(("Classification", "Segmentation")):
        given["num_labels"] = LABELS
    if "QuestionAnswering" in class_name:
        given["num_labels"] = 2
    default = _PAIRS[class_name]() if class_name in _PAIRS else kind.config_class()
    torch.manual_seed(0)
    return kind(tiny_config(default, **{**given, **options})).eval()


def tiny_config(config: PreTrainedConfig, **given: Any) -> PreTrainedConfig:
    """Return a small config like one of the default size.

    Args:
        config: The default config.
        given: Entries that are known; a dictionary for a config inside.
    """
    given = {**_EXCEPTIONS.get(type(config).__name__, {}), **given}
    layers = _kept_layers(config)
    options: dict[str, Any] = {}
    for index, field in enumerate(fields(config)):
        name = field.name
        try:
            value = getattr(config, name)
        except Exception:  # an attribute without one value for all layers, or without a default
            continue
        if name in _INHERITED:
            continue
        if isinstance(value, PreTrainedConfig):
            options[name] = tiny_config(value, **given.pop(name, {}))
        elif name == "num_hidden_layers" and layers:
            options[name] = len(layers)
        elif layers and isinstance(value, list) and len(value) == config.num_hidden_layers:
            options[name] = [_shrink(field, value[layer], index) for layer in layers]
        else:
            small = _shrink(field, value, index)
            # What the config outside has set stays, where it is no list made from other entries.
            is_set = isinstance(field.default, int | float | str) and value != field.default
            if small is not value or is_set:
                options[name] = small
    if config.is_encoder_decoder:
        options.setdefault("decoder_start_token_id", TOKENS["decoder_start"])
    options.update(given)
    return type(config)(**{name: v for name, v in options.items() if v is not KEPT})


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """Return the first layer of each kind, the first ones where all are of one kind."""
    names = ("layer_types", "layers_block_type", "mlp_layer_types")
    known = [field.name for field in fields(config) if field.name in names]
    kinds = [kind for name in known if isinstance(kind := getattr(config, name), list)]
    rows = list(zip(*kinds, strict=False))
    first = [rows.index(row) for row in dict.fromkeys(rows)]
    return first if len(first) != 1 else list(range(LAYERS))


def _shrink(field: Field, value: Any, index: int) -> Any:
    """Return a small value of a field."""
    name, kind = field.name, str(field.type)
    if token := re.fullmatch(r"(\w+?)_token_(id|index)", name):
        if value is None and token[1] not in ("pad", "bos", "eos", "decoder_start"):
            return None
        return TOKENS.get(token[1], VOCABULARY - 10 + index % 10)
    if value is None:
        return _NOTHING_GIVEN.get(name)
    if isinstance(value, bool | str):
        return value
    if isinstance(value, dict) and "mrope_section" in value:
        return _rope(HEAD_WIDTH * value.get("partial_rotary_factor", 1), value)
    if isinstance(value, float) and re.search(r"layer_?drop|mask_(time|feature)_prob", name):
        return 0.0
    if isinstance(value, float) and re.search(r"layer_?scale_init", name):
        return 1.0
    if _RATE.search(name) and isinstance(value, int | float):
        return DROPOUT if "float" in kind and "router" not in name else value
    if name in ("initializer_range", "init_std", "initializer_std"):
        return SPREAD
    if isinstance(value, int):
        return _limit(name, value, _LIMITS)
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return type(value)(_limit(name, item, _LIST_LIMITS) for item in value)
    return value


def _limit(name: str, value: int, limits: tuple[tuple[str, int | None], ...]) -> int:
    for pattern, limit in limits:
        if re.search(pattern, name):
            return value if limit is None else min(value, limit)
    return value


def _rope(width: float, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return rotary positions in three dimensions for a width that is rotated."""
    part = round(width / 6)
    section = [part, part, int(width / 2) - 2 * part]
    return {"rope_type": "default", "rope_theta": 1e4, **(rope or {}), "mrope_section": section}


def _pair(kind: Any, encoder: Any, decoder: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: kind.from_encoder_decoder_configs(encoder(), decoder())


_PAIRS = {
    "EncoderDecoderModel": _pair(
        transformers.EncoderDecoderConfig, transformers.BertConfig, transformers.BertConfig
    ),
    "SpeechEncoderDecoderModel": _pair(
        transformers.SpeechEncoderDecoderConfig,
        transformers.Wav2Vec2Config,
        transformers.BertConfig,
    ),
    "VisionEncoderDecoderModel": _pair(
        transformers.VisionEncoderDecoderConfig, transformers.ViTConfig, transformers.BertConfig
    ),
}
_SPECIAL = {"pad_token_id": 0, "decoder_start_token_id": 3}
_FOUR_STAGES = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_OF_A_CLASS: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {**_FOUR_STAGES, "use_auxiliary_head": False},
    "Data2VecVisionForSemanticSegmentation": {**_FOUR_STAGES, "use_auxiliary_head": False},
    "ReformerModelWithLMHead": {"is_decoder": True},
    **dict.fromkeys(_PAIRS, _SPECIAL),
}
_TWO_STAGES = {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
_BOTH_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}
_PICTURE_TOKEN = {"vocabulary_map": {"<image>": VOCABULARY - 5}}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ASTConfig": {"max_length": IMAGE, "num_mel_bins": 16},
    "BambaConfig": {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "BitConfig": {"num_groups": 4},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "BrosConfig": {"hidden_size": 64},
    "ChameleonConfig": _PICTURE_TOKEN,
    "CodeGenConfig": {"n_head": 4, "rotary_dim": 4},
    "CohereCompassTextConfig": {"rope_parameters": _BOTH_ROPES},
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DiffLlamaConfig": {"attention_dropout": 0.0},
    "DonutSwinConfig": _TWO_STAGES,
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "EfficientNetConfig": {"hidden_dim": KEPT},
    "Emu3Config": _PICTURE_TOKEN,
    "EsmcConfig": {"vocab_size": VOCABULARY},
    "FalconH1Config": {"mamba_n_heads": 8, "mamba_d_ssm": None},
    "FunAsrNanoConfig": {"adaptor_config": {"intermediate_size": WIDTH // 4}},
    "GPTJConfig": {"rotary_dim": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Glm4vMoeTextConfig": {"rope_parameters": _rope(8, {"partial_rotary_factor": 0.5})},
    "Glm5NextTextConfig": {"index_topk": 16},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LEDConfig": {"attention_window": 4},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4},
    "LevitConfig": {"patch_size": KEPT, "image_size": 64},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 48},
    "LongcatFlashConfig": {"qk_head_dim": 32},
    "LongformerConfig": {"attention_window": 4},
    "Mamba2Config": {"num_heads": 4},
    "MiMoV2FlashConfig": {"num_attention_heads": 8},
    "MobileViTV2Config": {"image_size": 64},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "NystromformerConfig": {"num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
    "PerceiverConfig": {"num_latents": 8, "max_position_embeddings": LENGTH},
    "PvtConfig": {"num_encoder_blocks": KEPT},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 95},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 95},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"axial_pos_embds": False},
    "Sapiens2HeadConfig": {"upsample_out_channels": [8], "conv_out_channels": [8]},
    "Step3p7TextConfig": {"sliding_window": 4},
    "SwinConfig": _TWO_STAGES,
    "Tipsv2DptConfig": {"backbone_config": _FOUR_STAGES},
    "UperNetConfig": {
        "use_auxiliary_head": False,
        "backbone_config": {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
    },
    "VibeVoiceAcousticTokenizerConfig": {"num_filters": 1},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 1},
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": KEPT},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    # Their rotary positions in three dimensions have no entry in the default config.
    **{
        f"{kind}TextConfig": {"rope_parameters": _rope(HEAD_WIDTH)}
        for kind in (
            "Ernie4_5_VLMoe",
            "Glm46V",
            "Glm4v",
            "GlmOcr",
            "HunYuanVL",
            "PaddleOCR",
            "Qwen2VL",
            "Qwen2_5Omni",
            "Qwen2_5_VL",
        )
    },
}
