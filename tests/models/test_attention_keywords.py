"""What models ask of attention by keyword is done, as eager attention does it, or refused by name."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistill.models.attention import attention_forward

SHAPE = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SAME = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2, sliding": {"use_sliding_window": True, **MIXED},
    "Qwen3": {},
    "Mistral": WINDOW,
    "Mistral, wide": {"sliding_window": 20},
    "Gemma2": {**MIXED, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**MIXED, "query_pre_attn_scalar": 8},
    "GPT2": {},
    "GPTNeoX": {},
    "ModernBert": {"head_dim": 4, "local_attention": 4, "global_attn_every_n_layers": 2},
}
REFUSED = {
    "Gemma2": ({**MIXED, "attn_logit_softcapping": 2.0}, "softcap is 2.0"),
    "GptOss": ({**MIXED, "num_local_experts": 2}, r"s_aux is a tensor of shape \(4,\)"),
    "T5": ({"d_model": 16, "d_kv": 4, "d_ff": 32}, r"position_bias is a tensor of shape \(1, 4, 9, 9\)"),
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def model(name: str, implementation: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    config._attn_implementation = implementation
    made = getattr(transformers, f"{kind}Model")
    if not hasattr(sys.modules[made.__module__], "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("its attention is its own in this transformers")
    return made(config).eval()


@pytest.mark.parametrize("name", SAME)
def test_the_same_as_eager(name: str) -> None:
    ours, eager = (model(name, by, **SAME[name]) for by in ("fastdistill", "eager"))
    assert ours.config._attn_implementation == "fastdistill"
    with torch.no_grad():
        for mask in (None, PADDING):
            states = [m(IDS, attention_mask=mask).last_hidden_state for m in (ours, eager)]
            if mask is not None:  # what stands at padding is nobody's
                states = [x[mask.bool()] for x in states]
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_eager() -> None:
    grads = []
    for by in ("fastdistill", "eager"):
        llama = model("Llama", by)
        llama(IDS, attention_mask=PADDING).last_hidden_state[:, -1, ::3].sum().backward()
        grads.append([p.grad for p in llama.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
@pytest.mark.parametrize("step", [1, 4])
def test_with_a_cache(name: str, step: int) -> None:
    """One query, or several, after the keys of earlier ones."""
    some = model(name, "fastdistill", **SAME[name])
    with torch.no_grad():
        past, found = None, []
        for tokens in IDS.split(step, 1):
            out = some(tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.last_hidden_state)
        expected = model(name, "eager", **SAME[name])(IDS).last_hidden_state
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_with_room() -> None:
    """Of which the keys to come are not attended to, without a mask."""
    some = model("Llama", "fastdistill")
    cache = transformers.StaticCache(config=some.config, max_cache_len=20)
    with torch.no_grad():
        found = some(IDS, past_key_values=cache).last_hidden_state
        torch.testing.assert_close(found, model("Llama", "eager")(IDS).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "own"), [("RoFormer", {}), ("CodeGen", {"rotary_dim": 4}), ("MPNet", {})])
def test_attention_of_a_models_own_gets_a_mask_that_it_can_add(name: str, own: dict[str, Any]) -> None:
    states = []
    for by in ("fastdistill", "eager"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SHAPE | {"head_dim": 4} | own)
        some = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation=by).eval()
        with torch.no_grad():
            states += [some(IDS, attention_mask=mask).last_hidden_state[PADDING.bool()] for mask in (None, PADDING)]
    torch.testing.assert_close(states[:2], states[2:])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    some = model(name, "eager", **changes)
    some.set_attn_implementation("fastdistill")
    if name == "T5" and some.encoder.config._attn_implementation != "fastdistill":
        pytest.skip("this transformers (5.17) does not tell the stacks, which stay as they were")
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{message}, which 'fastdistill' attention cannot do; exp"):
        some(IDS, **({"decoder_input_ids": IDS} if name == "T5" else {}))


def attend(mask: Tensor | None = None, module: Any = None, **keywords: Any) -> Tensor:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    return attention_forward(module or nn.Module(), query, key, key, mask, **keywords)[0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"output_attentions": True}, "output_attentions is True, which .* cannot do; expected None, or .*'eager'"),
        ({"sliding_window": 4}, "sliding_window is 4"),
        ({"cu_seq_lens_q": torch.arange(3)}, r"cu_seq_lens_q is a tensor of shape \(3,\)"),
        ({"never_heard_of": 0}, "never_heard_of is 0"),
    ],
)
def test_no_keyword_is_ignored(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(**keywords)


def test_keywords_that_change_nothing() -> None:
    torch.manual_seed(0)
    plain = attend()
    torch.manual_seed(0)
    harmless: dict[str, Any] = {"output_attentions": False, "position_ids": torch.arange(5), "use_cache": True}
    other = attend(sliding_window=5, softcap=None, s_aux=None, **harmless)
    assert torch.equal(plain, other)
    attend(torch.ones(5, 5, dtype=torch.bool).tril(), sliding_window=2)  # which is in the mask


@pytest.mark.parametrize(
    "setting", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}], ids=lambda x: next(iter(x))
)
def test_settings_of_gpt2(setting: dict[str, Any]) -> None:
    """Which is told them by its module in earlier versions of transformers, in later ones by ``scaling``."""
    (name, value), module = *setting.items(), nn.Module()
    setattr(module, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}, which 'fastdistill' attention cannot do"):
        attend(module=module)
    attend(module=module, scaling=0.3)
    with torch.no_grad():
        expected = model("GPT2", "eager", **setting)(IDS).last_hidden_state
        try:
            found = model("GPT2", "fastdistill", **setting)(IDS).last_hidden_state
        except ValueError as error:
            assert str(error).startswith(name)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
