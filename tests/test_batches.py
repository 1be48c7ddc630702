"""Order, packing, and that no cut of a step into rows changes its gradient."""

import random

import pytest
import torch
from test_attention import checkpointed, folders, make_examples  # noqa: F401 - folders is a fixture

from data.batches import Batches, Encoded, epoch_order, hash_seed, pack, pack_row
from data.errors import UserError
from data.labels import NO_LOSS, Example
from model import load_model
from model.head import negative_log_likelihood, per_token


def example(length, id="", trained=None, **fields):
    ids = torch.arange(length)
    labels = ids.clone() if trained is None else torch.where(torch.tensor(trained), ids, NO_LOSS)
    return Example(input_ids=ids, labels=labels, positions=torch.arange(length), id=id, **fields)


# ---- order ----------------------------------------------------------------------------------------------------------


class Numbers:
    """A data set whose rows are their own numbers, with the random state that a worker could disturb."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == 3:
            return UserError("rows.jsonl:4: bad")
        return example(index + 1, id=str(index))


def ids_of(steps):
    return [[row.id if isinstance(row, Example) else str(row) for row in step] for step in steps]


def test_every_row_once_an_epoch():
    for rows, step_rows in ((10, 4), (8, 4), (1, 4), (5, 1)):
        batches = Batches(list(range(rows)), step_rows, seed=7)
        for epoch in range(3):
            steps = list(batches.rows(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch))
            assert sorted(i for step in steps for i in step) == list(range(rows))
            assert [len(s) for s in steps[:-1]] == [step_rows] * (len(steps) - 1)
            assert len(steps[-1]) == (rows - 1) % step_rows + 1


def test_order_is_a_pure_function_of_seed_and_epoch():
    torch.manual_seed(0)
    first = epoch_order(50, 1, 0)
    torch.manual_seed(99)
    torch.rand(3)
    assert epoch_order(50, 1, 0) == first and sorted(first) == list(range(50))
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36  # seed 1 epoch 0 is not seed 0 epoch 1
    assert len({hash_seed(seed, epoch) for seed in range(100) for epoch in range(100)}) == 10_000
    assert all(0 <= hash_seed(seed, 0) < 2**63 for seed in (0, 2**31, 2**63))
    assert epoch_order(6, 0, 0) == [0, 2, 5, 3, 1, 4]  # a run resumed by a later release depends on it


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_a_later_start_change_nothing(num_workers):
    whole = ids_of(Batches(Numbers(11), 4, seed=3).steps(0, 9))
    state = torch.get_rng_state()
    batches = Batches(Numbers(11), 4, seed=3, num_workers=num_workers)
    assert ids_of(batches.steps(0, 9)) == whole
    assert ids_of(batches.steps(4, 9)) == whole[4:]
    assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing from the run's random state
    assert sum(row == "rows.jsonl:4: bad" for step in whole for row in step) == 3  # once in each epoch, as itself


class Named:
    """A record as far as Encoded looks at it."""

    def __init__(self, length):
        self.length, self.id, self.where = length, str(length), f"rows.jsonl:{length}"


def test_encoded_returns_a_bad_rows_error():
    def encode(record):
        if record.length == "bad":
            raise UserError("row 2 is bad")
        return example(record.length)

    rows = Encoded(list(map(Named, [3, "bad", 5])), encode, [0, 1, 2])
    assert len(rows) == 3 and len(rows[0]) == 3 and isinstance(rows[1], UserError)
    assert (rows[1].where, rows[1].id) == ("rows.jsonl:bad", "bad")
    assert [len(Encoded(list(map(Named, [3, "bad", 5])), encode, [2, 0])[i]) for i in range(2)] == [5, 3]


# ---- packing --------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_example_once():
    draw = random.Random(0)
    for _ in range(200):
        examples = [example(draw.randint(1, 40), id=str(i)) for i in range(draw.randint(1, 20))]
        limit = draw.randint(10, 100)
        rows = pack(examples, limit)
        assert sorted((i for row in rows for i in row.ids), key=int) == [e.id for e in examples]
        for row in rows:
            assert sum(row.lengths) == len(row.input_ids) and (len(row.input_ids) <= limit or len(row.lengths) == 1)
        best = -(-sum(map(len, examples)) // limit)
        assert len(rows) <= max(best * 2, 1)  # first fit, longest first: never more than twice the least
        assert [row.ids for row in pack(examples, limit)] == [row.ids for row in rows]


def test_a_packed_row_is_its_examples_end_to_end():
    a = example(3, "a", image_spans=[(1, 2)])
    b = example(2, "b", weights=torch.tensor([0.5, 2.0]), image_spans=[(0, 1)])
    row = pack_row([a, b])
    assert row.input_ids.tolist() == [0, 1, 2, 0, 1] == row.positions.tolist()
    assert row.lengths == [3, 2] and row.ids == ["a", "b"] and row.image_spans == [(1, 2), (3, 4)]
    assert row.weights.tolist() == [1, 1, 1, 0.5, 2] and pack_row([a]).weights is None
    three = Example(torch.arange(4), torch.arange(4), positions=torch.zeros(3, 4, dtype=torch.long))
    assert pack_row([three, three]).positions.shape == (3, 8)


def test_supervised_places_do_not_cross_examples():
    draw = random.Random(1)
    for _ in range(100):
        examples = []
        for _ in range(draw.randint(1, 6)):
            length = draw.randint(1, 9)
            examples.append(example(length, trained=[draw.random() < 0.5 for _ in range(length)]))
        where, target = pack_row(examples).supervised()
        expected, start = [], 0
        for e in examples:
            expected += [(start + t, int(e.labels[t + 1])) for t in range(len(e) - 1) if e.labels[t + 1] != NO_LOSS]
            start += len(e)
        assert list(zip(where.tolist(), target.tolist(), strict=True)) == expected
        assert len(where) == sum(e.num_supervised for e in examples)


# ---- the gradient of a step -----------------------------------------------------------------------------------------


def step_gradient(model, rows, total):
    """Gradients of a step by the sum of its rows' losses over one denominator."""
    model.zero_grad()
    for packed in rows:
        where, target = packed.supervised()
        losses = per_token(model.hidden(packed), model.head_weight, negative_log_likelihood, where, target)
        (losses.sum() / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl"])
def test_no_cut_of_a_step_changes_its_gradient(folders, name):  # noqa: F811
    model, family = load_model(folders[name], dtype="float32")
    model.train()
    examples = make_examples(family, 8)
    total = sum(e.num_supervised for e in examples)
    draw = random.Random(2)

    def cut(size):
        return [pack_row(examples[i : i + size]) for i in range(0, 8, size)]

    cuts = {"8x1": cut(1), "4x2": cut(2), "2x4": cut(4), "1x8": cut(8)}
    for limit in (60, 150, 10**6):
        cuts[f"at most {limit}"] = pack(draw.sample(examples, 8), limit)
    reference = step_gradient(model, cuts.pop("8x1"), total)
    for checkpointing in (False, True):
        for key, rows in cuts.items():
            found = step_gradient(model, rows, total)
            for parameter, gradient in reference.items():
                gap = ((found[parameter] - gradient).norm() / gradient.norm()).item()
                assert gap <= 1e-6, (key, checkpointing, parameter, gap)
        checkpointed(model, family)
    wrong = step_gradient(model, [pack_row(examples[:4])], total / 2)  # half of the step is another gradient
    assert all((wrong[p] - g).norm() > 1e-3 * g.norm() for p, g in reference.items())
