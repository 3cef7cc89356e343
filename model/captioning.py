"""Captions of many images, fast and the same whatever else is captioned: the captioner's hot path.

An image is looked at once. Its keys and values are projected once for each layer, into memory that
is kept from group to group, and serve all of its captions. Images are taken in groups of one size:
every matrix product then has the same shape, or loses whole tiles of rows as captions end, and
neither changes how a row is rounded. Tests hold that bit by bit on the CPU, for float32 and any
number of threads.

Dims: B images, G images of a group, n captions of an image, R = G * n rows, P image tokens,
L the longest caption with its prompt, h heads, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.beam_search import BeamConfig, beam_search
from model.bert import KeysValues
from model.capfilt import MedCaptioner
from model.generation import (
    DecodingConfig,
    NucleusConfig,
    greedy,
    med_decoder,
    nucleus,
    uniform_draws,
)
from model.med import DecoderState, ImageKeysValues, MedText
from model.packing import TILE

_MANY_ROWS = 64  # enough for matrix products to run at speed
_MAX_IMAGES_CPU = 16  # whose keys and values take 0.7 GB at base size, 384 pixels
_MAX_IMAGES_GPU = 64


class CaptionDecoder:
    """Decodes captions with one captioner, one way of decoding and one prompt."""

    def __init__(
        self,
        captioner: MedCaptioner,
        config: DecodingConfig,
        prompt_ids: Sequence[int],
        *,
        seed: int = 0,
        num_captions: int = 1,
        is_compiled: bool = False,
    ) -> None:
        """`config` says how: `NucleusConfig`, `BeamConfig`, or greedily; `seed` is for the first.

        `captioner` is in evaluation mode, on its device. `is_compiled` compiles a step; with CUDA
        it is captured as a graph besides. Raises ValueError for a prompt that leaves no room.
        """
        self._captioner = captioner
        self._config = config
        self._seed = seed
        self._num_captions = num_captions
        weight = captioner.image_encoder.patches.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._prompt = torch.tensor([list(prompt_ids)], device=self._device)  # (1, T)
        self._max_length = config.total_lengths(len(prompt_ids))[1]
        self.images_at_once = self._group_size()
        self._image: ImageKeysValues | None = None
        self._decoder = med_decoder(captioner)
        if is_compiled:
            self._decoder = replace(self._decoder, step=FastStep(captioner.text))

    @torch.inference_mode()
    def decode(self, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        """Return (B * n, L) int64 for (B, 3, S, S) images: prompt, caption, its end, padding.

        `keys` name the images' samples for `uniform_draws`. When memory runs out, groups are half
        as large from then on and torch.OutOfMemoryError passes through.
        """
        parts = []
        for start in range(0, len(keys), self.images_at_once):
            group = slice(start, start + self.images_at_once)
            try:
                parts.append(self._decode_group(pixels[group], keys[group]))
            except torch.OutOfMemoryError:
                self.images_at_once = max(1, self.images_at_once // 2)
                self._image = None
                raise
        return torch.cat(parts)

    def _decode_group(self, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        state = self._captioner.text.begin(
            self._look(pixels), num_captions=1, max_length=self._max_length
        )
        prompt = self._prompt.repeat(self.images_at_once, 1)
        prompt[len(keys) :] = self._config.pad_id  # no image, no caption
        if isinstance(self._config, BeamConfig):
            return beam_search(self._decoder, state, prompt, self._config).ids[: len(keys)]
        if not isinstance(self._config, NucleusConfig):
            return greedy(self._decoder, state, prompt, self._config)[: len(keys)]
        ids = nucleus(self._decoder, state, prompt, self._config, self._draws(keys))
        return ids[: len(keys) * self._num_captions]

    def _look(self, pixels: Tensor) -> ImageKeysValues:
        """Return the keys and values of a group's images; those of too few stand in front.

        On a CPU one image fills the processor, so each goes alone, and through its caches.
        """
        at_once = 1 if self._device.type == "cpu" else self.images_at_once
        for start in range(0, len(pixels), at_once):
            part = pixels[start : start + at_once].to(self._device, self._dtype)
            missing = at_once - len(part)
            part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else part
            projected = self._captioner.project_image(self._captioner.image_encoder(part))
            if self._image is None:
                self._image = self._room_for(projected)
            for kept, fresh in zip(self._image, projected, strict=True):
                kept.keys[start : start + at_once] = fresh.keys
                kept.values[start : start + at_once] = fresh.values
        assert self._image is not None
        return self._image

    def _room_for(self, projected: ImageKeysValues) -> ImageKeysValues:
        """Return zeros for G images: (G, h, P, D/h), a head's tokens side by side."""
        shape = (self.images_at_once, *projected[0].keys.shape[1:])
        like = projected[0].keys
        return tuple(KeysValues(like.new_zeros(shape), like.new_zeros(shape)) for _ in projected)

    def _draws(self, keys: Sequence[str]) -> Tensor:
        named = [(key, index) for key in keys for index in range(self._num_captions)]
        length = self._max_length - self._prompt.shape[1]
        draws = uniform_draws(self._seed, named, length, self._device)
        return F.pad(draws, (0, 0, 0, self.images_at_once * self._num_captions - len(named)))

    def _group_size(self) -> int:
        """Return G: rows in whole tiles, enough of them, and not too many images."""
        if self._device.type != "cpu":
            return _MAX_IMAGES_GPU
        per_image = self._num_captions
        if isinstance(self._config, BeamConfig):
            per_image = self._config.num_beams
        step = TILE // math.gcd(TILE, per_image)
        return min(_MAX_IMAGES_CPU, step * math.ceil(_MANY_ROWS / (step * per_image)))


class FastStep:
    """A compiled `MedText.step`; with CUDA each token is the replay of one captured graph.

    A token of a few captions is hundreds of small kernels: to launch them costs more than to run
    them. The graph reads and writes memory of its own, to which a group's state is copied once.
    """

    def __init__(self, text: MedText) -> None:
        """Nothing is compiled before the first step."""
        self._text = text
        self._run: Any = torch.compile(text.decode_at, fullgraph=True, dynamic=False)
        self._graph: CapturedStep | None = None

    def __call__(self, token_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Do what `MedText.step` does."""
        if token_ids.shape[1] > 1:  # the prompt, once a group
            return self._text.step(token_ids, state)
        if token_ids.device.type != "cuda":
            position = torch.tensor([state.length], device=token_ids.device)
            logits = self._run(token_ids, position, state.image, state.text, state.places)
            return logits, replace(state, length=state.length + 1)
        if self._graph is None or not self._graph.fits(state):
            self._graph = CapturedStep(self._run, state)
        return self._graph.step(token_ids, state)


class CapturedStep:
    """One token of R captions as a CUDA graph."""

    def __init__(self, run: Any, state: DecoderState) -> None:  # noqa: ANN401  (compiled)
        """Capture `run`, a `MedText.decode_at`, on the images of `state` and memory of its own."""
        self._image = state.image
        self._text = tuple(
            KeysValues(torch.zeros_like(kv.keys), torch.zeros_like(kv.values)) for kv in state.text
        )
        device = state.text[0].keys.device
        self._tokens = torch.zeros(len(state.text[0].keys), 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        arguments = (self._tokens, self._position, self._image, self._text)
        aside: Any = torch.cuda.Stream  # torch has no types for it
        aside = aside()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and lets libraries take their workspaces
            for _ in range(3):
                run(*arguments)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = run(*arguments)

    def fits(self, state: DecoderState) -> bool:
        """Say whether a state is of the captured images and shapes."""
        own, other = self._text[0].keys, state.text[0].keys
        return self._image is state.image and own.shape == other.shape

    def step(self, token_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Do what `MedText.step` does; the logits are overwritten by the next step."""
        if state.text is not self._text:
            for own, given in zip(self._text, state.text, strict=True):
                own.keys.copy_(given.keys)
                own.values.copy_(given.values)
        self._tokens.copy_(token_ids)
        self._position.fill_(state.length)
        self._graph.replay()
        return self._logits, replace(state, text=self._text, length=state.length + 1)
