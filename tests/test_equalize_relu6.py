"""Cross-layer equalization around a ReLU6: kept, it clips what it clipped; replaced, it clips nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from awkward import SHAPE, noise_task
from random_task import warm
from test_equalize import equalize, incoming, outgoing, uneven
from torch import Tensor, nn

from compress.errors import ConfigError, DataError
from compress.stages import Equalize

IMAGES = noise_task().calibration.x


def clipped() -> nn.Sequential:
    """Three layers with a ReLU6 behind each, which clip some channels of the noise images and others not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 12, 3), nn.ReLU6()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6()),
        *(nn.Conv2d(12, 6, 1), nn.ReLU6()),
    )
    return uneven(model).eval()  # type: ignore[return-value]


def reached(model: nn.Sequential, layer: int, images: Tensor) -> Tensor:
    return model[: layer + 1](images).amax((0, 2, 3))  # type: ignore[no-any-return]


def test_relu6_stays_and_clips_what_it_clipped() -> None:
    model, original = clipped(), clipped()
    expected = original(IMAGES)
    edit = equalize(model, iterations=1000)
    torch.testing.assert_close(edit.model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert [type(module) for module in edit.model] == [type(module) for module in original]
    for first, second in ((0, 2), (2, 4)):
        most, after = reached(original, first, IMAGES), reached(model, first, IMAGES)
        clips = most > 6
        assert 0 < clips.sum() < 12 and ((after > 6 + 1e-4) == clips).all()
        torch.testing.assert_close(after[clips], most[clips])
        makes, reads = outgoing(model[first]), incoming(model[second], 12)
        equal, full = (makes / reads - 1).abs() < 2e-3, (after - 6).abs() < 1e-4
        assert (clips | equal | full).all() and equal.any() and full.any()
        assert (makes[full] < reads[full]).all()
        by_name = {site.name: site for site in edit.sites}
        assert by_name[str(first + 1)].after is None
        assert by_name[str(first + 1)].why == f"it clips {int(clips.sum())} of 12 channels, which keep their scale"
    assert edit.notes["channels_clipped"].keys() == {"1", "3"} and edit.notes["relu6_replaced"] == []
    assert by_name["5"].why == "it does not stand between two equalized layers"


def test_one_pair_around_a_relu6_has_the_scales_of_the_paper_where_they_fit() -> None:
    model, before = clipped()[:3], clipped()[:3]
    equalize(model, images=5)  # the largest of the first five images
    s = (outgoing(before[0]) / incoming(before[2], 12)).sqrt()
    most = reached(before, 0, IMAGES[:5])
    assert (s < most / 6).any() and (most < reached(before, 0, IMAGES)).any()
    s = torch.where(most > 6, 1.0, torch.maximum(s, most / 6))
    torch.testing.assert_close(model[0].weight, before[0].weight / s.view(-1, 1, 1, 1))
    torch.testing.assert_close(model[2].weight, before[2].weight * s.view(-1, 1, 1, 1))


def test_relu6_that_clips_everything_keeps_its_pair() -> None:
    model = clipped()
    with torch.no_grad():
        model[0].weight *= 100
    edit = equalize(model)
    assert edit.notes["pairs"] == ["2 -> 4"]
    by_name = {site.name: site for site in edit.sites}
    assert by_name["0"].why == "1 clips each of its channels"
    assert by_name["1"].why == "it clips 12 of 12 channels, which keep their scale"
    with pytest.raises(ConfigError, match="its ranges are those of 4 already, where 3 does not clip"):
        equalize(equalize(model, iterations=1000).model)


def test_relu6_is_replaced_between_pairs_only() -> None:
    model, original = clipped(), clipped()
    expected = F.relu6(original[4](F.relu(original[2](F.relu(original[0](IMAGES))))))
    edit = equalize(model, relu6="replace")
    torch.testing.assert_close(edit.model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert [type(module) for module in model][1::2] == [nn.ReLU, nn.ReLU, nn.ReLU6]
    assert edit.notes["relu6_replaced"] == ["1", "3"] and edit.notes["channels_clipped"] == {}
    by_name = {site.name: site for site in edit.sites}
    assert by_name["1"].why == "changes the output where an activation exceeds 6"
    assert by_name["5"].why == "it does not stand between two equalized layers"


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


def test_settings_and_images_that_do_not_serve() -> None:
    with pytest.raises(ConfigError, match=r"the function `relu6` reads it, which clips at 6; use the module `nn"):
        equalize(nn.Sequential(nn.Conv2d(8, 6, 3), Function(), nn.Conv2d(6, 4, 1)))
    with pytest.raises(ConfigError, match=r"`relu6` \(='drop'\) must be one of keep, replace"):
        Equalize(relu6="drop")
    with pytest.raises(ConfigError, match=r"`images` \(=0\) must be at least 1"):
        Equalize(images=0)
    broken = clipped()
    with torch.no_grad():
        broken[0].bias[3] = float("nan")
    with pytest.raises(DataError, match="calibration met NaN or infinity behind 0"):
        equalize(broken)


def test_absorbed_biases_of_clipped_channels_stay() -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1))
        model = warm(uneven(model), SHAPE)  # type: ignore[assignment]
        with torch.no_grad():
            model[1].weight.fill_(0.1)
            model[1].bias.copy_(torch.tensor([2.0, 3.0, 4.0, 0.2, 8.0, 5.9]))
        return model

    plain, edit = equalize(normed()).model, equalize(normed(), absorb=True)
    assert edit.notes["channels_clipped"] == {"2": "2 of 6"}
    assert edit.notes["absorbed"]["0"].startswith("3 of 6 channels")
    assert ((edit.model[0].bias == plain[0].bias) == torch.tensor([0, 0, 0, 1, 1, 1]).bool()).all()
