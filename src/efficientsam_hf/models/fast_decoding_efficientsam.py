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

from .checks_efficientsam import check_tensor, is_whole, short
from .modeling_efficientsam import EfficientSamAttention, EfficientSamModel, place_pixels


CPU_BYTES = 2 * 64 * 64 * 256 * 4  # of image tokens in a chunk: 2 prompts of 64 x 64 tokens of 256 float32 channels
LEAST_SCORE = 60.0  # below the largest: a weight of 1e-26, which among a million others is still a normal float32
CPU_UPSCALED_BYTES = 2**22  # of what a chunk's image tokens become in upscaling, at once: two cores' caches hold them
GLIBC_MAPPED_BYTES = 2**25  # glibc maps every larger block by itself, and returns it to the system when it is freed
GPU_SHARE = 0.25  # part of a GPU's free memory that a chunk may take
GPU_COPIES = 8  # tensors of the size of a prompt's image tokens that exist at once while it is decoded
MOST_PROMPTS = 256  # in a chunk


class EfficientSamFastDecoder:
    """Decodes prompts on one image: the same masks and scores as `EfficientSamModel.decode_prompts`.

    `image_embeddings` (1, C, h, w) is what `get_image_embeddings` of the model gives. `chunk_size` prompts are decoded
    at once; when it is left out, as many as a CPU's cache or a part of a GPU's free memory holds. A decoder whose
    layers are not plain ones (adapters, quantised or offloaded weights) decodes by `decode_prompts`, and so are boxes
    that change the image embeddings (`dense_boxes`).
    """

    def __init__(self, model: EfficientSamModel, image_embeddings: torch.Tensor, chunk_size: int | None = None):
        check_tensor("image_embeddings", image_embeddings, "(1, C, h, w)")
        if image_embeddings.ndim != 4 or len(image_embeddings) != 1:
            raise ValueError(
                f"image_embeddings has shape {tuple(image_embeddings.shape)}, expected that of one image, (1, C, h, w)"
            )
        if chunk_size is not None and (not is_whole(chunk_size) or chunk_size < 1):
            raise ValueError(f"chunk_size must be at least 1, got {short(chunk_size)}")
        model._check_embeddings(image_embeddings)
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
        _keep_freed_memory(self.embeddings.device)
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
        self.mask_count = len(decoder.mask_tokens.weight)
        row_bytes = 2 * self.chunk_size * self.image[:, :width].numel() * dtype.itemsize  # of upscaled tokens
        rows = max(1, CPU_UPSCALED_BYTES // row_bytes) if image.device.type == "cpu" else height
        self.tokens_at_once = rows * width
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
        masks, scores, _ = self._decode_all([input_points, input_labels, input_boxes], None)
        return masks, scores

    @torch.no_grad()
    def decode_above(
        self, threshold: float, input_points: torch.Tensor, input_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a call, for the K prompts that have a candidate (mask tokens 1 to 3) of predicted IoU above `threshold`.

        (Q, P, 2), (Q, P) -> logits (K, 4, 4h, 4w), predicted IoU (K, 4), index of each in the prompts (K). What the
        others cost ends where the scores are known: about half of a prompt's operations upscale its masks. The logits
        are the beginning of a tensor for all Q.
        """
        return self._decode_all([input_points, input_labels, None], threshold)

    def _decode_all(self, prompts: list[torch.Tensor | None], threshold: float | None):
        """Logits (K, 4, 4h, 4w), predicted IoU (K, 4) and index (K) of prompts above the threshold, None for all."""
        prompts = [None if p is None else p.unsqueeze(0) for p in prompts]
        prompts[1] = self.model._check_prompts(self.embeddings, *prompts, None)
        changes_image = prompts[2] is not None and self.model.prompt_encoder.dense_boxes
        if changes_image or not self.is_plain:
            return self._decode_plainly(prompts, threshold)
        patch = self.model.config.vision_config.patch_size
        size = (self.grid_size[0] * patch, self.grid_size[1] * patch)
        tokens, mask = self.model.prompt_encoder(*prompts, size)
        tokens = tokens[0].to(self.image.dtype)
        mask = None if mask is None or bool(mask.all()) else mask[0]
        pixels = 16 * self.image.shape[1]
        masks = tokens.new_empty(len(tokens), self.mask_count, pixels, dtype=self.model._compute_dtype(tokens.device))
        scores, good, count = [], [], 0
        for start in range(0, len(tokens), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            decoded, image = self._transform(*self._with_own_tokens(tokens, mask, part))
            scores.append(self.model.mask_decoder.iou_prediction_head(decoded[:, 0]))
            good.append(_is_above(scores[-1], threshold))
            if threshold is not None and not good[-1].all():
                decoded, image = decoded[good[-1]], image[good[-1]]
            if len(image):
                self._write_masks(image, decoded, masks[count : count + len(image)])
            count += len(image)
        good = torch.cat(good)
        masks = masks[:count].unflatten(2, [4 * side for side in self.grid_size])
        return masks, torch.cat(scores)[good], good.nonzero()[:, 0]

    def _decode_plainly(self, prompts: list[torch.Tensor | None], threshold: float | None):
        """By the model's own method."""
        masks, scores, good = [], [], []
        for start in range(0, next(p for p in prompts if p is not None).shape[1], self.chunk_size):
            part = [None if p is None else p[:, start : start + self.chunk_size] for p in prompts]
            logits, predicted, _ = self.model.decode_prompts(self.embeddings, *part)
            good.append(_is_above(predicted[0], threshold))
            masks.append(logits[0][good[-1]])
            scores.append(predicted[0][good[-1]])
        return torch.cat(masks), torch.cat(scores), torch.cat(good).nonzero()[:, 0]

    def _with_own_tokens(self, prompt_tokens: torch.Tensor, prompt_mask: torch.Tensor | None, part: slice):
        """The decoder's tokens before those of some prompts: (Q, T, C) and, True for padding, (Q, T) or None."""
        decoder = self.model.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(prompt_tokens.dtype)
        prompt_tokens = prompt_tokens[part]
        tokens = torch.cat([own.expand(len(prompt_tokens), -1, -1), prompt_tokens], dim=1)
        return tokens, None if prompt_mask is None else ~F.pad(prompt_mask[part], (len(own), 0), value=True)

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

    def _write_masks(self, image: torch.Tensor, tokens: torch.Tensor, masks: torch.Tensor) -> None:
        """Upscale image tokens and weigh their channels by the mask tokens': (Q, N, C), (Q, T, C) -> (Q, M, 16 * N).

        As the mask decoder upscales, with the affine part of its norm done in the same pass. That norm is over all
        tokens; what follows it is done for some rows at a time.
        """
        decoder = self.model.mask_decoder
        norm = decoder.upscale_norm
        heads = enumerate(decoder.output_hypernetworks_mlps)
        weights = torch.stack([head(tokens[:, 1 + index]) for index, head in heads], dim=2)  # (Q, C / 8, M)
        features = _children(image, decoder.upscale_conv1)
        features = F.layer_norm(features, features.shape[1:], self.norm_weight, self.norm_bias, norm.eps)
        start = 0
        for block in features.split(self.tokens_at_once, dim=1):
            children = _children(decoder.activation(block).flatten(1, 2), decoder.upscale_conv2)
            pixels = decoder.activation(children).flatten(1, 2) @ weights
            # Rows of four logits are moved, where place_pixels moves single ones.
            pixels = pixels.index_select(1, self.child_of_pixel[: pixels.shape[1]])
            masks[:, :, start : start + pixels.shape[1]] = pixels.transpose(1, 2)
            start += pixels.shape[1]


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a model takes images in: those of its first weight that is not offloaded."""
    parameters = list(model.parameters())
    first = next((one for one in parameters if one.device.type != "meta"), None)
    return torch.device("cpu") if first is None else first.device, parameters[0].dtype


def _chunk_size(prompt_bytes: int, device: torch.device) -> int:
    """Prompts to decode at once, where the image tokens of one take so many bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused) / GPU_COPIES
    else:
        budget = CPU_BYTES if device.type == "cpu" else 16 * CPU_BYTES
    return min(max(1, int(budget // prompt_bytes)), MOST_PROMPTS)


def _keep_freed_memory(device: torch.device) -> None:
    """Let the memory that a chunk frees stay with the process, for the next one, where the C library is glibc.

    It gives the end of its heap back whenever that is twice as large as the largest mapped block that was ever freed
    (mallopt(3), M_TRIM_THRESHOLD): each chunk would then ask for the same memory again, and the system would clear it
    page by page. Freeing one large block, which is never written to, ends that.
    """
    if device.type == "cpu":
        torch.empty(GLIBC_MAPPED_BYTES - 2**16, dtype=torch.uint8, device="cpu")


def _is_above(scores: torch.Tensor, threshold: float | None) -> torch.Tensor:
    """Prompts that have a candidate above the threshold, None for all of them: (Q, 4) -> (Q) bool."""
    if threshold is None:
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    return (scores[:, 1:].float() > threshold).any(1)


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
    """Softmax without denormal numbers, which CPUs compute ten times and multiply thirty times more slowly.

    `scores` is overwritten: what lies LEAST_SCORE below the largest is as good as that.
    """
    if scores.device.type == "cpu":
        scores = scores.clamp_(min=scores.amax(dim, keepdim=True) - LEAST_SCORE)
    return scores.softmax(dim)


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


__all__ = ["EfficientSamFastDecoder", "place_of"]
