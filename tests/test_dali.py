"""The graph: pixels against Pillow and torchvision, and the placement of its GPU form."""

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, picture, val_loader, write_split
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    PILToTensor,
    Resize,
    functional,
)
from torchvision.transforms.autoaugment import _apply_op

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data import operations
from resnet_dist.data.pixels.dali import (
    Augmenter,
    Decoder,
    GraphSpec,
    LoadedJob,
    Portion,
    build_pipeline,
    interpolation_numbers,
    windows_to_torch,
)
from resnet_dist.data.pixels.finish import (
    EXACT_RESIZES,
    FAST_RESIZES,
    Normalizer,
    erase,
    erase_by_mask,
    resize_and_crop,
)
from resnet_dist.data.pixels.image_header import image_size
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling import augment, crops
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.types import Job, OperationPlan

SIZES = [
    (375, 500),
    (500, 375),
    (333, 501),
    (257, 256),
    (256, 256),
    (255, 700),
    (97, 640),
    (640, 97),
    (31, 33),
    (1, 1),
    (1, 40),
    (40, 1),
    (225, 224),
    (768, 513),
]
FORMS = {
    "rgb": lambda image: encode(image),
    "444": lambda image: encode(image, subsampling=0, quality=95),
    "422": lambda image: encode(image, subsampling=1),
    "progressive": lambda image: encode(image, progressive=True),
    "gray": lambda image: encode(image.convert("L")),
    "cmyk": lambda image: encode(image.convert("CMYK")),
    "png": lambda image: encode(image, "PNG"),
    "png gray": lambda image: encode(image.convert("L"), "PNG"),
    "png palette": lambda image: encode(image.convert("P"), "PNG"),
    "png alpha": lambda image: encode(image.convert("RGBA"), "PNG"),
    "rotated": lambda image: encode(image, exif=rotated(image)),
}


def photographs(count: int = 40) -> list[bytes]:
    """ImageNet photographs, where there are some beside the project; the tests do not need them."""
    path = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample-500.tar"
    if not path.exists():
        return []
    with tarfile.open(path) as tar:
        members = (member for member in tar if member.name.endswith(".JPEG"))
        return [tar.extractfile(member).read() for member in itertools.islice(members, count)]


def rotated(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif


def pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode(files: list[bytes], windows) -> list[np.ndarray]:
    """Windows of some files, through the decoder of the CPU form."""
    images = [Encoded(row, data, *image_size(data)) for row, data in enumerate(files)]
    windows = np.array(windows)
    geometry = crops.Geometry(windows, (), windows[:, 0], np.full(len(files), "bilinear"))
    loaded = LoadedJob(val_job(np.arange(len(files))), images, geometry)
    decoder = Decoder(local_batch_size=len(files), threads=2, device=torch.device("cpu"))
    decoder.submit(Portion(loaded, 0, len(files)))
    return [pixels.numpy().copy() for pixels in windows_to_torch(decoder.collect()[1][0])]


def test_decoded_windows_are_pillows_pixels():
    """Also for CMYK, grayscale, palette and alpha; EXIF rotation is not applied, as PIL does not
    apply it.
    """
    rng = np.random.default_rng(0)
    files = [form(picture(61, 94, seed)) for seed, form in enumerate(FORMS.values())] * 4
    corners = [(rng.integers(0, 60), rng.integers(0, 93)) for _ in files]
    windows = [(y, x, rng.integers(1, 62 - y), rng.integers(1, 95 - x)) for y, x in corners]
    windows[: len(FORMS)] = [(0, 0, 61, 94)] * len(FORMS)
    for data, (y, x, h, w), pixels in zip(files, windows, decode(files, windows), strict=True):
        assert np.array_equal(pixels, np.asarray(pil(data))[y : y + h, x : x + w])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resize_size", "crop_size", "interpolation"),
    [
        (256, 224, "bilinear"),
        (232, 224, "bilinear"),
        (64, 64, "bilinear"),
        (48, 64, "bilinear"),
        (48, 64, "bicubic"),
        (20, 33, "bilinear"),
    ],
)
def test_evaluation_pixels_are_torchvisions(tmp_path, resize_size, crop_size, interpolation):
    """Through the whole loader, the very pixels of Resize + CenterCrop on PIL images; odd sizes,
    ratios and forms.

    A shorter side that is resized to less than the crop is padded with black, as torchvision does.
    """
    files = [encode(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    files += [form(picture(130, 201)) for form in FORMS.values()]
    if crop_size == 224:
        files += photographs()
    index = write_split(tmp_path, files, split="val")
    loader = val_loader(
        index,
        tmp_path,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        val_resize_size=resize_size,
        val_crop_size=crop_size,
        val_interpolation=interpolation,
        val_batch_size=10,
    )
    resize = Resize(resize_size, InterpolationMode(interpolation))
    reference = Compose([resize, CenterCrop(crop_size), PILToTensor()])
    shown = [
        (int(row), image)
        for batch in loader
        for row, image in zip(batch.indices, batch.images, strict=True)
    ]
    assert [row for row, _ in shown] == list(range(len(files)))
    for row, image in shown:
        assert torch.equal((image * 255).round().to(torch.uint8), reference(pil(files[row]))), row
    loader.close()


@pytest.mark.parametrize(("interpolation", "levels"), [("bilinear", 1), ("bicubic", 2)])
def test_training_cut_is_pillows(interpolation, levels):
    """Window, resize and flip of the CPU path, within 1/255 of PIL's crop, resize and mirror, or
    2/255 with the bicubic filter.
    """
    rng = np.random.default_rng(1)
    source = picture(300, 400)
    pixels = torch.from_numpy(np.array(source))
    resize = FAST_RESIZES[interpolation]
    method = Image.Resampling[interpolation.upper()]
    for _ in range(60):
        y = int(rng.integers(0, 299))
        x = int(rng.integers(0, 399))
        h = int(rng.integers(1, 301 - y))
        w = int(rng.integers(1, 401 - x))
        flip = bool(rng.integers(2))
        ours = resize_and_crop(
            pixels[y : y + h, x : x + w].contiguous(), (96, 96), (0, 0), flip, 96, resize
        )
        window = source.crop((x, y, x + w, y + h))
        rows_first = window.resize((96, h), method).resize((96, 96), method)
        references = [rows_first]
        if interpolation == "bilinear":
            # Pillow 13 begins with the columns of some windows. With the bicubic filter that can
            # make a difference of 21 (docs/data.md).
            references.append(window.resize((96, 96), method))
        for reference in references:
            if flip:
                reference = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            difference = np.abs(ours.numpy().astype(int) - np.asarray(reference))
            assert difference.max() <= levels


def test_graph_that_finishes_has_the_same_geometry():
    """The second half of the GPU form, run on the CPU: within 1/255 of Pillow, so nothing is
    shifted.

    Except at the image's very edge, where DALI's filter repeats the last pixel and Pillow's leaves
    out what is missing: in evaluation the central crop takes that away.
    """
    files = [encode(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    heights, widths = np.array([image_size(data) for data in files]).T
    pipeline = build_pipeline(GraphSpec(len(files), 2, views=1))
    rows = np.arange(len(files))
    random_filter = DataConfig(train_interpolation="random")
    geometries = [
        (0, crops.val_geometry(heights, widths, DataConfig(val_resize_size=72, val_crop_size=64))),
        (
            None,
            crops.val_geometry(heights, widths, DataConfig(val_resize_size=50, val_crop_size=64)),
        ),
        (2, crops.train_geometry(0, 0, rows, heights, widths, 64, DataConfig())),
        (4, crops.train_geometry(0, 0, rows, heights, widths, 64, random_filter)),
    ]
    for inner, geometry in geometries:
        windows = geometry.windows
        flips = geometry.flips
        (view,) = geometry.views
        sizes = view.sizes
        offsets = view.offsets
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in files])
        pipeline.feed_input("anchor", windows[:, :2].astype(np.int32).copy())
        pipeline.feed_input("extent", windows[:, 2:].astype(np.int32).copy())
        pipeline.feed_input("size0", sizes.astype(np.float32))
        pipeline.feed_input("offset0", offsets.astype(np.int32))
        pipeline.feed_input("square0", np.full((len(files), 2), 64, np.int32))
        pipeline.feed_input("flip", flips.astype(np.int32))
        pipeline.feed_input("interpolation", interpolation_numbers(geometry.interpolations))
        pipeline.schedule_run()
        finished = np.asarray(pipeline.share_outputs()[0].as_tensor())
        pipeline.release_outputs()
        for row, pixels in enumerate(decode(files, windows)):
            pixels = torch.from_numpy(pixels)
            ours = resize_and_crop(
                pixels,
                tuple(sizes[row].tolist()),
                offsets[row].tolist(),
                flips[row],
                64,
                EXACT_RESIZES[geometry.interpolations[row]],
            ).numpy()
            difference = np.abs(ours.astype(int) - finished[row])
            assert difference.mean() < 0.3, SIZES[row]
            assert inner is None or difference[inner : 64 - inner, inner : 64 - inner].max() <= 1, (
                SIZES[row]
            )


def protobuf_fields(data: bytes):
    """(number, value) of each field of a protocol buffer message; enough of the format to read a
    graph without DALI.
    """

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    position = 0
    while position < len(data):
        key = varint()
        length = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if length is None else length
        yield key >> 3, data[position : position + length]
        position += length


def placement(pipeline) -> dict[str, set]:
    """The devices of each kind of operator in a graph."""
    operators = {}
    for number, value in protobuf_fields(pipeline.serialize()):
        if number == 5:  # an operator: name 1, arguments 4
            parts = list(protobuf_fields(value))
            arguments = [dict(protobuf_fields(part)) for key, part in parts if key == 4]
            device = next(a[5].decode() for a in arguments if a.get(1) == b"device")
            operators.setdefault(parts[0][1].decode(), set()).add(device)
    return operators


@pytest.mark.slow
@pytest.mark.parametrize("slots", [0, 1])
def test_gpu_form_places_what_touches_pixels_on_the_gpu(slots):
    """Defined and serialized without a GPU: DALI checks operators, arguments and devices on the
    way.
    """
    pipeline = build_pipeline(GraphSpec(8, 4, "mixed", views=1, slots=slots))
    operators = placement(pipeline)
    assert operators.pop("ExternalSource") == {"cpu"}
    # The filter of each image is an argument of the resize.
    assert operators.pop("Reinterpret") == {"cpu"}
    assert operators.pop("decoders__Image") == {"mixed"}
    assert "decoders__ImageSlice" not in operators
    # On the CPU as well: which operation an image gets, and its arguments.
    for name in ("_ArithmeticGenericOp", "_TensorSubscript", "_conditional__Split"):
        assert operators.pop(name, None) == ({"cpu", "gpu"} if slots else None)
    assert {
        "Resize",
        "Slice",
        "Flip",
        *["WarpAffine", "Equalize", "Filter", "_conditional__Merge"] * slots,
    } <= operators.keys()
    assert all(devices == {"gpu"} for devices in operators.values()), operators
    (resize,) = [
        operator
        for number, operator in protobuf_fields(pipeline.serialize())
        if number == 5 and dict(protobuf_fields(operator))[1] == b"Resize"
    ]
    assert b"antialias" in resize
    inputs = [dict(protobuf_fields(value)) for key, value in protobuf_fields(resize) if key == 2]
    assert any(b"interp_type" in found.values() for found in inputs), inputs


def test_cpu_form_ends_after_the_window():
    pipeline = build_pipeline(GraphSpec(8, 4))
    assert b"Resize" not in pipeline.serialize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 224])
def test_normalizer(dtype, width):
    config = DataConfig()
    pixels = torch.randint(0, 256, (3, 37, width, 3), dtype=torch.uint8)
    out = torch.empty(pixels.shape, dtype=dtype)
    normalize = Normalizer(config, dtype, torch.device("cpu"))
    normalize.prepare(width)
    normalize(pixels, out)
    expected = (pixels.double() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    assert (out.double() - expected).abs().max() <= {torch.float32: 1e-6}.get(
        dtype, 3 * torch.finfo(dtype).eps
    )


def test_the_gpu_erases_what_the_cpu_erases():
    """The form for the whole batch, on rectangles at every edge, of one pixel, and none."""
    boxes = [(0, 0, 3, 4), (7, 0, 3, 12), (0, 9, 10, 3), (4, 5, 1, 1), (0, 0, 10, 12), (0, 0, 0, 0)]
    boxes = np.array(boxes, np.int64)
    images = torch.randn(len(boxes), 10, 12, 3)
    one = images.clone()
    other = images.clone()
    erase(one, boxes)
    erase_by_mask(other, torch.from_numpy(boxes))
    assert torch.equal(one, other)
    assert [int((image == 0).sum()) // 3 for image in one] == [12, 36, 30, 1, 120, 0]


# Operation, parameter: what policies and jitter reach at their ends, and the neutral ones.
CASES = [
    (name, value)
    for name, values in {
        "identity": [0],
        "shear_x": [-0.99, 0.1, 0.3],
        "shear_y": [-0.3, 0.99],
        "translate_x": [-31, 7],
        "translate_y": [9, -5],
        "rotate": [-135, 3.3, 30],
        "brightness": [0.1, 1, 1.99],
        "color": [0.01, 0.7, 1, 1.99],
        "contrast": [0.01, 0.7, 1, 1.99],
        "sharpness": [0.01, 1, 1.3, 1.99],
        "posterize": [2, 4, 8],
        "solarize": [0, 100.5, 255],
        "autocontrast": [0],
        "equalize": [0],
        "invert": [0],
        "hue": [-0.5, -0.1, 0.05, 0.3],
    }.items()
    for value in values
]


def plan_of(cases, side):
    ops = np.array([[operations.NAMES.index(name)] for name, _ in cases], np.int32)
    params = np.array([[value] for _, value in cases], np.float32)
    return OperationPlan(ops, params, operations.matrices(ops, params, side))


def torchvisions(image: torch.Tensor, name: str, value: float) -> torch.Tensor:
    """The operation of the same name: tensors' for geometry and hue, which has 256 values in
    Pillow; else Pillow's.
    """
    planes = image.permute(2, 0, 1)
    if name == "hue":
        return functional.adjust_hue(planes, value).permute(1, 2, 0)
    title = {"autocontrast": "AutoContrast"}.get(
        name, name.replace("_", " ").title().replace(" ", "")
    )
    if name in operations.NAMES[1:6]:
        return _apply_op(planes, title, value, InterpolationMode.BILINEAR, None).permute(1, 2, 0)
    value = value - 1 if name in ("brightness", "color", "contrast", "sharpness") else value
    return torch.from_numpy(
        np.array(_apply_op(Image.fromarray(image.numpy()), title, value, None, None))
    )


# Operation, parameter, and the same in timm: function and argument for a picture of 224 pixels.
TIMM_CASES = [
    ("timm_shear_x", 0.21, "shear_x", 0.21),
    ("timm_shear_y", -0.3, "shear_y", -0.3),
    ("timm_translate_x", -40.5, "translate_x_abs", 40.5),
    ("timm_translate_y", 90.0, "translate_y_abs", -90.0),
    ("timm_rotate", 21.0, "rotate", 21.0),
    ("timm_posterize", 2, "posterize", 2),
    ("timm_posterize", 1, "posterize", 1),
    ("timm_solarize", 77, "solarize", 77),
    ("timm_solarize", 0, "solarize", 0),
    ("solarize_add", 77, "solarize_add", 77),
    ("solarize_add", 110, "solarize_add", 110),
]


def test_operations_are_timms():
    """With bilinear interpolation and the mean colour outside; the geometric ones but for edges."""
    from timm.data import auto_augment

    side = 224
    augmenter = Augmenter(slots=1, local_batch_size=len(TIMM_CASES), threads=1)
    plan = plan_of([case[:2] for case in TIMM_CASES], side)
    for image in squares(3, side):
        found = augmenter(image.expand(len(TIMM_CASES), -1, -1, -1).contiguous(), plan)
        for (name, _, function, argument), pixels in zip(TIMM_CASES, found, strict=True):
            options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (124, 116, 104)}
            theirs = getattr(auto_augment, function)(
                Image.fromarray(image.numpy()), argument, **options
            )
            difference = (pixels.int() - torch.from_numpy(np.array(theirs)).int()).abs()
            if "shear" in name or "translate" in name or "rotate" in name:
                assert (difference > 2).float().mean() < 0.02, (name, argument)
                assert difference.float().mean() < 0.8, (name, argument)
            else:
                assert difference.max() == 0, (name, argument)


def squares(count: int, side: int) -> torch.Tensor:
    """Pictures, one of them with a channel of one value and one of a single colour."""
    pictures = [pil(data) for data in photographs(count // 2)]
    pictures += [picture(side, side, seed) for seed in range(count - len(pictures))]
    images = torch.from_numpy(
        np.stack([np.asarray(image.resize((side, side))) for image in pictures])
    )
    images[0, ..., 1] = 77
    images[1] = torch.tensor([200, 10, 90], dtype=torch.uint8)
    return images


@pytest.mark.parametrize("gpu_form", [False, True])
def test_operations_are_torchvisions(gpu_form, monkeypatch):
    """Within 1 level, 2 for color, contrast and equalize, at every pixel; the outermost of
    sharpness excepted.

    All cases are in one batch. The GPU form warps with another operator, which has a CPU form, too.
    """
    from nvidia.dali import fn

    if gpu_form:
        monkeypatch.setattr(
            fn.experimental,
            "warp_perspective",
            lambda pixels, matrix, fill_value: fn.warp_affine(
                pixels, matrix=matrix[:2], fill_value=0.0
            ),
        )
    # Pillow's equalize divides by a whole number, (pixels - brightest) // 255: of small pictures it
    # is another law.
    side = 224
    cases = [case for case in CASES if not gpu_form or case[0] in operations.NAMES[1:6]]
    augmenter = Augmenter(slots=1, local_batch_size=len(cases), threads=1)
    for image in squares(3, side):
        found = augmenter(image.expand(len(cases), -1, -1, -1).contiguous(), plan_of(cases, side))
        for (name, value), pixels in zip(cases, found, strict=True):
            difference = (pixels.int() - torchvisions(image, name, value).int()).abs()
            difference = difference[1:-1, 1:-1] if name == "sharpness" else difference
            exact = value == 1 or name in (
                "identity",
                "translate_x",
                "translate_y",
                "posterize",
                "solarize",
                "invert",
            )
            limit = 0 if exact else 2 if name in ("color", "contrast", "equalize") else 1
            assert difference.max() <= limit, (name, value)
            assert difference.float().mean() < 0.8, (name, value)


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_batch():
    """Nor on threads, on what came before, on an error in between; a graph serves every side and
    batch size.
    """
    config = AugmentConfig(policy="trivialaugment", color_jitter=(0, 0.4, 0, 0.1))
    slots = augment.num_slots(config)
    one, three = (
        Augmenter(slots=slots, local_batch_size=12, threads=threads) for threads in (1, 3)
    )
    for side, count in ((48, 12), (80, 5)):
        images = squares(count, side)
        plan = augment.plan_operations(config, 0, 0, np.arange(count), side)
        before = images.clone()
        together = one(images, plan)
        assert torch.equal(together, three(images, plan))
        assert torch.equal(images, before)
        for row in (0, 3):
            alone = augment.plan_operations(config, 0, 0, np.arange(row, row + 1), side)
            assert torch.equal(one(images[row : row + 1], alone)[0], together[row])
        if side == 48:
            with pytest.raises(RuntimeError):
                one(images[:2], plan)
    assert not torch.equal(together, images)


@pytest.mark.slow
def test_slots_in_the_graph_of_the_decoder_come_after_the_flip():
    """The GPU graph's form, run on the CPU: what the second stage makes of the same squares."""
    config = AugmentConfig(policy="autoaugment", color_jitter=(0, 0, 0.4, 0))
    side = 64
    rows = np.arange(8)
    files = [encode(picture(100, 120, seed)) for seed in rows]
    geometry = crops.train_geometry(
        0, 0, rows, np.full(8, 100), np.full(8, 120), side, DataConfig()
    )
    plan = augment.plan_operations(config, 0, 0, rows, side)
    images = [Encoded(row, data, 100, 120) for row, data in enumerate(files)]
    loaded = LoadedJob(Job(rows, training=True, operations=plan), images, geometry)
    shown = []
    for slots in (0, augment.num_slots(config)):
        decoder = Decoder(local_batch_size=8, threads=2, device=torch.device("cpu"))
        decoder.spec = GraphSpec(8, 2, views=1, slots=slots)
        decoder.restart()
        decoder.submit(Portion(loaded, 0, 8))
        shown.append(torch.stack(windows_to_torch(decoder.collect()[1][0])))
    augmenter = Augmenter(slots=augment.num_slots(config), local_batch_size=8, threads=1)
    assert torch.equal(augmenter(shown[0], plan), shown[1])
    assert not torch.equal(*shown)
