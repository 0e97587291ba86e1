"""Joint attention in which the last text token stands for many identical ones (training only).

n equal keys with equal values weigh as much as one of them whose score is raised by log n, so the result is that of the
stock processor on the full sequence at a quarter of the tokens.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

__all__ = ["ends_in_repeated_token"]


def ends_in_repeated_token(transformer: torch.nn.Module, batch: int, device: torch.device) -> torch.Tensor:
    """Make `transformer` count the last text token of sample i `result[i]` times; fill `result` before each call."""
    repeats = torch.ones(batch, device=device)
    for block in transformer.transformer_blocks:
        block.attn.processor = _RepeatedTokenProcessor(repeats)
    return repeats


class _RepeatedTokenProcessor:
    def __init__(self, repeats: torch.Tensor) -> None:
        self._repeats = repeats

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states, attention_mask=None, **kwargs):
        batch, image_tokens = hidden_states.shape[:2]

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, -1, attn.heads, projected.shape[-1] // attn.heads).transpose(1, 2)

        query = torch.cat(
            [
                attn.norm_q(heads(attn.to_q(hidden_states))),
                attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                attn.norm_k(heads(attn.to_k(hidden_states))),
                attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        bias = F.pad(self._repeats.log().view(batch, 1, 1, 1), (key.shape[2] - 1, 0)).to(query.dtype)
        bias = bias.expand(batch, attn.heads, key.shape[2], key.shape[2])
        mixed = F.scaled_dot_product_attention(query, key, value.to(query.dtype), attn_mask=bias)
        mixed = mixed.transpose(1, 2).reshape(batch, -1, attn.heads * query.shape[-1])
        image, text = mixed[:, :image_tokens], mixed[:, image_tokens:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)
