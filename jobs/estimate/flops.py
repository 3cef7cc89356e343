"""Arithmetic that scoring takes, by the shapes of the models, and what GPUs can do of it.

One multiply-add counts as two. L layers, D width, T tokens.
"""

from dataclasses import dataclass

from pipeline.model_configs import CaptionerConfig, ScorerConfig

# Dense peaks in TFLOP/s from NVIDIA's data sheets: bfloat16 (float16 on T4), and plain float32.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "T4": {"bfloat16": 65, "float32": 8.1},
    "A10G": {"bfloat16": 70, "float32": 31.2},
    "L4": {"bfloat16": 121, "float32": 30.3},
    "L40S": {"bfloat16": 362, "float32": 91.6},
    "A100": {"bfloat16": 312, "float32": 19.5},
    "H100": {"bfloat16": 989, "float32": 66.9},
    "H200": {"bfloat16": 989, "float32": 66.9},
}
_WEB_CAPTION_TOKENS = 20


@dataclass(frozen=True, slots=True)
class _Encoder:
    layers: int
    width: int
    tokens: int

    def forward(self) -> float:
        dense = 24 * self.tokens * self.width**2
        return float(self.layers * (dense + 4 * self.tokens**2 * self.width))


_BLIP_BASE, _BLIP_LARGE = _Encoder(12, 768, 577), _Encoder(24, 1024, 577)  # 384 px, patches of 16
_CLIP_TEXT = _Encoder(12, 768, 77)
_CLIP_LARGE, _CLIP_BASE = _Encoder(24, 1024, 257), _Encoder(12, 768, 50)
_TEXT_LAYERS, _TEXT_WIDTH = 12, 768  # BERT-base, in every BLIP


def captioning_flops(config: CaptionerConfig) -> float:
    """Return what captioning one image takes: encoded once, keys and values shared by all captions.

    A checkpoint whose name does not say `base` is taken for a large one.
    """
    vision = _blip(config.name)
    tokens = max(config.min_length, config.max_length) * config.num_captions
    beams = config.num_beams if config.method == "beam" else 1
    return vision.forward() + _image_keys(vision) + tokens * beams * _token(vision)


def scoring_flops(config: ScorerConfig, num_captions: int) -> float:
    """Return what scoring one image with its captions takes."""
    total = 0.0
    if config.filter is not None:
        vision = _blip(config.filter.name)
        passes = 2 if config.has_itc else 1
        texts = num_captions * passes * _WEB_CAPTION_TOKENS * _token(vision)
        total += vision.forward() + _image_keys(vision) + texts
    if config.clip is not None:
        vision = _CLIP_BASE if "base" in config.clip.name else _CLIP_LARGE
        total += vision.forward() + num_captions * _CLIP_TEXT.forward()
    return total


def _blip(name: str) -> _Encoder:
    return _BLIP_BASE if "base" in name else _BLIP_LARGE


def _image_keys(vision: _Encoder) -> float:
    """Return what every text layer's keys and values of the image take."""
    return float(_TEXT_LAYERS * 4 * vision.tokens * vision.width * _TEXT_WIDTH)


def _token(vision: _Encoder) -> float:
    """Return what one token takes: its own projections and FFN, and a look at the image."""
    return float(_TEXT_LAYERS * (28 * _TEXT_WIDTH**2 + 4 * vision.tokens * _TEXT_WIDTH))
