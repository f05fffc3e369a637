"""Plain attention is the same function as the library's."""

import pytest
import torch
import torch.nn.functional as F

from dina_lrm.core.precision import PlainAttention, faster_precision


@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_equal_the_library_kernel(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    results = []
    for mode in (None, PlainAttention()):
        query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
        if mode is None:
            output = F.scaled_dot_product_attention(query, key, value, scale=scale)
        else:
            with mode:
                output = F.scaled_dot_product_attention(query, key, value, scale=scale)
        results.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for library, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, library, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.eye(5, dtype=torch.bool)}])
def test_masks_are_left_to_the_library(options: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 5, 4, generator=generator) for _ in range(3))
    with PlainAttention():
        masked = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(masked, F.scaled_dot_product_attention(query, key, value, **options))


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_multiplies_in_bfloat16_where_it_has_the_instructions(
    supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert faster_precision("cpu") == expected
    assert faster_precision("cuda") == "bfloat16"
