"""A trained segmenter as one file that runs without this package: photo in, class probabilities out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cacl._support.files import replacing
from cacl._support.weights import copied
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD
from cacl.deeplab import DeepLabV2, probabilities
from cacl.errors import InputError, expected, first_line
from cacl.photos import Segmenter

SMALLEST = 32
"""Shortest side in pixels that an exported segmenter takes; four times its trunk's stride where that is more."""
LARGEST = 1 << 16
"""Longest side; without one, torch up to 2.9 asks whether sizes overflow."""


def export_segmenter(segmenter: Segmenter, out: Path) -> Path:
    """Write a segmenter as one file, with everything from the normalisation to the softmax in its graph.

    The graph takes a photo, ``(1, 3, H, W)`` uint8 RGB of any size from 32 × 32 on, and gives the probabilities of
    the classes, ``(1, C, H, W)`` float32: what ``DeepLabV2.predict(normalize(photo)[None])`` gives. It is made for
    the CPU and can be moved. It does not scale down large photos, as ``cacl predict`` does to 1024 pixels, nor map
    photos of more than 8 bits to them, as :func:`cacl.images.read_image` does with the segmenter's ``range``.

    With ``.pt2`` (torch promises to read it with the version that wrote it; others may):

    .. code-block:: python

        names = {"classes.json": ""}
        net = torch.export.load("segmenter.pt2", extra_files=names).module()  # needs torch only; .to("cuda") works
        with torch.no_grad():
            mask = net(photo).argmax(1)
        json.loads(names["classes.json"])  # ["background", "cat", …], the name of each value in the mask

    With ``.onnx`` (to be written, it needs the extra ``onnx`` and torch 2.7 or newer):

    .. code-block:: python

        session = onnxruntime.InferenceSession("segmenter.onnx")
        mask = session.run(None, {"photo": photo})[0].argmax(1)  # photo: a NumPy array
        json.loads(session.get_modelmeta().custom_metadata_map["classes"])

    Args:
        segmenter: is left as it is; of :func:`cacl.photos.load_segmenter`, for example.
        out: the file, ``.pt2`` or ``.onnx``; it is whole or as it was before.

    Returns:
        ``out``.

    Raises:
        ValueError: if the ending is another one, or the network does something that cannot be exported.
        ImportError: if the extra is missing.
    """
    if out.suffix not in (".pt2", ".onnx"):
        raise expected("out", "a file that ends in .pt2 or .onnx", out)
    if out.suffix == ".onnx":
        _require_onnx()
    program = _program(segmenter.net)
    names = json.dumps(["background", *segmenter.classes], ensure_ascii=False)
    if out.suffix == ".onnx":
        content = _onnx(program, names)
        with replacing(out) as file:
            file.write(content)
    else:
        with replacing(out) as file:
            torch.export.save(program, file, extra_files={"classes.json": names})
    return out


class _PhotoToProbabilities(nn.Module):
    """``(1, 3, H, W)`` uint8 -> ``(1, C, H, W)``."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: DeepLabV2) -> None:
        super().__init__()
        self.net = net
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.MaxPool2d) and not (child.ceil_mode or child.return_indices):
                    setattr(module, name, _MaxPool(child))
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None] * 255)

    def forward(self, photo: Tensor) -> Tensor:
        logits = self.net((photo - self.mean) / self.std)
        assert isinstance(logits, Tensor)
        return probabilities(logits, (photo.shape[2], photo.shape[3]))


class _MaxPool(nn.Module):
    """The same values by steps of 1 of which some are kept: torch up to 2.9 asks whether the size divides by larger
    steps, and so cannot leave it open."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        rows, columns = pool.stride if isinstance(pool.stride, tuple) else (pool.stride, pool.stride)
        self.steps = (..., slice(None, None, rows), slice(None, None, columns))
        self.pool = nn.MaxPool2d(pool.kernel_size, 1, pool.padding, pool.dilation)

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.pool(images)
        return pooled[self.steps]


def _program(net: DeepLabV2) -> ExportedProgram:
    try:
        net = copied("segmenter", net).cpu().eval().requires_grad_(False)
        with torch.no_grad():
            stride = -(-128 // net.logits(torch.zeros(1, 3, 128, 128, device="cpu")).shape[-1])
            # At half the size there must be more than one cell: symbolic sizes take 1 for a case of its own.
            smallest = max(SMALLEST, 4 * stride)
            height, width = (torch.export.Dim(name, min=smallest, max=LARGEST) for name in ("height", "width"))
            photo = torch.zeros(1, 3, 3 * smallest + 1, 4 * smallest + 3, dtype=torch.uint8, device="cpu")
            program = torch.export.export(
                _PhotoToProbabilities(net), (photo,), dynamic_shapes={"photo": {2: height, 3: width}}, strict=False
            )
    except Exception as error:  # torch raises many kinds, and a backbone of one's own any
        raise _cannot(f"torch {torch.__version__}", error) from error
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # would keep the graph from other devices
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _onnx(program: ExportedProgram, names: str) -> bytes:
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["photo"],
            output_names=["probabilities"],
            dynamic_shapes={"photo": {2: "height", 3: "width"}},
            optimize=True,
            verbose=False,
        )
    except Exception as error:  # as above
        cause: BaseException = error
        while cause.__cause__ is not None:  # only the first one says which operation is missing
            cause = cause.__cause__
        raise _cannot(f"torch {torch.__version__} to ONNX", cause) from error
    assert made is not None
    made.model.metadata_props["classes"] = names
    content: bytes = made.model_proto.SerializeToString()
    return content


def _require_onnx() -> None:
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError(f"ONNX files need an extra: pip install 'cacl[onnx]' ({error})") from None


def _cannot(what: str, error: BaseException) -> InputError:
    """In one line; torch lists what is wrong with the sizes from the second line on."""
    listed = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    return InputError(f"This segmenter's network cannot be exported by {what}: {(listed or [first_line(error)])[0]}")
