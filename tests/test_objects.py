"""What a user's own objects answer, and values that are neither yes nor no: one line that names the member."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from torch import Tensor, nn

from cacl import BackgroundSet, CACLLoss, CAMNet, PromptSet, load_encoder, pipeline, present_pairs, split_regions
from cacl._support.answers import check_given, check_terms
from cacl.config import Config
from cacl.crf import dense_crf
from cacl.deeplab import DeepLabV2, segmentation_loss
from cacl.irn import IRNet
from cacl.metrics import ConfusionMatrix, threshold_sweep
from cacl.mining import mine_labels
from cacl.pictures import heatmap, overlay, threshold
from cacl.random_walk import along_paths, propagate
from cacl.settings import Machine
from cacl.stages.contrast import STAGE
from cacl.tables import CACL

NAMES = ["boat", "train"]
WORDS = BackgroundSet({"boat": ["water"], "train": ["track"]})


class Output(OrderedDict):
    """As the library transformers gives them: fields that are entries too."""


class Fields:
    def __init__(self, **fields):
        vars(self).update(fields)


def answering(member, change):
    """An encoder whose ``member`` gives what ``change`` makes of its answer."""

    def method(self, given):
        return change(getattr(TinyEncoder, member)(self, given))

    return type("Own", (TinyEncoder,), {member: method})()


def with_attributes(**attributes):
    return type("Own", (TinyEncoder,), attributes)()


def loss_of(encoder, **settings):
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    cams = torch.full((2, 2, 2, 2), 0.5, requires_grad=True)
    return CACLLoss(encoder, NAMES, backgrounds=WORDS, **settings)(images, cams, torch.eye(2)).total


def said(action, kind=ValueError):
    """The one line of an error."""
    with pytest.raises(kind) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("member", ["encode_image", "encode_text"])
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda x: (x, None), TypeError, "but got tuple of Tensor, NoneType; give the tensor alone."),
        (lambda x: [*x], TypeError, "but got list of Tensor, Tensor"),
        (lambda x: Output(pooler_output=x), TypeError, "but got Output with 'pooler_output'; give its 'pooler_output'"),
        (lambda x: {"out": x, "aux": x}, TypeError, "but got dict with 'out', 'aux'; give its 'out' alone."),
        (lambda x: Fields(image_embeds=x), TypeError, "but got Fields; give its `image_embeds`."),
        (lambda x: x.detach().numpy(), TypeError, "but got ndarray; torch.from_numpy makes a tensor of it."),
        (lambda x: None, TypeError, "but got NoneType."),
        (lambda x: x.long(), TypeError, "of a floating point type, but got torch.int64."),
        (lambda x: x.to(torch.complex64), TypeError, "of a floating point type, but got torch.complex64."),
        (lambda x: x[..., None], ValueError, "32, 1)."),
        (lambda x: x[0], ValueError, "but got shape (32,)."),
        (lambda x: x[1:], ValueError, ", 32)."),
        (lambda x: x * float("nan"), ValueError, "finite features, but got NaN or infinity."),
        (lambda x: x.to("meta"), ValueError, "meta."),
    ],
)
def test_an_encoder_s_answers(member, change, kind, text):
    message = said(lambda: loss_of(answering(member, change)), kind)
    assert f"`encoder.{member}` to " in message
    assert text in message


def test_images_and_texts_with_features_of_another_length():
    message = said(lambda: loss_of(answering("encode_image", lambda x: x[:, :16])))
    assert message.endswith("as long as `encode_text`'s 32, but got shape (4, 16).")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_image_encoder_without_a_gradient_would_train_nothing(context):
    class Own(TinyEncoder):
        def encode_image(self, images):
            with context():
                return super().encode_image(images)

    message = said(lambda: loss_of(Own()))
    assert "`encoder.encode_image`" in message
    assert "no gradient, so that nothing would be trained" in message
    with torch.no_grad():  # where nothing is trained, nothing is missing
        assert loss_of(Own()).isfinite()


def test_texts_in_inference_mode_half_precision_and_with_a_gradient_are_taken():
    def inferred(self, texts):
        with torch.inference_mode():
            return TinyEncoder.encode_text(self, texts)

    wanted = loss_of(TinyEncoder())
    for encoder in (
        type("Own", (TinyEncoder,), {"encode_text": inferred})(),
        answering("encode_text", lambda x: x.clone().requires_grad_()),
    ):
        total = loss_of(encoder)
        torch.testing.assert_close(total, wanted)
        total.backward()
    torch.testing.assert_close(loss_of(answering("encode_text", Tensor.half)), wanted, rtol=1e-2, atol=1e-2)


def test_images_that_are_not_finite_are_not_the_encoder_s_fault():
    criterion = CACLLoss(TinyEncoder(), NAMES, backgrounds=WORDS)
    cams = torch.full((1, 2, 2, 2), float("nan"))
    assert criterion(torch.ones(1, 3, 16, 16), cams, torch.ones(1, 2)).total.isnan()


@pytest.mark.parametrize(
    ("attributes", "kind", "text"),
    [
        ({"image_size": (32, 32)}, TypeError, "`encoder.image_size` to be one integer"),
        ({"image_size": 32.0}, TypeError, "but got 32.0."),
        ({"image_size": True}, ValueError, "`encoder.image_size` to be a positive integer"),
        ({"image_size": 0}, ValueError, "`encoder.image_size` to be a positive integer, but got 0."),
        ({"mean": 0.5}, TypeError, "`encoder.mean` to be three finite numbers, one a channel, but got 0.5."),
        ({"std": (0.5,)}, ValueError, "`encoder.std` to be three finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "`encoder.std` to be positive"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "`encoder.mean` to be three finite numbers"),
        ({"mean": ("a", "b", "c")}, ValueError, "`encoder.mean`"),
        ({"mean": (123.7, 116.3, 103.5)}, ValueError, "`encoder.mean` to be of pixels of 0 to 1"),
        (
            {"std": (58.4, 57.1, 57.4)},
            ValueError,
            "`encoder.std` to be of pixels of 0 to 1, but got (58.4, 57.1, 57.4)",
        ),
        ({"mean": torch.zeros(2, 3)}, ValueError, "`encoder.mean` to be three finite numbers"),
        ({"encode_text": "words"}, TypeError, "`encoder.encode_text` to be callable, but got str."),
    ],
)
def test_an_encoder_s_members(attributes, kind, text):
    assert text in said(lambda: loss_of(with_attributes(**attributes)), kind)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, lambda x: torch.tensor(x).view(1, 3, 1, 1)])
def test_statistics_may_be_any_three_numbers(make):
    own = with_attributes(mean=make(TinyEncoder.mean), std=make(TinyEncoder.std), image_size=np.int64(32))
    torch.testing.assert_close(loss_of(own), loss_of(TinyEncoder()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"backgrounds": {"boat": ["sea"]}},
            "`backgrounds` to be a BackgroundSet, but got dict; cacl.BackgroundSet(…)",
        ),
        ({"backgrounds": "voc"}, "`backgrounds` to be a BackgroundSet, but got str"),
        ({"prompts": ["a {}"]}, "`prompts` to be a PromptSet, but got list; cacl.PromptSet(…) makes one."),
        ({"prompts": "a {}"}, "`prompts` to be a PromptSet, but got str"),
    ],
)
def test_texts_of_another_type(settings, text):
    assert text in said(lambda: CACLLoss(TinyEncoder(), NAMES, **settings), TypeError)


def test_other_values_at_the_doors_of_texts_and_encoders():
    with pytest.raises(TypeError, match=r"`words` to have class names for keys, but got 1"):
        BackgroundSet({1: ["water"]})
    with pytest.raises(TypeError, match=r"`encoder.encode_text` to be callable, but got NoneType"):
        PromptSet().encode(None, ["boat"])
    with pytest.raises(ValueError, match=r"device: expected a device of this machine, but got 'gpu'"):
        load_encoder("scenes", device="gpu")


def test_a_class_or_a_name_in_place_of_an_object():
    assert "but got the class TinyEncoder; give an object of it" in said(lambda: loss_of(TinyEncoder), TypeError)
    assert "load_encoder('ViT-B/32') makes one" in said(lambda: loss_of("ViT-B/32"), TypeError)
    for make in (CAMNet, DeepLabV2):
        text = said(lambda: make(2, backbone=TinyBackbone), TypeError)  # noqa: B023
        assert "`backbone`" in text
        assert "but got the class TinyBackbone" in text
    for given in ((TinyEncoder, None, None), (None, TinyBackbone, None), (None, None, CACLLoss)):
        assert "but got the class" in said(lambda: check_given(*given), TypeError)  # noqa: B023
    check_given(TinyEncoder(), TinyBackbone(), lambda images, cams, labels: None)


class Shaped(nn.Module):
    """A backbone that gives what ``change`` makes of its features."""

    def __init__(self, change, out_channels=8):
        super().__init__()
        self.inner, self.change, self.out_channels = TinyBackbone().eval(), change, out_channels

    def forward(self, images):
        return self.change(self.inner(images))


@pytest.mark.parametrize("make", [lambda b: CAMNet(2, backbone=b), lambda b: DeepLabV2(2, backbone=b), IRNet])
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda x: {"out": x}, TypeError, "(B, 8, h, w), but got dict with 'out'; give its 'out' alone."),
        (lambda x: (x,), TypeError, "(B, 8, h, w), but got tuple of Tensor; give the tensor alone."),
        (lambda x: x.mean((2, 3)), ValueError, "(B, 8, h, w), but got shape (2, 8)."),
        (lambda x: x[:, :4], ValueError, "(B, 8, h, w), but got shape (2, 4, 4, 4)."),
        (lambda x: x[:1], ValueError, "(B, 8, h, w), but got shape (1, 8, 4, 4)."),
        (lambda x: x.long(), TypeError, "of a floating point type, but got torch.int64."),
        (Tensor.half, TypeError, "maps of the network's type torch.float32, but got torch.float16."),
        (Tensor.double, TypeError, "maps of the network's type torch.float32, but got torch.float64."),
        (lambda x: x.to("meta"), ValueError, "maps on the network's device cpu, but got meta."),
        (lambda x: x[..., :0], ValueError, "but got shape (2, 8, 4, 0): are the images too small for it?"),
    ],
)
def test_a_backbone_s_answers(make, change, kind, text):
    net = make(Shaped(change)).eval()
    message = said(lambda: net(torch.zeros(2, 3, 64, 64)), kind)
    assert "`backbone` to be giving" in message
    assert text in message


@pytest.mark.parametrize("channels", [None, 8.0, True, "8", 0, -8])
def test_out_channels(channels):
    for make in (lambda b: CAMNet(2, backbone=b), lambda b: DeepLabV2(2, backbone=b), IRNet):
        message = said(lambda: make(Shaped(lambda x: x, channels)), TypeError)  # noqa: B023
        assert "integer `out_channels`, but got Shaped" in message
        assert channels is None or repr(channels) in message
    assert CAMNet(2, backbone=Shaped(lambda x: x, np.int64(8))).classifier.in_channels == 8


class Terms(NamedTuple):
    total: object


@pytest.mark.parametrize(
    ("terms", "kind", "text"),
    [
        ({"total": torch.zeros(())}, TypeError, "but got dict."),
        (None, TypeError, "but got NoneType."),
        ((torch.zeros(()),), TypeError, "but got tuple."),
        (Terms(None), TypeError, "but got no `total` in Terms."),
        (Terms(0.5), TypeError, "but got a `total` that is float in Terms."),
        (
            Terms(torch.zeros(1, requires_grad=True)),
            ValueError,
            "a scalar of a floating point type, but got shape (1,)",
        ),
        (Terms(torch.zeros((), dtype=torch.int64)), ValueError, "torch.int64"),
        (Terms(torch.zeros(())), ValueError, "that has a gradient"),
    ],
)
def test_a_criterion_s_answers(terms, kind, text):
    assert text in said(lambda: check_terms(terms), kind)
    check_terms(Terms(torch.zeros((), requires_grad=True)))


def test_what_is_given_to_a_run_is_seen_before_the_first_step(tmp_path):
    config = Config.load("scenes", [f"run.out={tmp_path}/out", f"data.root={tmp_path}/scenes"])
    for argument, given in (
        ("criterion", CACLLoss), ("criterion", 3), ("encoder", TinyEncoder), ("backbone", TinyBackbone), ("callback", 3)
    ):  # fmt: skip
        text = said(lambda: pipeline.run(config, **{argument: given}), TypeError)  # noqa: B023
        assert f"Expected argument `{argument}` to be" in text
    assert not (tmp_path / "scenes").exists()


def test_an_encoder_s_first_answer_comes_before_the_warm_up():
    class Run:
        given_criterion, machine, encoder = None, Machine(), answering("encode_image", lambda x: (x, None))

        def shared(self, name, make):
            return criterion

    criterion = CACLLoss(Run.encoder, NAMES, backgrounds=WORDS)
    text = said(lambda: STAGE.check(Run(), CACL()), TypeError)
    assert "`encoder.encode_image`" in text
    criterion = CACLLoss(TinyEncoder(), NAMES, backgrounds=WORDS).train()
    before = torch.random.get_rng_state()
    STAGE.check(Run(), CACL())
    assert criterion.training
    assert not criterion.selector.counts.any()
    assert torch.equal(torch.random.get_rng_state(), before)


# Labels


def labelled(value, dtype=torch.float32):
    labels = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=dtype)
    labels[0, 2] = value
    return labels


LABELLED = [
    (labelled(-1.0), "-1.0"), (labelled(float("nan")), "nan"), (labelled(0.5), "0.5"), (labelled(float("inf")), "inf"),
    (labelled(-1, torch.int64), "-1"), (labelled(2, torch.uint8), "2"),
]  # fmt: skip


@pytest.mark.parametrize(("labels", "value"), LABELLED)
def test_labels_that_are_neither_yes_nor_no(labels, value):
    wanted = f"Expected argument `labels` to be 0 (absent) or 1 (present), but got {value} for image 0, class 2."
    images, cams = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 2, 2)
    names = [*NAMES, "bird"]
    words = BackgroundSet({name: ["water"] for name in names})
    for call in (
        lambda: present_pairs(labels),
        lambda: split_regions(images, cams, labels, size=8),
        lambda: CACLLoss(TinyEncoder(), names, backgrounds=words)(images, cams, labels),
    ):
        assert said(call) == wanted


@pytest.mark.parametrize(
    "make", [torch.Tensor.to_sparse, lambda x: x.to("meta"), lambda x: x.to(torch.uint16), lambda x: x + 0j]
)
def test_labels_that_cannot_be_counted(make):
    assert "`labels` to be bool, or plain integers" in said(lambda: present_pairs(make(torch.eye(2))), TypeError)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_labels_of_any_type_that_are_yes_or_no(dtype):
    wanted = [(0, 0), (0, 2), (1, 1)]
    assert list(zip(*(x.tolist() for x in present_pairs(labelled(1, dtype))), strict=True)) == wanted


def test_a_warm_up_refuses_such_labels(tmp_path):
    from cacl.loading import Batch
    from cacl.stages import warmup

    def fit(step, *args, **kwargs):
        step(Batch(["a"], torch.zeros(1, 3, 32, 32), torch.tensor([[-1.0, 1.0]]), None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "fit", fit)
        net = CAMNet(2, backbone=TinyBackbone())
        assert "`labels` to be 0 (absent)" in said(lambda: warmup.train_classifier(net, []))


def test_class_indices_of_a_prediction():
    net = CAMNet(3, backbone=TinyBackbone())
    images = torch.ones(1, 3, 32, 32)
    wanted = net.predict(images)[:, [2, 0]]
    for classes in (torch.tensor([2, 0]), np.array([2, 0]), [2, 0]):
        torch.testing.assert_close(net.predict(images, classes=classes), wanted)
    assert net.predict(images, classes=torch.tensor([])).shape == (1, 0, 32, 32)
    assert "in [0, 2], but got -1" in said(lambda: net.predict(images, classes=torch.tensor([-1])))
    assert "in [0, 2], but got 3" in said(lambda: net.predict(images, classes=torch.tensor([3])))
    text = said(lambda: net.predict(images, classes=torch.tensor([True, False, True])), TypeError)
    assert "class indices (C,) in [0, 2], but got bool" in text
    assert "in [0, 2], but got shape ()" in said(lambda: net.predict(images, classes=1))
    assert "but got <U4" in said(lambda: net.predict(images, classes=["boat"]), TypeError)
    torch.testing.assert_close(net.predict(images, classes=np.array([2, 0], np.uint8)), wanted)


@pytest.mark.parametrize("scales", [1.0, [], [0.0], [-1.0], [float("nan")], [float("inf")], ["1"], None])
def test_scales_of_a_prediction(scales):
    net = CAMNet(2, backbone=TinyBackbone())
    assert "argument `scales` to " in said(lambda: net.predict(torch.ones(1, 3, 32, 32), scales=scales))


def test_scales_may_be_an_array_or_a_tensor():
    net, images = CAMNet(2, backbone=TinyBackbone()), torch.rand(1, 3, 32, 32)
    for scales in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])):
        assert torch.equal(net.predict(images, scales=scales), net.predict(images, scales=(1.0, 2.0)))


# Arrays, tensors and lists


def test_masks_may_be_arrays_tensors_or_lists():
    truth, prediction = [[0, 1, 2], [255, 1, 0]], [[0, 2, 2], [1, 1, 1]]
    wanted = [1 / 2, 1 / 3, 1 / 2]  # counted by hand: of 0, 1 and 2, the five pixels that are not 255
    for make in (np.array, torch.tensor, list, lambda x: torch.tensor(x, dtype=torch.uint8)):
        matrix = ConfusionMatrix(2)
        matrix.update(make(truth), make(prediction))
        np.testing.assert_allclose(matrix.iou, wanted)


def test_what_is_no_mask():
    matrix, mask = ConfusionMatrix(2), np.array([[0, 1, 2]])
    unsure = said(lambda: matrix.update(mask, np.array([[0, 1, 255]])))
    assert "`prediction` to be in [0, 2], but got 255; where it is unsure, set it to 0" in unsure
    assert "`prediction` to be in [0, 2], but got -1." in said(lambda: matrix.update(mask, mask - 1))
    assert "`truth` to be in [0, 2] or 255 (ignored), but got 3." in said(lambda: matrix.update(mask + 1, mask))
    assert "`truth` to hold integers, but got float64." in said(lambda: matrix.update(mask / 1, mask), TypeError)
    assert "but got torch.float" not in said(lambda: matrix.update(mask, torch.zeros(1, 3)), TypeError)
    assert "`prediction` to hold integers, but got NoneType." in said(lambda: matrix.update(mask, None), TypeError)
    assert "`truth` to hold integers" in said(lambda: matrix.update([[0], [1, 2]], mask), TypeError)
    assert "(ignored), but got 18446744073709551615." in said(
        lambda: matrix.update(np.full((1, 3), 2**64 - 1, np.uint64), mask)
    )
    assert matrix.counts.sum() == 0
    matrix.update(np.where(mask == 2, 255, mask), np.where(mask == 2, 255, mask))  # left out by the truth
    assert np.diagonal(matrix.counts).tolist() == [1, 1, 0]


def test_a_sweep_of_tensors():
    truth, classes, maps = np.array([[1, 1, 0, 0]]), np.array([0]), np.array([[[0.9, 0.4, 0.4, 0.1]]], np.float32)
    sweep = threshold_sweep([tuple(map(torch.from_numpy, (truth, classes, maps)))], 1, scores=(0.2, 0.5))
    np.testing.assert_allclose(sweep.iou, [[1 / 2, 2 / 3], [2 / 3, 1 / 2]])
    assert "class indices" in said(lambda: threshold_sweep([(truth, np.array([True]), maps)], 1))
    assert "`maps` to be an array (C, H, W)" in said(lambda: threshold_sweep([(truth, classes, maps[0])], 1))
    assert "`classes` to be class indices (C,) in [0, 0], but got 1." in said(
        lambda: threshold_sweep([(truth, [1], maps)], 1)
    )
    assert "`maps` to be without NaN" in said(lambda: threshold_sweep([(truth, classes, maps * np.nan)], 1))
    assert "for each image, but got tuple of 2." in said(lambda: threshold_sweep([(truth, classes)], 1), TypeError)
    assert "`num_classes` to be a positive integer" in said(lambda: threshold_sweep([], 0))
    for scores in ("ab", [float("nan")], 0.3, None):
        assert "argument `scores` to " in said(lambda scores=scores: threshold_sweep([], 1, scores=scores))
    assert threshold_sweep([(truth, classes, maps)], 1, scores=torch.tensor([0.25, 0.5])).miou(0.25) == sweep.miou(0.2)


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", True, None])
def test_numbers_of_classes(count):
    assert "`num_classes` to be a positive integer" in said(lambda: ConfusionMatrix(count))


def test_numbers_may_be_numpy_s():
    assert ConfusionMatrix(np.uint8(255)).counts.shape == (256, 256)
    assert CAMNet(np.int64(2), backbone=TinyBackbone())(torch.ones(1, 3, 32, 32)).cams.shape[1] == 2
    assert loss_of(TinyEncoder(), alpha=np.float32(1)).isfinite()
    image = np.zeros((4, 4, 3), np.uint8)
    assert (
        dense_crf(image, np.ones((2, 4, 4)), gaussian=(np.float32(3), np.int64(3)), iterations=np.int64(1)).shape[0]
        == 2
    )


def test_maps_and_probabilities_may_be_tensors():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)
    maps = rng.random((1, 8, 9), dtype=np.float32)
    wanted = mine_labels(image, np.array([2]), maps, backend="torch")
    for make in (torch.from_numpy, np.ndarray.tolist):
        np.testing.assert_array_equal(mine_labels(image, make(np.array([2])), make(maps), backend="torch"), wanted)
    both = np.concatenate([maps, 1 - maps])
    given = torch.from_numpy(both).requires_grad_()
    np.testing.assert_array_equal(
        dense_crf(image, given, backend="torch"), dense_crf(image, both, backend="torch")
    )  # fmt: skip
    text = said(lambda: dense_crf(torch.zeros(3, 8, 9, dtype=torch.uint8), both), TypeError)
    assert "but got Tensor; image.permute(1, 2, 0).numpy() makes one" in text
    for none in (lambda: mine_labels(None, [0], maps), lambda: mine_labels(image.tolist(), [], maps[:0])):
        assert "`image` to be a uint8 array (H, W, 3)" in said(none, TypeError)


def test_arrays_where_tensors_are_meant():
    edges = np.zeros((4, 4), np.float32)
    for call in (
        lambda: propagate(edges[None], torch.zeros(4, 4)),
        lambda: propagate(torch.zeros(1, 4, 4), edges),
        lambda: next(along_paths(edges, 2)),
        lambda: segmentation_loss([torch.zeros(1, 2, 2, 2)], np.zeros((1, 4, 4), np.int64)),
        lambda: present_pairs(np.eye(2)),
        lambda: CAMNet(2, backbone=TinyBackbone())(edges),
    ):
        assert "but got ndarray; torch.from_numpy makes a tensor of it" in said(call)


def test_backbones_in_half_precision_under_autocast():
    images = torch.rand(1, 3, 64, 64)
    for make in (lambda b: CAMNet(2, backbone=b), lambda b: DeepLabV2(2, backbone=b), IRNet):
        with torch.autocast("cpu", torch.bfloat16):
            make(Shaped(Tensor.bfloat16)).eval()(images)
    out = CAMNet(2, backbone=Shaped(Tensor.bfloat16)).bfloat16()(images.bfloat16())
    assert (out.cams.dtype, out.cams.shape) == (torch.bfloat16, (1, 2, 4, 4))


def test_masks_of_classes_that_there_are_not():
    logits = [torch.zeros(1, 2, 2, 2)]
    masks = torch.tensor([[[0, 1], [255, 7]]], dtype=torch.uint8)
    assert "`masks` to be in [0, 1] or 255 (ignored), but got 7." in said(lambda: segmentation_loss(logits, masks))
    assert "but got -1." in said(lambda: segmentation_loss(logits, masks.long().clamp(max=1) - 1))
    assert "integer type" in said(lambda: segmentation_loss(logits, torch.zeros(1, 2, 2)), TypeError)
    for other in (masks.to_sparse(), masks.to(torch.complex64)):
        assert "integer type" in said(lambda other=other: segmentation_loss(logits, other), TypeError)
    masks[0, 1, 1] = 1
    assert torch.equal(segmentation_loss(logits, masks.to(torch.uint16)), segmentation_loss(logits, masks))
    assert segmentation_loss(logits, masks).item() == pytest.approx(np.log(2))


def test_pictures_of_tensors():
    photo = np.full((4, 5, 3), 100, np.uint8)
    mask, maps = np.eye(4, 5, dtype=np.int64), np.linspace(0, 1, 20, dtype=np.float32).reshape(1, 4, 5)
    mask[0, 4] = 255
    tensor = torch.from_numpy(photo)
    np.testing.assert_array_equal(overlay(tensor, torch.from_numpy(mask)), overlay(photo, mask))
    np.testing.assert_array_equal(overlay(photo, mask)[0, 4], [200, 200, 200])  # 0.35 · 100 + 0.65 · 255
    np.testing.assert_array_equal(heatmap(tensor, torch.from_numpy(maps)), heatmap(photo, maps))
    np.testing.assert_array_equal(threshold(torch.tensor([3]), torch.from_numpy(maps), 0.5), 4 * (maps[0] > 0.5))
    assert "`mask` to be in [0, 255], but got -1 to" in said(lambda: overlay(photo, mask - 1))
    assert "`mask` to be of the photo's size (4, 5)" in said(lambda: overlay(photo, mask.T))
    assert "`mask` to hold integers, but got float64." in said(lambda: overlay(photo, mask / 1), TypeError)
    assert "`maps` to be of the photo's size (4, 5)" in said(lambda: heatmap(photo, maps.transpose(0, 2, 1)))
    for classes, came in (([-1], "-1"), ([254], "254"), (np.array([255], np.uint8), "255"), ([True], "bool")):
        text = said(lambda classes=classes: threshold(classes, maps))
        assert f"`classes` to be class indices (C,) in [0, 253], but got {came}." in text
    assert "`maps` to be without NaN" in said(lambda: heatmap(photo, maps * np.nan))
    assert "`photo` to hold integers, but got float64." in said(lambda: overlay(photo / 255, mask), TypeError)
    assert "`photo` to be in [0, 255], but got 400 to 400." in said(lambda: heatmap(photo * np.int64(4), maps))
    assert "`photo` to be an array (H, W, 3), but got shape (3, 4, 5)" in said(
        lambda: overlay(photo.transpose(2, 0, 1), mask)
    )


def test_texts_of_several_lengths():
    class Own(TinyEncoder):
        def encode_text(self, texts):
            return super().encode_text(texts)[:, : 32 - (len(texts) == 2)]

    text = said(lambda: PromptSet(["a {}"]).encode(Own(), ["a", "b", "c"], batch_size=2))
    assert re.search(r"`encoder.encode_text` to return features of one length, but got \[31, 32\]", text)
