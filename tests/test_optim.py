"""Schedules, parameter groups, optimizers and their state, stochastic rounding, dtypes and the loss scaler."""

import math
import sys

import pytest
import torch

from data.errors import UserError
from training import optim, precision
from training.optim import (
    build_optimizer,
    count_updates,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    round_stochastically_,
    schedule,
)
from training.precision import LossScaler, choose

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (0.25, 10), (10, 10), (1, 1), (0.03, 1000)])
def test_a_schedule_climbs_to_one_and_never_rises_again(name, warmup, total):
    values = [schedule(name, step, warmup, total) for step in range(total)]
    num_warmup = math.ceil(warmup * total) if warmup < 1 else warmup
    assert all(0 < value <= 1 for value in values)
    assert values[:num_warmup] == [pytest.approx((step + 1) / (num_warmup + 1)) for step in range(num_warmup)]
    if num_warmup < total:
        assert values[num_warmup] == 1.0
    assert values[num_warmup:] == sorted(values[num_warmup:], reverse=True)
    stays = name == "constant" or num_warmup == total
    assert schedule(name, total, warmup, total) == pytest.approx(1.0 if stays else 0.0)


def test_known_values_of_the_schedules():
    assert schedule("cosine", 60, 20, 100) == pytest.approx(0.5)
    assert schedule("cosine", 40, 20, 100) == pytest.approx(0.5 + math.sqrt(0.125))
    assert schedule("linear", 40, 20, 100) == pytest.approx(0.75)
    assert schedule("linear", 99, 20, 100) == pytest.approx(1 / 80)
    assert schedule("constant", 99, 20, 100) == 1.0
    with pytest.raises(UserError, match="--lr_schedule cosin: not one of cosine"):
        schedule("cosin", 0, 0, 1)


def test_a_fork_adds_a_schedule_in_one_line(monkeypatch):
    monkeypatch.setitem(optim.SCHEDULES, "root", lambda progress: 1 - math.sqrt(progress))
    assert schedule("root", 25, 0, 100) == 0.5


def test_a_fork_adds_an_optimizer_in_one_file(tmp_path, monkeypatch):
    """A file training/optim_<name>.py that registers itself; nothing else is edited."""
    monkeypatch.setattr(optim, "OPTIMIZERS", dict(optim.OPTIMIZERS))
    monkeypatch.setattr(optim, "__file__", str(tmp_path / "optim.py"))
    monkeypatch.setattr(sys.modules["training"], "__path__", [str(tmp_path)])
    (tmp_path / "optim_momentum.py").write_text(
        "import torch\nfrom training import optim\n"
        "def momentum(groups, lr, betas, eps):\n    return torch.optim.SGD(groups, lr=lr, momentum=betas[0])\n"
        "optim.OPTIMIZERS['momentum'] = momentum\n"
    )
    net = network()
    optimizer = build_optimizer("momentum", parameter_groups(net, 0.0), lr=0.1)
    train(net, optimizer, 3)
    tensors, numbers = optimizer_tensors(optimizer)
    assert set(tensors) == {f"{name}/momentum_buffer" for name, _ in net.named_parameters()} and numbers == {}
    monkeypatch.delitem(sys.modules, "training.optim_momentum")


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 64)).to(dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        rows = torch.randn(8, 64)
        loss = (net(rows.to(net[0].weight.dtype)).float() - rows.flip(1)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_only_trainable_matrices_decay():
    net = network()
    net[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups(net, 0.1)
    assert [name for name, _ in decayed["params"]] == ["2.weight"] and decayed["weight_decay"] == 0.1
    assert [name for name, _ in plain["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert plain["weight_decay"] == 0.0
    with pytest.raises(UserError, match="nothing is trainable"):
        build_optimizer("adamw", parameter_groups(net.requires_grad_(False), 0.1), lr=1e-3)
    with pytest.raises(UserError, match="--optim adam: not one of adamw"):
        build_optimizer("adam", parameter_groups(network(), 0.1), lr=1e-3)


def test_adamw_is_torchs_adamw():
    ours, theirs = network(), network()
    optimizer = build_optimizer("adamw", parameter_groups(ours, 0.0), lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for net, opt in ((ours, optimizer), (theirs, reference)):
        torch.manual_seed(1)
        train(net, opt, 10)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_adamw_trains_with_a_quarter_of_the_state(name, capsys):
    torch.manual_seed(1)
    net = network()
    optimizer = build_optimizer(name, parameter_groups(net, 0.0), lr=1e-2)
    losses = train(net, optimizer, 60)
    assert losses[-1] < 0.7 * losses[0]
    state = optimizer_tensors(optimizer)[0]
    assert state["0.weight/state1"].dtype == torch.uint8 and state["1.weight/state1"].dtype == torch.float32
    assert capsys.readouterr().out.count("note: paged") == (name == "paged_adamw_8bit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizer_state_leaves_and_enters_bit_for_bit(name, dtype):
    net = network(dtype)
    optimizer = build_optimizer(name, parameter_groups(net, 0.1), lr=1e-2)
    train(net, optimizer, 4)
    tensors, numbers = optimizer_tensors(optimizer)
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    weights = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    torch.manual_seed(9)
    train(net, optimizer, 4)

    again = network(dtype)
    again.load_state_dict(weights)
    resumed = build_optimizer(name, parameter_groups(again, 0.1), lr=1e-2)
    load_optimizer_tensors(resumed, kept, numbers)
    loaded = optimizer_tensors(resumed)
    assert loaded[1] == numbers and loaded[0].keys() == kept.keys()
    for key, tensor in kept.items():
        assert loaded[0][key].dtype == tensor.dtype and torch.equal(loaded[0][key], tensor), key
        assert loaded[0][key].data_ptr() != tensor.data_ptr(), "loading must copy"
    torch.manual_seed(9)
    train(again, resumed, 4)
    pairs = zip(again.parameters(), net.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_state_of_a_parameter_that_is_not_trained_is_refused():
    net = network()
    optimizer = build_optimizer("adamw", parameter_groups(net, 0.1), lr=1e-2)
    train(net, optimizer, 1)
    state = optimizer_tensors(optimizer)
    net[2].requires_grad_(False)
    with pytest.raises(UserError, match=r"2\.(weight|bias) and 1 more"):
        load_optimizer_tensors(build_optimizer("adamw", parameter_groups(net, 0.1), lr=1e-2), *state)


def test_stochastic_rounding_is_unbiased_and_picks_neighbours():
    torch.manual_seed(0)
    exact = torch.cat([torch.randn(500), torch.tensor([1e-39, -1e-39, 0.0, 1.0, -2.0, math.inf, -math.inf])])
    nearest = exact.bfloat16()
    rounded = torch.empty(4000, len(exact), dtype=torch.bfloat16)
    for row in rounded:
        round_stochastically_(row, exact)
    finite = exact.isfinite()
    assert torch.equal(rounded[:, ~finite], nearest[~finite].expand(4000, -1))
    unchanged = exact == nearest.float()
    assert unchanged.sum() >= 3 and torch.equal(rounded[:, unchanged], nearest[unchanged].expand(4000, -1))
    below = (exact.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    above = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert (((rounded == below) | (rounded == above))[:, finite]).all()
    gap = (above - below).abs()[finite & ~unchanged]
    error = (rounded.float().mean(0) - exact)[finite & ~unchanged].abs() / gap
    assert error.max() < 5 * 0.5 / math.sqrt(4000)  # five standard errors of the worst coin
    assert (nearest.float() - exact)[finite & ~unchanged].abs().div(gap).max() > 0.4  # which rounding to nearest misses


def test_small_updates_move_bf16_weights_only_with_stochastic_rounding():
    """Weights of 1, updates of about 1e-4: far below half of bf16's step under 1, which is 0.0039."""
    from bitsandbytes.optim import AdamW8bit

    def move(make) -> float:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = make(weight)
        for _ in range(200):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
            assert weight.dtype == weight.grad.dtype == torch.bfloat16
        return 1 - weight.float().mean().item()

    assert move(lambda weight: AdamW8bit([weight], lr=1e-4, weight_decay=0.0)) == 0.0

    def ours(weight):
        return build_optimizer("adamw_8bit", [{"params": [("weight", weight)], "weight_decay": 0.0}], lr=1e-4)

    assert move(ours) == pytest.approx(200 * 1e-4, rel=0.1)


def test_a_bf16_fine_tune_learns_as_well_as_fp32_where_plain_bf16_stalls():
    from bitsandbytes.optim import AdamW8bit

    def final(dtype, plain=False) -> float:
        net = network(dtype)
        groups = parameter_groups(net, 0.0)
        optimizer = AdamW8bit(groups, lr=2e-4) if plain else build_optimizer("adamw_8bit", groups, lr=2e-4)
        torch.manual_seed(1)
        losses = train(net, optimizer, 300)
        return sum(losses[-20:]) / 20 / losses[0]

    exact, rounded, stalled = final(torch.float32), final(torch.bfloat16), final(torch.bfloat16, plain=True)
    assert rounded == pytest.approx(exact, rel=0.05) and stalled > 1.1 * exact, (exact, rounded, stalled)


def test_precision_is_chosen_by_what_the_device_computes(monkeypatch):
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    assert choose("auto", CPU).compute == torch.bfloat16
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    assert choose("auto", CPU).compute == torch.float32
    assert choose("bf16", CPU).compute == torch.bfloat16  # asked for by name: emulated
    card = torch.device("cuda")
    assert choose("auto", card).compute == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 has no bf16"):
        choose("bf16", card)
    with pytest.raises(UserError, match="--precision fp16 needs a graphics card"):
        choose("fp16", CPU)
    with pytest.raises(UserError, match="--precision int8: not one of auto, bf16"):
        choose("int8", CPU)


def test_the_table_and_its_autocast():
    bf16 = choose("bf16", CPU)
    assert bf16.compute == bf16.frozen == bf16.full_8bit == torch.bfloat16
    assert bf16.full == torch.float32
    weight = torch.randn(4, 4, requires_grad=True)
    for name, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with choose(name, CPU).autocast():
            product = weight @ weight
        assert product.dtype == expected
        product.sum().backward()
        assert weight.grad.dtype == torch.float32
    assert not choose("bf16", CPU).scaler().dynamic


def test_scaling_is_exact_and_finds_overflows():
    weight = torch.nn.Parameter(torch.randn(50))
    rows = torch.randn(20, 50)
    (rows @ weight).pow(2).mean().backward()
    expected, weight.grad = weight.grad.clone(), None
    scaler = LossScaler(dynamic=True, scale=2.0**16)
    ((rows @ weight).pow(2).mean() * scaler.scale).backward()
    assert not scaler.unscale([weight, torch.nn.Parameter(torch.ones(1))])
    assert torch.equal(weight.grad, expected)
    for bad in (math.inf, -math.inf, math.nan):
        weight.grad = expected.clone()
        weight.grad[7] = bad
        assert scaler.unscale([weight])


def test_the_scale_follows_torchs_grad_scaler():
    """torch.amp.GradScaler is the rule that users know: same backoff, same growth, over a random history."""
    generator = torch.Generator().manual_seed(0)
    ours = LossScaler(dynamic=True, scale=2.0**16)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scales = []
    for step in range(9000):
        overflow = bool(torch.rand((), generator=generator) < (0.01 if 500 < step < 1500 else 0.0))
        weight.grad = torch.tensor([math.inf if overflow else 1.0])
        theirs.scale(torch.ones(()))  # creates its state on the first call
        theirs.step(optimizer)
        theirs.update()
        weight.grad = torch.tensor([math.inf if overflow else 1.0])
        ours.update(ours.unscale([weight]))
        assert ours.scale == theirs.get_scale()
        scales.append(ours.scale)
    assert min(scales) < 2.0**10 and scales[-1] > min(scales)  # it has fallen and grown


def test_the_scale_stays_at_one_or_above_and_an_idle_scaler_idle():
    scaler = LossScaler(dynamic=True, scale=4.0)
    for _ in range(10):
        scaler.update(found_inf=True)
    assert scaler == LossScaler(dynamic=True, scale=1.0, num_good_steps=0)
    idle = LossScaler()
    for _ in range(5000):
        idle.update(found_inf=False)
    assert idle == LossScaler() and idle.scale == 1.0


def test_few_rows_are_seen_more_often():
    """auto: 3 passes; for few rows as many as make 200 updates, but no more than 20 passes. What is said goes first."""
    found = [count_updates("auto", None, per_epoch) for per_epoch in (1, 4, 10, 13, 66, 67, 1000)]
    assert found == [20, 80, 200, 200, 200, 201, 3000]
    assert count_updates(2, None, 13) == 26 and count_updates("auto", 7, 13) == 7 and count_updates(2, 5, 13) == 5
