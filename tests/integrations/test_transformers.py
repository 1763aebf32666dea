"""Do models of Transformers compute with this package what they compute in eager mode, and does no mask get lost?

Real model classes, a few small layers each, with random weights, in float32: so the two agree to what rounding leaves.
On a GPU: DEVICE=cuda python -m pytest tests/integrations
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest

pytest.importorskip("transformers", reason="needs Transformers: pip install 'triton-attention[transformers]'")

import torch
import transformers as tf
from torch import nn
from transformers import masking_utils

from triton_attention.integrations import transformers as integration

integration.register()

TOLERANCE = 1e-5  # of the largest value; what is lost changes results by a hundred times as much at least
DEVICE = os.environ.get("DEVICE", "cpu")
LENGTH = 11
TOKENS = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)
DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LEFT_PADDED = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * (LENGTH - 3)], device=DEVICE)
RIGHT_PADDED = LEFT_PADDED.flip(1)
PACKED = torch.tensor(  # positions: three sequences in a row, and two
    [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]], device=DEVICE
)
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)


class Case(NamedTuple):
    """A model and what it is given."""

    model: Callable[[Any], nn.Module]
    config: Any
    inputs: Mapping[str, Any]
    sensitive_to: tuple[str, ...] = ("attention_mask",)  # arguments of attention without which the results change
    real: torch.Tensor | None = None  # the tokens that are not padding: the others' results are arbitrary
    bands: bool = True  # no mask becomes a matrix


def decoder(model, config, *further, bands=True, **inputs):
    """A case whose results depend on the mask and on `further` arguments of attention."""
    inputs = {"input_ids": TOKENS, "use_cache": False, **inputs}
    return Case(model, config, inputs, ("attention_mask", *further), inputs.get("attention_mask"), bands)


LLAMA = tf.LlamaConfig(**DECODER)
QWEN_WINDOW = DECODER | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
QWEN = tf.Qwen3Config(**QWEN_WINDOW)
QWEN_BOTH_WAYS = tf.Qwen3Config(**QWEN_WINDOW, is_causal=False)
GEMMA = tf.Gemma2Config(**DECODER, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=4)
GEMMA_BOTH_WAYS = tf.Gemma3TextConfig(**DECODER, sliding_window=5, use_bidirectional_attention=True)
GPT_OSS = tf.GptOssConfig(**DECODER, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
BERT = tf.BertConfig(**ENCODER, vocab_size=50, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
T5 = tf.T5Config(
    vocab_size=50,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    dropout_rate=0.0,
)
SWIN = tf.SwinConfig(
    image_size=16, patch_size=1, embed_dim=16, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.0
)
VIT = tf.ViTConfig(**ENCODER, image_size=16, patch_size=4)
T5_INPUTS = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6], "use_cache": False}

CASES = {
    "Llama": decoder(tf.LlamaForCausalLM, LLAMA),
    "Llama, padded left": decoder(tf.LlamaForCausalLM, LLAMA, attention_mask=LEFT_PADDED),
    "Llama, padded right": decoder(tf.LlamaForCausalLM, LLAMA, attention_mask=RIGHT_PADDED),
    "Llama, packed": decoder(tf.LlamaForCausalLM, LLAMA, position_ids=PACKED),
    "Qwen3": decoder(tf.Qwen3ForCausalLM, QWEN),
    "Qwen3, both ways": decoder(tf.Qwen3Model, QWEN_BOTH_WAYS, attention_mask=RIGHT_PADDED),
    "Gemma 2": decoder(tf.Gemma2ForCausalLM, GEMMA, "softcap", "scaling"),
    "Gemma 2, padded left": decoder(tf.Gemma2ForCausalLM, GEMMA, "softcap", attention_mask=LEFT_PADDED),
    "Gemma 2, packed": decoder(tf.Gemma2ForCausalLM, GEMMA, "softcap", position_ids=PACKED),
    "Gemma 3, both ways": decoder(tf.Gemma3TextModel, GEMMA_BOTH_WAYS, attention_mask=RIGHT_PADDED, bands=False),
    "gpt-oss": decoder(tf.GptOssForCausalLM, GPT_OSS, "s_aux", attention_mask=LEFT_PADDED),
    "BERT": Case(tf.BertForMaskedLM, BERT, {"input_ids": TOKENS}, ()),
    "BERT, padded": Case(
        tf.BertForMaskedLM, BERT, {"input_ids": TOKENS, "attention_mask": RIGHT_PADDED}, real=RIGHT_PADDED
    ),
    "T5": Case(tf.T5ForConditionalGeneration, T5, T5_INPUTS, ("attention_mask", "position_bias", "scaling")),
    "T5, padded": Case(
        tf.T5ForConditionalGeneration,
        T5,
        {**T5_INPUTS, "attention_mask": RIGHT_PADDED, "decoder_attention_mask": RIGHT_PADDED[:, :6]},
        ("attention_mask", "position_bias", "scaling"),
        RIGHT_PADDED[:, :6],
    ),
    "Swin": Case(tf.SwinForImageClassification, SWIN, {"pixel_values": PICTURES}),
    "ViT": Case(tf.ViTForImageClassification, VIT, {"pixel_values": PICTURES}, ()),
}
SENSITIVE_CASES = {name: case for name, case in CASES.items() if case.sensitive_to}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_model(model, config, implementation):
    """The same weights each time, large enough for attention to be far from uniform."""
    made = model._from_config(copy.deepcopy(config), attn_implementation=implementation).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return made.to(DEVICE)


def both(model, config):
    """(ours, the eager one)."""
    return make_model(model, config, integration.NAME), make_model(model, config, "eager")


def results(model, case, loss_weights=None):
    """The logits of real tokens, and the gradients of a weighted sum of them, by parameter."""
    outputs = model(**case.inputs)
    logits = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    logits = logits if case.real is None else logits[case.real.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    (logits * weights.to(DEVICE)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits.detach(), gradients


def relative_error(result, true, smallest=0.0):
    """The largest error, measured in the largest true value or in `smallest`, whichever is larger."""
    return ((result - true).abs().max() / true.abs().max().clamp(min=smallest)).item()


@pytest.fixture
def attention(monkeypatch):
    """Registers another attention function under our name, until the test is over."""

    def replace(function):
        monkeypatch.setitem(tf.AttentionInterface._global_mapping, integration.NAME, function)

    return replace


@pytest.fixture
def no_matrices(monkeypatch):
    """Call it, and whatever makes a matrix of a mask fails from then on."""

    def forbid():
        for module, name in ((masking_utils, "sdpa_mask"), (integration, "_same_sequence")):
            monkeypatch.setattr(module, name, Mock(side_effect=AssertionError("a mask became a matrix")))

    return forbid


@each_case
def test_logits_and_gradients_are_those_of_eager_mode(case, no_matrices):
    eager_logits, eager_gradients = results(make_model(case.model, case.config, "eager"), case)
    if case.bands:
        no_matrices()
    logits, gradients = results(make_model(case.model, case.config, integration.NAME), case)
    assert relative_error(logits, eager_logits) < TOLERANCE
    assert gradients.keys() == eager_gradients.keys()
    smallest = 1e-2 * max(gradient.abs().max() for gradient in eager_gradients.values())  # some are 0 but for rounding
    errors = {name: relative_error(gradient, eager_gradients[name], smallest) for name, gradient in gradients.items()}
    assert not {name: error for name, error in errors.items() if error > TOLERANCE}


@pytest.mark.parametrize("case", SENSITIVE_CASES.values(), ids=SENSITIVE_CASES)
def test_what_attention_is_given_matters(case, attention):
    """Without the mask, the bias and so on the tests above would fail: what they compare is not blind to them."""
    model = make_model(case.model, case.config, integration.NAME)
    with torch.no_grad():
        outputs = model(**case.inputs)
    logits = next(iter(outputs.values()))
    for name in case.sensitive_to:

        def without(*positional, name=name, **named):
            *positional, mask = positional
            named |= {"attention_mask": mask, "is_causal": False}
            assert named[name] is not None
            return integration.attention_forward(*positional, **(named | {name: None}))

        attention(without)
        with torch.no_grad():
            worse = next(iter(model(**case.inputs).values()))
        assert relative_error(worse, logits) > 100 * TOLERANCE, name


def test_t5_learns_its_bias():
    """The table of relative positions gets a gradient in the encoder and in the decoder."""
    _, gradients = results(make_model(tf.T5ForConditionalGeneration, T5, integration.NAME), CASES["T5, padded"])
    tables = [gradient for name, gradient in gradients.items() if "relative_attention_bias" in name]
    assert len(tables) == 2
    assert all(gradient.abs().max() > 1e-3 for gradient in tables)


def test_packed_sequences_are_those_sequences_alone():
    model = make_model(tf.LlamaForCausalLM, LLAMA, integration.NAME)
    packed = model(input_ids=TOKENS[:1], position_ids=PACKED[:1], use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in TOKENS[:1].split([3, 5, 3], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", ["in a row", "of each sequence"])
def test_cu_seqlens_separate_sequences(positions, no_matrices):
    """Positions in a row would not tell, and the library's own functions ignore the ends outside of flash_attn."""
    model = make_model(tf.Gemma2ForCausalLM, GEMMA, integration.NAME)
    no_matrices()
    lengths = torch.tensor([0, 3, 8, 11], dtype=torch.int32, device=DEVICE)
    ends = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    ids = PACKED[:1] if positions == "of each sequence" else torch.arange(LENGTH, device=DEVICE)[None]
    together = model(input_ids=TOKENS, use_cache=False).logits
    packed = model(input_ids=TOKENS, position_ids=ids, use_cache=False, **ends).logits  # both entries of the batch
    parts = zip(TOKENS.split([3, 5, 3], dim=1), ids.split([3, 5, 3], dim=1), strict=True)
    alone = [model(input_ids=tokens, position_ids=some, use_cache=False).logits for tokens, some in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-4)
    assert relative_error(packed, together) > 1e-2
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    packed, alone = (
        torch.autograd.grad((logits * weights).sum(), [*model.parameters()])
        for logits in (packed, torch.cat(alone, dim=1))
    )
    smallest = 1e-2 * max(gradient.abs().max() for gradient in alone)
    errors = [relative_error(gradient, true, smallest) for gradient, true in zip(packed, alone, strict=True)]
    assert max(errors) < 10 * TOLERANCE


GENERATING = {
    "Llama": (tf.LlamaForCausalLM, LLAMA, {}),
    "Llama, padded": (tf.LlamaForCausalLM, LLAMA, {"attention_mask": LEFT_PADDED}),
    "Llama, static cache": (tf.LlamaForCausalLM, LLAMA, {"cache_implementation": "static"}),
    "Gemma 2, beyond its window": (tf.Gemma2ForCausalLM, GEMMA, {"attention_mask": LEFT_PADDED}),
    "Gemma 2, static cache": (
        tf.Gemma2ForCausalLM,
        GEMMA,
        {"attention_mask": LEFT_PADDED, "cache_implementation": "static"},
    ),
    "T5": (tf.T5ForConditionalGeneration, T5, {"attention_mask": RIGHT_PADDED, "decoder_start_token_id": 0}),
}


@pytest.mark.parametrize(("model", "config", "inputs"), GENERATING.values(), ids=GENERATING)
def test_generation(model, config, inputs):
    options = {
        "do_sample": False,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "output_scores": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    ours, eager = (made.eval().generate(TOKENS, **inputs, **options) for made in both(model, config))
    assert torch.equal(ours.sequences, eager.sequences)
    for step, eager_step in zip(ours.scores, eager.scores, strict=True):
        finite = eager_step > -torch.inf
        assert relative_error(step[finite], eager_step[finite]) < TOLERANCE


def test_a_prompt_in_two_parts():
    """Several queries that begin in the middle of what they see."""
    ours, eager = both(tf.Gemma2ForCausalLM, GEMMA)
    logits = []
    for model in (ours, eager):
        first = model(input_ids=TOKENS[:, :6], use_cache=True)
        logits.append(model(input_ids=TOKENS[:, 6:], past_key_values=first.past_key_values).logits)
    assert relative_error(*logits) < TOLERANCE


def test_a_mask_of_the_users():
    """Bool or an addend, also one that differs between heads."""
    ours, eager = both(tf.LlamaForCausalLM, LLAMA)
    visible = torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.6
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    visible = visible.to(DEVICE)
    addend = torch.where(visible, 0.0, -torch.inf)
    expected = eager(input_ids=TOKENS, attention_mask=addend, use_cache=False).logits
    for mask in (visible, addend):
        result = ours(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
        assert relative_error(result, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # 5.17 has no other name for it
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """The mask passes through checkpoint, which a tensor subclass could get lost in."""
    case = CASES["Gemma 2, padded left"]
    logits, gradients = results(make_model(case.model, case.config, integration.NAME), case)
    model = make_model(case.model, case.config, integration.NAME)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found_logits, found = results(model, case)
    assert relative_error(found_logits, logits) < TOLERANCE
    assert all(torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4) for name, gradient in gradients.items())


def test_dropout_is_drawn_in_training_alone():
    config = tf.LlamaConfig(**DECODER, attention_dropout=0.5)
    model = make_model(tf.LlamaForCausalLM, config, integration.NAME)

    def logits(seed):
        torch.manual_seed(seed)
        return model(input_ids=TOKENS, use_cache=False).logits

    assert torch.equal(logits(0), logits(0))
    assert not torch.allclose(logits(0), logits(1))
    model.eval()
    assert torch.equal(logits(0), logits(1))


def test_autocast():
    """The model's products in bfloat16, and attention too."""
    ours, eager = both(tf.LlamaForCausalLM, LLAMA)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits, true = (model(input_ids=TOKENS, use_cache=False).logits.float() for model in (ours, eager))
    exact = eager(input_ids=TOKENS, use_cache=False).logits
    assert relative_error(logits, exact) < 2 * relative_error(true, exact) + torch.finfo(torch.bfloat16).eps


# Masks

BANDS = {  # the function, its window, and what it is between a query and a key
    "full": (masking_utils.bidirectional_mask_function, None),
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(3), 3),
}
LENGTHS = {  # q_length, kv_length, q_offset, kv_offset
    "square": (7, 7, 0, 0),
    "after what is cached": (3, 9, 6, 0),
    "a cache that forgets": (3, 5, 8, 6),
    "one token": (1, 9, 8, 0),
    "an empty static cache": (4, 9, 0, 0),
}


def make_mask(function, window, lengths, padding=None):
    q_length, kv_length, q_offset, kv_offset = lengths
    return integration.attention_mask(
        2,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=function,
        local_size=window,
        attention_mask=padding,
        config=None,
        dtype=torch.float32,
        allow_is_causal_skip=False,
        use_vmap=False,
    )


@pytest.mark.parametrize("padding_length", [None, 7, 12])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("function", "window"), BANDS.values(), ids=BANDS)
def test_bands_are_the_librarys_masks(function, window, lengths, padding_length):
    padding = None
    if padding_length is not None:
        padding = torch.ones(2, padding_length, dtype=torch.bool)
        padding[1, :7:2] = False
    mask = make_mask(function, window, lengths, padding)
    assert isinstance(mask, integration.BandMask)

    q_length, kv_length, q_offset, kv_offset = lengths
    offset = torch.arange(kv_length) - torch.arange(q_length)[:, None]
    lower, upper = mask.band.band(q_length, kv_length)
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen &= offset >= lower if lower is not None else seen
    seen &= offset <= upper if upper is not None else seen
    seen = seen.expand(2, 1, -1, -1) & (True if mask.keys is None else mask.keys)
    arguments = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": function, "attention_mask": padding}
    true = masking_utils.sdpa_mask(2, q_length, kv_length, **arguments, allow_is_causal_skip=False)
    assert mask.shape == true.shape
    assert torch.equal(seen, true)
    assert torch.equal(mask.matrix(), true)


SEQUENCES = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])  # of the positions of two entries of a batch


def packed_mask(function, window=None):
    both = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(SEQUENCES))
    return make_mask(both, window, (7, 7, 0, 0))


@pytest.mark.parametrize(("function", "window"), BANDS.values(), ids=BANDS)
def test_packed_sequences_are_boundaries_and_a_band(function, window, no_matrices):
    mask = packed_mask(function, window)
    assert mask.boundaries.tolist() == [0, 3, 6, 7, 8, 14]
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    addend = torch.randn(2, 2, 7, 7)
    arguments = {"query": q, "key": k, "value": v}
    for bias in (addend, None):
        expected = call(**arguments, attention_mask=mask.matrix(), position_bias=bias)
        if bias is None:
            no_matrices()
        torch.testing.assert_close(call(**arguments, attention_mask=mask, position_bias=bias), expected)


@pytest.mark.parametrize("further", [None, "a mask of keys", "a bias"])
def test_cu_seqlens_beside_what_the_mask_says(further):
    """Sequences end where either says so."""
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    addend = torch.randn(1, 2, 7, 7) if further == "a bias" else None
    padding = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]]).bool() if "keys" in str(further) else None
    ends = torch.tensor([0, 4, 7], dtype=torch.int32)
    same = (torch.arange(7) < 4) == (torch.arange(7)[:, None] < 4)
    masks = [make_mask(masking_utils.causal_mask_function, None, (7, 7, 0, 0), padding)]
    masks += [packed_mask(masking_utils.causal_mask_function)] if padding is None else []
    for mask in masks:
        arguments = {"query": q, "key": k, "value": v, "position_bias": addend}
        found = call(**arguments, attention_mask=mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
        torch.testing.assert_close(found, call(**arguments, attention_mask=mask.matrix() & same))


def test_padding_that_hides_nothing_costs_nothing():
    mask = make_mask(masking_utils.causal_mask_function, None, (7, 7, 0, 0), torch.ones(2, 7, dtype=torch.bool))
    assert mask.keys is None


def chunked(chunk):
    return masking_utils.chunked_causal_mask_function(chunk, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("function", "window", "lengths"),
    [
        (masking_utils.sliding_window_causal_mask_function(4), 3, (7, 7, 0, 0)),  # of another width than is said
        (chunked(3), 3, (7, 7, 0, 0)),
        (masking_utils.and_masks(masking_utils.causal_mask_function), None, (7, 7, 0, 0)),
        (  # of two kinds of sequences
            masking_utils.and_masks(*2 * [masking_utils.packed_sequence_mask_function(torch.zeros(2, 7))]),
            None,
            (7, 7, 0, 0),
        ),
        (
            masking_utils.or_masks(masking_utils.sliding_window_overlay(3), masking_utils.causal_mask_function),
            3,
            (7, 7, 0, 0),
        ),
        (  # of which there is more than the queries
            masking_utils.and_masks(
                masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(torch.zeros(2, 9))
            ),
            None,
            (3, 9, 6, 0),
        ),
        (lambda batch, head, query, key: key <= query, None, (7, 7, 0, 0)),
        (masking_utils.causal_mask_function, None, (3, 9, 2, 0)),  # the diagonal ends in no corner
        (masking_utils.causal_mask_function, None, (3, 9, torch.tensor(6), 0)),  # where it ends is not known
    ],
)
def test_other_masks_are_matrices(function, window, lengths):
    mask = make_mask(function, window, lengths)
    assert type(mask) is torch.Tensor
    assert mask.dtype == torch.bool


LOOKS = {
    "slice": lambda mask: mask[:, :, 1:, :5],
    "sum": lambda mask: mask + torch.zeros(1),
    "where": lambda mask: torch.where(mask, 0.0, -1.0),
    "not": lambda mask: ~mask,
    "to": lambda mask: mask.to(torch.float16),
    "all": lambda mask: mask.all(dim=-1),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_who_looks_into_a_band_sees_the_matrix(look):
    mask = make_mask(masking_utils.sliding_window_causal_mask_function(3), 3, (7, 7, 0, 0))
    seen, true = look(mask), look(mask.matrix())
    assert type(seen) is type(true)
    assert torch.equal(seen, true)


def test_expanded_masks_are_read_once():
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool).expand(2, 4, 7, 7)
    assert integration._unexpanded(mask).shape == (2, 1, 1, 7)


# What is refused


def test_models_with_attention_of_their_own_are_refused():
    """They would run without this package, and take our masks for theirs."""
    config = tf.GPTJConfig(n_layer=1, n_embd=32, n_head=2, rotary_dim=4, vocab_size=50)
    with pytest.raises(ValueError, match=r"attn_implementation must be 'eager' for GPTJModel.* got 'triton_attention'"):
        tf.GPTJModel._from_config(config, attn_implementation=integration.NAME)
    assert tf.GPTJModel._from_config(config, attn_implementation="eager").config._attn_implementation == "eager"


def test_registering_twice_changes_nothing():
    check = tf.PreTrainedModel.get_correct_attn_implementation
    integration.register()
    assert tf.PreTrainedModel.get_correct_attn_implementation is check


def call(**arguments):
    arguments = {name: torch.randn(1, 2, 5, 8) for name in ("query", "key", "value")} | arguments
    return integration.attention_forward(nn.Module(), **({"attention_mask": None} | arguments))


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks"])
def test_what_is_not_computed_is_refused(name):
    call(**{name: None})
    with pytest.raises(NotImplementedError, match=f"{name} must be None"):
        call(**{name: torch.zeros(1)})


def test_probabilities_are_refused():
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        call(output_attentions=True)


@pytest.mark.parametrize("missing", ["cu_seq_lens_q", "cu_seq_lens_k", None])
def test_packed_sequences_that_do_not_match_are_refused(missing):
    ends = {name: torch.tensor([0, 2, 5]) for name in ("cu_seq_lens_q", "cu_seq_lens_k") if name != missing}
    further = {} if missing else {"key": torch.randn(1, 2, 7, 8), "value": torch.randn(1, 2, 7, 8)}
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be of the same packed sequences"):
        call(**ends, **further)


def test_a_band_for_other_lengths_is_refused():
    mask = make_mask(masking_utils.causal_mask_function, None, (5, 6, 1, 0))
    with pytest.raises(ValueError, match=r"attention_mask must be for 5 queries and 5 keys, got \(2, 1, 5, 6\)"):
        call(attention_mask=mask)


@pytest.mark.parametrize("causal", [True, False])
def test_none_means_what_it_does_to_sdpa(causal):
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    sdpa = tf.AttentionInterface()["sdpa"]
    for length in (5, 1):
        arguments = (nn.Module(), q[:, :, :length], k, v, None)
        result, expected = (attend(*arguments, is_causal=causal)[0] for attend in (integration.attention_forward, sdpa))
        torch.testing.assert_close(result, expected)


# torch.compile


@pytest.fixture
def _compile_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compile_afresh")
@pytest.mark.parametrize(
    ("padding", "positions"), [(None, None), (LEFT_PADDED, None), (None, PACKED)], ids=["all", "padded", "packed"]
)
def test_a_compiled_model(padding, positions):
    ours, eager = both(tf.Gemma2ForCausalLM, GEMMA)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    real = slice(None) if padding is None else padding.bool()
    arguments = {"input_ids": TOKENS, "attention_mask": padding, "position_ids": positions, "use_cache": False}
    assert relative_error(compiled(**arguments).logits[real], eager(**arguments).logits[real]) < TOLERANCE


@pytest.mark.usefixtures("_compile_afresh")
def test_compiled_layers_notice_another_mask():
    """Each layer is compiled by itself, and gets the band as an argument."""
    ours, eager = both(tf.Gemma2ForCausalLM, GEMMA)
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for padding in (LEFT_PADDED, LEFT_PADDED.flip(0), torch.ones_like(LEFT_PADDED), RIGHT_PADDED):
        arguments = {"input_ids": TOKENS, "attention_mask": padding, "use_cache": False}
        logits, true = (model(**arguments).logits[padding.bool()] for model in (ours, eager))
        assert relative_error(logits, true) < TOLERANCE


@pytest.mark.usefixtures("_compile_afresh")
def test_compiled_layers_notice_other_packed_sequences():
    ours, eager = both(tf.Gemma2ForCausalLM, GEMMA)
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for positions in (PACKED, PACKED.flip(0), torch.arange(LENGTH, device=DEVICE).expand(2, -1)):
        arguments = {"input_ids": TOKENS, "position_ids": positions, "use_cache": False}
        assert relative_error(*(model(**arguments).logits for model in (ours, eager))) < TOLERANCE
