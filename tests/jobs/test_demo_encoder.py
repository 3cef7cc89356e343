"""The demo's image encoder: how it is taught, and that the one that is kept has learned it."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jobs.demo import encoder as demo_encoder
from jobs.demo.encoder import EncoderTraining, train_encoder
from model.image_encoder_files import load_image_encoder, start_from
from model.losses import IGNORED
from model.presets import DEMO_VIT
from model.vision import ImageEncoder


def test_norms_are_folded_into_convolutions_without_a_change():
    torch.manual_seed(0)
    stem = demo_encoder._with_batch_norm(ImageEncoder(DEMO_VIT).stem)
    pixels = torch.randn(4, 3, 48, 48)
    stem(pixels)  # statistics that are not the initial ones
    folded = demo_encoder._without_batch_norm(stem.eval())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)
    torch.testing.assert_close(folded(pixels), stem(pixels), atol=1e-4, rtol=1e-4)


def test_training_gives_an_encoder_of_the_demos_sizes():
    encoder, accuracies = train_encoder(EncoderTraining(num_scenes=20, num_steps=2))
    assert encoder.config == DEMO_VIT
    assert encoder.state_dict().keys() == ImageEncoder(DEMO_VIT).state_dict().keys()
    assert accuracies.keys() == {"shape", "colour", "texture", "size"}


def test_the_encoder_that_is_kept_tells_shapes_apart():
    config, weights = load_image_encoder(Path(str(files("jobs") / "demo" / "encoder_weights")))
    encoder = ImageEncoder(config).eval()
    assert start_from(encoder, weights, "encoder_weights") == []
    pictures, labels = demo_encoder._draw(range(500_000, 500_200), seed=0)
    with torch.no_grad():
        patches = encoder(demo_encoder.normalised(pictures))[:, 1:].flatten(0, 1).numpy()
    shapes = labels[:, 0].flatten()
    known = shapes != IGNORED
    states, shapes = patches[known], shapes[known]
    half = len(states) // 2
    # A linear look at its patches, fitted on one half of scenes that it has never seen.
    wanted = np.eye(6)[shapes[:half]]
    with_one = np.hstack([states, np.ones((len(states), 1))])
    fitted, *_ = np.linalg.lstsq(with_one[:half], wanted, rcond=None)
    right = (with_one[half:] @ fitted).argmax(axis=1) == shapes[half:]
    assert right.mean() > 0.9
