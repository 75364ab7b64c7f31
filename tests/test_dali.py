"""The graph: pixels against Pillow and torchvision, and the placement of its GPU form."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, picture, val_loader, write_split
from nvidia.dali import fn
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


def rotated(image: Image.Image) -> Image.Exif:
    orientation = 0x0112
    exif = image.getexif()
    exif[orientation] = 6
    return exif


def all_forms(image: Image.Image) -> list[bytes]:
    """The image in all forms of JPEG and PNG."""
    return [
        encode(image),
        encode(image, subsampling=0, quality=95),
        encode(image, subsampling=1),
        encode(image, progressive=True),
        encode(image.convert("L")),
        encode(image.convert("CMYK")),
        encode(image, "PNG"),
        encode(image.convert("L"), "PNG"),
        encode(image.convert("P"), "PNG"),
        encode(image.convert("RGBA"), "PNG"),
        encode(image, exif=rotated(image)),
    ]


def photographs(count: int = 40) -> list[bytes]:
    """ImageNet photographs, where there are some beside the project; the tests do not need them."""
    path = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample-500.tar"
    if not path.exists():
        return []
    files = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".JPEG") and len(files) < count:
                files.append(tar.extractfile(member).read())
    return files


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
    _, [decoded] = decoder.collect()
    return [pixels.numpy().copy() for pixels in windows_to_torch(decoded)]


def test_decoded_windows_are_pillows_pixels():
    """Also for CMYK, grayscale, palette and alpha; EXIF rotation is not applied, as PIL does not
    apply it.
    """
    height = 61
    width = 94
    forms = all_forms(picture(height, width))
    files = forms * 4
    windows = [(0, 0, height, width)] * len(forms)
    rng = np.random.default_rng(0)
    while len(windows) < len(files):
        y = rng.integers(0, height - 1)
        x = rng.integers(0, width - 1)
        windows.append((y, x, rng.integers(1, height + 1 - y), rng.integers(1, width + 1 - x)))
    for data, (y, x, h, w), pixels in zip(files, windows, decode(files, windows), strict=True):
        whole = np.asarray(pil(data))
        assert np.array_equal(pixels, whole[y : y + h, x : x + w])


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
    files += all_forms(picture(130, 201))
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
    rows = []
    for batch in loader:
        for row, image in zip(batch.indices.tolist(), batch.images, strict=True):
            rows.append(row)
            pixels = (image * 255).round().to(torch.uint8)
            assert torch.equal(pixels, reference(pil(files[row]))), row
    loader.close()
    assert rows == list(range(len(files)))


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
        own_window = pixels[y : y + h, x : x + w].contiguous()
        ours = resize_and_crop(own_window, (96, 96), (0, 0), flip, 96, resize)
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
    side = 64
    val_config = DataConfig(val_resize_size=72, val_crop_size=side)
    padded_config = DataConfig(val_resize_size=50, val_crop_size=side)
    random_filter = DataConfig(train_interpolation="random")
    # The width of the edge that may differ; None means that only the mean is compared.
    cases = (
        (0, crops.val_geometry(heights, widths, val_config)),
        (None, crops.val_geometry(heights, widths, padded_config)),
        (2, crops.train_geometry(0, 0, rows, heights, widths, side, DataConfig())),
        (4, crops.train_geometry(0, 0, rows, heights, widths, side, random_filter)),
    )
    for edge, geometry in cases:
        squares_of_dali = run_finishing_graph(pipeline, files, geometry)
        [view] = geometry.views
        for row, pixels in enumerate(decode(files, geometry.windows)):
            ours = resize_and_crop(
                torch.from_numpy(pixels),
                tuple(view.sizes[row].tolist()),
                view.offsets[row].tolist(),
                geometry.flips[row],
                side,
                EXACT_RESIZES[geometry.interpolations[row]],
            )
            difference = np.abs(ours.numpy().astype(int) - squares_of_dali[row])
            assert difference.mean() < 0.3, SIZES[row]
            if edge is not None:
                inner = difference[edge : side - edge, edge : side - edge]
                assert inner.max() <= 1, SIZES[row]


def run_finishing_graph(pipeline, files, geometry):
    """The squares that DALI cuts out of the files: uint8 [n, side, side, 3]."""
    [view] = geometry.views
    pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in files])
    pipeline.feed_input("anchor", geometry.windows[:, :2].astype(np.int32).copy())
    pipeline.feed_input("extent", geometry.windows[:, 2:].astype(np.int32).copy())
    pipeline.feed_input("size0", view.sizes.astype(np.float32))
    pipeline.feed_input("offset0", view.offsets.astype(np.int32))
    pipeline.feed_input("square0", np.full((len(files), 2), view.side, np.int32))
    pipeline.feed_input("flip", geometry.flips.astype(np.int32))
    pipeline.feed_input("interpolation", interpolation_numbers(geometry.interpolations))
    pipeline.schedule_run()
    [output] = pipeline.share_outputs()
    finished = np.array(output.as_tensor())
    pipeline.release_outputs()
    return finished


def protobuf_fields(data: bytes):
    """(number, value) of each field of a protocol buffer message; enough of the format to read a
    graph without DALI.
    """
    varint = 0
    fixed_lengths = {1: 8, 5: 4}
    position = 0

    def read_varint():
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            is_last = byte < 128
            if is_last:
                return value

    while position < len(data):
        key = read_varint()
        number = key >> 3
        wire_type = key & 7
        if wire_type == varint:
            yield number, read_varint()
            continue
        length = fixed_lengths.get(wire_type)
        if length is None:
            length = read_varint()
        yield number, data[position : position + length]
        position += length


# Numbers of fields in DALI's messages: the operators of a graph; the name, the inputs and the
# arguments of an operator; the name of an argument, and its value if it is a text.
OPERATOR = 5
NAME = 1
INPUT = 2
ARGUMENT = 4
TEXT = 5


def operators_of(pipeline) -> list[list]:
    """The fields of each operator of a graph."""
    graph = protobuf_fields(pipeline.serialize())
    return [list(protobuf_fields(value)) for number, value in graph if number == OPERATOR]


def messages(fields, wanted: int) -> list[dict]:
    """The fields with this number, as messages."""
    return [dict(protobuf_fields(value)) for number, value in fields if number == wanted]


def placement(pipeline) -> dict[str, set]:
    """The devices of each kind of operator in a graph."""
    devices = {}
    for fields in operators_of(pipeline):
        name = dict(fields)[NAME].decode()
        arguments = messages(fields, ARGUMENT)
        [device] = [one[TEXT].decode() for one in arguments if one.get(NAME) == b"device"]
        devices.setdefault(name, set()).add(device)
    return devices


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
    of_slots = None
    if slots:
        of_slots = {"cpu", "gpu"}
    for name in ("_ArithmeticGenericOp", "_TensorSubscript", "_conditional__Split"):
        assert operators.pop(name, None) == of_slots

    expected = {"Resize", "Slice", "Flip"}
    if slots:
        expected |= {"WarpAffine", "Equalize", "Filter", "_conditional__Merge"}
    assert expected <= operators.keys()
    for name, devices in operators.items():
        assert devices == {"gpu"}, name


def test_gpu_form_resizes_with_antialias_and_the_filter_of_each_image():
    pipeline = build_pipeline(GraphSpec(8, 4, "mixed", views=1))
    [resize] = [fields for fields in operators_of(pipeline) if dict(fields)[NAME] == b"Resize"]
    arguments = [argument[NAME] for argument in messages(resize, ARGUMENT)]
    assert b"antialias" in arguments
    inputs = messages(resize, INPUT)
    assert any(b"interp_type" in of_input.values() for of_input in inputs), inputs


def test_cpu_form_ends_after_the_window():
    pipeline = build_pipeline(GraphSpec(8, 4))
    assert b"Resize" not in pipeline.serialize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 224])
def test_normalizer_subtracts_the_mean_and_divides_by_the_deviation(dtype, width):
    config = DataConfig()
    pixels = torch.randint(0, 256, (3, 37, width, 3), dtype=torch.uint8)
    out = torch.empty(pixels.shape, dtype=dtype)
    normalize = Normalizer(config, dtype, torch.device("cpu"))
    normalize.prepare(width)
    normalize(pixels, out)
    expected = (pixels.double() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    tolerance = 3 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        tolerance = 1e-6
    assert (out.double() - expected).abs().max() <= tolerance


def test_the_gpu_erases_what_the_cpu_erases():
    """The form for the whole batch, on rectangles at every edge, of one pixel, and none."""
    rectangles = (
        (0, 0, 3, 4),
        (7, 0, 3, 12),
        (0, 9, 10, 3),
        (4, 5, 1, 1),
        (0, 0, 10, 12),
        (0, 0, 0, 0),
    )
    boxes = np.array(rectangles, np.int64)
    images = torch.randn(len(boxes), 10, 12, 3)
    one = images.clone()
    other = images.clone()
    erase(one, boxes)
    erase_by_mask(other, torch.from_numpy(boxes))
    assert torch.equal(one, other)
    num_erased = (one == 0).sum((1, 2, 3)) // 3
    assert num_erased.tolist() == [12, 36, 30, 1, 120, 0]


# What policies and jitter reach at their ends, and the neutral parameters.
PARAMETERS = {
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
}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


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
    # "ShearX" for shear_x.
    title = name.title().replace("_", "")
    if name == "autocontrast":
        title = "AutoContrast"
    if name in GEOMETRIC:
        return _apply_op(planes, title, value, InterpolationMode.BILINEAR, None).permute(1, 2, 0)
    if name in ("brightness", "color", "contrast", "sharpness"):
        # torchvision's magnitude is the change of the factor.
        value = value - 1
    result = _apply_op(Image.fromarray(image.numpy()), title, value, None, None)
    return torch.from_numpy(np.array(result))


def difference_of(found, expected) -> torch.Tensor:
    """Of uint8 images, in levels."""
    return (found.int() - expected.int()).abs()


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


@pytest.mark.slow
def test_operations_are_timms():
    """With bilinear interpolation and the mean colour outside; the geometric ones but for edges."""
    from timm.data import auto_augment

    side = 224
    num_cases = len(TIMM_CASES)
    augmenter = Augmenter(slots=1, local_batch_size=num_cases, threads=1)
    plan = plan_of([(name, value) for name, value, _, _ in TIMM_CASES], side)
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (124, 116, 104)}
    for image in squares(3, side):
        copies = image.expand(num_cases, -1, -1, -1).contiguous()
        found = augmenter(copies, plan)
        for (name, _, function, argument), pixels in zip(TIMM_CASES, found, strict=True):
            operation = getattr(auto_augment, function)
            theirs = operation(Image.fromarray(image.numpy()), argument, **options)
            difference = difference_of(pixels, torch.from_numpy(np.array(theirs)))
            if name.removeprefix("timm_") in GEOMETRIC:
                assert (difference > 2).float().mean() < 0.02, (name, argument)
                assert difference.float().mean() < 0.8, (name, argument)
            else:
                assert difference.max() == 0, (name, argument)


def squares(count: int, side: int) -> torch.Tensor:
    """Pictures, one of them with a channel of one value and one of a single colour."""
    pictures = [pil(data) for data in photographs(count // 2)]
    pictures += [picture(side, side, seed) for seed in range(count - len(pictures))]
    resized = [np.asarray(image.resize((side, side))) for image in pictures]
    images = torch.from_numpy(np.stack(resized))
    images[0, ..., 1] = 77
    images[1] = torch.tensor([200, 10, 90], dtype=torch.uint8)
    return images


@pytest.mark.slow
@pytest.mark.parametrize("gpu_form", [False, True])
def test_operations_are_torchvisions(gpu_form, monkeypatch):
    """Within 1 level, 2 for color, contrast and equalize, at every pixel; the outermost of
    sharpness excepted.

    All cases are in one batch. The GPU form warps with another operator, which has a CPU form, too.
    """
    cases = []
    for name, values in PARAMETERS.items():
        if gpu_form and name not in GEOMETRIC:
            continue
        cases += [(name, value) for value in values]
    if gpu_form:
        monkeypatch.setattr(fn.experimental, "warp_perspective", warp_affine)
    # Pillow's equalize divides by a whole number, (pixels - brightest) // 255: of small pictures it
    # is another law.
    side = 224
    augmenter = Augmenter(slots=1, local_batch_size=len(cases), threads=1)
    plan = plan_of(cases, side)
    for image in squares(3, side):
        copies = image.expand(len(cases), -1, -1, -1).contiguous()
        for (name, value), pixels in zip(cases, augmenter(copies, plan), strict=True):
            difference = difference_of(pixels, torchvisions(image, name, value))
            if name == "sharpness":
                difference = difference[1:-1, 1:-1]
            assert difference.max() <= largest_difference(name, value), (name, value)
            assert difference.float().mean() < 0.8, (name, value)


def warp_affine(pixels, matrix, fill_value):
    """The operator of the GPU form, in the place of that of the CPU form."""
    return fn.warp_affine(pixels, matrix=matrix[:2], fill_value=0.0)


def largest_difference(name, value):
    """How far an operation may be from torchvision's, in levels."""
    exact = ("identity", "translate_x", "translate_y", "posterize", "solarize", "invert")
    if name in exact or value == 1:
        return 0
    if name in ("color", "contrast", "equalize"):
        return 2
    return 1


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_batch():
    """Nor on threads, on what came before, on an error in between; a graph serves every side and
    batch size.
    """
    config = AugmentConfig(policy="trivialaugment", color_jitter=(0, 0.4, 0, 0.1))
    slots = augment.num_slots(config)
    one = Augmenter(slots=slots, local_batch_size=12, threads=1)
    three = Augmenter(slots=slots, local_batch_size=12, threads=3)
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
        _, [decoded] = decoder.collect()
        shown.append(torch.stack(windows_to_torch(decoded)))
    without, with_slots = shown
    augmenter = Augmenter(slots=augment.num_slots(config), local_batch_size=8, threads=1)
    assert torch.equal(augmenter(without, plan), with_slots)
    assert not torch.equal(without, with_slots)
