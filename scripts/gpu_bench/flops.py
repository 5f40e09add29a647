"""Matrix-product FLOPs of a Vision Transformer by formula: what "model FLOPs utilisation" divides by time.

Counts a multiply-add as two. Norms, activations, softmax and the loss are left out, as is usual.
"""

from model_architecture import VisionTransformerConfig


def forward_flops(config: VisionTransformerConfig, height: int | None = None, width: int | None = None) -> int:
    """FLOPs of one image's forward pass with a patch stem, at its `image_size` or at [height, width] pixels.

    With N tokens, D wide, hidden width H: 2 N (3 P^2) D for the stem, 2 N D (4 D + 2 H) + 4 N^2 D a block, 2 F C for
    the head with its F features, 2 N F for pooling to the cells of a grid. Training takes three times as many (the
    gradients of a product are two products); the first layer needs no gradient of its input, which that leaves out.
    Of an ensemble those of all members. Raises ValueError for a convolutional stem.
    """
    if config.stem != "patch":
        raise ValueError(f"model.stem={config.stem} is counted by no formula; use torch.utils.flop_counter")
    patch, wide = config.patch_size, config.embed_dim
    tokens = ((height or config.image_size) // patch) * ((width or config.image_size) // patch)
    inside = tokens + (config.pooling == "class_token") + config.register_tokens
    hidden = int(wide * config.mlp_ratio)
    block = 2 * inside * wide * (4 * wide + 2 * hidden) + 4 * inside**2 * wide
    pooling = 2 * tokens * config.num_features if config.pooling == "grid" else 0
    head = 2 * config.num_features * config.num_tags
    return config.num_members * (2 * tokens * 3 * patch**2 * wide + config.depth * block + pooling + head)


def training_flops(config: VisionTransformerConfig, height: int | None = None, width: int | None = None) -> int:
    """FLOPs of one image's forward and backward pass."""
    return 3 * forward_flops(config, height, width)
