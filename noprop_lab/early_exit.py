"""Early exit: an image leaves the chain once the answer is sure. Most images need one block."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_example import NoProp
from noprop_lab.flows import Flow


@torch.inference_mode()
def early_exit(model: NoProp, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, classes), and how many blocks each image went through, (N,).

    An image leaves once a class is more probable than threshold, by the last block, or by the mean of the
    blocks so far, see NoProp.by_average. images: see NoProp.probabilities(), whose ValueErrors are raised
    here too, as for a network of CT or FM, which is no chain. Nothing is sampled: τ = 0.
    """
    if isinstance(model, Flow):
        raise ValueError(f"an early exit leaves a chain of blocks, and {model.config.objective} has none")
    answers, blocks, by_average = [], [], model.by_average and not model.config.temperature
    for image in model.batches(images):
        z, inside = model.start(image), torch.arange(len(image), device=image.device)
        answer, used = image.new_zeros(len(image), model.classifier.out_features), torch.zeros_like(inside)
        for t in range(1, len(model.blocks) + 1):
            u_hat, z = model.step(t, image, z)
            probability = model.classify(u_hat, z).softmax(-1)
            if by_average:
                probability = answer[inside].lerp(probability, 1 / t)
            answer[inside] = probability
            used[inside] = t
            stay = probability.amax(-1) <= threshold
            inside, image, z = inside[stay], image[stay], z[stay]
            if not len(inside):
                break
        answers, blocks = [*answers, answer], [*blocks, used]
    return torch.cat(answers), torch.cat(blocks)
