"""AdamW with 8-bit moments against torch's AdamW, and what it stores."""

import copy
import math

import pytest
import torch
from torch import nn

from minipeft.quantized_adamw import AdamW8bit


def regression(optimizer, steps=60, width=128, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 64))
    x, y = torch.randn(256, 32), torch.randn(256, 64)
    update = optimizer(net.parameters(), lr=1e-2, weight_decay=0.1, **options)
    losses = []
    for _ in range(steps):
        loss = (net(x) - y).square().mean()
        losses.append(loss.item())
        update.zero_grad()
        loss.backward()
        update.step()
    return losses, net, update


def test_eight_bit_adamw_is_adamw_for_small_parameters():
    exact, a, _ = regression(torch.optim.AdamW, width=8)
    small, b, _ = regression(AdamW8bit, width=8)
    assert small == pytest.approx(exact, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_eight_bit_adamw_learns_like_adamw_with_a_quarter_of_the_state():
    exact, _, full = regression(torch.optim.AdamW)
    small, net, eight = regression(AdamW8bit)
    assert small != exact
    assert small[-1] == pytest.approx(exact[-1], rel=0.05) and small[-1] < 0.7 * small[0]
    weight = net[2].weight  # 64 x 128 = 8,192 elements
    state = eight.state[weight]
    size = sum(t.nbytes for t in state.values() if torch.is_tensor(t))
    assert size == 2 * 8192 + 2 * 4 * 8192 // 256
    assert (
        size < sum(t.nbytes for t in full.state[full.param_groups[0]["params"][2]].values()) / 3.8
    )


def test_eight_bit_state_survives_a_state_dict():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(100, 100))
    one, grads = AdamW8bit([p], lr=0.1), torch.randn(4, 100, 100)
    for g in grads[:2]:
        p.grad = g.clone()
        one.step()
    q = nn.Parameter(p.detach().clone())
    two = AdamW8bit([q], lr=0.1)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.state[q]["m"].dtype == two.state[q]["v"].dtype == torch.uint8
    for g in grads[2:]:
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        two.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eight_bit_state_of_a_half_precision_parameter_survives_a_state_dict_too(dtype):
    """torch casts what it loads to the type of the parameter."""
    p = nn.Parameter(torch.randn(100, 100, dtype=dtype))
    bias = nn.Parameter(torch.randn(100, dtype=dtype))
    one, two = (AdamW8bit([p, bias], lr=0.1) for _ in range(2))
    p.grad, bias.grad = torch.randn_like(p), torch.randn_like(bias)
    one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for tensor in (p, bias):
        assert two.state[tensor].keys() == one.state[tensor].keys()
        for name, value in one.state[tensor].items():
            assert not torch.is_tensor(value) or value.dtype == two.state[tensor][name].dtype
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two.state[tensor][name]))


@pytest.mark.parametrize("shape", [(8, 16), (64, 128)])  # moments in float32, and in 8 bits
def test_a_float16_parameter_moves_as_in_float32(shape):
    """eps is 0 in float16, so an element without a gradient would become 0 / 0 there."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape).half(), torch.randn(5, *shape).half()
    grads[:, 0] = 0
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.float())
    eight, exact = (kind([x], lr=0.02, weight_decay=0.0) for kind, x in
                    ((AdamW8bit, p), (torch.optim.AdamW, q)))  # fmt: skip
    for grad in grads:
        p.grad, q.grad = grad.clone(), grad.float()
        eight.step()
        exact.step()
    moved, wanted = p.detach().float() - start.float(), q.detach() - start.float()
    assert torch.equal(p[0], start[0]) and p.dtype == torch.float16
    assert (moved - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    "options",
    [{"betas": (0.9, math.inf)}, {"betas": 0.9}, {"betas": (0.9,)}, {"lr": math.nan}, {"lr": -1.0},
     {"lr": "1e-3"}, {"eps": 0.0}, {"eps": None}, {"weight_decay": -1}, {"weight_decay": math.inf}],
)  # fmt: skip
def test_settings_of_the_eight_bit_optimizer_are_checked(options):
    with pytest.raises(ValueError, match="is out of range") as error:
        AdamW8bit([nn.Parameter(torch.zeros(1))], **options)
    assert str(next(iter(options.values()))) in str(error.value)
