"""Do models of many families compute on this package what they compute in eager mode, with padding and without?

`test_transformers.py` looks closely at few; here many are looked at once, so that a family shows which hands attention
something that is not known there. On a GPU: DEVICE=cuda python -m pytest tests/integrations
"""

import copy
import os

import pytest

pytest.importorskip("transformers", reason="needs Transformers: pip install 'triton-attention[transformers]'")

import torch
from transformers import AutoConfig, AutoModel

from triton_attention.integrations import transformers as integration

integration.register()

TOLERANCE = 1e-5  # of the largest value
DEVICE = os.environ.get("DEVICE", "cpu")
TOKENS = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(1)).to(DEVICE)
EXISTS = torch.tensor([[1] * 11, [1] * 8 + [0] * 3], device=DEVICE)
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = SIZES | SPECIAL | NO_DROPOUT | {"max_position_embeddings": 40}
VISION = SIZES | NO_DROPOUT | {"image_size": 16, "patch_size": 4}
T5 = SPECIAL | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = SPECIAL | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 40,
}
GROUPED = SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = GROUPED | {"sliding_window": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}

DECODERS = {
    **dict.fromkeys(("phi", "phi3", "gemma", "qwen2", "olmo2", "cohere", "granite", "stablelm", "smollm3"), GROUPED),
    **dict.fromkeys(("nemotron", "glm4", "helium"), GROUPED),
    **dict.fromkeys(("mistral", "gemma3_text", "olmo3", "cohere2", "starcoder2", "exaone4"), WINDOW),
    "mixtral": WINDOW | {"num_local_experts": 2},
    "qwen3_moe": GROUPED | EXPERTS,
    "llama4_text": GROUPED | {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "deepseek_v3": SIZES | SPECIAL | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 2},
    "gpt_neox": SIZES | SPECIAL,
    "gpt2": SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "opt": SIZES | SPECIAL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
}
ENCODERS = {
    **dict.fromkeys(("roberta", "electra", "albert", "ernie", "camembert", "data2vec-text", "nomic_bert"), ENCODER),
    "esm": ENCODER | {"position_embedding_type": "rotary", "mask_token_id": 4},
    "distilbert": SPECIAL | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": SIZES | SPECIAL | {"local_attention": 6, "global_attn_every_n_layers": 2},
    "eurobert": GROUPED,
}
WITH_DECODER = {
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "plbart"), BART),
    **dict.fromkeys(("mt5", "umt5"), T5),
    "longt5": T5 | {"local_radius": 3},
}
OF_PICTURES = dict.fromkeys(
    ("deit", "beit", "dinov2", "dinov3_vit", "ijepa", "siglip_vision_model", "clip_vision_model"), VISION
)
OWN_ATTENTION = ("bloom", "falcon", "mpt", "xlnet", "deberta-v2", "swinv2")


def make_model(name, config, implementation):
    """The same weights each time, large enough for attention to be far from uniform."""
    config = AutoConfig.for_model(name, **copy.deepcopy(config))
    model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.to(DEVICE)


@torch.no_grad()
def assert_equals_eager(name, config, inputs, real=...):
    results = [
        make_model(name, config, implementation)(**inputs)[0][real] for implementation in (integration.NAME, "eager")
    ]
    ours, eager = results
    assert ours.isfinite().all()
    assert (ours - eager).abs().max() < TOLERANCE * eager.abs().max()


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The layers that call our attention."""
    counted = []

    def attention(*arguments, **keywords):
        counted.append(arguments[0])
        return integration.attention_forward(*arguments, **keywords)

    monkeypatch.setitem(integration.AttentionInterface._global_mapping, integration.NAME, attention)
    return counted


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(("name", "config"), (DECODERS | ENCODERS).items(), ids=DECODERS | ENCODERS)
def test_text(name, config, padded, calls):
    mask = {"attention_mask": EXISTS} if padded else {}
    assert_equals_eager(name, config, {"input_ids": TOKENS, **mask}, EXISTS.bool() if padded else ...)
    assert calls


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(("name", "config"), WITH_DECODER.items(), ids=WITH_DECODER)
def test_encoder_and_decoder(name, config, padded, calls):
    mask = {"attention_mask": EXISTS} if padded else {}
    assert_equals_eager(name, config, {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6], **mask})
    assert calls


@pytest.mark.parametrize(("name", "config"), OF_PICTURES.items(), ids=OF_PICTURES)
def test_pictures(name, config, calls):
    assert_equals_eager(name, config, {"pixel_values": PICTURES})
    assert calls


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_attention_of_their_own_is_refused(name):
    with pytest.raises(ValueError, match="computes attention in code of its own, got 'triton_attention'"):
        AutoModel.from_config(AutoConfig.for_model(name), attn_implementation=integration.NAME)
