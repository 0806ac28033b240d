"""Keel language models (arXiv 2601.19895) for transformers: deep, post-norm, with a scaled skip.

    x_1     = x_0 + F_0(N_in(x_0))                     attention of block 1
    x_2     = N_out(x_1 + F_1(N_in(x_1)))              FFN of block 1
    x_{l+1} = N_out(alpha x_l + F_l(N_in(x_l)))        l >= 2, alpha = L

N is an RMSNorm, F_l attention (l even) or an FFN (l odd), L the number of sub-layers, twice that of
blocks. The other residual rules differ in which norms exist, in alpha and in factors:
`sub_layer` in configuration_keel.py is the table.

The residual stream and the norms are fp32 whatever the type of the weights is: at alpha = 1024 a
bf16 stream would lose most of every update, and rounded norm weights compound over depth. The
branches compute in the type of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_keel import KeelConfig, sub_layer
from .layers_keel import KeelRMSNorm, KeelStreams, KeelVector, merged, spread

# transformers 5.24 renames the argument and output `past_key_values` to `cache`.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def rotary_table(config: KeelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [batch, tokens, head_dim], fp32; the angles in fp64, exact at any position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_parameters["rope_theta"] ** -(exponents / config.head_dim)
    angles = positions[..., None].double() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x [batch, heads, tokens, d]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T scaling + mask) V: [batch, tokens, heads, d], and the weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KeelAttention(nn.Module):
    """Causal attention with grouped keys and values and rotary positions."""

    def __init__(self, config: KeelConfig, layer_idx: int, head_norms: str) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        h = config.hidden_size
        self.q_proj = nn.Linear(h, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, h, bias=False)
        self.q_norm = self.k_norm = self.v_norm = None
        if head_norms:
            self.q_norm = KeelRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = KeelRMSNorm(config.head_dim, config.rms_norm_eps)
        if head_norms == "qkv":
            self.v_norm = KeelRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The branch [batch, tokens, h] of its input; both in the type of the weights."""
        batch, tokens = hidden_states.shape[:2]

        def heads(x: Tensor, norm: KeelRMSNorm | None) -> Tensor:
            x = x.view(batch, tokens, -1, self.head_dim)
            x = x if norm is None else norm(x).to(x.dtype)
            return x.transpose(1, 2)

        z = hidden_states
        query, key, value = self.q_proj(z), self.k_proj(z), self.v_proj(z)
        query = rotate(heads(query, self.q_norm), *position_embeddings)
        key = rotate(heads(key, self.k_norm), *position_embeddings)
        value = heads(value, self.v_norm)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, tokens, -1).contiguous()), weights


class KeelMLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate z) * W_up z)."""

    def __init__(self, config: KeelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, z: Tensor) -> Tensor:
        """The branch [..., h] of its input; both in the type of the weights."""
        return self.down_proj(self.act_fn(self.gate_proj(z)) * self.up_proj(z))


class KeelDecoderLayer(GradientCheckpointingLayer):
    """One block: the sub-layers l = 2 layer_idx (attention) and 2 layer_idx + 1 (FFN)."""

    def __init__(self, config: KeelConfig, layer_idx: int) -> None:
        super().__init__()
        attention = sub_layer(2 * layer_idx, config)
        ffn = sub_layer(2 * layer_idx + 1, config)
        self.attention_alpha, self.feedforward_alpha = attention.alpha, ffn.alpha
        self.attention_inner, self.feedforward_inner = attention.inner_factor, ffn.inner_factor
        self.attention_factor, self.feedforward_factor = attention.branch_factor, ffn.branch_factor
        self.attention_streams = KeelStreams(attention.streams)
        self.feedforward_streams = KeelStreams(ffn.streams)
        self.attention_layernorm = _inner(attention.inner, config)
        self.self_attn = KeelAttention(config, layer_idx, attention.head_norms)
        self.branch_attention_layernorm = _outer(attention.branch_norm, config)
        self.post_attention_layernorm = _outer(attention.outer_norm, config)
        self.feedforward_layernorm = _inner(ffn.inner, config)
        self.mlp = KeelMLP(config)
        self.branch_feedforward_layernorm = _outer(ffn.branch_norm, config)
        self.post_feedforward_layernorm = _outer(ffn.outer_norm, config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The fp32 stream [batch, tokens, h] after both sub-layers."""
        x, dtype = hidden_states, self.mlp.down_proj.weight.dtype
        z = self.attention_inner * self.attention_layernorm(self.attention_streams.read(x))
        branch, _weights = self.self_attn(z.to(dtype), **kwargs)
        branch = self.attention_factor * self.branch_attention_layernorm(branch)
        x = self.attention_streams.joined(x, self.attention_alpha, branch)
        x = self.post_attention_layernorm(x)
        z = self.feedforward_inner * self.feedforward_layernorm(self.feedforward_streams.read(x))
        branch = self.feedforward_factor * self.branch_feedforward_layernorm(self.mlp(z.to(dtype)))
        x = self.feedforward_streams.joined(x, self.feedforward_alpha, branch)
        return self.post_feedforward_layernorm(x)


def _inner(kind: str, config: KeelConfig) -> nn.Module:
    if kind == "norm":
        return KeelRMSNorm(config.hidden_size, config.rms_norm_eps)
    return KeelVector(config.hidden_size) if kind == "vector" else nn.Identity()


def _outer(exists: bool, config: KeelConfig) -> nn.Module:
    return KeelRMSNorm(config.hidden_size, config.rms_norm_eps) if exists else nn.Identity()


class KeelPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config: KeelConfig
    config_class = KeelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("KeelDecoderLayer",)
    _skip_keys_device_placement = (CACHE,)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": KeelDecoderLayer,
        "attentions": KeelAttention,
    }
    _keep_in_fp32_modules_strict = (
        "attention_layernorm",
        "branch_attention_layernorm",
        "post_attention_layernorm",
        "feedforward_layernorm",
        "branch_feedforward_layernorm",
        "post_feedforward_layernorm",
        "embedding_norm",
        "attention_streams",
        "feedforward_streams",
        "q_norm",
        "k_norm",
        "v_norm",
        "norm",
    )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KeelVector | KeelStreams):
            for weight in module.parameters():
                nn.init.ones_(weight)


class KeelModel(KeelPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: KeelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_norm = _outer(config.embedding_norm, config)
        self.layers = nn.ModuleList(
            KeelDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = _outer(config.final_norm, config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The stream [batch, tokens, h] after the last block and the final norm, fp32.

        Args:
            input_ids: tokens [batch, tokens]; or give inputs_embeds.
            attention_mask: [batch, all tokens], 0 at padding.
            position_ids: [batch, tokens]; None: from the cache's length on.
            cache: keys and values of earlier tokens.
            past_key_values: its name before transformers 5.24.
            inputs_embeds: [batch, tokens, h].
            use_cache: return a cache; None: as in the configuration.
            kwargs: passed to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        table = rotary_table(self.config, position_ids)
        n = sub_layer(0, self.config).streams
        x = spread(self.embedding_norm(inputs_embeds.float()), n)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(
                x,
                attention_mask=mask,
                position_embeddings=table,
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(merged(x, n)), **{CACHE: cache})


class KeelForCausalLM(KeelPreTrainedModel, GenerationMixin):
    """Keel with an output layer that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: KeelConfig) -> None:
        super().__init__(config)
        self.model = KeelModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary], and the mean loss in nats if labels are given.

        Args:
            input_ids: this and what is not explained here: see `KeelModel.forward`.
            attention_mask: see there.
            position_ids: see there.
            cache: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: [batch, tokens], shifted here; -100 does not count.
            use_cache: see there.
            logits_to_keep: only the last so many tokens, or these positions; 0: all.
            kwargs: see there.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = outputs.last_hidden_state[:, kept, :]
        logits = self.lm_head(states.to(self.lm_head.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
