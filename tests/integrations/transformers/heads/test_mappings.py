"""Every class of the library's own mappings that a head names: its own loss, and two passes of it.

A class that no table names must be known rightly: its likelihood is the model's own loss. Otherwise
it is refused by name, or stands here with a reason.
"""

import importlib.util
import re
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from regdrop import repeat_batch
from regdrop.heads import Head, UnknownHeadError
from regdrop.integrations.transformers.forward.micro_batch import auxiliary_loss
from regdrop.integrations.transformers.heads.registry import find_head, known_endings
from regdrop.loss import ItemTerms, combine_terms
from tiny_batches import tiny_batch
from tiny_models import class_names, tiny_model

NEEDED = {
    "DinatForImageClassification": "natten",
    "FastVlmForConditionalGeneration": "timm",
    "Gemma3nForConditionalGeneration": "timm",
    "LayoutLMv2ForQuestionAnswering": "detectron2",
    "LayoutLMv2ForSequenceClassification": "detectron2",
    "LayoutLMv2ForTokenClassification": "detectron2",
    "PerceptionLMForConditionalGeneration": "timm",
    "TimmWrapperForImageClassification": "timm",
}
CODES = "predicts several codes of sound at every position"
PROCESSED = "its words and its picture or sound go together as its processor makes them"
LEFT_OUT = {
    "Blip2ForConditionalGeneration": PROCESSED,
    "CsmForConditionalGeneration": CODES,
    "DiaForConditionalGeneration": CODES,
    "Dots3NoteForCausalLM": "the widths of its layers are no entries of its config",
    "Dots3NoteForConditionalGeneration": "the widths of its layers are no entries of its config",
    "Gemma4AssistantForCausalLM": "reads the states of another model",
    "Gemma4UnifiedAssistantForCausalLM": "reads the states of another model",
    "GradiumPhononTTSForConditionalGeneration": CODES,
    "Granite4VisionForConditionalGeneration": "its config has no defaults",
    "HiggsAudioV2ForConditionalGeneration": CODES,
    "InstructBlipForConditionalGeneration": PROCESSED,
    "InstructBlipVideoForConditionalGeneration": PROCESSED,
    "Kosmos2ForConditionalGeneration": PROCESSED,
    "KyutaiSpeechToTextForConditionalGeneration": CODES,
    "MusicgenForCausalLM": CODES,
    "MusicgenForConditionalGeneration": CODES,
    "MusicgenMelodyForCausalLM": CODES,
    "MusicgenMelodyForConditionalGeneration": CODES,
    "PI0ForConditionalGeneration": "predicts the actions of a robot",
    "PPLCNetForImageClassification": "has no loss of its own to compare with",
    "PocketTTSForConditionalGeneration": CODES,
    "Qwen2_5OmniForConditionalGeneration": "has no forward of its own",
    "Qwen3OmniMoeForConditionalGeneration": "has no forward of its own",
    "VoxtralRealtimeForConditionalGeneration": PROCESSED,
}
# Their own loss is another by design, and they are told so by name.
REFUSED = {
    "BlipForConditionalGeneration": "with label smoothing",
    "BlipForQuestionAnswering": "its forward takes no 'start_positions'",
    "DPTForSemanticSegmentation": "adds the loss of an auxiliary head, times 0.4",
    "GitForCausalLM": "that of the positions behind a picture",
    "LxmertForQuestionAnswering": "its forward takes no 'start_positions'",
    "Nemotron3DiarizationForAudioFrameClassification": "of several speakers a frame",
    "ProphetNetForCausalLM": "that of several next words",
    "ProphetNetForConditionalGeneration": "that of several next words",
    "ShieldGemma2ForImageClassification": "that of words",
    "TapasForQuestionAnswering": "its forward takes no 'start_positions'",
    "ViltForQuestionAnswering": "its forward takes no 'start_positions'",
}
# No dropout acts on what these read, whatever their config says.
WITHOUT_DROPOUT = frozenset(
    {
        "BigBirdForQuestionAnswering",
        "DiffLlamaForCausalLM",
        "DiffLlamaForQuestionAnswering",
        "DiffLlamaForSequenceClassification",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "FalconMambaForCausalLM",
        "HGNetV2ForImageClassification",
        "LevitForImageClassification",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Lfm2VlForConditionalGeneration",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "MptForCausalLM",
        "MptForQuestionAnswering",
        "MptForSequenceClassification",
        "NeoMMEForMaskedLM",
        "PaddleOCRVLForConditionalGeneration",
        "RegNetForImageClassification",
        "ResNetForImageClassification",
        "RwkvForCausalLM",
        "TextNetForImageClassification",
        "UperNetForSemanticSegmentation",
        "xLSTMForCausalLM",
    }
)
# Mixtures of experts that add the balance of their experts to the loss.
BALANCED = [
    "DeepseekV4ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "FlexOlmoForCausalLM",
    "Glm4vMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "JambaForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration",
]
NAMES = class_names(known_endings())
RUN = [name for name in NAMES if not {name} & {*NEEDED, *LEFT_OUT, *REFUSED}]


@pytest.fixture(autouse=True)
def _quiet():
    """Leave out what models say of their odd sizes."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(?!regdrop)")
        yield
    transformers.logging.set_verbosity(level)


def check_own_loss(model: PreTrainedModel, head: Head, batch: dict[str, torch.Tensor]) -> ItemTerms:
    """Hold the likelihood against the model's own loss; return its terms."""
    own = model(**batch).loss
    output = model(**head.inputs)
    terms = head.terms(head.outputs(output), head.target, num_passes=1)
    auxiliary = auxiliary_loss(model, output)
    loss = combine_terms(terms, alpha=0.0, num_passes=1).loss + (auxiliary or 0.0)
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-6, check_dtype=False)
    return terms


def terms_of(model: PreTrainedModel, head: Head, num_passes: int) -> ItemTerms:
    inputs = repeat_batch(head.inputs, num_passes, batch_size=head.rows)
    return head.terms(head.outputs(model(**inputs)), head.target, num_passes=num_passes)


@pytest.mark.long
@pytest.mark.parametrize("name", RUN)
def test_one_pass_is_the_models_own_loss_and_two_have_a_divergence(name):
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    given = dict(batch)
    head = find_head(model, batch)
    assert all(batch[key] is value for key, value in given.items())
    assert not {"labels", "start_positions", "end_positions"} & set(head.inputs)
    with torch.no_grad():
        terms = check_own_loss(model, head, batch)
        counts = head.counts()
        assert (counts.nll, counts.kl) == (terms.nll_count, terms.kl_count)
        two = terms_of(model.train(), head, num_passes=2)
    assert two.nll.shape == two.kl.shape == terms.nll.shape
    assert len(two.nll) == head.rows
    assert two.nll.isfinite().all()
    assert two.kl.isfinite().all()
    kl = two.kl.sum() / two.kl_count
    assert (abs(kl) < 1e-7) if name in WITHOUT_DROPOUT else (kl > 1e-5)


@pytest.mark.parametrize("name", BALANCED)
def test_the_balance_of_experts_is_kept_with_its_coefficient(name):
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    kind = getattr(transformers, name).config_class
    is_inside = "router_aux_loss_coef" not in {field.name for field in fields(kind)}
    model = tiny_model(name, **({"text_config": options} if is_inside else options))
    batch = tiny_batch(model, name)
    with torch.no_grad():
        assert auxiliary_loss(model, model(**batch)) > 0.1
        check_own_loss(model, find_head(model, batch), batch)


@pytest.mark.parametrize("name", ["DbrxForCausalLM", "JetMoeForCausalLM"])
def test_the_balance_of_experts_is_kept_under_another_name_of_its_coefficient(name):
    model = tiny_model(name)
    model.config.output_router_logits = True
    batch = tiny_batch(model, name)
    with torch.no_grad():
        assert auxiliary_loss(model, model(**batch)) > 0
        check_own_loss(model, find_head(model, batch), batch)


def test_losses_of_experts_that_the_output_hides_are_refused():
    name = "SwitchTransformersForConditionalGeneration"
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    assert find_head(model, batch | {"output_router_logits": False}).vocabulary == 99
    with pytest.raises(UnknownHeadError, match=f"^{name} adds losses of its experts .*leaves them"):
        find_head(model, batch | {"output_router_logits": True})


@pytest.mark.parametrize("name", REFUSED)
def test_another_loss_behind_a_familiar_name_is_refused_by_name(name):
    model = tiny_model(name)
    labels = {"labels": torch.zeros(4, 8, dtype=torch.long), "input_ids": torch.ones(4, 8).long()}
    found = f"^{name} .*{re.escape(REFUSED[name])}.*RDropConfig\\(likelihood='model'\\).*rdrop_head"
    with pytest.raises(UnknownHeadError, match=found):
        find_head(model, labels)


@pytest.mark.parametrize("name", NEEDED)
def test_what_another_package_is_needed_for_fails_for_want_of_it(name):
    if importlib.util.find_spec(NEEDED[name]) is not None:
        pytest.skip(f"{NEEDED[name]} is installed")
    with pytest.raises(ImportError, match=NEEDED[name]):
        tiny_model(name)


def test_nearly_all_classes_run():
    assert {*NEEDED, *LEFT_OUT, *REFUSED} <= set(NAMES)
    assert set(RUN) >= WITHOUT_DROPOUT
    assert len(RUN) >= 0.93 * len(NAMES)
    assert len(WITHOUT_DROPOUT) < 0.05 * len(RUN)
