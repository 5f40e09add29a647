"""The head computes in 16 bits, adds up in float32, and what the optimizer keeps is float32."""

import torch

from Configuration_System import OptimizerSection
from model_architecture import SimplifiedTagger, VisionTransformerConfig
from tagger.devices import resolve_device
from training_utils import MixedPrecisionTrainer, create_optimizer

CPU = torch.device("cpu")


def _model(**changes: int) -> SimplifiedTagger:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_tags": 4, **changes}
    return SimplifiedTagger(VisionTransformerConfig(mlp_ratio=2.0, **sizes))  # type: ignore[arg-type]


def test_logits_are_bf16_and_what_training_keeps_is_float32() -> None:
    model = _model()
    optimizer = create_optimizer(OptimizerSection(name="adamw"), model)
    precision = MixedPrecisionTrainer("bf16", CPU)
    with precision.autocast():
        logits = model(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
        loss = logits.float().square().sum()
    assert logits.dtype == torch.bfloat16
    precision.backward(loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert {g.dtype for g in gradients} == {p.dtype for p in model.parameters()} == {torch.float32}
    precision.step(optimizer, list(model.parameters()), 1.0, loss)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert len(kept) >= 2 * len(gradients)
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_logits_of_an_evaluation_are_float32() -> None:
    model = _model().eval()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, features = model(images), model.forward_features(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.nn.functional.linear(features.float(), model.head.weight, model.head.bias))


def test_the_head_adds_up_in_float32() -> None:
    # Ones: a sum kept in bfloat16 would stop growing at 256.
    model = _model(embed_dim=512)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.head(torch.ones(3, 512))
    assert logits.dtype == torch.bfloat16
    assert (logits == 512).all()


def test_devices_may_not_add_up_in_sixteen_bits() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    resolve_device("cpu")
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
