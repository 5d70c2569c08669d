"""The Fréchet distance: its moments in one pass, its closed forms, and the extractors that it is measured on."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.analyses.errors import AnalysisError
from bench.analyses.extractors import inception, open_extractor
from bench.analyses.frechet import Gaussian, Moments, distance
from fastpeft._compat import ensure_torchvision
from fastpeft.errors import FastPEFTError

CPU = torch.device("cpu")


def gaussian(seed: int, width: int = 6, rank: int | None = None) -> Gaussian:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(width, rank or width))
    return Gaussian(random.normal(size=width), factor @ factor.T)


def test_moments_of_batches_are_those_of_all():
    # A mean far larger than the deviations is where sums of squares lose everything.
    values = np.random.default_rng(0).normal(size=(257, 5)) * [1, 2, 3, 4, 1e-3] + 1e7
    moments = Moments(5)
    for start in range(0, 257, 64):
        moments.add(values[start : start + 64])
    moments.add(values[:0])
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-14)
    expected, deviations = np.cov((values - 1e7).T), values.std(axis=0)
    assert (np.abs(found.covariance - expected) < 1e-6 * np.outer(deviations, deviations)).all()
    assert found.count == 257


def test_one_dimension_and_diagonals_have_closed_forms():
    one, two = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([-2.0]), np.array([[9.0]]))
    assert distance(one, two) == pytest.approx(9 + (2 - 3) ** 2, rel=1e-14)
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 25.0])
    first, second = Gaussian(np.zeros(3), np.diag(a)), Gaussian(np.ones(3), np.diag(b))
    assert distance(first, second) == pytest.approx(3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-14)


def test_scipys_square_root_gives_the_same():
    from scipy.linalg import sqrtm

    for seed in range(5):
        first, second = gaussian(seed), gaussian(seed + 100)
        root = sqrtm(first.covariance @ second.covariance).real
        gap = first.mean - second.mean
        expected = gap @ gap + np.trace(first.covariance + second.covariance - 2 * root)
        assert distance(first, second) == pytest.approx(expected, rel=1e-9)
        assert distance(first, second) == pytest.approx(distance(second, first), rel=1e-12)


def test_singular_covariances_need_no_help():
    # Two lines at an angle: tr (C1 C2)^(1/2) = |u . v| for C = u u^T.
    u, v = np.array([3.0, 0.0, 0.0]), np.array([1.0, 2.0, 0.0])
    first, second = (Gaussian(np.zeros(3), np.outer(x, x)) for x in (u, v))
    assert distance(first, second) == pytest.approx(9 + 5 - 2 * 3, rel=1e-12)
    point = Gaussian(np.zeros(3), np.zeros((3, 3)))
    assert distance(point, first) == pytest.approx(9) and distance(point, point) == 0
    # Far fewer vectors than numbers in each: of a set with itself nothing may be left but rounding.
    thin = gaussian(1, width=200, rank=10)
    assert distance(thin, thin) < 1e-12 * np.trace(thin.covariance)


def test_moving_and_turning_both_changes_nothing():
    first, second = gaussian(1), gaussian(2)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
    turned = [Gaussian(turn @ one.mean + 5, turn @ one.covariance @ turn.T) for one in (first, second)]
    assert distance(*turned) == pytest.approx(distance(first, second), rel=1e-10)
    doubled = [Gaussian(2 * one.mean, 4 * one.covariance) for one in (first, second)]
    assert distance(*doubled) == pytest.approx(4 * distance(first, second), rel=1e-12)


def test_a_sample_comes_near_the_distance_of_its_distributions():
    random = np.random.default_rng(0)
    moments = [Moments(2), Moments(2)]
    moments[0].add(random.normal(size=(20000, 2)))
    moments[1].add(random.normal(size=(20000, 2)) * [2, 3] + [1, 0])
    assert distance(*(one.gaussian() for one in moments)) == pytest.approx(1 + 1 + 4, rel=0.03)


def test_what_is_no_distribution():
    with pytest.raises(AnalysisError, match="not finite"):
        Moments(2).add(np.array([[1.0, np.nan]]))
    lone = Moments(2)
    lone.add(np.zeros((1, 2)))
    with pytest.raises(AnalysisError, match="at least 2 images, got 1"):
        lone.gaussian()
    with pytest.raises(AnalysisError, match="not a covariance: it has the eigenvalue -1"):
        distance(Gaussian(np.zeros(2), np.diag([1.0, -1.0])), Gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(AnalysisError, match="features of 2 and of 3"):
        distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))
    with pytest.raises(AnalysisError, match="expected a mean"):
        Gaussian(np.zeros(2), np.eye(3))


def test_features_are_the_models_pooled_ones():
    extractor = open_extractor("vit_tiny_patch16_224@random", 32, CPU)
    images = torch.randn(2, 3, 32, 32)
    found = extractor(images)
    model = extractor.model
    assert found.dtype == torch.float64 and not model.training and extractor.side == 32
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found.float(), expected)
    assert torch.equal(open_extractor("vit_tiny_patch16_224@random", 32, CPU)(images), found)


def test_a_backbone_without_weights_is_not_taken_for_one_with():
    with pytest.raises(AnalysisError, match="give NAME@WEIGHTS"):
        open_extractor("vit_tiny_patch16_224", 32, CPU)
    with pytest.raises(AnalysisError, match="WEIGHTS is a file"):
        open_extractor("inception", None, CPU)
    with pytest.raises(FastPEFTError, match="did you mean"):
        open_extractor("vit_tiny_patch16_22@random", 32, CPU)


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """State dicts of the two Inceptions, with random weights that agree but for the head."""
    ensure_torchvision()
    inception_module = pytest.importorskip("torchvision.models.inception")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inception")
    model = inception_module.Inception3(1000, aux_logits=True, init_weights=False)
    state = model.state_dict()
    torch.save(state, folder / "torchvision.pth")
    old = {key: value for key, value in state.items() if "AuxLogits" not in key and "num_batches" not in key}
    old |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(old, folder / "of_2015.pth", _use_new_zipfile_serialization=False)
    return folder, model


def test_torchvisions_inception(inceptions):
    folder, model = inceptions
    images = torch.rand(1, 3, 96, 96) * 2 - 1
    found = inception(folder / "torchvision.pth").eval()
    kept = []
    model.eval().avgpool.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(images)
        torch.testing.assert_close(found(images), kept[0].flatten(1))
    extractor = open_extractor(f"inception@{folder / 'torchvision.pth'}", None, CPU)
    assert (extractor.side, extractor.mean, extractor.std) == (299, (0.5,) * 3, (0.5,) * 3)
    assert extractor(images).shape == (1, 2048)
    with pytest.raises(AnalysisError, match="299 pixels"):
        open_extractor(f"inception@{folder / 'torchvision.pth'}", 224, CPU)


def test_the_inception_of_2015_pools_as_it_was_trained(inceptions):
    folder, _ = inceptions
    found = inception(folder / "of_2015.pth").eval()
    x = {
        "Mixed_5b": torch.randn(1, 192, 5, 5),
        "Mixed_7b": torch.randn(1, 1280, 4, 4),
        "Mixed_7c": torch.randn(1, 2048, 4, 4),
    }
    for name, values in x.items():
        block = found.get_submodule(name)
        pooled = (
            F.max_pool2d(values, 3, 1, 1)
            if name == "Mixed_7c"
            else F.avg_pool2d(values, 3, 1, 1)
            * 9
            / F.conv2d(torch.ones(1, 1, *values.shape[2:]), torch.ones(1, 1, 3, 3), padding=1)
        )
        branch = block.branch_pool
        with torch.no_grad():
            expected = F.relu(branch.bn(branch.conv(pooled)))
            output = block(values)
        torch.testing.assert_close(output[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-5)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/fastpeft-test-payload-that-must-not-be",)


def test_files_that_are_no_inception(tmp_path, inceptions):
    with pytest.raises(AnalysisError, match="no such file"):
        inception(tmp_path / "none.pth")
    (tmp_path / "torn.pth").write_bytes((inceptions[0] / "of_2015.pth").read_bytes()[:1000])
    with pytest.raises(AnalysisError, match=r"cannot be read|is damaged"):
        inception(tmp_path / "torn.pth")
    torch.save({"fc.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(AnalysisError, match="could run code"):
        inception(tmp_path / "evil.pth")
    assert not os.path.exists("/tmp/fastpeft-test-payload-that-must-not-be")
    torch.save({"fc.weight": torch.zeros(10, 2048)}, tmp_path / "other.pth")
    with pytest.raises(AnalysisError, match=r"got fc.weight of \(10, 2048\)"):
        inception(tmp_path / "other.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "part.pth")
    with pytest.raises(AnalysisError, match="not the state dict of an Inception-v3"):
        inception(tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(AnalysisError, match="expected a state dict"):
        inception(tmp_path / "list.pth")
