# SPDX-License-Identifier: Apache-2.0
"""Many prompts on one image, without gradients: the mask decoder's numbers with less arithmetic and memory traffic.

What does not depend on the prompt is computed once per image. Where an attention joins a dozen tokens with thousands
of image tokens, its projections of the image are moved to the side of the tokens: the scores q . (W x) are (W' q) . x,
and the sum of a (W x) is W (sum of a x), so that keys, values and queries of the image are never formed after the
first layer. With T tokens and H heads that costs H * T columns where projections cost twice the attention's width.

Shapes: Q prompts, T tokens, H heads of width d, N image tokens of C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_efficientsam import EfficientSamAttention, EfficientSamModel, place_pixels


# Of image tokens in a chunk: 2 prompts of 64 x 64 tokens of 256 float32 channels. Upscaling makes twice as much of
# them, which then stays below the 32 MiB from which glibc returns memory to the system after each use.
CPU_BYTES = 2 * 64 * 64 * 256 * 4
GPU_SHARE = 0.25  # part of a GPU's free memory that a chunk may take
GPU_COPIES = 8  # tensors of the size of a prompt's image tokens that exist at once while it is decoded
MOST_PROMPTS = 256  # in a chunk


class EfficientSamFastDecoder:
    """Decodes prompts on one image: the same masks and scores as `EfficientSamModel.decode_prompts`.

    `image_embeddings` (1, C, h, w) is what `get_image_embeddings` of the model gives. `chunk_size` prompts are decoded
    at once; when it is left out, as many as a CPU's cache or a part of a GPU's free memory holds. A decoder whose
    layers are not plain ones (adapters, quantised or offloaded weights) decodes by `decode_prompts`.
    """

    def __init__(self, model: EfficientSamModel, image_embeddings: torch.Tensor, chunk_size: int | None = None):
        if image_embeddings.ndim != 4 or len(image_embeddings) != 1:
            raise ValueError(
                f"image_embeddings has shape {tuple(image_embeddings.shape)}, expected that of one image, (1, C, h, w)"
            )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.model = model
        self.embeddings = image_embeddings
        dtype = model.prompt_encoder.point_embed.weight.dtype
        self.chunk_size = chunk_size or _chunk_size(image_embeddings.numel() * dtype.itemsize, image_embeddings.device)
        self.is_plain = _has_plain_layers(model.mask_decoder)
        if self.is_plain:
            self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Everything about the image that no prompt changes."""
        prompt_encoder, decoder = self.model.prompt_encoder, self.model.mask_decoder
        dtype = prompt_encoder.point_embed.weight.dtype
        height, width = self.grid_size = self.embeddings.shape[2:]
        image = self.embeddings.to(dtype)
        dense = prompt_encoder.encode_masks(None)
        image = image if dense is None else image + dense[0].to(dtype)
        self.image = image.flatten(2).transpose(1, 2).contiguous()  # (1, N, C)
        self.positions = prompt_encoder.positional_encoding.grid(height, width).to(dtype)  # (N, C)
        placed = self.image + self.positions
        first = decoder.transformer.layers[0]
        to_image, to_token = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        self.first_keys = _heads(to_image.k_proj(placed), to_image)[0].transpose(1, 2)  # (H, d, N)
        self.first_values = _heads(to_image.v_proj(self.image), to_image)[0]  # (H, N, d)
        self.first_queries = _heads(to_token.q_proj(placed), to_token)[0].transpose(1, 2)  # (H, d, N)
        norm = decoder.upscale_norm
        shape = (self.image.shape[1], 4, len(norm.weight))
        children = torch.arange(16 * self.image.shape[1], device=image.device)[None, None, :, None]
        self.child_of_pixel = place_pixels(children, self.grid_size).flatten()
        self.norm_weight, self.norm_bias = (p.to(dtype).expand(shape).contiguous() for p in (norm.weight, norm.bias))

    @torch.no_grad()
    def __call__(
        self,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (Q, 4, 4h, 4w) and predicted IoU (Q, 4) of the four mask tokens.

        (Q, P, 2), (Q, P) and (Q, 4), coordinates in model pixels, as `decode_prompts` takes them for one image; its
        errors are raised.
        """
        prompts = [None if p is None else p.unsqueeze(0) for p in (input_points, input_labels, input_boxes)]
        prompts[1] = self.model._check_prompts(self.embeddings, *prompts, None)
        if not self.is_plain:
            return self._decode_plainly(prompts)
        patch = self.model.config.vision_config.patch_size
        size = (self.grid_size[0] * patch, self.grid_size[1] * patch)
        tokens, mask = self.model.prompt_encoder(*prompts, size)
        tokens = tokens[0].to(self.image.dtype)
        mask = None if mask is None or bool(mask.all()) else mask[0]
        chunks = range(0, len(tokens), self.chunk_size)
        pieces = [
            self._decode(tokens[i : i + self.chunk_size], None if mask is None else mask[i : i + self.chunk_size])
            for i in chunks
        ]
        return torch.cat([masks for masks, _ in pieces]), torch.cat([scores for _, scores in pieces])

    def _decode_plainly(self, prompts: list[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """By the model's own method."""
        pieces = []
        for start in range(0, next(p for p in prompts if p is not None).shape[1], self.chunk_size):
            part = [None if p is None else p[:, start : start + self.chunk_size] for p in prompts]
            pieces.append(self.model.decode_prompts(self.embeddings, *part))
        return torch.cat([masks[0] for masks, _, _ in pieces]), torch.cat([scores[0] for _, scores, _ in pieces])

    def _decode(self, prompt_tokens: torch.Tensor, prompt_mask: torch.Tensor | None):
        decoder = self.model.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(prompt_tokens.dtype)
        tokens = torch.cat([own.expand(len(prompt_tokens), -1, -1), prompt_tokens], dim=1)
        hidden = None if prompt_mask is None else ~F.pad(prompt_mask, (len(own), 0), value=True)
        tokens, image = self._transform(tokens, hidden)
        weights = torch.stack(
            [mlp(tokens[:, 1 + index]) for index, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=2
        )
        # Rows of four logits are moved, where place_pixels moves single ones.
        masks = (self._upscale(image) @ weights).index_select(1, self.child_of_pixel).transpose(1, 2)
        masks = masks.reshape(*masks.shape[:2], *(4 * side for side in self.grid_size))
        return masks, decoder.iou_prediction_head(tokens[:, 0])

    def _transform(self, tokens: torch.Tensor, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The two-way transformer: (Q, T, C), (Q, T) bool with True for padding -> (Q, T, C), (Q, N, C)."""
        transformer = self.model.mask_decoder.transformer
        token_positions, image, placed = tokens, self.image, None
        for layer in transformer.layers:
            if not layer.is_first:
                tokens = tokens + token_positions
            tokens = layer.layer_norm1(tokens + _self_attention(layer.self_attn, tokens, hidden))
            query = tokens + token_positions
            attention = layer.cross_attn_token_to_image
            attended = (
                self._first_token_to_image(attention, query)
                if layer.is_first
                else _token_to_image(attention, query, placed, image)
            )
            tokens = layer.layer_norm2(tokens + attended)
            tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
            attention, key = layer.cross_attn_image_to_token, tokens + token_positions
            scores = self._first_scores(attention, key) if layer.is_first else _scores(attention, placed, key)
            image = layer.layer_norm4(_add_attended(image, attention, scores, tokens, hidden))
            placed = image + self.positions
        attended = _token_to_image(transformer.final_attn_token_to_image, tokens + token_positions, placed, image)
        return transformer.layer_norm_final_attn(tokens + attended), image

    def _first_token_to_image(self, attention: EfficientSamAttention, query: torch.Tensor) -> torch.Tensor:
        """With keys and values that all prompts share: (Q, T, C) -> (Q, T, C)."""
        count, length = query.shape[:2]
        query = _heads(attention.q_proj(query), attention).transpose(0, 1).flatten(1, 2) * attention.scaling
        weights = _softmax(query @ self.first_keys, -1)  # (H, Q * T, N)
        attended = (weights @ self.first_values).unflatten(1, (count, length))  # (H, Q, T, d)
        return attention.out_proj(attended.permute(1, 2, 0, 3).flatten(2))

    def _first_scores(self, attention: EfficientSamAttention, key: torch.Tensor) -> torch.Tensor:
        """Scores of the image's shared queries: (Q, T, C) -> (Q, H, T, N)."""
        count, length = key.shape[:2]
        key = _heads(attention.k_proj(key), attention).transpose(0, 1).flatten(1, 2) * attention.scaling
        return (key @ self.first_queries).unflatten(1, (count, length)).transpose(0, 1)

    def _upscale(self, image: torch.Tensor) -> torch.Tensor:
        """As the mask decoder's, with the affine part of its norm done in the same pass: -> (Q, N * 16, C / 8)."""
        decoder = self.model.mask_decoder
        features = _children(image, decoder.upscale_conv1)
        norm = decoder.upscale_norm
        features = F.layer_norm(features, features.shape[1:], self.norm_weight, self.norm_bias, norm.eps)
        features = decoder.activation(features).flatten(1, 2)
        return decoder.activation(_children(features, decoder.upscale_conv2)).flatten(1, 2)


def _chunk_size(prompt_bytes: int, device: torch.device) -> int:
    """Prompts to decode at once, where the image tokens of one take so many bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused) / GPU_COPIES
    else:
        budget = CPU_BYTES if device.type == "cpu" else 16 * CPU_BYTES
    return min(max(1, int(budget // prompt_bytes)), MOST_PROMPTS)


def _has_plain_layers(decoder: nn.Module) -> bool:
    """Whether the weights of all projections are at hand as they are."""
    layers = [
        getattr(module, name)
        for module in decoder.modules()
        if isinstance(module, EfficientSamAttention)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    layers += [decoder.upscale_conv1, decoder.upscale_conv2]
    plain = all(type(layer) in (nn.Linear, nn.ConvTranspose2d) for layer in layers)
    return plain and all(layer.weight.is_floating_point() and layer.weight.device.type != "meta" for layer in layers)


def _heads(states: torch.Tensor, attention: EfficientSamAttention) -> torch.Tensor:
    """(Q, L, H * d) -> (Q, H, L, d)"""
    return states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _head_weights(layer: nn.Linear, heads: int) -> torch.Tensor:
    """Weight of a projection head by head: (H, d, C)."""
    return layer.weight.unflatten(0, (heads, -1))


def _softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax whose smallest values are zero: with denormal numbers CPUs multiply thirty times more slowly."""
    weights = scores.softmax(dim)
    return F.threshold(weights, 1e-30, 0.0, inplace=True) if weights.device.type == "cpu" else weights


def _self_attention(attention: EfficientSamAttention, tokens: torch.Tensor, hidden: torch.Tensor | None):
    """Attention among tokens: (Q, T, C) -> (Q, T, C)."""
    query, key, value = (
        _heads(project(tokens), attention) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = query @ key.transpose(2, 3) * attention.scaling
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
    return attention.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def _token_to_image(attention: EfficientSamAttention, query, keys, values) -> torch.Tensor:
    """Tokens attend to the image: (Q, T, C), (Q, N, C) x 2 -> (Q, T, C)."""
    heads, length = attention.num_attention_heads, query.shape[1]
    query = _heads(attention.q_proj(query), attention) * attention.scaling
    query = (query @ _head_weights(attention.k_proj, heads)).flatten(1, 2)  # (Q, H * T, C)
    # What the keys' bias adds to a token's scores is the same for every image token: softmax takes it out again.
    weights = _softmax(query @ keys.transpose(1, 2), -1)
    attended = (weights @ values).unflatten(1, (heads, length))
    attended = attended @ _head_weights(attention.v_proj, heads).transpose(1, 2)  # (Q, H, T, d)
    return attention.out_proj(attended.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _scores(attention: EfficientSamAttention, queries: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scores of image tokens that attend to tokens: (Q, N, C), (Q, T, C) -> (Q, H, T, N)."""
    heads, length = attention.num_attention_heads, key.shape[1]
    key = _heads(attention.k_proj(key), attention) * attention.scaling  # (Q, H, T, d)
    absorbed = (key @ _head_weights(attention.q_proj, heads)).flatten(1, 2)  # (Q, H * T, C)
    constant = key @ attention.q_proj.bias.unflatten(0, (heads, -1)).unsqueeze(-1)  # (Q, H, T, 1)
    scores = absorbed @ queries.transpose(1, 2)
    return scores.unflatten(1, (heads, length)) + constant


def _add_attended(image, attention: EfficientSamAttention, scores, value, hidden: torch.Tensor | None):
    """Image tokens plus what they attend to: (1 or Q, N, C), scores (Q, H, T, N), (Q, T, C) -> (Q, N, C)."""
    heads = attention.num_attention_heads
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, :, None], torch.finfo(scores.dtype).min)
    weights = _softmax(scores, 2).flatten(1, 2)  # (Q, H * T, N)
    value = _heads(attention.v_proj(value), attention)
    outwards = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (H, d, C)
    # A head's weights add up to one, so that each head can carry its share of the bias.
    value = (value @ outwards + attention.out_proj.bias / heads).flatten(1, 2)  # (Q, H * T, C)
    return torch.baddbmm(image.expand(len(weights), -1, -1), weights.transpose(1, 2), value)


def _children(tokens: torch.Tensor, layer: nn.ConvTranspose2d) -> torch.Tensor:
    """The four children of each token: (Q, N, C) -> (Q, N, 4, C')."""
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(tokens, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))


__all__ = ["EfficientSamFastDecoder"]
