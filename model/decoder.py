"""sam2's mask decoder on many prompts of one tile: its weights and its answers, with less work on the image's side.

Knows sam2's MaskDecoder by its parts, and tensors. Upstream repeats a tile's features for every prompt, as images, and
converts them between precisions at each step; on a CPU that takes most of its time. Here the tile's cells stay
rows of a matrix, what does not depend on a prompt is computed once for all prompts, and the two transposed convolutions
(2 × 2, stride 2, so that no outputs overlap) are matrix multiplications. Results differ by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCells:
    """What a tile's encoder features are to the decoder, as rows: one for each cell of the embedding, row by row.

    embedding `[n, C]`; middle `[n, 4, C/4]` and finest `[n, 16, C/8]` hold the cells of strides 8 and 4 that lie in
    each cell of the embedding, in the order in which the decoder's transposed convolutions make them.
    """

    embedding: torch.Tensor
    middle: torch.Tensor
    finest: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + self.middle.nbytes + self.finest.nbytes


def tile_cells(embedding: torch.Tensor, high_res: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> TileCells:
    """From one tile's embedding `[C, h, w]` and high_res `[C/8, 4h, 4w]`, `[C/4, 2h, 2w]`; copies."""
    height, width = embedding.shape[1:]
    finest, middle = high_res
    fine = finest.view(-1, height, 2, 2, width, 2, 2).permute(1, 4, 2, 5, 3, 6, 0)
    medium = middle.view(-1, height, 2, width, 2).permute(1, 3, 2, 4, 0)
    return TileCells(
        embedding=embedding.flatten(1).t().to(dtype, copy=True, memory_format=torch.contiguous_format),
        middle=medium.reshape(height * width, 4, -1).to(dtype, copy=True),
        finest=fine.reshape(height * width, 16, -1).to(dtype, copy=True),
    )


class _Joined:
    """Several linear projections of the image's cells as one: their weights, and what is added to the result, which
    holds the biases and what the position encoding adds."""

    def __init__(self, projections: list[tuple[nn.Linear, bool]], position: torch.Tensor, dtype: torch.dtype) -> None:
        """projections: each with whether the position encoding `[n, C]` is added to its input."""
        self.weight = torch.cat([linear.weight for linear, _ in projections]).to(dtype)
        offsets = [
            functional.linear(position, linear.weight, linear.bias) if has_pe else linear.bias.expand(len(position), -1)
            for linear, has_pe in projections
        ]
        self.offset = torch.cat(offsets, dim=1).to(dtype)
        self.parts = len(projections)

    def __call__(self, cells: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cells `[B, n, C]` to one `[B, n, c]` for each projection."""
        return functional.linear(cells, self.weight).add_(self.offset).chunk(self.parts, dim=-1)


class MaskDecoder:
    """The decoder of a loaded SAM 2. Inner arithmetic on cells is in `dtype`; that on tokens in float32.

    position: of the embedding's cells, `[1, C, h, w]`, float32.
    """

    def __init__(self, decoder: Any, position: torch.Tensor, dtype: torch.dtype) -> None:
        self._sam = decoder
        self._dtype = dtype
        self._side = position.shape[-1]
        cells = position[0].flatten(1).t()
        self._layers = list(decoder.transformer.layers)
        self._joined = [
            _Joined(
                [
                    (layer.cross_attn_token_to_image.k_proj, True),
                    (layer.cross_attn_token_to_image.v_proj, False),
                    (layer.cross_attn_image_to_token.q_proj, True),
                ],
                cells,
                dtype,
            )
            for layer in self._layers
        ]
        final = decoder.transformer.final_attn_token_to_image
        self._final = _Joined([(final.k_proj, True), (final.v_proj, False)], cells, dtype)
        self._outs = [_cast(layer.cross_attn_image_to_token.out_proj, dtype) for layer in self._layers]
        self._norms = [_cast(layer.norm4, dtype) for layer in self._layers]
        first, norm, _, second, _ = decoder.output_upscaling
        self._upscalings = [_as_matrix(convolution, dtype) for convolution in (first, second)]
        self._upscaled_norm = norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
        output_tokens = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if decoder.pred_obj_scores:
            output_tokens.insert(0, decoder.obj_score_token.weight)
        self._output_tokens = torch.cat(output_tokens)

    def __call__(
        self, tile: TileCells, sparse: torch.Tensor, dense: torch.Tensor, *, multimask: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits `[P, M, 4h, 4w]` and predicted IoU `[P, M]`, float32, of prompts on one tile.

        sparse `[P, T, C]`; dense `[P, C, h, w]`, or `[1, C, h, w]` when it is the same for all. M is 3 with
        `multimask`, else 1.
        """
        masks, iou = self._answer(tile, sparse, dense)
        return (masks[:, 1:], iou[:, 1:]) if multimask else self._single(masks, iou)

    def both(self, tile: TileCells, sparse: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both answers at once, `[P, 4, 4h, 4w]` and `[P, 4]`: the one mask first, then the three."""
        masks, iou = self._answer(tile, sparse, dense)
        single, single_iou = self._single(masks, iou)
        return torch.cat([single, masks[:, 1:]], dim=1), torch.cat([single_iou, iou[:, 1:]], dim=1)

    def _answer(self, tile: TileCells, sparse: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of all tokens, and their predicted IoU."""
        count = sparse.shape[0]  # len() would fix the number when the decoder is exported
        tokens = torch.cat([self._output_tokens.expand(count, -1, -1), sparse.float()], dim=1)
        cells = tile.embedding + dense.flatten(2).transpose(1, 2).to(self._dtype)
        queries = tokens
        for layer, joined, out, norm in zip(self._layers, self._joined, self._outs, self._norms, strict=True):
            if layer.skip_first_layer_pe:
                queries = layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
            else:
                queries_with_pe = queries + tokens
                queries = layer.norm1(queries + layer.self_attn(q=queries_with_pe, k=queries_with_pe, v=queries))
            keys, values, image_queries = joined(cells)
            to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            queries = layer.norm2(queries + self._cross_attend(to_image, queries + tokens, keys, values))
            queries = layer.norm3(queries + layer.mlp(queries))
            attended = _attend(
                image_queries.expand(count, -1, -1),
                to_tokens.k_proj(queries + tokens).to(self._dtype),
                to_tokens.v_proj(queries).to(self._dtype),
                to_tokens.num_heads,
            )
            cells = functional.linear(attended, *out).add_(cells)
            cells = functional.layer_norm(cells, cells.shape[-1:], *norm, layer.norm4.eps)
        transformer = self._sam.transformer
        final = transformer.final_attn_token_to_image
        attended = self._cross_attend(final, queries + tokens, *self._final(cells))
        queries = transformer.norm_final_attn(queries + attended)
        return self._read(tile, queries, cells)

    def _cross_attend(
        self, attention: Any, queries_with_pe: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Tokens `[P, T, C]` attend to cells `[P, n, c]`; all in one row when the cells are the same for all prompts,
        `[1, n, c]`."""
        projected = attention.q_proj(queries_with_pe).to(self._dtype)
        if keys.shape[0] == 1:
            answers = _attend(projected.flatten(0, 1)[None], keys, values, attention.num_heads).view(projected.shape)
        else:
            answers = _attend(projected, keys, values, attention.num_heads)
        return attention.out_proj(answers.float())  # type: ignore[no-any-return]

    def _read(self, tile: TileCells, queries: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sam, count, side = self._sam, queries.shape[0], self._side
        first = self._output_tokens.shape[0] - sam.num_mask_tokens  # token of the first mask
        iou = sam.iou_prediction_head(queries[:, first - 1])
        weights = torch.stack(
            [mlp(queries[:, first + i]) for i, mlp in enumerate(sam.output_hypernetworks_mlps)], dim=1
        )
        coarse, fine = self._upscalings
        middle = functional.linear(cells, *coarse).view(count, *tile.middle.shape).add_(tile.middle)
        weight, bias, eps = self._upscaled_norm
        middle = functional.gelu(functional.layer_norm(middle, middle.shape[-1:], weight, bias, eps))
        finest = functional.linear(middle, *fine).view(count, *tile.finest.shape).add_(tile.finest)
        finest = functional.gelu(finest).flatten(1, 2)
        masks = (finest @ weights.transpose(1, 2).to(self._dtype)).float()
        masks = masks.view(count, side, side, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return masks.reshape(count, -1, 4 * side, 4 * side), iou

    def _single(self, masks: torch.Tensor, iou: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all masks the one for a prompt that is not ambiguous."""
        if self._sam.dynamic_multimask_via_stability:
            return self._sam._dynamic_multimask_via_stability(masks, iou)  # type: ignore[no-any-return]
        return masks[:, :1], iou[:, :1]


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of `[B, N, c]` to `[B, M, c]` in several heads, `[B, N, c]`."""
    q, k, v = (tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2) for tensor in (queries, keys, values))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _cast(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _as_matrix(convolution: nn.ConvTranspose2d, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A transposed convolution with 2 × 2 weights `[in, out, 2, 2]` and stride 2 as a linear layer, whose outputs are
    the four cells that it makes of one."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = convolution.bias if convolution.bias is not None else weight.new_zeros(convolution.out_channels)
    return weight.to(dtype).contiguous(), bias.repeat(4).to(dtype)
