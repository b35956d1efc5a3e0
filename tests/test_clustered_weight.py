"""Shared weights: k-means against scikit-learn, the table's gradient and pace, batch norm in the gain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from random_task import warm
from sklearn.cluster import KMeans
from test_cluster import book, cluster
from torch import Tensor, nn

from compress.lower.fold import fold_batch_norm
from compress.nn.clustered import nearest
from compress.stages.cluster import shared_values


def error(points: Tensor, centres: Tensor) -> float:
    """The squared error when every point takes the nearest centre, by comparing with all of them."""
    return float((points.double().view(-1, 1) - centres.double()).square().amin(1).sum())


@pytest.mark.parametrize("start", ["linear", "density"])
def test_k_means_is_that_of_scikit_learn_from_the_same_start(start: str) -> None:
    points = torch.randn(600, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    spread = np.linspace(float(points.min()), float(points.max()), 8)
    equal = np.sort(points.numpy())[((np.arange(8) + 0.5) * 600 / 8).astype(int)]
    first = (spread if start == "linear" else equal).reshape(-1, 1)
    theirs = KMeans(8, init=first, n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(
        points.double().view(-1, 1).numpy()
    )
    mine = shared_values(points, 8, start, iterations=1000)
    np.testing.assert_allclose(mine.numpy(), np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-5)
    assert error(points, mine) == pytest.approx(theirs.inertia_, rel=1e-5)


def test_a_cluster_without_weights_takes_half_of_the_worst() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.cat((torch.randn(1000, generator=generator) * 0.01, torch.tensor([5.0, -3.0])))
    mine = shared_values(points, 16)  # 14 of 16 evenly spread centres start without any weight
    places = nearest(points, mine)
    assert len(mine) == 16 and len(places.unique()) == 16
    assert torch.equal(shared_values(points, 16), mine)
    theirs = KMeans(16, n_init=10, random_state=0).fit(points.view(-1, 1).numpy())
    assert error(points, mine) < 1.2 * theirs.inertia_


def test_few_distinct_weights_are_kept_exactly() -> None:
    weight = torch.tensor([0.5, -1.0, 0.25])[torch.randint(3, (8, 8, 3, 3))]
    assert shared_values(weight, 16).tolist() == [-1.0, 0.25, 0.5]
    layer = nn.Conv2d(8, 8, 3)
    layer.weight.data.copy_(weight)
    edit = cluster(nn.Sequential(layer), bits=4)
    assert torch.equal(layer.weight, weight) and edit.sites[0].after == "3 shared weights"
    assert edit.notes == {"entries": {"0": 3}, "relative_error": {"0": 0.0}}


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3)
    cluster(nn.Sequential(layer), bits=3)
    book(layer).gain.copy_(torch.linspace(-1, 2, 8))
    plain = nn.Conv2d(4, 8, 3)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = torch.randn(2, 4, 9, 9)
    for model in (layer, plain):
        model(x).square().sum().backward()
    index = layer.parametrizations.weight.original.long()
    scaled = plain.weight.grad * torch.linspace(-1, 2, 8).view(-1, 1, 1, 1)
    expected = torch.stack([scaled[index == entry].sum() for entry in range(8)])
    torch.testing.assert_close(book(layer).table.grad, expected, rtol=1e-4, atol=1e-3)
    assert layer.parametrizations.weight.original.grad is None
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_a_step_moves_entries_by_the_mean_of_the_steps_of_free_weights() -> None:
    weight = torch.linspace(-1, 1, 16).repeat(16).view(16, 16)  # every entry gets equally many
    layer = nn.Linear(16, 16)
    layer.weight.data.copy_(weight)
    cluster(nn.Sequential(layer), bits=4)
    assert book(layer).parameter_rules() == {"table": {"lr_scale": 16 / 256, "weight_decay": 0.0}}
    wanted = torch.randn(16, 16)
    (layer.weight * wanted).sum().backward()
    step = book(layer).table.grad * book(layer).parameter_rules()["table"]["lr_scale"]
    index = layer.parametrizations.weight.original
    expected = torch.stack([wanted[index == entry].mean() for entry in range(16)])
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same_bits_on_several_threads() -> None:
    threads = torch.get_num_threads()
    layer = nn.Linear(512, 512)
    wanted = torch.randn(512, 512)
    cluster(nn.Sequential(layer), bits=4)
    try:
        torch.set_num_threads(4)
        grads = [torch.autograd.grad((layer.weight * wanted).sum(), book(layer).table)[0] for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "groups": 2}, {"groups": 8}, {"bias": False}], ids=str)
def test_batch_norm_is_folded_into_the_gain(settings: dict[str, object]) -> None:
    model = warm(nn.Sequential(nn.Conv2d(8, 16, 3, **settings), nn.BatchNorm2d(16), nn.ReLU()), (8, 12, 12))  # type: ignore[arg-type]
    with torch.no_grad():
        model[1].weight[::2] *= -1
        model[1].weight[3] = 0
        model[0].weight[5] = 0
    cluster(model, bits=4)
    x = torch.randn(2, 8, 12, 12)
    expected, index = model(x), model[0].parametrizations.weight.original.clone()
    assert fold_batch_norm(model) == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model[0].parametrizations.weight.original, index)
    assert (book(model[0]).gain < 0).any() and book(model[0]).gain[3] == 0


def test_only_a_factor_for_each_channel_can_be_assigned() -> None:
    layer = nn.Linear(32, 32)
    cluster(nn.Sequential(layer), bits=4)
    expected = layer.weight.detach().clone()
    for value in (torch.randn(32, 32), expected + 0.01, expected * torch.rand(32)):
        with pytest.raises(NotImplementedError, match="can only be scaled, by one factor for each output channel"):
            layer.weight = value
        assert torch.equal(layer.weight, expected)
    layer.weight = -2 * expected
    torch.testing.assert_close(layer.weight, -2 * expected)


def test_copies_and_states_stand_alone() -> None:
    torch.manual_seed(0)
    model = cluster(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 32)), bits=4).model
    x = torch.randn(2, 8, 5, 5)
    expected = model(x)
    twin = copy.deepcopy(model)
    book(twin[0]).table.data.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    twin[2].weight = 2 * twin[2].weight.detach()
    assert torch.equal(model(x), expected)
