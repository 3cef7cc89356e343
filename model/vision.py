"""Vision transformers: pixels in, one embedding for each patch out.

One implementation serves the four towers of the papers: EVA-CLIP ViT-g/14, CLIP ViT-L/14 and BLIP's
ViT-B/16 and ViT-L/16. transformers has each of them, but BLIP's there computes attention without a
fused kernel, none has stochastic depth, EVA's cannot leave out the key bias, and CLIP's projects
queries, keys and values apart. Here they are one file with fused projections and SDPA; tests hold
it equal to those towers.

Dims: B batch, P patches plus the class token, C width, h heads, G patches along a side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.losses import at_least_float32


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Sizes and habits of a vision transformer; the defaults are those of BLIP's ViT-B/16.

    `num_layers` counts the blocks that are kept: BLIP-2 reads EVA-CLIP and CLIP before their last
    block (BLIP-2, Sec. 3.4), so that block is never built.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # gelu is the exact (erf) one
    has_key_bias: bool = True  # without it queries and values alone have a bias (EVA)
    has_patch_bias: bool = True
    has_norm_before: bool = False  # CLIP's ln_pre, between the embeddings and the first block
    has_norm_after: bool = True  # on what is returned
    align_corners: bool = False  # how positions are resized to another resolution
    is_residual_fp32: bool = True  # in mixed precision; False follows the patch embedding (CLIP)
    drop_path: float = 0.0  # chance to skip the last block; grows linearly from 0 at the first
    # Convolutions in front of the patches, each halving the picture's side: a transformer learns
    # from far fewer images then (Xiao et al., 2021, "Early convolutions"). No tower of the papers.
    stem_widths: tuple[int, ...] = ()
    checkpoint_activations: bool = False  # trade a second forward pass for memory when training
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.patch_size % self.stem_factor:
            raise ValueError(
                f"patch_size {self.patch_size} is not a multiple of {self.stem_factor}, by which "
                f"{len(self.stem_widths)} convolutions shrink the picture"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; a probability below 1 was expected")

    @property
    def stem_factor(self) -> int:
        """By how much the stem shrinks a picture's sides."""
        return int(2 ** len(self.stem_widths))

    @property
    def num_tokens(self) -> int:
        """How many embeddings one image becomes: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


BLIP_VIT_B = VisionConfig()  # BLIP's pretraining; VQA and NLVR2 fine-tune with drop_path 0.1
BLIP_VIT_L = VisionConfig(width=1024, num_layers=24, num_heads=16, mlp_width=4096, drop_path=0.1)
EVA_CLIP_VIT_G = VisionConfig(
    patch_size=14,
    width=1408,
    num_layers=39,  # of 40
    num_heads=16,
    mlp_width=6144,
    has_key_bias=False,
    has_norm_after=False,
)
CLIP_VIT_L = VisionConfig(
    patch_size=14,
    width=1024,
    num_layers=23,  # of 24
    num_heads=16,
    mlp_width=4096,
    norm_eps=1e-5,
    activation="quick_gelu",
    has_patch_bias=False,
    has_norm_before=True,
    has_norm_after=False,
    align_corners=True,
    is_residual_fp32=False,
)
TINY_VIT = VisionConfig(
    image_size=32, patch_size=8, width=48, num_layers=2, num_heads=4, mlp_width=192
)


class ImageEncoder(nn.Module):
    """A vision transformer that returns all of its tokens (BLIP, Sec. 3.1; BLIP-2, Sec. 3.1)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config.stem_widths)
        side = config.patch_size // config.stem_factor
        channels = (3, *config.stem_widths)[-1]
        self.patches = nn.Conv2d(channels, config.width, side, side, bias=config.has_patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, config.num_tokens, config.width))
        self.norm_before = _optional_norm(config, config.has_norm_before)
        deepest = max(config.num_layers - 1, 1)
        self.layers = nn.ModuleList(
            VisionBlock(config, drop_path=config.drop_path * depth / deepest)
            for depth in range(config.num_layers)
        )
        self.norm_after = _optional_norm(config, config.has_norm_after)
        self.reset_parameters()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, P, C) embeddings, the class token first, for normalised `pixels`.

        `pixels` is (B, 3, image_size, image_size). Under autocast, or with weights stored in half
        precision, the result is fp32 where `config.is_residual_fp32` and half precision otherwise.
        Raises ValueError for another resolution: see `change_resolution`.
        """
        hidden = self._embed(pixels)
        if self.norm_before is not None:
            hidden = _normalise(hidden, self.norm_before).to(hidden.dtype)
        for layer in self.layers:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        if self.norm_after is not None:
            hidden = _normalise(hidden, self.norm_after).to(hidden.dtype)
        return hidden

    def _embed(self, pixels: Tensor) -> Tensor:
        """Cut into patches, put the class token in front, add positions: (B, P, C)."""
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixels are {tuple(pixels.shape)}, not (B, 3, {size}, {size}); resize the images, "
                f"or call change_resolution to resize the position embeddings"
            )
        pixels = pixels.to(self.patches.weight.dtype)
        patches = self.patches(pixels if self.stem is None else self.stem(pixels))  # (B, C, G, G)
        patches = patches.flatten(2).transpose(1, 2)  # (B, G*G, C)
        dtype = patches.dtype
        if self.config.is_residual_fp32:  # fp32 unless the whole model was cast to less
            dtype = torch.promote_types(dtype, self.cls_token.dtype)
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        hidden = torch.cat((cls_token.to(dtype), patches.to(dtype)), dim=1)  # (B, P, C)
        return hidden + self.positions.to(dtype)

    @torch.no_grad()
    def change_resolution(self, image_size: int) -> None:
        """Take images of another size from now on, by resizing the position embeddings in place.

        Call it after loading weights and before building an optimizer: the parameter is replaced.
        """
        self.config = replace(self.config, image_size=image_size)
        side = image_size // self.config.patch_size
        resized = resize_positions(
            self.positions, side=side, align_corners=self.config.align_corners
        )
        self.positions = nn.Parameter(resized, requires_grad=self.positions.requires_grad)

    def freeze(self, num_layers: int) -> None:
        """Stop all below block `num_layers` from learning: stem, patches, positions and blocks."""
        self.cls_token.requires_grad_(False)
        self.positions.requires_grad_(False)
        for module in (self.stem, self.patches, self.norm_before, *self.layers[:num_layers]):
            if module is not None:
                module.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: truncated N(0, init_std), zero biases, LayerNorm (1, 0)."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, VisionAttention):
                module.reset_biases()
        if self.stem is not None:  # its ReLUs halve the variance
            for module in self.stem.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.trunc_normal_(self.cls_token, std=std)
        nn.init.trunc_normal_(self.positions, std=std)


class FrozenImageEncoder(ImageEncoder):
    """An image encoder that never learns, whatever is done to the model around it (BLIP-2, Sec. 3).

    It runs in evaluation mode without gradients, before and after `model.train()`; its parameters
    do not require gradients, and those of a model that turned them on again stay without one.

    `dtype` is how convolutions and linear layers are stored and computed; the class token,
    positions, LayerNorms and EVA's query and value biases stay fp32, as in LAVIS. A later
    `.to(dtype)` or `.half()` moves the device and leaves these dtypes alone. The weights' names are
    those of `ImageEncoder`, and `load_state_dict` casts, so either loads what the other saved.
    """

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError for a `dtype` other than float32, bfloat16 and float16."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype is {dtype}; use torch.float32, torch.bfloat16 or torch.float16"
            )
        super().__init__(config)
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        self.requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, P, C) embeddings in the dtype of `pixels`, without a gradient.

        Stored in fp32, it computes as autocast says; stored in half precision, in that precision.
        Raises ValueError for another resolution: see `change_resolution`.
        """
        autocast = self.dtype == torch.float32 and torch.is_autocast_enabled(pixels.device.type)
        with torch.autocast(pixels.device.type, enabled=autocast):
            features = super().forward(pixels)
        return features.to(pixels.dtype)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode; `mode` is what the surrounding model asks for."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        # .to, .half and .cuda of this module and of every module around it end here.
        applied: Self = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return applied


class VisionBlock(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, *, drop_path: float) -> None:
        """`drop_path` is the chance that a sample skips a branch while training."""
        super().__init__()
        self.drop_path = drop_path
        self.attention = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, P, C) for `hidden` (B, P, C), in its dtype."""
        hidden = hidden + self._drop(self.attention(hidden))
        return hidden + self._drop(self.mlp(hidden))

    def _drop(self, branch: Tensor) -> Tensor:
        """Drop the branch for some samples, and scale it for the others (stochastic depth)."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


class VisionAttention(nn.Module):
    """Normalises, then attends from every token to every token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.has_key_bias)
        self.query_bias: nn.Parameter | None = None
        self.value_bias: nn.Parameter | None = None
        if not config.has_key_bias:
            self.query_bias = nn.Parameter(torch.zeros(width))
            self.value_bias = nn.Parameter(torch.zeros(width))
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the branch (B, P, C) to add to `hidden` (B, P, C)."""
        batch, tokens, width = hidden.shape
        weight = self.qkv.weight
        normalised = _normalise(hidden, self.norm).to(weight.dtype)
        qkv = F.linear(normalised, weight, self._bias())  # (B, P, 3*C)
        qkv = qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, h, P, C/h)
        attended = F.scaled_dot_product_attention(query, key, value)
        branch: Tensor = self.output(attended.transpose(1, 2).flatten(2))  # (B, P, C)
        return branch

    def _bias(self) -> Tensor | None:
        if self.query_bias is None or self.value_bias is None:
            return self.qkv.bias
        joined = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        return joined.to(self.qkv.weight.dtype)

    def reset_biases(self) -> None:
        """Zero the query and value biases that stand outside a linear layer."""
        for bias in (self.query_bias, self.value_bias):
            if bias is not None:
                nn.init.zeros_(bias)


class VisionMlp(nn.Module):
    """Normalises, widens, activates, narrows."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the branch (B, P, C) to add to `hidden` (B, P, C)."""
        wide = self.up(_normalise(hidden, self.norm).to(self.up.weight.dtype))
        wide = F.gelu(wide) if self.activation == "gelu" else wide * torch.sigmoid(1.702 * wide)
        branch: Tensor = self.down(wide)
        return branch


def resize_positions(positions: Tensor, *, side: int, align_corners: bool) -> Tensor:
    """Resize (1, 1+G*G, C) position embeddings to (1, 1+side*side, C), bicubically.

    The class token's comes first and is kept. `align_corners` is False for EVA-CLIP and BLIP and
    True for CLIP, as in the references. Returns the same tensor when the size is right already.
    Raises ValueError when the patches do not form a square.
    """
    old_side = round((positions.shape[1] - 1) ** 0.5)
    if old_side**2 != positions.shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} patch positions do not form a square grid")
    if old_side == side:
        return positions
    grid = positions[:, 1:].float().transpose(1, 2).reshape(1, -1, old_side, old_side)
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=align_corners)
    patches = resized.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, side*side, C)
    return torch.cat((positions[:, :1], patches), dim=1)


def _stem(widths: tuple[int, ...]) -> nn.Sequential | None:
    """Two convolutions for each width, the first of which halves the picture's sides."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers) if layers else None


def _optional_norm(config: VisionConfig, is_present: bool) -> nn.LayerNorm | None:
    return nn.LayerNorm(config.width, eps=config.norm_eps) if is_present else None


def _normalise(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply `norm` in its own precision, fp32, whatever the precision of `hidden`."""
    normalised: Tensor = norm(hidden.to(norm.weight.dtype))
    return normalised


class LnVision(nn.LayerNorm):
    """BLIP-2's trainable LayerNorm on image tokens: computed in float32, then cast once.

    The result is in what the Q-Former's projections compute in: autocast's dtype where it is on,
    else the parameters'.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, P, I) for `states` (B, P, I) of any floating dtype."""
        device, wide = states.device.type, at_least_float32
        with torch.autocast(device, enabled=False):
            normalised = F.layer_norm(
                wide(states), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps
            )
        is_mixed = torch.is_autocast_enabled(device)
        return normalised.to(torch.get_autocast_dtype(device) if is_mixed else self.weight.dtype)
