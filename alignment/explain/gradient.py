"""Places of a match, found by what each place of the last features brings into the embedding.

Place in the flow: `picture -> vision tower with a hook (here) -> cosine -> gradients -> places`. One pass of the
picture, and per caption one backward pass through the last layers. The tensors that are watched follow from the tower:

    our own tower       its last feature maps, 9 x 9
    mean, or attention  the last hidden state, which the pooling reads (SigLIP)
    class token         the values that the last layer's attention picks from (CLIP, Chinese-CLIP, ViT)

Contributions are gradient times value, which for attention is the weight of a place times what lies there: Grad-ECLIP
with the model's own attention and without its cut at zero, so that contributions keep the cosine's scale and sign.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.model import DualEncoder
from alignment.preprocess import Preprocessor

UNIT = 1 / 9  # share of the picture whose loss relevance is quoted for, whatever the method
STEPS = 8  # of the integral over our own tower's maps; more change nothing that can be seen

Inputs = dict[str, Tensor]
Box = tuple[float, float, float, float]


def gradient(encoder: DualEncoder, image: Image.Image, text_embeds: Tensor, resolution: int) -> Tensor | None:
    """Trace the cosine with captions (num_captions, embed_dim) back to the places of the picture.

    The result is (num_captions, side, side) with side 2 * (resolution + 1), cosine per `UNIT` of the picture, 0 where
    the encoder crops; None for a tower without places to watch.

    Source: Grad-ECLIP (Zhao et al., 2024); integrated gradients (Sundararajan et al., 2017) for our own tower.
    """
    inputs = encoder.preprocessor.images([image])
    texts = functional.normalize(text_embeds.float(), dim=-1).to(encoder.device)
    ours = encoder.module.config.vision_config.model_type == "efficientnet-lite"
    found = _of_maps(encoder, inputs, texts) if ours else _of_tokens(encoder, inputs, texts)
    if found is None:
        return None
    density = found * (found[0].numel() * UNIT)
    return _laid_out(density.cpu(), _seen(encoder.preprocessor, image, inputs), 2 * (resolution + 1))


def _of_maps(encoder: DualEncoder, inputs: Inputs, texts: Tensor) -> Tensor:
    """Integrate gradients from empty maps to the picture's; all places together bring the cosine.

    The integral splits what the cosine has over that of empty maps; the latter depends on the caption alone and is
    spread evenly.
    """
    tower = encoder.module.vision_model
    with torch.no_grad():
        trunk = tower.trunk_maps(inputs["pixel_values"].to(encoder.device))
        maps = [tail(trunk) for tail in (tower.tail, *([tower.concept.tail] if tower.config.embed_dim else []))]
    amounts = torch.cat([torch.zeros(1), (torch.arange(STEPS) + 0.5) / STEPS]).to(encoder.device)
    scaled = [(amounts[:, None, None, None] * last).requires_grad_() for last in maps]
    parts = {"last_maps": scaled[0]}
    if len(scaled) == 2:
        probabilities = tower.concept.classifier(scaled[1].mean((2, 3))).softmax(-1)
        parts |= {"concepts": tower.concept.concepts(probabilities), "certainty": probabilities.amax(-1, keepdim=True)}
    empty, *along = encoder.embed_images(parts) @ texts.T
    found = []
    for cosine in torch.stack(along).mean(0):
        slopes = torch.autograd.grad(cosine, scaled, retain_graph=True)
        found.append(torch.stack([(slope.sum(0) * last[0]).sum(0) for slope, last in zip(slopes, maps, strict=True)]))
    places = torch.stack(found).sum(1)
    places = places + (empty.detach() / places[0].numel())[:, None, None]
    # A place sees far beyond its borders, and single places are noise: each gets the mean of itself and its neighbours.
    return functional.avg_pool2d(places, 3, stride=1, padding=1, count_include_pad=False)


def _of_tokens(encoder: DualEncoder, inputs: Inputs, texts: Tensor) -> Tensor | None:
    """Split the cosine over the tokens of the last layer; the embedding's length is held constant.

    A tower that is linear behind its tokens is then split exactly. Through the length, contributions would cancel to
    nothing for every caption alike.
    """
    grid = _token_grid(encoder, inputs)
    values = [module for name, module in encoder.module.vision_model.named_modules() if name.endswith("v_proj")]
    if grid is None or not values:
        return None
    inputs = {name: value.to(encoder.device) for name, value in inputs.items()}
    inputs["pixel_values"].requires_grad_()
    seen: list[Tensor] = []
    hook = values[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.enable_grad(), hook:  # leaving a handle removes the hook
        output = encoder.module.get_image_features(**inputs)
    features = output.pooler_output[0].float()
    cosines = texts @ (features / features.detach().norm())
    for tokens in (output.last_hidden_state, *seen):
        found = _contributions(cosines, tokens, grid, padded="spatial_shapes" in inputs)
        if found is not None and found.any():  # where the class token is all that is read, the others have no slope
            return found
    return None


def _contributions(cosines: Tensor, tokens: Tensor, grid: tuple[int, int], *, padded: bool) -> Tensor | None:
    """Multiply gradient and value of the picture's tokens, (num_captions, rows, columns).

    `cosines` come with their graph. In `tokens` (1, length, width) special ones stand in front of the picture's, or
    padding behind them (`padded`); no tower has both.
    """
    count = grid[0] * grid[1]
    if tokens.ndim != 3 or tokens.shape[1] < count:
        return None  # a hierarchical tower has merged its tokens
    found = []
    for cosine in cosines:
        (slope,) = torch.autograd.grad(cosine, tokens, retain_graph=True, allow_unused=True)
        if slope is None:
            return None
        found.append((slope * tokens.detach())[0].sum(-1))
    start = 0 if padded else tokens.shape[1] - count
    return torch.stack(found)[:, start : start + count].unflatten(1, grid)


def _token_grid(encoder: DualEncoder, inputs: Inputs) -> tuple[int, int] | None:
    """Rows and columns of the picture's tokens; None where the tower cuts no square patches."""
    if "spatial_shapes" in inputs:
        rows, columns = inputs["spatial_shapes"][0].tolist()
        return rows, columns
    patch = getattr(encoder.module.vision_model.config, "patch_size", None)
    height, width = inputs["pixel_values"].shape[-2:]
    return (height // patch, width // patch) if isinstance(patch, int) else None


def _seen(preprocessor: Preprocessor, image: Image.Image, inputs: Inputs) -> Box:
    """Find the part of the picture that the encoder sees: left, top, right, bottom as shares of its sides.

    A picture whose red rises from left to right and whose green rises from top to bottom is preprocessed the same way;
    where a colour comes out tells where it came from, whatever resizing, cropping and padding a family does.
    """
    if inputs["pixel_values"].ndim != 4:  # patches of the whole picture
        return 0.0, 0.0, 1.0, 1.0
    rising = Image.linear_gradient("L").resize(image.size)  # from top to bottom
    across = Image.linear_gradient("L").rotate(90).resize(image.size)
    black = Image.new("L", image.size)
    white = Image.new("RGB", image.size, "white")
    pictures = (Image.merge("RGB", (across, rising, black)), black.convert("RGB"), white)
    ramp, dark, light = (preprocessor.images([picture])["pixel_values"][0] for picture in pictures)
    shares = (ramp - dark) / (light - dark)
    (left, right), (top, bottom) = _ends(shares[0].mean(0)), _ends(shares[1].mean(1))
    return left, top, right, bottom


def _ends(values: Tensor) -> tuple[float, float]:
    """Follow a rising line through two of its places to both ends; resampling bends it only there."""
    first, last = len(values) // 4, len(values) - 1 - len(values) // 4
    low, high = values[first].item(), values[last].item()
    start = low - (high - low) * (first + 0.5) / (last - first)
    return start, start + (high - low) * len(values) / (last - first)


def _laid_out(places: Tensor, box: Box, side: int) -> Tensor:
    """Spread (n, rows, columns) over the box as part of a grid (n, side, side) over the whole picture."""
    left, top, right, bottom = box
    centres = (torch.arange(side) + 0.5) / side
    across, down = (2 * (centres - left) / (right - left) - 1, 2 * (centres - top) / (bottom - top) - 1)
    points = torch.stack([across.expand(side, side), down[:, None].expand(side, side)], dim=-1)
    (spread,) = functional.grid_sample(places[None], points[None], padding_mode="border", align_corners=False)
    return spread * ((points.abs() <= 1).all(-1))
