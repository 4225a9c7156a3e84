"""Our decoder's weights in transformers' own models, so that other tools read the same numbers.

`export` knows the architectures of the presets gpt2 and llama, at any size; `hflm` puts such a
model and one of our tokenizers into lm-eval's own HFLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from components.decoder import Decoder
from components.registry import UserError


def export(model: Decoder, end_of_text: int = 0) -> Any:
    """A GPT2LMHeadModel or LlamaForCausalLM with the model's weights, in evaluation mode.

    Raises:
        UserError: the parts are neither GPT-2's nor Llama's.
    """
    mixer, named = model.specs["mixer"], {kind: spec.name for kind, spec in model.specs.items()}
    usual = named["mixer"] == "attention" and named["block"] == "pre"
    usual = usual and not mixer.params["qk_norm"] and not mixer.params["window"]
    parts = (named["norm"], named["position"], named["ffn"])
    if usual and parts == ("layernorm", "learned", "mlp") and mixer.params["bias"]:
        theirs, weights = _gpt2(model, end_of_text)
    elif usual and parts == ("rmsnorm", "rotary", "swiglu") and not mixer.params["bias"]:
        theirs, weights = _llama(model, end_of_text)
    else:
        listed = ", ".join(f"{kind} {name}" for kind, name in sorted(named.items()))
        raise UserError(f"only the presets gpt2 and llama can be exported, not {listed}")
    theirs.load_state_dict(weights)
    return theirs.eval()


def _gpt2(model: Decoder, end_of_text: int) -> tuple[Any, dict[str, Tensor]]:
    """Their matrices are (in, out), with q, k and v in one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dims, ours = model.dims, dict(model.state_dict())
    activation = model.specs["ffn"].params["activation"]
    tanh = activation.params.get("approximate") == "tanh"
    config = GPT2Config(
        vocab_size=dims.vocab_size, n_positions=dims.max_seq_len, n_embd=dims.d_model,
        n_layer=dims.n_layers, n_head=dims.n_heads, n_inner=ours["blocks.0.ffn.w_up.bias"].numel(),
        activation_function={True: "gelu_new", False: activation.name}[tanh],
        layer_norm_epsilon=model.specs["norm"].params["eps"], resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=model.lm_head is None, bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )  # fmt: skip
    named = {
        "transformer.wte.weight": ours["tok_emb.weight"],
        "transformer.wpe.weight": ours["position.table.weight"],
        "lm_head.weight": model.output_weight.detach(),
    }
    parts = {"mixer.w_o": "attn.c_proj", "ffn.w_up": "mlp.c_fc", "ffn.w_down": "mlp.c_proj"}
    for end in ("weight", "bias"):
        named[f"transformer.ln_f.{end}"] = ours[f"final_norm.{end}"]
        for layer in range(dims.n_layers):
            mine, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
            joined = torch.cat([ours[f"{mine}mixer.{w}.{end}"] for w in ("w_q", "w_k", "w_v")])
            named[f"{theirs}attn.c_attn.{end}"] = joined.T if end == "weight" else joined
            for a, b in parts.items():
                value = ours[f"{mine}{a}.{end}"]
                named[f"{theirs}{b}.{end}"] = value.T if end == "weight" else value
            for a, b in {"mixer_norm": "ln_1", "ffn_norm": "ln_2"}.items():
                named[f"{theirs}{b}.{end}"] = ours[f"{mine}{a}.{end}"]
    return GPT2LMHeadModel(config), named


def _llama(model: Decoder, end_of_text: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    dims, ours = model.dims, dict(model.state_dict())
    theta = model.specs["position"].params["theta"]
    config = LlamaConfig(
        vocab_size=dims.vocab_size, max_position_embeddings=dims.max_seq_len,
        hidden_size=dims.d_model, num_hidden_layers=dims.n_layers,
        num_attention_heads=dims.n_heads, head_dim=dims.head_dim,
        num_key_value_heads=model.specs["mixer"].params["n_kv_heads"] or dims.n_heads,
        intermediate_size=len(ours["blocks.0.ffn.w_up.weight"]),
        rms_norm_eps=model.specs["norm"].params["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=model.lm_head is None, bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )  # fmt: skip
    named = {
        "model.embed_tokens.weight": ours["tok_emb.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": model.output_weight.detach(),
    }
    parts = {
        "mixer.w_q": "self_attn.q_proj",
        "mixer.w_k": "self_attn.k_proj",
        "mixer.w_v": "self_attn.v_proj",
        "mixer.w_o": "self_attn.o_proj",
        "ffn.w_gate": "mlp.gate_proj",
        "ffn.w_up": "mlp.up_proj",
        "ffn.w_down": "mlp.down_proj",
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(dims.n_layers):
        for a, b in parts.items():
            named[f"model.layers.{layer}.{b}.weight"] = ours[f"blocks.{layer}.{a}.weight"]
    return LlamaForCausalLM(config), named


def hflm(model: Any, tokenizer: Any, max_length: int, batch_size: int = 16, **how: Any) -> Any:
    """lm-eval's HFLM around a transformers model and one of our subword tokenizers."""
    import tokenizers
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
    end = backend.id_to_token(tokenizer.end_of_text)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return HFLM(
        pretrained=model, tokenizer=wrapped, max_length=max_length, batch_size=batch_size, **how
    )
